"""HF folders: what transformers makes of ours, what we make of broken ones, random models."""

from __future__ import annotations

import json
import math
import re
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from npr_megatron.config.hf_architecture import read_architecture
from npr_megatron.config.model import InitConfig, MoeConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import EnvironmentFault, InputError, LayoutError
from npr_megatron.weights.checkpoints.hf import hf_config, random_init, read_hf, write_hf
from npr_megatron.weights.layouts import canonical_layout, trainer_layout
from npr_megatron.weights.storages import empty_storages, load_tiles
from tests.unit.weights.oracles import num_different, tiny_model, trainer_storages

MODEL = tiny_model(hidden_size=16, head_dim=8, rope_theta=5e5)
UNTIED = MODEL.model_copy(update={"tie_word_embeddings": False})


@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("max_file_bytes", [10**9, 5000], ids=["one file", "many files"])
def test_transformers_loads_the_same_tensors_under_the_same_names(tmp_path, model, max_file_bytes):
    from transformers import AutoModelForCausalLM

    weights = random_init(model, InitConfig(), seed=1)
    write_hf(tmp_path / "model", model, weights, max_file_bytes=max_file_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = loaded.state_dict()
    assert set(found) - set(weights) == ({"lm_head.weight"} if model.tie_word_embeddings else set())
    assert num_different([{name: found[name] for name in weights}], [weights]) == 0
    assert loaded.config.rope_parameters["rope_theta"] == model.rope_theta
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("max_file_bytes", [10**9, 5000])
def test_written_folder_loads_into_trainer_shards(tmp_path, max_file_bytes):
    weights = random_init(UNTIED, InitConfig(), seed=1)
    write_hf(tmp_path / "model", UNTIED, weights, max_file_bytes=max_file_bytes)
    parallel = ParallelConfig(tp_size=4, pp_size=2)
    layout = trainer_layout(UNTIED, parallel)
    ranks = [empty_storages(rank, torch.float32) for rank in layout.ranks]
    checkpoint = read_hf(tmp_path / "model", read_architecture(tmp_path / "model"))
    for rank, storages in zip(layout.ranks, ranks, strict=True):
        load_tiles(rank, checkpoint.read, storages)
    assert num_different(ranks, trainer_storages(UNTIED, parallel, weights)) == 0


def test_config_comes_back_as_the_same_architecture(tmp_path):
    for model in (MODEL, UNTIED):
        (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
        assert read_architecture(tmp_path) == model


def test_tokenizer_files_and_special_ids_come_from_the_source_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("must not be copied")
    (source / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 1}))
    write_hf(tmp_path / "out", MODEL, random_init(MODEL, InitConfig(), 1), source_folder=source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (7, MODEL.vocab_size)
    with pytest.raises(InputError, match="is not a folder"):
        write_hf(tmp_path / "out", MODEL, random_init(MODEL, InitConfig(), 1), source_folder="no")


def test_rewritten_folder_holds_the_new_weights_and_nothing_of_the_old(tmp_path):
    write_hf(tmp_path / "m", MODEL, random_init(MODEL, InitConfig(), 1), max_file_bytes=5000)
    second = random_init(MODEL, InitConfig(), 2)
    write_hf(tmp_path / "m", MODEL, second)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert num_different([load_file(tmp_path / "m" / "model.safetensors")], [second]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_failed_write_leaves_the_old_folder_alone(tmp_path):
    first = random_init(MODEL, InitConfig(), 1)
    write_hf(tmp_path / "m", MODEL, first)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "config.json").write_text("not json")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        write_hf(
            tmp_path / "m",
            MODEL,
            random_init(MODEL, InitConfig(), 2),
            source_folder=tmp_path / "blocked",
        )
    assert num_different([load_file(tmp_path / "m" / "model.safetensors")], [first]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocked", "m"]


def test_tensors_that_are_not_the_models_are_not_written(tmp_path):
    weights = random_init(MODEL, InitConfig(), 1)
    with pytest.raises(LayoutError, match=r"lm_head\.weight .* is missing"):
        write_hf(tmp_path / "m", UNTIED, weights)
    with pytest.raises(LayoutError, match="fp32 or bf16"):
        write_hf(tmp_path / "m", MODEL, {n: t.double() for n, t in weights.items()})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def files_up_to_20_kb():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_reported_and_the_old_folder_stays(tmp_path, request):
    first = random_init(MODEL, InitConfig(), 1)
    write_hf(tmp_path / "m", MODEL, first)
    request.getfixturevalue("files_up_to_20_kb")
    with pytest.raises(EnvironmentFault, match=r"bytes was to be written to .*File too large"):
        write_hf(tmp_path / "m", MODEL, random_init(MODEL, InitConfig(), 2))
    assert num_different([load_file(tmp_path / "m" / "model.safetensors")], [first]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_expert_bias_is_fp32_whatever_the_weights_are(tmp_path):
    moe = MoeConfig(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_intermediate_size=8,
        has_expert_bias=True,
    )
    model = UNTIED.model_copy(update={"family": "glm4_moe", "moe": moe})
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    weights = {n: t.bfloat16() for n, t in random_init(model, InitConfig(), 1).items()}
    with pytest.raises(LayoutError, match=rf"{bias} is torch\.bfloat16, .* torch\.float32"):
        write_hf(tmp_path / "m", model, weights)
    assert not weights[bias].any()

    weights = {n: t.float() if n.endswith("bias") else t for n, t in weights.items()}
    weights[bias][:] = torch.tensor([1.0, 1 + 2**-20, 3.0, 1e-30])
    write_hf(tmp_path / "m", model, weights)
    (layout,) = canonical_layout(model).ranks
    again = empty_storages(layout, torch.bfloat16)
    load_tiles(layout, read_hf(tmp_path / "m", model).read, again)
    assert num_different([again], [weights]) == 0
    assert again[bias].dtype == torch.float32


def test_every_wrong_tensor_of_a_checkpoint_is_listed(tmp_path):
    weights = random_init(MODEL, InitConfig(), 1)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    weights["model.norm.weight"] = torch.ones(3)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 16, dtype=torch.int8)
    del weights["model.layers.2.mlp.gate_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refused:
        read_hf(tmp_path, MODEL)
    for problem in (
        "unknown tensor model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight has shape [3], expected [16]",
        "model.layers.1.mlp.up_proj.weight is torch.int8",
        "missing tensor model.layers.2.mlp.gate_proj.weight",
    ):
        assert problem in str(refused.value)


def test_head_stored_beside_a_tied_embedding_is_ignored(tmp_path):
    weights = random_init(MODEL, InitConfig(), 1)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    layout = canonical_layout(MODEL).ranks[0]
    found = empty_storages(layout, torch.float32)
    load_tiles(layout, read_hf(tmp_path, MODEL).read, found)
    del weights["lm_head.weight"]
    assert num_different([found], [weights]) == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, r"model\.safetensors is missing"),
        (b"not safetensors", r"model\.safetensors has 15 bytes, not even its header is whole"),
        (b"\x08" + bytes(7) + b"not json", r"model\.safetensors has no readable header"),
    ],
)
def test_missing_or_broken_weight_files_are_named(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"weights cannot be read:\n.*{problem}"):
        read_hf(tmp_path, MODEL)


