"""Linear layers whose weights are kept in FP8, one fp32 scale per block of 128 x 128.

Which storages those are, their shapes and their arithmetic belong to ``weights.layouts.served`` and
``weights.quantise``; here is only the product with them:

* Hopper GPUs multiply FP8 by FP8 (``torch.nn.functional.scaled_mm``): activations are quantised on
  the way, one scale per token and 128 channels, products are summed in fp32, results are bf16;
* every other device dequantises the matrix into the dtype of the activations first. That saves
  memory, not time, and equals the plain model with dequantised weights bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_megatron.engine.compute.dense import dense_product
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.layouts.served import Quantisation, scales_of
from npr_megatron.weights.quantise import (
    LARGEST,
    QUANTISED,
    block_amax,
    block_scales,
    dequantise,
    quantise_blocks,
)
from npr_megatron.weights.storages import ReadBox

_BLOCK = 128
_TOKEN_MULTIPLE = 16
"""cuBLAS wants aligned columns of scales; tokens are padded to a multiple of this."""
_SCALE_MULTIPLE = 4
"""cuBLAS reads the scales of a weight in rows of a multiple of this."""


class BlockScaled(NamedTuple):
    """A matrix ``values * scales``, both live storages."""

    values: Tensor
    """[M, K] e4m3."""
    scales: Tensor
    """[ceil(M / 128), ceil(K / 128)] fp32."""


Weight = Tensor | BlockScaled


def weight_of(name: str, storages: Mapping[str, Tensor]) -> Weight:
    """Return storage ``name``, with its scales where it has some."""
    scales = storages.get(scales_of(name))
    return storages[name] if scales is None else BlockScaled(storages[name], scales)


def linear(inputs: Tensor, weight: Weight) -> Tensor:
    """Return [T, M]: ``inputs`` [T, K] times the transpose of ``weight`` [M, K], in their dtype."""
    if isinstance(weight, Tensor):
        return dense_product(inputs, weight)
    height, width = weight.values.shape
    if _multiplies_fp8(inputs.device) and not (width % _BLOCK or height % _BLOCK):
        return scaled_product(inputs, weight)
    plain = dequantise(weight.values, weight.scales, _BLOCK)
    return dense_product(inputs, plain.to(inputs.dtype))


def scaled_product(inputs: Tensor, weight: BlockScaled) -> Tensor:
    """Return what :func:`linear` does, by one FP8 matrix product; K and M are multiples of 128.

    Layouts of the scales are those of cuBLAS: [T, K / 128] with tokens adjacent for the
    activations; for the weight the grid, its rows padded to a multiple of 4, transposed.
    """
    num_tokens = len(inputs)
    padded = F.pad(inputs, (0, 0, 0, -num_tokens % _TOKEN_MULTIPLE))
    values, scales = quantise_tokens(padded)
    grid = F.pad(weight.scales, (0, -weight.scales.shape[1] % _SCALE_MULTIPLE))
    product = F.scaled_mm(
        values,
        weight.values.t(),
        scale_a=scales,
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=grid.t(),
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return product[:num_tokens].to(inputs.dtype)


def quantise_tokens(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return [T, K] activations in e4m3 and their scales [T, K / 128] fp32, tokens adjacent."""
    groups = inputs.float().unflatten(-1, (-1, _BLOCK))
    scales = block_scales(groups.abs().amax(-1), "exact")
    values = (groups / scales[..., None]).clamp_(-LARGEST, LARGEST).to(QUANTISED)
    return values.flatten(-2), scales.t().contiguous().t()


@cache
def _multiplies_fp8(device: torch.device) -> bool:
    """Whether torch has the block-scaled product there: Hopper, cuBLAS of CUDA 12.9 or later."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(map(int, torch.version.cuda.split(".")[:2]))
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)


def quantising_reader(read: ReadBox, quantisation: Quantisation) -> ReadBox:
    """Return a reader of what ``read`` reads, served in FP8: values and scales, made on the way.

    Boxes are of whole blocks, as those of an engine's layout. The bytes are those that quantising
    whole matrices gives. A matrix is read twice, for its values and its scales.
    """
    owners = {scales_of(parameter): parameter for parameter in quantisation.shapes}
    size = quantisation.block_size

    def scales_in(parameter: str, elements: Box) -> tuple[Tensor, Tensor]:
        values = read(parameter, elements)
        amax = block_amax(values, elements.start, size)
        return values, block_scales(amax, quantisation.rule)

    def read_served(parameter: str, box: Box) -> Tensor:
        if parameter in owners:
            shape = quantisation.shapes[owners[parameter]]
            return scales_in(owners[parameter], _elements_of(box, shape, size))[1]
        if parameter not in quantisation.shapes:
            return read(parameter, box)
        values, scales = scales_in(parameter, box)
        quantised = torch.empty(values.shape, dtype=QUANTISED, device=values.device)
        quantise_blocks(values, scales, box.start, size, quantised)
        return quantised

    return read_served


def _elements_of(blocks: Box, shape: Index, size: int) -> Box:
    """Return the elements of ``blocks`` of a matrix of ``shape``."""
    stop = tuple(min(last * size, end) for last, end in zip(blocks.stop, shape, strict=True))
    return Box(tuple(first * size for first in blocks.start), stop)
