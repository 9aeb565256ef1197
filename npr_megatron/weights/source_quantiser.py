"""FP8 weights made where the weights are: each source rank quantises its own tiles, once.

A rank looks at its tiles, compares amax of the blocks it shares with others (one collective maximum
over one flat vector), and writes e4m3, scales and everything that is not quantised straight into
the storages it is given, usually those of an arena. Engines receive exactly the bytes that
quantising whole matrices would give, however the trainer cuts them. What is not quantised is cast
to the dtype of its destination by torch, nearest even; matrices are quantised from the trainer's
own dtype, with no cast between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.errors import DivergenceError, EnvironmentFault
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.layouts.served import (
    Quantisation,
    ScaleRule,
    SharedBlocks,
    scales_of,
    straddling_blocks,
    touched_blocks,
)
from npr_megatron.weights.quantise import block_amax, block_scales, quantise_blocks
from npr_megatron.weights.storages import check_storages, tile_view
from npr_megatron.weights.tiles import Layout, RankLayout, Tile

AllMax = Callable[[Tensor], None]
"""Replaces a vector, in place, by its maximum over all source ranks."""


def all_max_over(process_group: dist.ProcessGroup, timeout_s: float) -> AllMax:
    """Return the maximum over the ranks of ``process_group``, all of which must call it.

    It raises EnvironmentFault if the others do not within ``timeout_s``.
    """

    def all_max(vector: Tensor) -> None:
        try:
            work = dist.all_reduce(vector, dist.ReduceOp.MAX, group=process_group, async_op=True)
            if work is not None:
                work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise EnvironmentFault(
                f"amax of {vector.numel() - 1} shared blocks was not exchanged within "
                f"{timeout_s} s ({error}); a rank is gone or stuck, publish again"
            ) from error

    return all_max


@dataclass(frozen=True, slots=True)
class Maxima:
    """Amax of all blocks that a rank touches."""

    grids: Mapping[str, Tensor]
    """By parameter, [block rows, block columns] fp32; all blocks around its tiles here."""
    shared: Tensor
    """[shared blocks + 1] fp32, to be maximised over all ranks before use. The last element is
    positive where a weight is not finite, so that all ranks refuse together."""


class SourceQuantiser:
    """Writes the served storages of one source rank."""

    def __init__(
        self,
        layout: Layout,
        served: Layout,
        quantisation: Quantisation,
        rank: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """Prepare ``rank``, whose storages are on ``device``.

        ``served`` is ``layout`` quantised (``may_straddle=True``). A rank may hold nothing.
        """
        self._device = device
        self._layout, self._served = layout.ranks[rank], served.ranks[rank]
        self._block_size = quantisation.block_size
        self._rule: ScaleRule = quantisation.rule
        self._tiles = _tiles_by_parameter(self._layout, quantisation.shapes)
        scales = [scales_of(parameter) for parameter in self._tiles]
        self._scale_tiles = _tiles_by_parameter(self._served, scales)
        self._grids = {
            parameter: _around([touched_blocks(tile.box, self._block_size) for tile in tiles])
            for parameter, tiles in self._tiles.items()
        }
        straddling = straddling_blocks(layout, quantisation)
        self._num_shared = sum(shared.blocks.num_elements for shared in straddling)
        self._shared = tuple(_shared_here(straddling, rank))

    def quantise(
        self, storages: Mapping[str, Tensor], into: Mapping[str, Tensor], all_max: AllMax
    ) -> None:
        """Write this rank's served storages; all source ranks call it together.

        Args:
            storages: what the trainer holds, of the source layout; not modified.
            into: filled in place; of the served layout, in the dtype of the engines.

        Raises:
            DivergenceError: weights are not finite, here or on another rank; ``into`` is untouched.
            LayoutError: ``storages`` or ``into`` are not laid out as declared.
            EnvironmentFault: the other ranks did not call in time.
        """
        check_storages(self._layout, storages)
        check_storages(self._served, into)
        maxima = self.measure(storages)
        all_max(maxima.shared)
        self.write(storages, maxima, into)

    @torch.no_grad()
    def measure(self, storages: Mapping[str, Tensor]) -> Maxima:
        """Return amax of this rank's parts of blocks: the work before the exchange."""
        grids: dict[str, Tensor] = {}
        for parameter, tiles in self._tiles.items():
            around = self._grids[parameter]
            grid = torch.zeros(around.shape, dtype=torch.float32, device=self._device)
            for tile in tiles:
                touched = touched_blocks(tile.box, self._block_size)
                region = grid[_inside(around, touched)]
                amax = block_amax(tile_view(tile, storages), tile.box.start, self._block_size)
                torch.maximum(region, amax, out=region)
            grids[parameter] = grid
        shared = torch.zeros(self._num_shared + 1, dtype=torch.float32, device=self._device)
        for parameter, blocks, offset in self._shared:
            part = grids[parameter][_inside(self._grids[parameter], blocks)]
            shared[offset : offset + blocks.num_elements] = part.flatten().nan_to_num(
                nan=torch.inf, posinf=torch.inf
            )
        shared[-1] = float(bool(_not_finite(grids)))
        return Maxima(grids, shared)

    @torch.no_grad()
    def write(
        self, storages: Mapping[str, Tensor], maxima: Maxima, into: Mapping[str, Tensor]
    ) -> None:
        """Fill ``into``; uses up ``maxima``, whose shared part has been exchanged.

        Raises:
            DivergenceError: as ``quantise``.
        """
        if maxima.shared[-1] > 0:
            raise DivergenceError(
                "weights were to be quantised that are not finite: "
                + (", ".join(_not_finite(maxima.grids)) or "those of another source rank")
                + "; training is broken, restart from the last checkpoint"
            )
        for parameter, blocks, offset in self._shared:
            amax = maxima.shared[offset : offset + blocks.num_elements].view(blocks.shape)
            maxima.grids[parameter][_inside(self._grids[parameter], blocks)] = amax
        quantised = {tile.storage for tiles in self._tiles.values() for tile in tiles}
        for name, storage in storages.items():
            if name not in quantised:
                into[name].copy_(storage)
        for parameter in self._tiles:
            scales = block_scales(maxima.grids[parameter], self._rule)
            self._write_parameter(parameter, scales, storages, into)

    def _write_parameter(
        self,
        parameter: str,
        scales: Tensor,
        storages: Mapping[str, Tensor],
        into: Mapping[str, Tensor],
    ) -> None:
        around, size = self._grids[parameter], self._block_size
        for tile in self._tiles[parameter]:
            touched = scales[_inside(around, touched_blocks(tile.box, size))]
            values, target = tile_view(tile, storages), tile_view(tile, into)
            quantise_blocks(values, touched, tile.box.start, size, target)
        for tile in self._scale_tiles.get(scales_of(parameter), ()):
            tile_view(tile, into).copy_(scales[_inside(around, tile.box)])


