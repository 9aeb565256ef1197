"""``npr weights verify`` finds and names every planted fault, and none where there is none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.folders import open_checkpoint
from npr_megatron.weights.checkpoints.hf import read_hf
from npr_megatron.weights.digest import digest_box
from npr_megatron.weights.executors.disk import seal, write_shard
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.storages import empty_storages, load_tiles
from tests.unit.weights.folders import (
    MODELS,
    QWEN3,
    convert,
    hf_tensors,
    write_fp8_folder,
    write_hf_folder,
)


@pytest.fixture(scope="module", params=["hf", "torch_dist"])
def good(request, tmp_path_factory):
    """A checkpoint of each format."""
    base = tmp_path_factory.mktemp("good")
    source = write_hf_folder(base / "hf", QWEN3)
    return source if request.param == "hf" else convert(source, base / "megatron")


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def test_a_good_one_is_described_with_its_digest(npr, good):
    result = npr("weights", "verify", str(good))
    tensors = hf_tensors(good if (good / "config.json").exists() else good.parent / "hf")
    digest = sum(
        digest_box(name, Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor)
        for name, tensor in tensors.items()
    )
    assert result.code == 0
    first, second = result.out.splitlines()
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert first.endswith(f" tensors, {size} bytes, float32, no problem")
    assert second == f"digest {digest % 2**64:#018x}"


@pytest.mark.parametrize("family", MODELS)
def test_the_digest_is_the_same_in_every_format_and_cut(npr, family, tmp_path):
    source = write_hf_folder(tmp_path / "hf", MODELS[family], torch.bfloat16)
    there = convert(source, tmp_path / "megatron", reader_shape=(2, 2, 1))
    found = {npr("weights", "verify", str(path)).out.splitlines()[1] for path in (source, there)}
    assert len(found) == 1


def problems(npr, *arguments) -> list[str]:
    """Return the problems, one line each; the exit code must say so too."""
    result = npr("weights", "verify", *map(str, arguments))
    assert result.code == 2
    assert result.out == ""
    lines = result.err.splitlines()
    assert lines[-1].endswith("found")
    assert all(line.startswith("error: ") for line in lines[:-1])
    return [line.removeprefix("error: ") for line in lines[:-1]]


def weight_file(folder):
    return next(iter(sorted([*folder.glob("*.safetensors"), *folder.glob("__0_0.distcp")])))


def test_a_flipped_bit_is_found(npr, copy, good):
    tensors = open_checkpoint(copy).tensors
    chunk = tensors[sorted(tensors)[-1]].chunks[-1]
    content = bytearray(chunk.file.read_bytes())
    content[chunk.offset + 9] ^= 0x10
    chunk.file.write_bytes(content)
    if (copy / "config.json").exists():  # no checksum: what is wrong is seen by comparing only
        assert npr("weights", "diff", str(copy), str(good)).code == 1
        return
    (problem,) = problems(npr, copy)
    assert "__0_0.distcp has checksum" in problem
    (copy / "checksums.json").unlink()
    (problem,) = problems(npr, copy)
    assert "the bytes in" in problem and "are not those that were saved" in problem


def test_a_missing_file_is_named(npr, copy):
    file = weight_file(copy)
    file.unlink()
    found = problems(npr, copy)
    assert any(f"{file} is missing" in problem for problem in found)


def test_a_truncated_file_is_named_with_both_sizes(npr, copy):
    file = weight_file(copy)
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    found = "\n".join(problems(npr, copy))
    assert f"has {len(content) - 100}" in found or f"which has {len(content) - 100}" in found
    assert "truncated" in found


def test_another_shape_is_told_for_every_tensor(npr, copy):
    config = copy / "config.json" if (copy / "config.json").exists() else copy / "hf/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    found = problems(npr, copy)
    assert any("has shape" in problem and "expected" in problem for problem in found)
    assert len(found) == (4 * 3 if (copy / "config.json").exists() else 2)


def spoiled_hf(tmp_path, change):
    folder = write_hf_folder(tmp_path / "spoiled", QWEN3)
    tensors = hf_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[NORM].__setitem__(3, torch.nan), f"{NORM}: 1 values are not finite"),
        (lambda t: t.pop(NORM), f"missing tensor {NORM} [32]"),
        (lambda t: t.update(x=torch.zeros(1)), "unknown tensor x"),
        (
            lambda t: t.update({NORM: t[NORM].long()}),
            f"{NORM} is torch.int64, expected one of",
        ),
    ],
    ids=["nan", "missing", "unknown", "dtype"],
)
def test_planted_faults_are_named(npr, tmp_path, change, problem):
    found = problems(npr, spoiled_hf(tmp_path, change))
    assert any(line.startswith(problem) for line in found), found


def test_copies_of_a_parameter_that_disagree_are_found(npr, tmp_path):
    source = write_hf_folder(tmp_path / "hf", MODELS["qwen3_moe"])
    folder = convert(source, tmp_path / "megatron")
    (folder / "checksums.json").unlink()
    tensor = open_checkpoint(folder).tensors["decoder.layers.pre_mlp_layernorm.weight"]
    with tensor.chunks[1].file.open("r+b") as file:
        file.seek(tensor.chunks[1].offset)
        file.write(b"\0\0\0\1")
    found = problems(npr, folder)
    name = "model.layers.1.post_attention_layernorm.weight"
    assert any(
        line.startswith(f"{name} ") and "differs between its copies" in line for line in found
    )


def test_what_is_no_checkpoint_is_refused(npr, tmp_path):
    result = npr("weights", "verify", str(tmp_path))
    assert result.code == 2
    assert "is no checkpoint: it has neither config.json" in result.err


def test_blockwise_fp8_is_verified_with_its_scales(npr, tmp_path):
    folder, _ = write_fp8_folder(tmp_path / "fp8")
    result = npr("weights", "verify", str(folder))
    assert result.code == 0
    assert "float32, float8_e4m3fn, no problem" in result.out
    assert npr("weights", "diff", str(folder), str(folder)).code == 0
    tensors = hf_tensors(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    tensors[name][1, 2] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    found = problems(npr, folder)
    assert found == [
        f"missing tensor {name}_scale_inv [3, 2]",
        f"{name}: 1 values are not finite, expected none",
    ]


@pytest.fixture
def version(tmp_path):
    """A version as two trainer ranks write it, and its digest."""
    source = write_hf_folder(tmp_path / "hf", QWEN3)
    layout = trainer_layout(QWEN3, ParallelConfig(tp_size=2))
    records = []
    for rank, rank_layout in enumerate(layout.ranks):
        storages = empty_storages(rank_layout, torch.float32)
        load_tiles(rank_layout, read_hf(source, QWEN3).read, storages)
        args = tmp_path / "versions", layout, rank, 3, storages, torch.float32
        records.append(write_shard(*args))
    return seal(tmp_path / "versions", records, keep_last=1)


def test_a_published_version_is_read_and_has_the_digest_of_the_model(npr, version, tmp_path):
    result = npr("weights", "verify", str(version))
    assert result.code == 0
    digest = npr("weights", "verify", str(tmp_path / "hf")).out.splitlines()[1]
    assert result.out.splitlines()[1] == digest


def test_a_spoiled_version_is_named_file_by_file(npr, version):
    first, second = sorted(version.glob("rank*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # nan
    first.write_bytes(content)
    second.unlink()
    found = problems(npr, version)
    assert len(found) == 3
    assert f"{first} has SHA-256" in found[0]
    assert f"in {first}: 1 values are not finite" in found[1]
    assert str(second) in found[2]
