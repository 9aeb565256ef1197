"""Versions on disk: bits, foreign readers, and everything that must not be served or left."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import (
    DivergenceError,
    EnvironmentFault,
    InputError,
    LayoutError,
    StaleWeightsError,
)
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.executors.disk import (
    DiskReceiver,
    read_manifest,
    seal,
    versions_on_disk,
    write_shard,
)
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.storages import empty_storages
from tests.unit.weights.oracles import (
    Topology,
    element_ids,
    engine_storages,
    num_different,
    tiny_model,
    topologies,
    trainer_storages,
)

MODEL = tiny_model()
PARALLEL = ParallelConfig(tp_size=2, pp_size=2)
SOURCE = trainer_layout(MODEL, PARALLEL)
ENGINE = engine_layout(MODEL)
SHARD = "rank00001.safetensors"


def weights_of(seed: int, dtype: torch.dtype = torch.float32):
    return {n: t.to(dtype) for n, t in random_init(MODEL, InitConfig(), seed).items()}


def shards(root, version, storages, dtype=torch.float32, layout=SOURCE):
    return [
        write_shard(root, layout, rank, version, held, dtype) for rank, held in enumerate(storages)
    ]


def publish(root, version: int, seed: int = 1, dtype=torch.float32, keep_last: int = 9):
    records = shards(root, version, trainer_storages(MODEL, PARALLEL, weights_of(seed)), dtype)
    return seal(root, records, keep_last=keep_last)


def pulled(folder, dtype=torch.float32, target=ENGINE):
    into = empty_storages(target.ranks[0], dtype)
    DiskReceiver(SOURCE, target).pull(folder, into)
    return into


@settings(max_examples=8, deadline=None)
@given(topologies())
def test_every_element_arrives_from_disk_on_random_topologies(tmp_path_factory, topology: Topology):
    root = tmp_path_factory.mktemp("disk")
    model, parallel, engine_tp = topology.model, topology.parallel, topology.engine_tp_size
    source, target = trainer_layout(model, parallel), engine_layout(model, engine_tp)
    held = trainer_storages(model, parallel, element_ids(model))
    folder = seal(root, shards(root, 0, held, torch.int64, source), keep_last=1)
    arrived = [empty_storages(rank, torch.int64) for rank in target.ranks]
    read_manifest(folder).publication.check(
        DiskReceiver(source, target, rank).pull(folder, into) for rank, into in enumerate(arrived)
    )
    assert num_different(arrived, engine_storages(model, engine_tp, element_ids(model))) == 0


def test_fp32_trainer_is_written_as_bf16(tmp_path):
    folder = publish(tmp_path, 3, dtype=torch.bfloat16)
    expected = engine_storages(MODEL, 1, weights_of(1, torch.bfloat16))
    assert num_different([pulled(folder, torch.bfloat16)], expected) == 0
    assert read_manifest(folder).publication.version == 3


def test_safetensors_itself_reads_the_shards(tmp_path):
    folder = publish(tmp_path, 0)
    for rank, held in enumerate(trainer_storages(MODEL, PARALLEL, weights_of(1))):
        found = load_file(folder / f"rank{rank:05d}.safetensors")
        assert num_different([{name: found[name] for name in held}], [held]) == 0


def test_a_version_is_invisible_until_it_is_sealed_and_older_ones_are_retired(tmp_path):
    for version in (1, 2):
        publish(tmp_path, version)
    shards(tmp_path, 3, trainer_storages(MODEL, PARALLEL, weights_of(3)))
    assert [path.name for path in versions_on_disk(tmp_path)] == ["v000000000001", "v000000000002"]
    publish(tmp_path, 4, keep_last=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["v000000000002", "v000000000004"]  # the attempt at 3 is gone, too
    assert versions_on_disk(tmp_path / "absent") == []


def test_shards_of_an_attempt_with_more_ranks_are_not_sealed_in(tmp_path):
    more = trainer_layout(MODEL, ParallelConfig(tp_size=4, pp_size=2))
    held = trainer_storages(MODEL, ParallelConfig(tp_size=4, pp_size=2), weights_of(1))
    shards(tmp_path, 0, held, layout=more)
    folder = publish(tmp_path, 0)
    assert len(list(folder.iterdir())) == len(SOURCE.ranks) + 1
    pulled(folder)


def test_versions_are_written_once_and_by_all_ranks(tmp_path):
    publish(tmp_path, 0)
    held = trainer_storages(MODEL, PARALLEL, weights_of(1))
    with pytest.raises(StaleWeightsError, match="written once"):
        shards(tmp_path, 0, held)
    with pytest.raises(StaleWeightsError, match="one part of every source rank"):
        seal(tmp_path, shards(tmp_path, 1, held)[1:], keep_last=1)
    held[-1]["output_layer.weight"] = held[-1]["output_layer.weight"] + 1
    with pytest.raises(DivergenceError, match="replicas"):
        seal(tmp_path, shards(tmp_path, 2, held), keep_last=1)
    assert len(versions_on_disk(tmp_path)) == 1


def test_a_flipped_byte_names_tensor_and_file(tmp_path):
    folder = publish(tmp_path, 0)
    held = trainer_storages(MODEL, PARALLEL, weights_of(1))[1]
    content = bytearray((folder / SHARD).read_bytes())
    value = held["decoder.layers.1.mlp.linear_fc2.weight"].numpy().tobytes()
    content[content.index(value)] ^= 1
    (folder / SHARD).write_bytes(content)
    wrong = rf"wrong: model\.layers\.1\.mlp\.down_proj\.weight in {folder / SHARD}$"
    with pytest.raises(StaleWeightsError, match=wrong):
        pulled(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_shard_names_file_and_tensor(tmp_path, kept):
    folder = publish(tmp_path, 0)
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:kept])
    with pytest.raises(InputError, match=rf"{SHARD} has \d+ bytes, \S+ \[.*truncated"):
        pulled(folder)


def test_a_missing_shard_manifest_or_another_header_is_refused(tmp_path):
    folder = publish(tmp_path, 0)
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content.replace(b"decoder.layers.0", b"decoder.layers.9", 1))
    with pytest.raises(InputError, match=f"{SHARD} does not hold the tensors of its layout"):
        pulled(folder)
    (folder / SHARD).unlink()
    with pytest.raises(InputError, match=f"{SHARD} cannot be read"):
        pulled(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["publication"]["digest"]
    for text in (json.dumps(manifest), "{", "[]"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="not the manifest"):
            pulled(folder)
    with pytest.raises(InputError, match="not the manifest"):
        pulled(tmp_path / "absent")


def test_another_layout_or_dtype_is_refused(tmp_path):
    folder = publish(tmp_path, 0)
    with pytest.raises(LayoutError, match=r"torch\.float32.*torch\.bfloat16"):
        pulled(folder, torch.bfloat16)
    other = trainer_layout(MODEL, ParallelConfig(tp_size=2))
    with pytest.raises(StaleWeightsError, match="laid out anew"):
        DiskReceiver(other, ENGINE).pull(folder, empty_storages(ENGINE.ranks[0], torch.float32))


@contextmanager
def largest_file(num_bytes: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_error_that_names_the_tensor_and_leaves_nothing(tmp_path):
    older = publish(tmp_path, 0)
    held = trainer_storages(MODEL, PARALLEL, weights_of(2))
    size = (older / SHARD).stat().st_size
    with largest_file(size - 50), pytest.raises(EnvironmentFault) as fault:
        write_shard(tmp_path, SOURCE, 1, 1, held[1], torch.float32)
    last = SOURCE.ranks[1].storages[-1].name
    assert f"{SHARD}: {last} could not be written" in str(fault.value)
    assert f"the file takes {size} bytes" in str(fault.value)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    records = shards(tmp_path, 1, held)
    with largest_file(64), pytest.raises(EnvironmentFault, match="the manifest could not be"):
        seal(tmp_path, records, keep_last=1)
    assert versions_on_disk(tmp_path) == [older]
    pulled(seal(tmp_path, records, keep_last=1))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    held = trainer_storages(MODEL, PARALLEL, weights_of(2))
    with pytest.raises(EnvironmentFault, match="its folder could not be written"):
        write_shard(tmp_path / "file" / "root", SOURCE, 0, 0, held[0], torch.float32)
