"""Experts of the engine against the sum written out, token by token and expert by expert."""

from __future__ import annotations

import pytest
import torch

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.engine.compute.experts import Experts
from npr_megatron.engine.compute.kernels import Kernels, kernels_for
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.errors import InputError
from npr_megatron.weights.quantise import (
    QUANTISED,
    block_amax,
    block_scales,
    dequantise,
    quantise_blocks,
)
from tests.engines import EXPERTS

CPU = torch.device("cpu")
HIDDEN, WIDTH = 32, 24
MOE = MoeConfig(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=WIDTH)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def storages_of(hidden: int = HIDDEN, width: int = WIDTH) -> dict[str, torch.Tensor]:
    return {
        "gate.weight": 2.0 * numbers(MOE.num_experts, hidden, seed=1),
        "experts.w13_weight": numbers(MOE.num_experts, 2 * width, hidden, seed=2),
        "experts.w2_weight": numbers(MOE.num_experts, hidden, width, seed=3),
    }


def kernels_of(dtype: torch.dtype) -> Kernels:
    return kernels_for(CPU, dtype, (4, 2), 1e-6)


def written_out(storages: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Every expert in float64, weighted by its share among the three likeliest."""
    router, gate_up, down = (storages[name].double() for name in storages)
    results = []
    for token in hidden.double():
        odds = (router @ token).exp()
        chosen = sorted(range(MOE.num_experts), key=lambda e: -float(odds[e]))[:3]
        total = sum(float(odds[e]) for e in chosen)
        result = torch.zeros_like(token)
        for e in chosen:
            gate, up = (gate_up[e] @ token).chunk(2)
            result += odds[e] / total * (down[e] @ (gate * gate.sigmoid() * up))
        results.append(result)
    return torch.stack(results)


@pytest.mark.parametrize("num_tokens", [1, 2, 57])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_get_the_weighted_sum_of_their_likeliest_experts(num_tokens, dtype) -> None:
    storages = {name: tensor.to(dtype) for name, tensor in storages_of().items()}
    hidden = 3.0 * numbers(num_tokens, HIDDEN, seed=num_tokens).to(dtype)
    experts = Experts(storages, "", MOE, kernels_of(dtype))
    shares, chosen = experts.route(hidden)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(-1), torch.ones(num_tokens))
    assert (shares.diff(dim=-1) <= 0).all()
    found = experts.compute(hidden, shares, chosen)
    expected = written_out(storages, hidden).to(dtype)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_no_token_reaches_an_expert_that_was_not_chosen() -> None:
    storages = storages_of()
    hidden = numbers(9, HIDDEN, seed=4)
    experts = Experts(storages, "", MOE, kernels_of(torch.float32))
    chosen = torch.tensor([[0, 4, 5]]).expand(9, -1)
    shares = torch.full((9, 3), 1 / 3)
    before = experts.compute(hidden, shares, chosen)
    for unused in (1, 2, 3):
        storages["experts.w13_weight"][unused] = torch.nan
    assert torch.equal(experts.compute(hidden, shares, chosen), before)
    storages["experts.w13_weight"][4] *= 2.0  # storages are live
    assert not torch.equal(experts.compute(hidden, shares, chosen), before)


def test_grouped_products_are_those_of_one_expert_after_another() -> None:
    storages = {name: tensor.bfloat16() for name, tensor in storages_of().items()}
    experts = Experts(storages, "", MOE, kernels_of(torch.bfloat16))
    assert not experts.is_grouped, "on a CPU the host is asked"
    inputs = 20.0 * numbers(20, HIDDEN, seed=5).bfloat16()
    owners = torch.tensor([0] * 7 + [2] * 1 + [3] * 10 + [5] * 2)  # experts without any, too
    grouped, apart = experts._grouped(inputs, owners), experts._apart(inputs, owners)
    torch.testing.assert_close(grouped, apart, atol=2e-2, rtol=2e-2)
    assert apart.float().std() > 0.5
    other = experts._grouped(inputs, owners.clone().fill_(1))
    assert (other - apart).abs().max() > 0.1


def test_fp8_experts_compute_with_what_their_blocks_stand_for() -> None:
    size, storages = 128, storages_of(hidden=128, width=128)
    served, plain = dict(storages), dict(storages)
    for name in ("experts.w13_weight", "experts.w2_weight"):
        values = torch.empty(storages[name].shape, dtype=QUANTISED)
        scales = []
        for number, matrix in enumerate(storages[name]):
            scales.append(block_scales(block_amax(matrix, (0, 0), size), "exact"))
            quantise_blocks(matrix, scales[-1], (0, 0), size, values[number])
        served[name], served[f"{name}_scale_inv"] = values, torch.stack(scales)
        plain[name] = torch.stack(
            [dequantise(v, s, size).float() for v, s in zip(values, scales, strict=True)]
        )
    hidden = 3.0 * numbers(11, 128, seed=6)
    found, expected = (
        (experts := Experts(each, "", MOE, kernels_of(torch.float32))).compute(
            hidden, *experts.route(hidden)
        )
        for each in (served, plain)
    )
    assert torch.equal(found, expected)


def test_routers_that_are_not_computed_here_are_refused() -> None:
    biased = MOE.model_copy(update={"has_expert_bias": True})
    model: ModelConfig = EXPERTS.model_copy(update={"family": "glm4_moe", "moe": biased})
    with pytest.raises(InputError, match=r"family glm4_moe.*use such a model"):
        EngineModel(model, num_slots=1, dtype=torch.float32, device=CPU)
