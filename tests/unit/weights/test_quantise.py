"""FP8 blocks against an oracle that knows the 256 e4m3 numbers and one element at a time."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.weights.quantise import (
    block_amax,
    block_scales,
    dequantise,
    quantise,
    quantise_blocks,
)

RULES = ("exact", "power_of_two")


def e4m3(code: int) -> float:
    """The number that a non-negative e4m3 code stands for: 4 bits exponent, bias 7, 3 mantissa."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa / 8 * 2.0**-6
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


FINITE = [e4m3(code) for code in range(0x7F)]  # 0x7F is NaN
MIDPOINTS = [(low + high) / 2 for low, high in pairwise(FINITE)]


def nearest_code(value: np.float32) -> int:
    """Round to the nearest e4m3 number, ties to the even code; beyond the largest, the largest."""
    magnitude = float(abs(value))
    code = bisect_left(MIDPOINTS, magnitude)
    if code < len(MIDPOINTS) and MIDPOINTS[code] == magnitude:
        code += code % 2
    return code | (0x80 if np.signbit(value) else 0)


def slow_scale(amax: np.float32, rule: str) -> np.float32:
    if amax == 0:
        return np.float32(1)
    scale = np.float32(amax / np.float32(448))
    power = np.float32(2.0**-126)
    if rule == "exact":
        return max(scale, power)
    while power < scale:
        power *= np.float32(2)
    return power


def slow_quantise(weight: torch.Tensor, block: int, rule: str):
    """Return codes and scales, element by element."""
    values = weight.float().numpy()
    height, width = values.shape
    codes = np.zeros(values.shape, np.uint8)
    scales = np.zeros((math.ceil(height / block), math.ceil(width / block)), np.float32)
    for i, j in np.ndindex(*scales.shape):
        rows = range(i * block, min((i + 1) * block, height))
        columns = range(j * block, min((j + 1) * block, width))
        scales[i, j] = slow_scale(max(abs(values[r, c]) for r in rows for c in columns), rule)
        for r in rows:
            for c in columns:
                codes[r, c] = nearest_code(values[r, c] / scales[i, j])
    return codes, scales


