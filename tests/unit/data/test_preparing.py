"""Files to stores: what was read comes back, what may not be learnt is told all at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from npr_megatron.config.sft import DataSection
from npr_megatron.data.conversations import check_rows
from npr_megatron.data.demonstrations import Kind, demonstration
from npr_megatron.data.preparing import SampleLimits, open_prepared, prepare
from npr_megatron.data.samples import sft_sample
from npr_megatron.errors import ConfigError
from npr_megatron.topology.layout import layout_of
from npr_megatron.topology.pairs import num_visible_pairs

LIMITS = SampleLimits(max_tokens=256, max_positions=512)


def rows(tokenizer, count: int, first: int = 0) -> list[dict[str, str]]:
    questions = [
        f"a:{i % 9 + 1}+{i // 9 % 9 + 1};b:3+{i // 81 + 1}?" for i in range(first, first + count)
    ]
    return [
        {
            "prompt": question,
            "response": tokenizer.decode(demonstration(Kind.WELL_FORMED, question, tokenizer, 1)),
        }
        for question in questions
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def prepared(sums, sums_folder, tmp_path):
    def run(data: DataSection, **options):
        return prepare(data, sums, sums_folder, tmp_path / "data", LIMITS, seed=0, **options)

    return run


def test_samples_come_back_as_they_were_laid_out(prepared, sums, tmp_path):
    lines = [*rows(sums, 3), {"prompt": "a:1+2?", "response": "3"}]
    path = write(tmp_path / "train.jsonl", lines)
    found = prepared(DataSection(train=(path,)))
    assert found.train.places == tuple(f"{path}:{number}" for number in (1, 2, 3, 4))
    for number, line in enumerate(lines[:3]):
        prompt = sums.encode(line["prompt"] + "\n")
        ids = [*prompt, *sums.encode(line["response"])]
        expected = sft_sample(ids, len(prompt), layout_of(ids, len(prompt), sums.vocabulary))
        sample = found.train.sample(number)
        for name in ("token_ids", "position_ids", "block", "branch", "predecessor", "loss_mask"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(expected, name))
        assert found.train.lengths[number] == len(ids)
        assert found.train.pairs[number] == num_visible_pairs(expected.block, expected.branch)
    plain = found.train.sample(3)
    assert not plain.block.any()
    assert plain.loss_mask.tolist() == [False] * 7 + [True] * 2


def test_a_second_start_reads_nothing_until_something_changes(prepared, sums, tmp_path):
    path = write(tmp_path / "train.jsonl", rows(sums, 300))
    data, reads = DataSection(train=(path,)), []
    first = prepared(data, report=reads.append)
    assert reads == [256]
    again = prepared(data, report=reads.append)
    assert reads == [256]
    assert again.train.digest == first.train.digest
    write(tmp_path / "train.jsonl", rows(sums, 301))
    changed = prepared(data, report=reads.append)
    assert reads == [256, 256]
    assert changed.train.digest != first.train.digest


def test_all_bad_rows_of_all_files_are_told_at_once_and_nothing_is_written(
    prepared, sums, tmp_path
):
    good = rows(sums, 1)[0]
    broken = {**good, "response": good["response"].replace("</step>", "", 1)}
    long = {**good, "prompt": "a:" + "1+" * 200 + "1?"}
    first = write(tmp_path / "a.jsonl", [good, {"prompt": "a:1+2?"}, broken])
    second = write(tmp_path / "b.jsonl", [long, {"prompt": float("nan"), "response": "3"}])
    with pytest.raises(ConfigError) as error:
        prepared(DataSection(train=(first, second)))
    *named, corrupt, malformed, over_long = error.value.problems
    assert [problem.split(": ")[0].removeprefix(str(tmp_path)) for problem in named] == [
        "/a.jsonl:2",
        "/a.jsonl:3",
        "/b.jsonl:1",
        "/b.jsonl:2",
    ]
    assert "prompt is NaN" in named[3]
    assert corrupt == "2 rows cannot be learnt from; correct or delete them"
    assert malformed.startswith("1 responses break the grammar")
    assert over_long.startswith("1 samples are too long; raise trainer.row_tokens")
    assert list((tmp_path / "data").iterdir()) == []
    assert check_rows([first, second]) == [named[0], named[3]]


def test_what_may_be_skipped_is_skipped_and_named(prepared, sums, tmp_path):
    good = rows(sums, 1)[0]
    broken = {**good, "response": good["response"].replace("</step>", "", 1)}
    long = {**good, "prompt": "a:" + "1+" * 200 + "1?"}
    path = write(tmp_path / "train.jsonl", [broken, good, long])
    data = DataSection(train=(path,), over_long="skip", malformed="skip")
    found = prepared(data)
    assert found.train.places == (f"{path}:2",)
    assert [(fault.place, fault.kind) for fault in found.skipped] == [
        (f"{path}:1", "malformed"),
        (f"{path}:3", "over_long"),
    ]
    assert open_prepared(tmp_path / "data", data).skipped == found.skipped


def test_a_share_is_held_out_and_equal_samples_stay_together(prepared, sums, tmp_path):
    lines = rows(sums, 200)
    path = write(tmp_path / "train.jsonl", lines + lines)
    found = prepared(DataSection(train=(path,), validation_frac=0.2))
    assert found.validation is not None
    assert found.train.num_samples + found.validation.num_samples == 400
    assert 40 <= found.validation.num_samples <= 120
    ids = [
        {store.sample(i).token_ids.tobytes() for i in range(store.num_samples)}
        for store in (found.train, found.validation)
    ]
    assert not ids[0] & ids[1]


def test_held_out_files_share_no_sample_with_training(prepared, sums, tmp_path):
    train = write(tmp_path / "train.jsonl", rows(sums, 5))
    held_out = write(tmp_path / "held_out.jsonl", rows(sums, 2, first=4))
    with pytest.raises(ConfigError) as error:
        prepared(DataSection(train=(train,), validation=(held_out,)))
    assert error.value.problems[0] == (f"{train}:5: the same as {held_out}:1, which is held out")


def test_nothing_left_to_learn_or_to_measure_is_refused(prepared, sums, tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(ConfigError, match="leaves no sample to learn"):
        prepared(DataSection(train=(empty,)))
    train = write(tmp_path / "train.jsonl", rows(sums, 2))
    with pytest.raises(ConfigError, match="no sample was held out"):
        prepared(DataSection(train=(train,), validation=(empty,)))
    with pytest.raises(ConfigError, match=r"data\.validation: .*nowhere.jsonl does not exist"):
        prepared(DataSection(train=(train,), validation=("nowhere.jsonl",)))
