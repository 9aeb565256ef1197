"""``npr weights convert``: survives kill -9 and a full disk, stays within its memory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from npr_megatron.cli.weights.convert import parse_size
from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.weights.checkpoints.conversion import Conversion, Request
from npr_megatron.weights.checkpoints.journal import Journal
from tests.unit.cli.forked_npr import Server
from tests.unit.weights.folders import (
    MODELS,
    QWEN3,
    convert,
    hf_tensors,
    same_bits,
    write_hf_folder,
)

WIDE = QWEN3.model_copy(
    update={
        "hidden_size": 512,
        "intermediate_size": 2048,
        "vocab_size": 24_576,
        "num_hidden_layers": 4,
    }
)
"""About 100 MB in fp32."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("npr"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("small") / "hf", QWEN3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("wide") / "hf", WIDE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back(npr, small, tmp_path):
    there, back = tmp_path / "megatron", tmp_path / "back"
    result = npr("weights", "convert", str(small), str(there), "--tp", "2", "--pp", "2")
    size = sum(tensor.nbytes for tensor in hf_tensors(small).values())
    assert (result.code, result.out) == (0, f"{there}: {size} bytes of weights\n")
    assert npr("weights", "convert", str(there), str(back), "--memory", "32MiB").code == 0
    assert same_bits(hf_tensors(small), hf_tensors(back))
    assert names(tmp_path) == ["back", "megatron"]


def test_the_same_command_again_has_nothing_to_do_and_another_is_refused(npr, small, tmp_path):
    target = tmp_path / "megatron"
    arguments = ["weights", "convert", str(small), str(target)]
    assert npr(*arguments).code == 0
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert npr(*arguments).code == 0
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    result = npr(*arguments, "--dtype", "bf16")
    assert result.code == 2
    assert "exists and is not what this conversion writes; remove it" in result.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tp", "3"], "num_attention_heads 4 is not a multiple of --tp 3"),
        (["--ep", "2"], "num_experts 1 is not a multiple of --ep 2"),
        (["--memory", "lots"], "--memory 'lots' is no size; write 512MiB or 4GiB"),
        (["--memory", "1MiB"], "1048576 bytes of memory are too few"),
    ],
)
def test_bad_requests_are_told_before_anything_is_written(
    npr, small, tmp_path, arguments, complaint
):
    result = npr("weights", "convert", str(small), str(tmp_path / "target"), *arguments)
    assert result.code == 2
    assert complaint in result.err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 2**32), ("512 mib", 2**29), ("1.5KB", 1500), ("77", 77)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_tensors_of_several_dtypes_cannot_be_fused(small, tmp_path):
    from safetensors.torch import save_file

    tensors = hf_tensors(small)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    folder = write_hf_folder(tmp_path / "hf", QWEN3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"linear_qkv\.weight is made of tensors of several dtypes"
    ):
        convert(folder, tmp_path / "megatron")
    convert(folder, tmp_path / "cast", dtype="bf16")


