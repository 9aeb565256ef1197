"""Engines on exported folders: weights as they are, or quantised on the way in."""

from __future__ import annotations

import pytest
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.errors import InputError, LayoutError
from npr_megatron.pipeline.local_engine import local_engine, open_engine
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.weights.checkpoints.hf import random_init, write_hf
from npr_megatron.weights.layouts.served import Quantisation
from npr_megatron.weights.quantise import dequantise, quantise
from tests.engines import request_for
from tests.structures import NUM_IDS, SMALL

MODEL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=128,
    vocab_size=NUM_IDS,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)


def write_model(folder, model, dequantised=False):
    """Write a random model; or one with the numbers that FP8 makes of its matrices."""
    tensors = random_init(model, InitConfig(embedding_std=0.3), seed=4)
    for name in Quantisation.of(model).shapes if dequantised else ():
        tensors[name] = dequantise(*quantise(tensors[name], 128, "exact"), 128)
    write_hf(folder, model, tensors)
    return folder


def answers(folder, weights):
    config = EngineConfig(num_kv_slots=1024, weights=weights)
    engine = open_engine(folder, config, SMALL)
    requests = [
        request_for(
            (20 + seed, 2), rollout=seed, seed=seed, mode=DecodeMode.SEQUENTIAL, max_new_tokens=40
        )
        for seed in range(4)
    ]
    return engine.generate(requests), engine


def test_fp8_answers_are_those_of_a_folder_with_the_dequantised_weights(tmp_path):
    folder = write_model(tmp_path / "trained", MODEL)
    quantised, engine = answers(folder, "fp8")
    expected, _ = answers(write_model(tmp_path / "rounded", MODEL, dequantised=True), "as_trained")
    trained, _ = answers(folder, "as_trained")
    for mine, same, other in zip(quantised, expected, trained, strict=True):
        assert mine.token_ids.tolist() == same.token_ids.tolist()
        assert mine.logprobs.tolist() == same.logprobs.tolist()
        assert mine.logprobs.tolist() != other.logprobs.tolist()
    kinds = {name: tensor.dtype for name, tensor in engine.weights.items()}
    assert kinds["layers.0.gate_up_proj.weight"] == torch.float8_e4m3fn
    assert kinds["layers.0.gate_up_proj.weight_scale_inv"] == torch.float32
    assert kinds["lm_head.weight"] == kinds["norm.weight"] == torch.float32


def test_a_model_whose_matrices_have_no_whole_blocks_is_refused_for_fp8(tmp_path):
    model = MODEL.model_copy(update={"head_dim": 16})  # keys begin at row 64 of their storage
    folder = write_model(tmp_path / "model", model)
    with pytest.raises(LayoutError, match="FP8 needs multiples of 128"):
        answers(folder, "fp8")
    assert answers(folder, "as_trained")[0]


def test_torchrun_does_not_cut_a_backend_that_starts_its_own_processes(tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    config = EngineConfig(backend="sglang")
    with (
        pytest.raises(InputError, match="without torchrun, with --tp-size 2"),
        local_engine(tmp_path, config, SMALL),
    ):
        pass