@pytest.fixture
def many_files(tmp_path):
    folder = tmp_path / "many"
    write_hf(folder, MODEL, random_init(MODEL, InitConfig(), 1), max_file_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder, index, sorted(folder.glob("*.safetensors"))


def test_every_missing_and_truncated_file_is_named_with_what_it_held(many_files):
    folder, index, files = many_files
    gone, short = files[0], files[1]
    num_bytes = short.stat().st_size
    gone.unlink()
    with short.open("r+b") as opened:
        opened.truncate(num_bytes - 1)
    with pytest.raises(InputError) as refused:
        read_hf(folder, MODEL)
    held = sorted(name for name, file in index.items() if file == gone.name)
    assert (
        f"{gone.name} is missing; it holds {', '.join(held[:3])} and {len(held) - 3} more"
        in str(refused.value)
    )
    truncated = rf"model\.layers\.\S+ \[.*\] takes \d+ bytes up to byte {num_bytes} of .*"
    assert re.search(rf"{truncated}{short.name}, which has {num_bytes - 1}", str(refused.value))


def test_tensors_in_the_wrong_file_or_in_two_are_named(many_files):
    folder, index, files = many_files
    first, second = load_file(files[0]), load_file(files[1])
    moved, doubled = [name for name, file in index.items() if file == files[0].name][:2]
    second[doubled] = first[doubled]
    del first[moved]
    save_file(first, files[0])
    save_file(second, files[1])
    with pytest.raises(InputError) as refused:
        read_hf(folder, MODEL)
    assert f"{moved} is not in {files[0]}, where the index has it" in str(refused.value)
    assert f"{doubled} is in two files, one is {files[1]}" in str(refused.value)


@pytest.mark.parametrize("text", ["not json", "{}", '{"weight_map": 3}', "[]"])
def test_a_broken_index_is_refused(many_files, text):
    folder, _, _ = many_files
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json is not the index of a checkpoint"):
        read_hf(folder, MODEL)


def test_blockwise_fp8_is_read_as_the_numbers_it_stands_for(tmp_path):
    model = tiny_model(hidden_size=144, intermediate_size=264, num_hidden_layers=1)
    weights = random_init(model, InitConfig(), 1)
    stored = dict(weights)
    expected = dict(weights)
    for name, tensor in weights.items():
        if name.endswith("_proj.weight"):
            grid = [-(-n // 128) for n in tensor.shape]
            scales = torch.arange(1.0, 1 + math.prod(grid)).view(grid) / 64
            stored[name], stored[f"{name}_scale_inv"] = tensor.to(torch.float8_e4m3fn), scales
            factor = torch.kron(scales, torch.ones(128, 128))
            factor = factor[: tensor.shape[0], : tensor.shape[1]]
            expected[name] = stored[name].float() * factor
    save_file(stored, tmp_path / "model.safetensors")
    parallel = ParallelConfig(tp_size=4)
    layout = trainer_layout(model, parallel)
    ranks = [empty_storages(rank, torch.float32) for rank in layout.ranks]
    checkpoint = read_hf(tmp_path, model)
    for rank, storages in zip(layout.ranks, ranks, strict=True):
        load_tiles(rank, checkpoint.read, storages)
    assert num_different(ranks, trainer_storages(model, parallel, expected)) == 0

    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    stored["model.layers.0.mlp.down_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as refused:
        read_hf(tmp_path, model)
    assert "missing tensor model.layers.0.mlp.up_proj.weight_scale_inv [3, 2]" in str(refused.value)
    assert "down_proj.weight_scale_inv has shape [1, 1], expected [2, 3]" in str(refused.value)


def test_random_model_depends_on_names_and_seed_alone():
    one, again = random_init(MODEL, InitConfig(), 1), random_init(MODEL, InitConfig(), 1)
    deeper = MODEL.model_copy(update={"num_hidden_layers": 5})
    assert num_different([one], [again]) == 0
    embedding = "model.embed_tokens.weight"
    assert torch.equal(random_init(deeper, InitConfig(), 1)[embedding], one[embedding])
    assert not torch.equal(random_init(MODEL, InitConfig(), 2)[embedding], one[embedding])
    layers = [one[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_random_model_has_the_described_spread():
    model = tiny_model(hidden_size=64, intermediate_size=256, vocab_size=512, head_dim=16)
    init = InitConfig(embedding_std=0.5, matrix_gain=2.0)
    weights = random_init(model, init, 1)
    residual = math.sqrt(2 * model.num_hidden_layers)
    expected = {
        "model.embed_tokens.weight": 0.5,
        "model.layers.0.self_attn.q_proj.weight": 2 / math.sqrt(64),
        "model.layers.0.self_attn.o_proj.weight": 2 / math.sqrt(128) / residual,
        "model.layers.3.mlp.up_proj.weight": 2 / math.sqrt(64),
        "model.layers.3.mlp.down_proj.weight": 2 / math.sqrt(256) / residual,
    }
    for name, std in expected.items():
        assert float(weights[name].std()) == pytest.approx(std, rel=0.05), name
        assert abs(float(weights[name].mean())) < 0.05 * std, name
    assert all(bool((t == 1).all()) for n, t in weights.items() if "norm" in n)
