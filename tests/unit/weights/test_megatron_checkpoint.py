"""Megatron checkpoints: a proven layout, files that torch reads, and every byte comes back."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from math import prod

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.errors import InputError, LayoutError
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.chunking import ReaderShape, chunk_groups
from npr_megatron.weights.checkpoints.folders import examine_checkpoint, open_checkpoint
from npr_megatron.weights.checkpoints.gather import Gather
from npr_megatron.weights.checkpoints.stored import StoredChunk, StoredTensor, read_box
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.layouts.megatron_checkpoint import form_found, megatron_checkpoint_layout
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from tests.unit.weights.folders import (
    MODELS,
    QWEN3,
    convert,
    hf_tensors,
    same_bits,
    write_fp8_folder,
    write_hf_folder,
)

BF16 = torch.bfloat16


@pytest.mark.parametrize("family", MODELS)
def test_the_layout_is_a_permutation_of_the_model(family):
    ours, theirs = megatron_checkpoint_layout(MODELS[family]), canonical_layout(MODELS[family])
    for source, target in ((ours, theirs), (theirs, ours)):
        assert verify_transfer(plan_transfer(source, target), source, target) == []


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_every_byte_is_the_same(family, dtype, tmp_path):
    source = write_hf_folder(tmp_path / "hf", MODELS[family], dtype)
    ep_size = 2 if MODELS[family].moe else 1
    middle = convert(source, tmp_path / "megatron", reader_shape=(2, 2, ep_size))
    back = convert(middle, tmp_path / "back")

    assert same_bits(hf_tensors(source), hf_tensors(back))
    for name in ("config.json", "tokenizer.json"):
        assert (source / name).read_bytes() == (back / name).read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it should be
def test_torch_reads_what_we_wrote(tmp_path):
    source = write_hf_folder(tmp_path / "hf", QWEN3)
    folder = convert(source, tmp_path / "megatron", reader_shape=(2, 1, 1))
    layout = megatron_checkpoint_layout(QWEN3)
    state = {s.name: torch.zeros(s.shape) for s in layout.ranks[0].storages}
    dcp.load(state, checkpoint_id=folder, no_dist=True)

    expected = hf_tensors(source)
    for layer in range(4):
        gate, up = (
            expected[f"model.layers.{layer}.mlp.{side}_proj.weight"] for side in ("gate", "up")
        )
        fused = state["decoder.layers.mlp.linear_fc1.weight"][layer]
        assert torch.equal(fused, torch.cat([gate, up]))
        q, k, v = (
            expected[f"model.layers.{layer}.self_attn.{side}_proj.weight"].view(2, -1, 32)
            for side in "qkv"
        )
        fused = state["decoder.layers.self_attention.linear_qkv.weight"][layer]
        assert torch.equal(fused, torch.cat([q, k, v], 1).reshape(-1, 32))
    embedding = state["embedding.word_embeddings.weight"]
    assert torch.equal(embedding, expected["model.embed_tokens.weight"])


def test_casting_is_the_only_thing_that_changes_values(tmp_path):
    source = write_hf_folder(tmp_path / "hf", MODELS["glm4_moe"])
    folder = convert(source, tmp_path / "megatron", dtype="bf16")
    back = convert(folder, tmp_path / "back")
    expected = {
        name: tensor if name.endswith("_bias") else tensor.to(BF16)
        for name, tensor in hf_tensors(source).items()
    }
    assert same_bits(hf_tensors(back), expected)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_blockwise_fp8_becomes_the_numbers_it_stands_for(tmp_path):
    source, numbers = write_fp8_folder(tmp_path / "hf")
    with pytest.raises(InputError, match=r"is in blockwise FP8.* choose --dtype bf16 or fp32"):
        convert(source, tmp_path / "megatron")
    folder = convert(source, tmp_path / "megatron", dtype="fp32")
    back = convert(folder, tmp_path / "back")
    assert same_bits(hf_tensors(back), numbers)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 4, 1)], ids=str)
def test_chunks_cover_every_tensor_once_and_a_rank_reads_whole_ones(family, shape):
    model = MODELS[family]
    if model.moe is None:
        shape = (*shape[:2], 1)
    rank_layout = megatron_checkpoint_layout(model).ranks[0]
    for limit in (10**9, 100):
        chunks = [
            c for g in chunk_groups(model, rank_layout, ReaderShape(*shape), limit) for c in g
        ]
        for storage in rank_layout.storages:
            count = torch.zeros(storage.shape)
            for chunk in chunks:
                if chunk.storage == storage.name:
                    count[chunk.box.slices] += 1
                    assert chunk.box.num_elements <= max(limit, chunk.box.shape[-1])
            assert (count == 1).all(), storage
        wanted = Box((0, 0, 0), (1, 32, 64 // shape[0]))
        for chunk in chunks:
            if chunk.storage == "decoder.layers.self_attention.linear_proj.weight":
                common = chunk.box.intersect(wanted)
                assert common in (None, chunk.box)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_of_any_chunking_is_read(data, tmp_path_factory):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    dtype, into_dtype = (data.draw(st.sampled_from([torch.float32, BF16])) for _ in "ab")
    values = torch.arange(prod(shape)).to(dtype).view(shape)
    file = tmp_path_factory.mktemp("stored") / "file"
    axis = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[axis]))
    whole = Box((0,) * len(shape), shape)
    chunks, content = [], b"junk"
    for low, high in ((0, cut), (cut, shape[axis])):
        if low < high:
            start, stop = list(whole.start), list(whole.stop)
            start[axis], stop[axis] = low, high
            box = Box(tuple(start), tuple(stop))
            chunks.append(StoredChunk(box, file, len(content)))
            content += values[box.slices].contiguous().view(torch.uint8).numpy().tobytes()
    file.write_bytes(content)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    box = Box(start, stop)
    into = torch.full(box.shape, -1.0, dtype=into_dtype)
    read_box(StoredTensor("t", shape, dtype, tuple(chunks)), box, into)
    assert torch.equal(into, values[box.slices].to(into_dtype))


def test_wide_rows_are_read_row_by_row_and_band_by_band(tmp_path):
    values = torch.arange(3 * 40_000, dtype=torch.float32).view(3, 40_000)
    file = tmp_path / "file"
    file.write_bytes(values.numpy().tobytes())
    chunk = StoredChunk(Box((0, 0), (3, 40_000)), file, 0)
    tensor = StoredTensor("t", (3, 40_000), torch.float32, (chunk,))
    for first, last in ((100, 30_000), (7, 9), (0, 40_000)):
        into = torch.empty(2, last - first)
        read_box(tensor, Box((1, first), (3, last)), into)
        assert torch.equal(into, values[1:, first:last])


def test_a_padded_vocabulary_is_read_without_its_padding():
    layout = canonical_layout(QWEN3)
    shapes = {s.name: s.shape for s in megatron_checkpoint_layout(QWEN3).ranks[0].storages}
    shapes["embedding.word_embeddings.weight"] = (128, 32)
    padded = megatron_checkpoint_layout(QWEN3, form_found(QWEN3, shapes))
    assert padded.ranks[0].storages[0].shape == (128, 32)
    assert verify_transfer(plan_transfer(padded, layout), padded, layout) == []


def test_padding_is_gathered_as_zeros(tmp_path):
    shapes = {"embedding.word_embeddings.weight": (128, 32)}
    padded = megatron_checkpoint_layout(QWEN3, form_found(QWEN3, shapes))
    source = open_checkpoint(write_hf_folder(tmp_path / "hf", QWEN3))
    gather = Gather(source, padded)
    rows = torch.full((20, 32), -1.0)
    gather.fill("embedding.word_embeddings.weight", Box((60, 0), (80, 32)), rows)
    embedding = hf_tensors(source.path)["model.embed_tokens.weight"]
    assert torch.equal(rows, torch.cat([embedding[60:], torch.zeros(10, 32)]))


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((3, 1, 1), "num_attention_heads 4 is not a multiple of --tp 3"),
        ((1, 3, 1), "num_hidden_layers 4 is not a multiple of --pp 3"),
        ((1, 1, 3), "num_experts 4 is not a multiple of --ep 3"),
    ],
)
def test_an_impossible_parallelism_is_refused(shape, complaint, tmp_path):
    source = write_hf_folder(tmp_path / "hf", MODELS["qwen3_moe"])
    with pytest.raises(LayoutError, match=complaint):
        convert(source, tmp_path / "megatron", reader_shape=shape)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.fixture(scope="module")
def megatron_folder(tmp_path_factory):
    """A converted checkpoint, to be copied and spoiled."""
    base = tmp_path_factory.mktemp("megatron")
    source = write_hf_folder(base / "hf", QWEN3)
    return convert(source, base / "megatron", reader_shape=(2, 1, 1))


def problems_after(spoil, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    spoil(copy)
    return examine_checkpoint(copy)[1]


def test_a_missing_part_names_every_tensor_in_it(megatron_folder, tmp_path):
    found = problems_after(lambda f: (f / "__1_0.distcp").unlink(), megatron_folder, tmp_path)
    assert all("__1_0.distcp is missing" in problem for problem in found)
    assert any(p.startswith("decoder.layers.mlp.linear_fc2.weight Box") for p in found)


def test_a_truncated_part_says_how_long_it_should_be(megatron_folder, tmp_path):
    size = (megatron_folder / "__0_0.distcp").stat().st_size
    found = problems_after(
        lambda f: os.truncate(f / "__0_0.distcp", size - 1), megatron_folder, tmp_path
    )
    assert len(found) == 1
    assert f"has {size - 1} bytes, expected at least {size}; the file is truncated" in found[0]


def test_another_architecture_is_told_tensor_by_tensor(megatron_folder, tmp_path):
    def widen(folder):
        config = folder / "hf" / "config.json"
        found = json.loads(config.read_text())
        config.write_text(json.dumps(found | {"intermediate_size": 96, "num_hidden_layers": 5}))

    found = problems_after(widen, megatron_folder, tmp_path)
    assert (
        "decoder.layers.mlp.linear_fc2.weight has shape [4, 32, 48], expected [5, 32, 96]" in found
    )


def test_metadata_that_would_run_code_is_refused(megatron_folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    found = problems_after(
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Attack())), megatron_folder, tmp_path
    )
    assert "posix.mkdir has no place in the metadata of weights" in found[0]
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("pointer", "text", "name"),
    [
        ("latest", "step-00000012", "step-00000012"),
        ("latest_checkpointed_iteration.txt", "12\n", "iter_0000012"),
        ("latest_checkpointed_iteration.txt", "release", "release"),
    ],
)
def test_a_folder_of_checkpoints_stands_for_its_newest(
    pointer, text, name, megatron_folder, tmp_path
):
    (tmp_path / pointer).write_text(text)
    shutil.copytree(megatron_folder, tmp_path / name)
    assert open_checkpoint(tmp_path).path == tmp_path / name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_keys_behind_a_wrapper_are_found_and_an_optimizer_is_passed_over(megatron_folder, tmp_path):
    state = {
        storage.name: torch.zeros(storage.shape)
        for storage in megatron_checkpoint_layout(QWEN3).ranks[0].storages
    }
    dcp.load(state, checkpoint_id=megatron_folder, no_dist=True)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    wrapped["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.ones(32)
    dcp.save(wrapped, checkpoint_id=tmp_path / "wrapped", no_dist=True)
    shutil.copy(megatron_folder / "metadata.json", tmp_path / "wrapped")
    found = open_checkpoint(tmp_path / "wrapped", megatron_folder / "hf")
    for name, tensor in state.items():
        into = torch.empty(tensor.shape)
        found.read(0, name, Box((0,) * tensor.dim(), tuple(tensor.shape)), into)
        assert torch.equal(into, tensor)


def test_what_is_no_checkpoint_is_refused(megatron_folder, tmp_path):
    with pytest.raises(InputError, match=r"neither config\.json .* nor metadata\.json"):
        open_checkpoint(tmp_path)
    copy = shutil.copytree(megatron_folder, tmp_path / "copy")
    (copy / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(InputError, match="names backend 'zarr', readable is 'torch_dist'"):
        open_checkpoint(copy)
    shutil.rmtree(copy / "hf")
    shutil.copy(megatron_folder / "metadata.json", copy)
    with pytest.raises(InputError, match="say whose architecture it has with --hf"):
        open_checkpoint(copy)
    assert open_checkpoint(copy, megatron_folder / "hf").model == QWEN3
