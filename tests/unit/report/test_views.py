"""The live view, the stage table and the page show what was measured, also half-way through a
run."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from npr_megatron.errors import InputError
from npr_megatron.observability.metrics import MetricsLine, read_json_lines
from npr_megatron.report.live import LiveView, show_duration, show_value, spark_line
from npr_megatron.report.page import write_page
from npr_megatron.report.table import COLUMNS, stage_rows, stage_table
from tests.unit.report.runs import sums_tokenizer, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder / "quickstart-seed0", sums_tokenizer(folder))


@pytest.fixture(scope="module")
def page_text(run):
    path = write_page(run)
    assert path == run / "report.html"
    return path.read_text()


def plain(width=200):
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def printed(console):
    return console.file.getvalue()


def test_without_a_terminal_the_view_prints_first_last_and_occasional_lines():
    console = plain()
    with LiveView(console, plain_interval_s=3600) as view:
        view.begin_stage("zero", 40)
        for step in range(1, 41):
            view.advance(step, {"train/loss": 1 / step})
        view.end_stage()
    lines = printed(console).splitlines()
    assert lines[0].startswith("zero  40 steps")
    assert lines[1].startswith("zero 1/40 ")
    assert lines[2].startswith("zero 40/40 ")
    assert lines[2].endswith("train/loss 0.025")
    assert lines[3].startswith("zero: 40 steps in ")
    assert len(lines) == 4


def test_a_resumed_stage_counts_only_its_own_steps():
    console = plain()
    with LiveView(console) as view:
        view.begin_stage("sample", 100, unit="accepted")
        view.resume(60)
        view.advance(100, {})
        view.end_stage()
    assert "sample: resumed after 60 accepted" in printed(console)
    assert "sample: 40 accepted in" in printed(console)


def test_in_a_terminal_the_view_shows_the_table_and_cleans_up():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with LiveView(console) as view:
        view.begin_stage("npr", 2)
        view.activity("decoding 256 answers")
        view.advance(1, {"rollout/accuracy": 0.25})
        view.advance(2, {"rollout/accuracy": 0.75})
        view.end_stage()
    text = printed(console)
    assert "rollout/accuracy" in text
    assert "0.75" in text
    assert "npr: 2 steps in" in text
    assert "decoding" not in text.split("npr: 2 steps in")[1], "no activity outlives its stage"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is visible again"


def test_advancing_outside_a_stage_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="begin_stage"):
        LiveView(plain()).advance(1, {})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert show_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (1e-5, "1.00e-05"),
        (123456.0, "1.235e+05"),
        (float("nan"), "nan"),
    ],
)
def test_values_are_short(value, text):
    assert show_value(value) == text


def test_spark_lines_span_lowest_to_highest_and_leave_gaps_for_nan():
    assert spark_line([0.0, float("nan"), 7.0]) == "\u2581 \u2588"
    assert spark_line([3.0, 3.0]) == "\u2581\u2581"
    assert spark_line([float("nan")]) == ""


def test_the_table_keeps_the_last_measurement_of_each_stage_in_order():
    measured = [
        {"stage": "npr", "mode": "parallel", "validity": 0.1},
        {"stage": "seed", "mode": "parallel", "validity": 0.2},
        {"stage": "npr", "mode": "parallel", "validity": 0.9},
        {"stage": "seed", "mode": "sequential", "validity": 0.3},
    ]
    rows = stage_rows(measured)
    assert [(r["stage"], r["mode"], r["validity"]) for r in rows] == [
        ("seed", "sequential", 0.3),
        ("seed", "parallel", 0.2),
        ("npr", "parallel", 0.9),
    ]


def test_the_table_fits_a_terminal_of_80_columns_uncut(run):
    console = plain(width=80)
    console.print(stage_table(read_json_lines(run / "evaluations.jsonl")))
    text = printed(console)
    assert "\u2026" not in text
    assert re.search(r"npr +parallel +99.0% +79.0% +100.0% +74.0% +97.2 +61.5 +1.58x +1.62x", text)
    assert re.search(r"seed +sequential +18.0% +2.0% +19.0% +- ", text)


def test_an_empty_table_says_so():
    console = plain()
    console.print(stage_table([]))
    assert "nothing was measured yet" in printed(console)


class _Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags nest."""

    void = frozenset({"meta", "br", "use"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = dict(attrs)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if "id" in names:
            self.ids.append(names["id"])
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(page_text):
    page, text = _Page(), page_text
    page.feed(text)
    assert page.open == []
    assert [link for link in page.links if not link.startswith("#")] == []
    assert "url(http" not in text
    assert "@import" not in text
    # 3 curves for seed and beta each, 8 for zero and npr each, one chart of progress
    assert page.tags.count("svg") == 3 + 8 + 3 + 8 + 1
    assert page.tags.count("tr") == 1 + 6
    assert text.index("What each stage reached") < text.index("train/loss")
    assert "\\boxed{12,12,16}" in text
    assert text.count('class="box branch"') == 2 + 3
    for column in COLUMNS:
        assert column.title in text


def test_charts_of_one_page_do_not_share_ids(page_text):
    page = _Page()
    page.feed(page_text)
    assert len(page.ids) >= 23, "every chart clips its curve by an id"
    assert len(page.ids) == len(set(page.ids))


def test_the_page_can_be_written_before_anything_was_measured(tmp_path, run):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "Nothing has been measured yet" in write_page(tmp_path).read_text()


def test_answers_cannot_inject_html(tmp_path, run):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    sample["pieces"][-1] = "<b>x"
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = write_page(tmp_path).read_text()
    assert "<b>x" not in text
    assert "&lt;b&gt;x" in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        write_page(tmp_path)


def test_metric_lines_are_values():
    line = MetricsLine(stage="zero", step=1, time_s=0.0, values={})
    with pytest.raises(AttributeError):
        line.step = 2
