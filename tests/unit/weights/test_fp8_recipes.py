"""How training recipes scale to FP8, written out slowly, against the quantiser of served weights.

TransformerEngine multiplies by ``448 / amax`` where the quantiser divides by ``amax / 448``; apart
from that they must mean the same numbers, or engines would serve other weights than were trained.
Powers of two are what the block recipes use by default, e8m0 what mxfp8 stores.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.weights.quantise import (
    LARGEST,
    block_scales,
    dequantise,
    quantise,
    quantise_blocks,
)
from tests.unit.weights.test_quantise import FINITE, codes_of, matrix, nearest_code

WHOLE = 10**6
"""A block larger than any matrix here: one scale for each tensor."""


def trained_scale(amax: np.float32, *, power_of_two: bool) -> np.float64:
    """The factor that TransformerEngine multiplies by: fp32, rounded down to a power of two."""
    if amax == 0:
        return np.float64(1)
    scale = np.float32(LARGEST) / amax
    return np.float64(2.0 ** (math.frexp(scale)[1] - 1) if power_of_two else scale)


def trained_codes(values: np.ndarray, scale: np.float64) -> list[int]:
    scaled = (values.astype(np.float32).ravel() * np.float32(scale)).astype(np.float32)
    return [nearest_code(value) for value in scaled]


def amax_of(values: torch.Tensor) -> np.float32:
    return values.float().abs().max().numpy()


@settings(max_examples=300, deadline=None)
@given(st.integers(0x0C00_0000, 0x7200_0000))
def test_power_of_two_scales_are_those_of_training(bits):
    """From 2**-103 to 2**101."""
    require_equal_scale(np.array(bits, np.uint32).view(np.float32))


@pytest.mark.parametrize("octave", [-20, 0, 7])
def test_they_are_so_next_to_where_they_change(octave):
    """Although one side rounds ``448 / amax`` and the other ``amax / 448``."""
    edge = np.float32(LARGEST * 2.0**octave)
    below, above = (np.nextafter(edge, np.float32(end)) for end in (0, np.inf))
    assert [require_equal_scale(amax) for amax in (below, edge, above)] == [
        2.0**octave,
        2.0**octave,
        2.0 ** (octave + 1),
    ]


def require_equal_scale(amax: np.float32) -> float:
    (scale,) = block_scales(torch.tensor([float(amax)]), "power_of_two").tolist()
    assert scale == 1 / trained_scale(amax, power_of_two=True)
    return scale


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_square_blocks_have_the_codes_of_blockwise_training(rows, columns, seed):
    block = 4
    weight = matrix(rows * block, columns * block, seed, torch.bfloat16)
    codes, scales = quantise(weight, block, "power_of_two")
    for i, j in np.ndindex(rows, columns):
        part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
        scale = trained_scale(amax_of(weight[part]), power_of_two=True)
        assert float(scales[i, j]) == 1 / scale
        expected = trained_codes(weight[part].float().numpy(), scale)
        assert codes_of(codes[part]).ravel().tolist() == expected


@pytest.mark.parametrize(("width", "recipe"), [(128, "blockwise"), (32, "mxfp8")])
def test_rows_of_blocks_have_the_codes_of_activations_and_of_mxfp8(width, recipe):
    values = matrix(3, 2 * width, 5, torch.bfloat16)
    for row in values:
        codes, scales = quantise(row[None], width, "power_of_two")
        for block, scale in enumerate(scales[0]):
            part = row[block * width : (block + 1) * width]
            factor = trained_scale(amax_of(part), power_of_two=True)
            assert float(scale) == 1 / factor
            found = codes_of(codes)[0, block * width : (block + 1) * width]
            assert found.tolist() == trained_codes(part.float().numpy(), factor)
        if recipe == "mxfp8":
            assert torch.equal(scales.to(torch.float8_e8m0fnu).float(), scales)


def test_e8m0_holds_every_power_of_two_scale_and_no_other():
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-100, 1.0, 447.0, 449.0, 3e38])
    powers, exact = (block_scales(amax, rule) for rule in ("power_of_two", "exact"))
    assert torch.equal(powers.to(torch.float8_e8m0fnu).float(), powers)
    assert not torch.equal(exact.to(torch.float8_e8m0fnu).float(), exact)


def test_one_scale_for_a_tensor_is_the_current_scaling_but_for_ties():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    codes, scales = quantise(weight, WHOLE, "exact")
    assert scales.shape == (1, 1)
    scale = trained_scale(amax_of(weight), power_of_two=False)
    assert float(scales) == pytest.approx(1 / scale, rel=2**-23)
    expected = np.array(trained_codes(weight.float().numpy(), scale)).reshape(256, 256)
    apart = np.abs(codes_of(codes).astype(int) - expected)
    assert apart.max() <= 1, "another neighbour of a tie at most"
    assert (apart > 0).mean() < 1e-3


@pytest.mark.parametrize("growth", [0.5, 1.0, 4.0, 1e6])
def test_a_tensor_that_outgrew_its_history_saturates(growth):
    """Delayed scaling: the scale is that of the largest magnitude of the passes before."""
    history = [matrix(4, 64, seed).clamp(-100, 100) for seed in range(3)]
    largest = max(amax_of(values) for values in history)
    scale = np.float64(np.float32(LARGEST) / largest)
    values = history[0] * (float(largest) * growth / float(amax_of(history[0])))
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    quantise_blocks(values, torch.tensor([[np.float32(1 / scale)]]), (0, 0), WHOLE, codes)
    meant = codes.float().numpy().astype(np.float64) / scale
    reference = np.clip(values.numpy().astype(np.float64), -largest, largest)
    step = np.maximum(np.abs(reference) * 2.0**-4, FINITE[1] / 2 / scale)
    assert (np.abs(meant - reference) <= step * (1 + 1e-6)).all()
    assert np.abs(meant).max() <= largest * (1 + 1e-6)
    assert np.isfinite(meant).all(), "e4m3 has no infinity"


def test_nan_stays_nan_and_is_no_scale():
    values = torch.tensor([[math.nan, 1.0]])
    codes = torch.empty(1, 2, dtype=torch.float8_e4m3fn)
    quantise_blocks(values, torch.ones(1, 1), (0, 0), WHOLE, codes)
    assert codes_of(codes).tolist() == [[0x7F, 0x38]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**31))
def test_weights_that_are_fp8_already_are_published_as_they_are(height, width, block, seed):
    """What is trained in blocks with powers of two is exact in bf16, and quantises to itself."""
    codes, scales = quantise(matrix(height, width, seed), block, "power_of_two")
    trained = dequantise(codes, scales, block)
    published = trained.bfloat16()
    assert torch.equal(published.float(), trained)
    again = dequantise(*quantise(published, block, "power_of_two"), block)
    assert torch.equal(again, trained)


def test_exact_scales_keep_the_codes_of_weights_that_are_fp8_already():
    codes, scales = quantise(matrix(300, 300, 6), 128, "exact")
    again, _ = quantise(dequantise(codes, scales, 128), 128, "exact")
    assert np.array_equal(codes_of(again), codes_of(codes))
