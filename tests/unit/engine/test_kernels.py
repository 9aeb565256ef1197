"""Compiled loops against the same operations in torch, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npr_megatron.engine.compute import host_kernels
from npr_megatron.engine.compute.kernels import HostKernels, TorchKernels, kernels_for

_HEADS = (6, 2)
_EPS = 1e-6
_CPU = torch.device("cpu")


def _both() -> tuple[HostKernels, TorchKernels]:
    return HostKernels(_HEADS, _EPS), TorchKernels(_HEADS, _EPS, _CPU)


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", [1, 2, 37])
@pytest.mark.parametrize("width", [8, 64, 130])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_norm_and_gate_equal_those_of_torch(num_rows: int, width: int, scale: float) -> None:
    host, reference = _both()
    hidden, weight = scale * _numbers(num_rows, width), _numbers(width, seed=1)
    expected = reference.norm(hidden.double(), weight.double()).float()
    torch.testing.assert_close(host.norm(hidden, weight), expected, rtol=2e-6, atol=1e-7)
    expected = reference.gate(hidden.double()).float()
    torch.testing.assert_close(host.gate(hidden), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_turned_heads_equal_those_of_torch_and_values_stay(size: int) -> None:
    host, reference = _both()
    heads, fused = _numbers(5, sum(_HEADS) + 2, size), _numbers(3, 2, size, seed=1)
    angles = _numbers(5, 1, size // 2, seed=2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    expected = heads.double()
    norms = reference.head_norms(fused.double())[1]
    reference.turn(expected, norms, cos.double(), signed_sin.double())
    turned = heads.clone()
    host.turn(turned, host.head_norms(fused)[1], cos, signed_sin)
    torch.testing.assert_close(turned, expected.float(), rtol=2e-6, atol=1e-6)
    assert torch.equal(turned[:, sum(_HEADS) :], heads[:, sum(_HEADS) :])


def test_heads_without_norms_are_rotated_only() -> None:
    host, reference = _both()
    heads, angles = _numbers(5, sum(_HEADS) + 2, 16), _numbers(5, 1, 8, seed=2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    low, high = heads[:, : sum(_HEADS)].chunk(2, dim=-1)
    rotated = torch.cat(
        (low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), -1
    )
    for kernels in (host, reference):
        turned = heads.clone()
        kernels.turn(turned, None, cos, signed_sin)
        torch.testing.assert_close(turned[:, : sum(_HEADS)], rotated, rtol=2e-6, atol=1e-6)
        assert torch.equal(turned[:, sum(_HEADS) :], heads[:, sum(_HEADS) :])


def test_what_is_no_number_stays_none() -> None:
    """So broken weights are noticed, however compilers reorder."""
    hidden = _numbers(4, 16)
    hidden[1, 3], hidden[2, 5] = torch.nan, torch.inf
    host, reference = _both()
    weight = torch.ones(16)
    for ours, theirs in (
        (host.norm(hidden, weight), reference.norm(hidden, weight)),
        (host.gate(hidden), reference.gate(hidden)),
    ):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours[1].isnan().any()
        assert ours[0].isfinite().all()
        assert ours[3].isfinite().all()


def test_nan_in_a_key_or_a_value_reaches_who_reads_it_and_nobody_else() -> None:
    cache, heads = _numbers(6, 4, 8).numpy(), _numbers(3, 6, 8, seed=1).numpy()
    cache[2, 0, 1], cache[3, 3, 2] = np.nan, np.nan
    keys, lengths = np.array([[1, 2, 0], [1, 3, 4], [1, 4, 5]]), np.array([2, 3, 3])
    out = np.zeros((3, 2, 8), np.float32)
    host_kernels.attend(heads, cache, keys, lengths, np.float32(1.0), out)
    assert np.isnan(out).any(axis=(1, 2)).tolist() == [True, True, False]


def test_the_exponential_is_good_to_single_precision() -> None:
    scores = np.linspace(-86.0, 86.0, 100_001, dtype=np.float32)
    gate_up = np.stack([scores, np.ones_like(scores)], axis=1)
    out = np.empty((len(scores), 1), np.float32)
    host_kernels.gate(gate_up, out)
    exact = scores.astype(np.float64) / (1.0 + np.exp(-scores.astype(np.float64)))
    assert np.abs(out[:, 0] / np.where(exact == 0.0, 1.0, exact) - (exact != 0.0)).max() < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_single_precision_on_a_cpu_is_compiled(dtype: torch.dtype) -> None:
    found = kernels_for(_CPU, dtype, _HEADS, _EPS)
    assert isinstance(found, HostKernels) == (dtype == torch.float32)
