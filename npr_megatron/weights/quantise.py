"""FP8 with one scale per block of a matrix, the arithmetic fixed to the last bit.

::

    amax = max |w| over the block, exact in fp32
    s    = amax / 448, or that rounded up to a power of two; at least 2**-126; 1 where amax is 0
    q    = w / s in fp32 by true division, clamped to +-448, rounded to nearest even e4m3

Blocks lie on the grid of the whole canonical matrix, so a part of a matrix is quantised to the same
bytes as the whole if its scales are those of whole blocks. Every operation is a single correctly
rounded one, hence the CPU and CUDA give equal bytes; multiplying by ``1 / s`` would change some.
A block of zeros has scale 1 (not 0, which would divide 0 by 0). Scales are kept out of the
subnormal numbers, because not every kernel that multiplies by them keeps those.

Deliberately not here: who holds which part of a block (``layouts.served``), and the exchange
of amax between them (``weights.source_quantiser``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_megatron.weights.box import Index
from npr_megatron.weights.layouts.served import ScaleRule

QUANTISED = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite e4m3 number."""

_NUMBERS = torch.arange(256, dtype=torch.uint8).view(QUANTISED).float()
"""What each byte means."""
_SMALLEST_SCALE = 2.0**-126
_MANTISSA = 0x007F_FFFF
_SLAB_ELEMENTS_CPU = 2**20
"""Worked on at a time; five times faster than all at once, because temporaries stay in cache."""
_SLAB_ELEMENTS_GPU = 2**26
"""Enough to occupy a GPU, while temporaries stay below 1 GiB."""


def block_amax(values: Tensor, start: Index, block_size: int) -> Tensor:
    """Return the largest magnitude in each block that a box of a matrix touches.

    Args:
        values: [m, k] bf16 or fp32, the elements of the box.
        start: where the box begins in the matrix; blocks begin at multiples of ``block_size``.

    Returns:
        [blocks touched vertically, horizontally] fp32. Of a block that the box cuts, the part
        inside counts. NaN and infinity propagate.
    """
    grid = _grid_shape(start, values.shape, block_size)
    amax = torch.zeros(grid, dtype=torch.float32, device=values.device)
    for slab in _slabs(values, start, block_size):
        amax[slab.blocks] = slab.of(values).abs().amax(1).amax(2).float()
    return amax


def block_scales(amax: Tensor, rule: ScaleRule) -> Tensor:
    """Return the scales (fp32) of blocks with these largest magnitudes (fp32, finite)."""
    scales = (amax / LARGEST).clamp_(min=_SMALLEST_SCALE)
    if rule == "power_of_two":
        # Adding all mantissa bits carries into the exponent unless the mantissa is 0 already.
        scales = ((scales.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)
    return torch.where(amax == 0, 1.0, scales)


def quantise_blocks(
    values: Tensor, scales: Tensor, start: Index, block_size: int, into: Tensor
) -> None:
    """Quantise a box of a matrix with given scales, in place.

    Args:
        values: [m, k] bf16 or fp32, finite; the elements of the box.
        scales: fp32, of each block that the box touches, as ``block_amax`` orders them.
        start: where the box begins in the matrix.
        into: [m, k] e4m3; may be a view of a larger tensor.
    """
    for slab in _slabs(values, start, block_size):
        divisor = scales[slab.blocks][:, None, :, None]
        slab.of(into).copy_((slab.of(values).float() / divisor).clamp_(-LARGEST, LARGEST))


def quantise(weight: Tensor, block_size: int, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Return a whole matrix [M, K] in e4m3 and its scales [ceil(M / block), ceil(K / block)]."""
    scales = block_scales(block_amax(weight, (0, 0), block_size), rule)
    quantised = torch.empty(weight.shape, dtype=QUANTISED, device=weight.device)
    quantise_blocks(weight, scales, (0, 0), block_size, quantised)
    return quantised, scales


def dequantise(quantised: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Return ``q * s`` in fp32 of a whole matrix [M, K]."""
    weight = torch.empty(quantised.shape, dtype=torch.float32, device=quantised.device)
    for slab in _slabs(quantised, (0, 0), block_size):
        factor = scales[slab.blocks][:, None, :, None]
        torch.mul(_widened(slab.of(quantised)), factor, out=slab.of(weight))
    return weight


def _widened(quantised: Tensor) -> Tensor:
    """Return e4m3 numbers in fp32.

    torch converts them one by one on the CPU; looking each up among all 256 takes a quarter of the
    time.
    """
    if quantised.device.type != "cpu":
        return quantised.float()
    codes = quantised.view(torch.uint8).flatten().int()
    return _NUMBERS.index_select(0, codes).view(quantised.shape)


@dataclass(frozen=True, slots=True)
class _Band:
    """A run along one axis of a box that holds an equal part of each block it touches."""

    elements: slice
    blocks: slice
    """Relative to the first block touched."""
    width: int
    """Elements of each block."""


@dataclass(frozen=True, slots=True)
class _Slab:
    """A part of a box without ragged blocks."""

    rows: _Band
    columns: _Band

    @property
    def blocks(self) -> tuple[slice, slice]:
        return self.rows.blocks, self.columns.blocks

    def of(self, values: Tensor) -> Tensor:
        """Return a view [block rows, height, block columns, width] of the part of ``values``."""
        part = values[self.rows.elements, self.columns.elements]
        by_columns = part.unflatten(1, (-1, self.columns.width))
        return by_columns.unflatten(0, (-1, self.rows.width))


def _grid_shape(start: Index, shape: Index, block_size: int) -> Index:
    return tuple(
        -(-(first + length) // block_size) - first // block_size
        for first, length in zip(start, shape, strict=True)
    )


def _slabs(values: Tensor, start: Index, block_size: int) -> Iterator[_Slab]:
    height, width = values.shape
    at_once = _SLAB_ELEMENTS_CPU if values.device.type == "cpu" else _SLAB_ELEMENTS_GPU
    rows_at_once = max(1, at_once // (block_size * width)) * block_size
    for columns in _bands(start[1], width, block_size, limit=width):
        for rows in _bands(start[0], height, block_size, limit=rows_at_once):
            yield _Slab(rows, columns)


def _bands(start: int, length: int, block_size: int, limit: int) -> Iterator[_Band]:
    """Yield a cut first block, whole blocks (at most ``limit`` elements each time), a cut last."""
    offset = 0
    while offset < length:
        to_boundary = block_size - (start + offset) % block_size
        num_elements = min(to_boundary, length - offset)
        if num_elements == block_size:
            whole = min(length - offset, max(limit, block_size))
            num_elements = whole // block_size * block_size
        width = min(num_elements, block_size)
        block = (start + offset) // block_size - start // block_size
        yield _Band(
            slice(offset, offset + num_elements),
            slice(block, block + num_elements // width),
            width,
        )
        offset += num_elements