def matrix(height: int, width: int, seed: int, dtype: torch.dtype = torch.float32):
    """Random numbers of many magnitudes, with zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(height, width, generator=generator)
    values *= 2.0 ** torch.randint(-20, 20, (height, width), generator=generator)
    values[torch.rand(height, width, generator=generator) < 0.05] = -0.0
    return values.to(dtype)


def codes_of(quantised: torch.Tensor):
    return quantised.view(torch.uint8).numpy()


def test_every_midpoint_and_its_neighbours_round_as_the_list_of_numbers_says():
    exact = np.array([*FINITE, *MIDPOINTS], np.float32)
    around = [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(1e9))]
    values = np.concatenate([*around, [464, 465, 480, 1e30, 1e-30]]).astype(np.float32)
    values = np.concatenate([values, -values])[None, :]
    into = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    quantise_blocks(torch.from_numpy(values), torch.ones(1, 1), (0, 0), values.size, into)
    assert codes_of(into)[0].tolist() == [nearest_code(value) for value in values[0]]


def test_codes_mean_what_torch_says_they_mean():
    codes = torch.arange(0x7F, dtype=torch.uint8).view(1, -1)
    assert dequantise(codes.view(torch.float8_e4m3fn), torch.ones(1, 1), 128)[0].tolist() == FINITE


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    block=st.integers(1, 6),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_are_those_of_the_slow_reference(height, width, block, rule, dtype, seed):
    weight = matrix(height, width, seed, dtype)
    quantised, scales = quantise(weight, block, rule)
    slow_codes, slow_scales = slow_quantise(weight, block, rule)
    assert np.array_equal(scales.numpy(), slow_scales)
    assert np.array_equal(codes_of(quantised), slow_codes)


@pytest.mark.parametrize("rule", RULES)
def test_matrices_larger_than_one_slab_with_ragged_edges(rule):
    weight = matrix(300, 9000, 1)
    quantised, scales = quantise(weight, 128, rule)
    assert scales.shape == (3, 71)
    padded = torch.zeros(384, 71 * 128)
    padded[:300, :9000] = weight
    blocks = padded.view(3, 128, 71, 128).transpose(1, 2)
    assert torch.equal(scales, block_scales(blocks.abs().amax((2, 3)), rule))
    by_element = scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :9000]
    expected = (weight / by_element).to(torch.float8_e4m3fn)
    assert np.array_equal(codes_of(quantised), codes_of(expected))
    assert torch.equal(dequantise(quantised, scales, 128), expected.float() * by_element)


def test_multiplying_by_the_reciprocal_would_give_other_bytes():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    quantised, scales = quantise(weight, 128, "exact")
    reciprocal = (1 / scales).repeat_interleave(128, 0).repeat_interleave(128, 1)
    wrong = codes_of((weight.float() * reciprocal).clamp(-448, 448).to(torch.float8_e4m3fn))
    assert 1e-5 < (wrong != codes_of(quantised)).mean() < 1e-2


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES), block=st.integers(1, 7))
def test_a_box_with_the_scales_of_whole_blocks_has_the_bytes_of_the_matrix(data, rule, block):
    shape = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    start = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    stop = tuple(data.draw(st.integers(a + 1, size)) for a, size in zip(start, shape, strict=True))
    box = tuple(map(slice, start, stop))
    touched = tuple(slice(a // block, -(-b // block)) for a, b in zip(start, stop, strict=True))
    weight = matrix(*shape, seed=data.draw(st.integers(0, 2**31)))
    quantised, scales = quantise(weight, block, rule)

    arena = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    quantise_blocks(weight[box], scales[touched], start, block, arena[box])
    assert np.array_equal(codes_of(arena[box]), codes_of(quantised[box]))

    outside_zeroed = torch.zeros(shape)
    outside_zeroed[box] = weight[box]
    partial = block_amax(outside_zeroed, (0, 0), block)[touched]
    assert torch.equal(block_amax(weight[box], start, block), partial)


@pytest.mark.parametrize("rule", RULES)
def test_zero_blocks_have_scale_one_and_keep_their_signs(rule):
    weight = torch.zeros(2, 4)
    weight[1, 3] = -0.0
    quantised, scales = quantise(weight, 2, rule)
    assert scales.tolist() == [[1.0, 1.0]]
    assert codes_of(quantised).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0x80]]


def test_largest_numbers_keep_finite_scales_and_smallest_normal_ones():
    huge, tiny = 1e38, 2.0**-149
    for rule in RULES:
        for amax in (huge, tiny):
            quantised, scales = quantise(torch.tensor([[amax, -amax]]), 128, rule)
            assert 2.0**-126 <= float(scales) < math.inf
            assert torch.isfinite(dequantise(quantised, scales, 128)).all()
    assert float(block_scales(torch.tensor([[tiny]]), "exact")) == 2.0**-126


def test_powers_of_two_are_the_next_ones_above():
    amax = torch.tensor([448.0, 449.0, 448.0 * 1024, 447.9, 1.0])
    assert block_scales(amax, "power_of_two").tolist() == [1.0, 2.0, 1024.0, 1.0, 2.0**-8]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_amax_shows_what_is_not_finite(wrong):
    weight = torch.zeros(4, 4)
    weight[3, 0] = wrong
    assert torch.isfinite(block_amax(weight, (0, 0), 2)).tolist() == [[True, True], [False, True]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_bytes_of_the_cpu(rule, dtype):
    weight = matrix(1000, 3000, 3, dtype)
    here, there = quantise(weight, 128, rule), quantise(weight.cuda(), 128, rule)
    assert torch.equal(here[1], there[1].cpu())
    assert np.array_equal(codes_of(here[0]), codes_of(there[0].cpu()))
    assert torch.equal(dequantise(*here, 128), dequantise(*there, 128).cpu())
