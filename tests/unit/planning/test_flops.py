"""Operations counted by formula against the list of parameters and against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.planning.flops import matmul_parameters, peak_tflops, training_flops
from npr_megatron.weights.names import EMBEDDING, canonical_parameters

DENSE = ModelConfig(
    num_hidden_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    vocab_size=64,
    tie_word_embeddings=False,
)
ALL_EXPERTS = DENSE.model_copy(
    update={
        "family": "qwen3_moe",
        "moe": MoeConfig(
            num_experts=4, num_experts_per_tok=4, moe_intermediate_size=8, num_dense_layers=1
        ),
    }
)


@pytest.mark.parametrize("model", [DENSE, ALL_EXPERTS], ids=["dense", "moe"])
def test_every_matrix_but_the_embedding_counts_once(model):
    matrices = [p for p in canonical_parameters(model) if len(p.shape) > 1 and p.name != EMBEDDING]
    sizes = [torch.Size(parameter.shape).numel() for parameter in matrices]
    assert matmul_parameters(model) == sum(sizes)


def test_a_tied_head_is_multiplied_with_all_the_same():
    assert matmul_parameters(DENSE.model_copy(update={"tie_word_embeddings": True})) == (
        matmul_parameters(DENSE)
    )


def test_only_chosen_experts_count():
    moe = ALL_EXPERTS.moe.model_copy(update={"num_experts_per_tok": 1})
    one = ALL_EXPERTS.model_copy(update={"moe": moe})
    expert, sparse_layers = 3 * 32 * 8, 2
    assert matmul_parameters(ALL_EXPERTS) - matmul_parameters(one) == 3 * expert * sparse_layers


def test_attention_counts_as_torch_counts_it():
    tokens, heads, dim = 24, DENSE.num_attention_heads, DENSE.head_dim
    query, key, value = (torch.ones(1, heads, tokens, dim, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (query @ key.transpose(-1, -2) @ value).sum().backward()
    all_pairs = training_flops(DENSE, 0, tokens * tokens)
    assert all_pairs == counter.get_total_flops() * DENSE.num_hidden_layers


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks_of_known_devices(device, peak):
    assert peak_tflops(device) == peak