def test_killed_at_any_byte_it_continues_and_nothing_shows_before(wide, tmp_path, server):
    target = tmp_path / "target"
    arguments = ("weights", "convert", wide, target, "--tp", 4, "--pp", 4, "--memory", "32MiB")
    size = sum(tensor.nbytes for tensor in hf_tensors(wide).values())
    points = random.Random(0).sample(range(size // 3), 5)
    written = {}
    for point in points:
        assert server.run(*arguments, dies_at_byte=point).status == -signal.SIGKILL
        assert names(tmp_path) == [".target.partial", ".target.partial.jsonl"]
        done = {line["file"] for line in parts_done(tmp_path)}
        assert done >= written.keys(), "finished parts were forgotten"
        for file in done:
            changed = (tmp_path / ".target.partial" / file).stat().st_mtime_ns
            assert written.setdefault(file, changed) == changed, "a part was written twice"
    assert len(written) > 4

    assert server.run(*arguments).status == 0
    assert names(tmp_path) == ["target"]
    assert all((target / file).stat().st_mtime_ns == time for file, time in written.items())
    back = convert(target, tmp_path / "back")
    assert same_bits(hf_tensors(back), hf_tensors(wide))


def parts_done(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / ".target.partial.jsonl").read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines[1:] if line.endswith(b"\n")]


def test_finished_files_that_changed_and_torn_lines_are_not_trusted(small, tmp_path, server):
    target = tmp_path / "target"
    arguments = ("weights", "convert", small, target, "--pp", 2)
    server.run(*arguments, dies_at_byte=180_000)
    assert [line["file"] for line in parts_done(tmp_path)] == ["__0_0.distcp"]
    part, journal = tmp_path / ".target.partial/__0_0.distcp", tmp_path / ".target.partial.jsonl"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with journal.open("a") as file:
        file.write('{"file": "__1_0.distcp", "bytes": ')
    assert server.run(*arguments).status == 0
    assert server.run("weights", "verify", target).status == 0
    assert same_bits(hf_tensors(convert(target, tmp_path / "back")), hf_tensors(small))


def stop_at(num_bytes: int):
    def report(progress):
        if progress.done > num_bytes:
            raise KeyboardInterrupt

    return report


def test_another_conversion_to_the_same_target_starts_afresh(small, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        Conversion(Request(source=small, target=target)).run(stop_at(100_000))
    convert(small, target, dtype="bf16")
    assert {t.dtype for t in hf_tensors(convert(target, tmp_path / "back")).values()} == {
        torch.bfloat16
    }
    assert names(tmp_path) == ["back", "target"]


def test_two_conversions_to_one_target_are_refused(small, tmp_path):
    with (
        Journal(tmp_path / "target", "another"),
        pytest.raises(EnvironmentFault, match="another process is converting to"),
    ):
        convert(small, tmp_path / "target")


def test_a_place_that_cannot_be_written_to_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="file cannot be written to"):
        convert(small, tmp_path / "file" / "target")


def test_too_little_room_is_told_before_anything_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "npr_megatron.weights.checkpoints.conversion.shutil.disk_usage",
        lambda path: _Room(free=1000),
    )
    with pytest.raises(EnvironmentFault, match=r"needs \d+ more bytes, .* has 1000 free"):
        convert(small, tmp_path / "target")
    assert not (tmp_path / "target").exists()


class _Room:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_disk_that_becomes_full_is_named_and_the_rest_continues(wide, tmp_path, server):
    target = tmp_path / "target"
    arguments = ("weights", "convert", wide, target, "--pp", 4, "--memory", "32MiB")
    server.run(*arguments, dies_at_byte=90_000_000)
    num_done = len(parts_done(tmp_path))
    assert num_done > 1
    ended = server.run(*arguments, max_file_bytes=1 << 20)
    assert ended.status == 2
    said = f"error: .* became full .* {num_done} of 5 files are done and kept; free some space"
    assert re.search(said, ended.output)
    assert "Traceback" not in ended.output
    assert not target.exists()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / ".target.partial").iterdir()}
    assert sizes == {line["file"]: line["bytes"] for line in parts_done(tmp_path)}
    assert server.run(*arguments).status == 0
    assert names(tmp_path) == ["target"]


def test_memory_stays_within_what_was_allowed(wide, tmp_path, server):
    there, back = tmp_path / "there", tmp_path / "back"
    assert (wide / "model.safetensors").stat().st_size > 3 * (32 << 20)
    for source, target in ((wide, there), (there, back)):
        ended = server.run("weights", "convert", source, target, "--memory", "32MiB")
        assert ended.status == 0
        assert (8 << 20) < ended.peak_bytes < (32 << 20)
    ended = server.run("weights", "convert", wide, tmp_path / "more", "--memory", "128MiB")
    assert ended.peak_bytes > 32 << 20, "the measurement sees nothing"


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_experts_over_several_files(family, tmp_path):
    source = write_hf_folder(tmp_path / "hf", MODELS[family])
    there = convert(source, tmp_path / "megatron", reader_shape=(2, 2, 2))
    back = convert(there, tmp_path / "back", max_hf_file_bytes=50_000)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 3
    assert same_bits(hf_tensors(source), hf_tensors(back))
    again = convert(back, tmp_path / "again")
    assert same_bits(hf_tensors(convert(again, tmp_path / "last")), hf_tensors(source))


def test_a_source_cut_short_in_the_middle_is_named(small, tmp_path):
    source = write_hf_folder(tmp_path / "hf", QWEN3)
    conversion = Conversion(Request(source=source, target=tmp_path / "target"))
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model\.norm\.weight: .* it is truncated, copy it again"):
        conversion.run(lambda progress: None)
    assert not (tmp_path / "target").exists()
