"""What the views of a packed row call learnt is what the loss sees."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from npr_megatron.data.packing import pack_rows
from npr_megatron.data.samples import sft_sample
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.report.packed_row import draw_row, shown_row, write_rows_page
from npr_megatron.topology.layout import layout_of, plain_layout
from tests.unit.data.test_samples import BRANCH_1, BRANCH_2, PROMPT, TAIL, TRUNK


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_sums_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def packed(tokenizer):
    """A row of a tree and a plain sample, and the text of each of its cells."""
    prompt = tokenizer.encode(PROMPT)
    tree = [*prompt, *tokenizer.encode(TRUNK + BRANCH_1 + BRANCH_2 + TAIL)]
    plain = [*prompt, *tokenizer.encode("3,7<eos>")]
    samples = [
        sft_sample(tree, len(prompt), layout_of(tree, len(prompt), tokenizer.vocabulary)),
        sft_sample(plain, len(prompt), plain_layout(len(plain))),
    ]
    (batch,) = pack_rows([samples], 1, 1)
    return batch, tokenizer.pieces(batch.token_ids[0])


def test_learnt_tokens_are_the_response_but_what_nothing_predicts(packed):
    tree, plain = shown_row(*(packed[0], 0, ["f:1", "f:2"], packed[1]))
    learnt = "".join(token.text for token in tree.tokens if token.is_learnt)
    without_header = BRANCH_2.removeprefix("<step>")  # no logit predicts the second <step>,
    tail = TAIL.removeprefix("<takeaway>")  # nor what follows the join
    assert learnt == TRUNK + BRANCH_1 + without_header + tail
    assert [t.text for t in tree.tokens if t.is_unpredicted] == ["<step>", "<takeaway>"]
    assert "".join(t.text for t in plain.tokens if t.is_learnt) == "3,7<eos>"
    assert plain.headline == "f:2: 17 tokens, 4 learnt"


def test_the_terminal_shows_every_sample_and_the_page_every_token(packed, tmp_path):
    row = shown_row(packed[0], 0, ["f:1", "a<b:2"], packed[1])
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(draw_row(row))
    assert "\\boxed{3,7}<eos>" in console.export_text()
    write_rows_page(tmp_path / "rows.html", [row], "first rows")
    page = (tmp_path / "rows.html").read_text()
    assert page.count("<span") == sum(len(sample.tokens) for sample in row)
    assert "a&lt;b:2" in page
    assert page.count('class="l"') == sum(t.is_learnt for s in row for t in s.tokens)


def test_a_label_that_is_not_the_token_that_follows_is_caught(packed):
    batch, pieces = packed
    labels = batch.labels.copy()
    labels[labels >= 0] += 1
    wrong = dataclasses.replace(batch, labels=labels)
    with pytest.raises(AssertionError, match="labels differ"):
        shown_row(wrong, 0, ["f:1", "f:2"], pieces)