def _tiles_by_parameter(
    rank_layout: RankLayout, parameters: Iterable[str]
) -> dict[str, tuple[Tile, ...]]:
    wanted = frozenset(parameters)
    tiles: defaultdict[str, list[Tile]] = defaultdict(list)
    for tile in rank_layout.tiles:
        if tile.parameter in wanted:
            tiles[tile.parameter].append(tile)
    return {parameter: tuple(held) for parameter, held in tiles.items()}


def _shared_here(straddling: Sequence[SharedBlocks], rank: int) -> Iterator[tuple[str, Box, int]]:
    """Yield parameter, blocks and offset in the exchanged vector of what ``rank`` shares."""
    offset = 0
    for shared in straddling:
        if rank in shared.ranks:
            yield shared.parameter, shared.blocks, offset
        offset += shared.blocks.num_elements


def _around(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that holds all ``boxes``."""
    return Box(
        tuple(map(min, zip(*(box.start for box in boxes), strict=True))),
        tuple(map(max, zip(*(box.stop for box in boxes), strict=True))),
    )


def _inside(around: Box, blocks: Box) -> tuple[slice, ...]:
    """Return the index expression of ``blocks`` in a tensor that begins where ``around`` does."""
    origin: Index = (0,) * len(around.start)
    return blocks.moved(around.start, origin).slices


def _not_finite(grids: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters with a block that is not finite; one wait for the device."""
    if not grids:
        return []
    is_finite = torch.stack([torch.isfinite(grid).all() for grid in grids.values()]).tolist()
    return [parameter for parameter, good in zip(grids, is_finite, strict=True) if not good]
