"""Which checkpoint of a folder counts, whatever crashes, people and full disks have left there."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest

from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.train.checkpoint_folder import (
    begin_checkpoint,
    find_checkpoint,
    publish_checkpoint,
    whole_checkpoints,
)
from npr_megatron.train.checkpoint_manifest import (
    Manifest,
    Origin,
    damaged_files,
    read_manifest,
    record_file,
    write_manifest,
)
from tests.distributed.jobs import MODEL

ORIGIN = Origin(model=MODEL, dtype="fp32", optimizer="adam")


def publish(folder, step, keep_last=2):
    """Publish a checkpoint of two files."""
    partial = begin_checkpoint(folder, step)
    (partial / "shard").write_bytes(bytes(100))
    (partial / "common").write_bytes(b"abc")
    manifest = Manifest(
        step=step,
        progress={"step": step},
        origin=ORIGIN.to_json(),
        parallel={},
        versions={},
        files={name: record_file(partial / name) for name in ("shard", "common")},
    )
    write_manifest(partial, manifest)
    return publish_checkpoint(partial, step, keep_last)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_counts_and_the_last_few_stay(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 4, 6):
        publish(tmp_path, step, keep_last=2)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000006"
    assert found.manifest == read_manifest(found.path)
    assert found.manifest.num_bytes == 103
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000006"]


@pytest.mark.parametrize("keep_last", [1, 2, 3, 4, 9])
def test_as_many_stay_as_asked_for(keep_last, tmp_path):
    for step in range(4):
        publish(tmp_path, step, keep_last)
    assert len(names(tmp_path)) == 1 + min(keep_last, 4)


@pytest.mark.parametrize("name", ["shard", "manifest.json"])
@pytest.mark.parametrize("spoil", ["remove", "truncate"])
def test_what_is_not_whole_is_passed_over_and_named(name, spoil, tmp_path):
    publish(tmp_path, 2)
    path = publish(tmp_path, 4) / name
    if spoil == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000002"
    _, problems = whole_checkpoints(tmp_path)
    assert len(problems) == 1
    assert str(path) in problems[0]


def test_where_nothing_is_whole_nobody_begins_from_scratch_unasked(tmp_path):
    for step in (2, 4):
        (publish(tmp_path, step) / "shard").unlink()
    with pytest.raises(InputError, match="none there is whole") as caught:
        find_checkpoint(tmp_path)
    assert "step-00000002/shard" in str(caught.value)
    assert "step-00000004/shard" in str(caught.value)
    shutil.rmtree(tmp_path / "step-00000002")
    shutil.rmtree(tmp_path / "step-00000004")
    with pytest.raises(InputError, match="names step-00000004, which is not there"):
        find_checkpoint(tmp_path)


def test_a_kill_before_latest_was_replaced_leaves_the_older_one_in_force(tmp_path):
    publish(tmp_path, 2)
    publish(tmp_path, 4)
    (tmp_path / "latest").write_text("step-00000002")
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000002"
    publish(tmp_path, 4)  # the run comes by again; what is there is never overwritten
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000004-2"]
    assert (tmp_path / "latest").read_text() == "step-00000004-2"


def test_who_goes_back_leaves_the_other_future_behind(tmp_path):
    for step in (2, 4, 6):
        publish(tmp_path, step, keep_last=3)
    (tmp_path / "latest").write_text("step-00000002")
    publish(tmp_path, 3, keep_last=3)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]


def test_leftovers_of_crashed_saves_and_removals_go_with_the_next_save(tmp_path):
    publish(tmp_path, 2)
    for name in (".partial-step-00000004", ".removed-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_bytes(bytes(10))
    (tmp_path / ".partial-latest").write_text("step-0")
    publish(tmp_path, 4)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000004"]


def test_a_disk_without_room_for_another_is_not_filled(tmp_path, monkeypatch):
    publish(tmp_path, 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(EnvironmentFault, match=r"takes 103 bytes and the disk of .* has 100 left"):
        begin_checkpoint(tmp_path, 4)
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_one_checkpoint_is_a_folder_of_itself(tmp_path):
    publish(tmp_path, 2)
    path = publish(tmp_path, 4)
    whole, problems = whole_checkpoints(path)
    assert [stored.path for stored in whole] == [path]
    assert problems == []


def test_every_flipped_bit_is_found(tmp_path):
    path = publish(tmp_path, 2)
    manifest = read_manifest(path)
    for name in manifest.files:
        content = bytearray((path / name).read_bytes())
        content[-1] ^= 4
        (path / name).write_bytes(content)
    found = damaged_files(path, manifest, manifest.files)
    assert [problem.split(" ")[0] for problem in found] == [
        str(path / name) for name in manifest.files
    ]


def test_a_changed_manifest_is_not_believed(tmp_path):
    path = publish(tmp_path, 2) / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"step": 3}))
    with pytest.raises(InputError, match="is not as it was written"):
        read_manifest(path.parent)


def test_another_trainer_is_told_field_by_field():
    other = Origin(
        model=MODEL.model_copy(update={"hidden_size": 64, "num_hidden_layers": 6}),
        dtype="bf16",
        optimizer="muon",
    )
    assert ORIGIN.differences(ORIGIN.to_json()) == []
    assert other.differences(ORIGIN.to_json()) == [
        "hidden_size is 32 there, 64 here",
        "num_hidden_layers is 4 there, 6 here",
        "dtype is fp32 there, bf16 here",
        "optimizer is adam there, muon here",
    ]
