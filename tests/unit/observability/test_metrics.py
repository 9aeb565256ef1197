"""Metrics survive kills, repeated steps and numbers that are not finite."""

from __future__ import annotations

import json
import logging
import math
import sys
import time

import pytest

from npr_megatron.errors import InputError
from npr_megatron.observability.log import set_up_logging
from npr_megatron.observability.metrics import MetricsLog, read_json_lines, read_metrics


def test_what_is_written_is_read_back_in_order(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    before = time.time()
    log.write("zero", 1, {"train/loss": 0.5, "push/s": 2})
    log.write("zero", 2, {"train/loss": 0.25})
    first, second = read_metrics(tmp_path / "deep" / "metrics.jsonl")
    assert (first.stage, first.step, first.values) == (
        "zero",
        1,
        {"train/loss": 0.5, "push/s": 2.0},
    )
    assert (second.step, second.values) == (2, {"train/loss": 0.25})
    assert before - 1 <= first.time_s <= second.time_s <= time.time() + 1


def test_a_repeated_step_replaces_the_first_one_in_its_place(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step, loss in ((1, 9.0), (2, 8.0), (1, 7.0)):
        log.write("zero", step, {"train/loss": loss})
    log.write("npr", 1, {"train/loss": 6.0})
    lines = read_metrics(tmp_path / "m.jsonl")
    assert [(n.stage, n.step, n.values["train/loss"]) for n in lines] == [
        ("zero", 1, 7.0),
        ("zero", 2, 8.0),
        ("npr", 1, 6.0),
    ]


def test_an_unfinished_line_is_ignored_by_readers_and_removed_by_the_next_writer(tmp_path):
    path = tmp_path / "m.jsonl"
    MetricsLog(path).write("zero", 1, {"train/loss": 1.0})
    with path.open("a") as file:
        file.write('{"stage": "zero", "st')
    assert len(read_metrics(path)) == 1
    MetricsLog(path).write("zero", 2, {"train/loss": 2.0})
    assert [line.step for line in read_metrics(path)] == [1, 2]


def test_the_file_may_be_replaced_between_two_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.write("zero", 1, {"train/loss": 1.0})
    shorter = tmp_path / "shorter"
    shorter.write_text("")
    shorter.replace(path)
    log.write("zero", 1, {"train/loss": 2.0})
    assert [line.values["train/loss"] for line in read_metrics(path)] == [2.0]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    path = tmp_path / "m.jsonl"
    MetricsLog(path).write("zero", 1, {"train/loss": math.nan, "train/grad_norm": math.inf})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["train/loss"] is None
    (line,) = read_metrics(path)
    assert math.isnan(line.values["train/loss"])


@pytest.mark.parametrize("name", ["loss", "train/", "train/the loss", "/loss", "Train/loss"])
def test_badly_named_metrics_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="area/thing_unit"):
        MetricsLog(tmp_path / "m.jsonl").write("zero", 1, {name: 1.0})


def test_broken_files_name_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{broken\n')
    with pytest.raises(InputError, match=r"m\.jsonl:2 is not JSON"):
        read_json_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(InputError, match=r"m\.jsonl:1 is not a JSON object"):
        read_json_lines(path)
    with pytest.raises(InputError, match="does not exist"):
        read_json_lines(tmp_path / "none")


@pytest.fixture
def package_logger():
    logger = logging.getLogger("npr_megatron")
    yield logger
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def test_logs_are_stamped_with_the_role_and_only_warnings_reach_the_terminal(
    tmp_path, capsys, package_logger
):
    path = tmp_path / "logs" / "run.log"
    set_up_logging("trainer 3", path=path)
    logger = logging.getLogger("npr_megatron.some.module")
    logger.debug("hidden")
    logger.info("pushed version %d", 7)
    logger.warning("replica 1 is silent")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert "INFO    trainer 3: pushed version 7  [npr_megatron.some.module:" in lines[0]
    assert "WARNING trainer 3: replica 1 is silent" in lines[1]
    error = capsys.readouterr().err
    assert "silent" in error
    assert "pushed" not in error


def test_setting_up_twice_does_not_write_twice_and_follows_a_replaced_stderr(
    tmp_path, capsys, monkeypatch, package_logger
):
    set_up_logging("driver", path=tmp_path / "a.log")
    set_up_logging("driver", path=tmp_path / "b.log")
    replaced = (tmp_path / "stderr").open("w+")
    monkeypatch.setattr(sys, "stderr", replaced)
    logging.getLogger("npr_megatron.x").warning("once")
    replaced.seek(0)
    assert replaced.read().count("once") == 1
    replaced.close()
    assert (tmp_path / "a.log").read_text() == ""
    assert (tmp_path / "b.log").read_text().count("once") == 1
