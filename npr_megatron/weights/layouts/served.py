"""Layouts of a model that is served in FP8: e4m3 matrices with one fp32 scale per block.

The scales of ``p`` are a parameter ``p_scale_inv`` of their own, a grid with one element per block
(the convention of DeepSeek's and Qwen's FP8 checkpoints). In a quantised layout they are tiles like
any other, so planner, verifier, digest and executors need to know nothing of FP8.

A trainer may cut a matrix anywhere, hence a block may straddle: several tiles, and often several
ranks, hold parts of it. Its scale then belongs to the tile that holds the block's first row and
first column, which keeps the tiles of the grid disjoint and covering; ``straddling_blocks`` tells
whose amax must be compared. An engine must hold whole blocks, or its kernels would scale wrongly.

Imports no torch. The arithmetic is in ``weights.quantise``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.tiles import Layout, Piece, RankLayout, Storage, Tile

ScaleRule = Literal["exact", "power_of_two"]
"""How a scale follows from amax; engines with UE8M0 scales need powers of two."""

_SCALES = "_scale_inv"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What is served in FP8, and how."""

    shapes: Mapping[str, Index]
    """The quantised parameters [out, in], by canonical name."""
    block_size: int = 128
    """Rows and columns of a block."""
    rule: ScaleRule = "exact"

    @classmethod
    def of(
        cls, model: ModelConfig, block_size: int = 128, rule: ScaleRule = "exact"
    ) -> Quantisation:
        """Quantise every projection and expert, as HF's FP8 checkpoints do.

        Embedding, head, norms and routers stay as they are.
        """
        shapes = {
            parameter.name: parameter.shape
            for parameter in canonical_parameters(model)
            if parameter.name.endswith("_proj.weight")
        }
        return cls(shapes, block_size, rule)

    def grid(self, parameter: str) -> Index:
        """Return the shape of the scales of ``parameter``."""
        return _blocks_in(self.shapes[parameter], self.block_size)


def scales_of(name: str) -> str:
    """Return the name of the scales of a quantised parameter or storage."""
    return f"{name}{_SCALES}"


def quantised_layout(
    layout: Layout, quantisation: Quantisation, *, may_straddle: bool = False
) -> Layout:
    """Return ``layout`` with its quantised parameters as e4m3 tiles and fp32 tiles of scales.

    Args:
        may_straddle: for sources: blocks may be cut, and the scales that a storage owns lie in
            ``<storage>_scale_inv`` in the order of its tiles. Otherwise, for engines and
            checkpoints, ``<storage>_scale_inv`` is the grid of the storage's own blocks, with the
            storage's leading axes.

    Raises:
        LayoutError: a block would be cut, or a storage is quantised in part only; lists every
            problem with the numbers of parts that are possible.
    """
    problems = [] if may_straddle else _cut_blocks(layout, quantisation)
    if problems:
        raise LayoutError("\n".join(problems))
    known: dict[int, RankLayout] = {}  # replicas are often the same object; keep them so
    for rank_layout in layout.ranks:
        if id(rank_layout) not in known:
            known[id(rank_layout)] = _quantised_rank(rank_layout, quantisation, may_straddle)
    return Layout(layout.kind, tuple(known[id(rank_layout)] for rank_layout in layout.ranks))


def owned_scales(box: Box, block_size: int) -> Box:
    """Return the blocks whose first row and column lie in ``box``; it may be empty."""
    return Box(_blocks_in(box.start, block_size), _blocks_in(box.stop, block_size))


def touched_blocks(box: Box, block_size: int) -> Box:
    """Return the blocks of which ``box`` holds at least a part."""
    start = tuple(first // block_size for first in box.start)
    return Box(start, _blocks_in(box.stop, block_size))


@dataclass(frozen=True, slots=True)
class SharedBlocks:
    """Blocks of which no holder can tell the amax alone."""

    parameter: str
    blocks: Box
    """In the grid of ``parameter``'s scales."""
    ranks: tuple[int, ...]
    """All that hold a part of each of these blocks."""


def straddling_blocks(layout: Layout, quantisation: Quantisation) -> tuple[SharedBlocks, ...]:
    """Return the blocks of a source layout for which amax must be exchanged, in a fixed order.

    A block cut between tiles is not among them where each of its holders holds all its parts.
    """
    held: defaultdict[str, defaultdict[Box, list[int]]]
    held = defaultdict(lambda: defaultdict(list))
    for rank, rank_layout in enumerate(layout.ranks):
        for tile in rank_layout.tiles:
            if tile.parameter in quantisation.shapes:
                held[tile.parameter][tile.box].append(rank)
    shared: list[SharedBlocks] = []
    known: dict[_Cuts, list[_Run]] = {}  # layers and experts of a rank are cut alike
    for parameter, holders in sorted(held.items()):
        shape, size = quantisation.shapes[parameter], quantisation.block_size
        if not all(_is_whole(box, shape, size) for box in holders):
            cuts = shape, tuple((box, tuple(ranks)) for box, ranks in holders.items())
            if cuts not in known:
                known[cuts] = list(_runs_shared(shape, dict(cuts[1]), size))
            shared += [SharedBlocks(parameter, blocks, ranks) for blocks, ranks in known[cuts]]
    return tuple(shared)


_Run = tuple[Box, tuple[int, ...]]
"""Blocks, and all ranks that hold parts of them."""
_Cuts = tuple[Index, tuple[_Run, ...]]
"""Shape of a matrix, boxes of it and their holders."""


def _runs_shared(shape: Index, holders: Mapping[Box, tuple[int, ...]], size: int) -> Iterator[_Run]:
    """Yield runs of blocks that the same ranks share.

    Between block boundaries next to a cut, all blocks are cut alike; so few runs are looked at.
    """
    rows, columns = (
        list(pairwise(sorted({edge for cut in cuts for edge in (cut // size, -(-cut // size))})))
        for cuts in ({c for box in holders for c in (box.start[a], box.stop[a])} for a in (0, 1))
    )
    for top, bottom in rows:
        for left, right in columns:
            blocks = Box((top, left), (bottom, right))
            elements = Box(
                (top * size, left * size),
                (min(bottom * size, shape[0]), min(right * size, shape[1])),
            )
            parts: defaultdict[int, int] = defaultdict(int)
            for box, ranks in holders.items():
                if (common := box.intersect(elements)) is not None:
                    for rank in ranks:
                        parts[rank] += common.num_elements
            if any(part != elements.num_elements for part in parts.values()):
                yield blocks, tuple(sorted(parts))


def _quantised_rank(
    rank_layout: RankLayout, quantisation: Quantisation, may_straddle: bool
) -> RankLayout:
    inside: defaultdict[str, list[Tile]] = defaultdict(list)
    for tile in rank_layout.tiles:
        inside[tile.storage].append(tile)
    storages: list[Storage] = []
    tiles: list[Tile] = []
    for storage in rank_layout.storages:
        held = inside[storage.name]
        tiles += held
        if not _is_quantised(storage, held, quantisation):
            storages.append(storage)
            continue
        scales, scale_tiles = (_stacked_scales if may_straddle else _scale_grid)(
            storage, held, quantisation.block_size
        )
        storages.append(replace(storage, dtype="fp8_e4m3"))
        if scale_tiles:
            storages.append(scales)
            tiles += scale_tiles
    return RankLayout(tuple(storages), tuple(tiles))


def _is_quantised(storage: Storage, tiles: Sequence[Tile], quantisation: Quantisation) -> bool:
    is_quantised = {tile.parameter in quantisation.shapes for tile in tiles}
    if is_quantised == {True} and storage.dtype is None:
        return True
    if True not in is_quantised:
        return False
    raise LayoutError(
        f"storage {storage.name} ({storage.dtype or 'no pinned dtype'}) holds "
        f"{sorted({tile.parameter for tile in tiles})}, of which only some can be quantised; "
        "quantise all or none of them"
    )


def _scale_grid(storage: Storage, tiles: Sequence[Tile], block_size: int) -> Piece:
    """Return the scales of a storage of whole blocks, in the places of their blocks."""
    name, axes = scales_of(storage.name), len(storage.shape) - 2
    shape = storage.shape[:axes] + _blocks_in(storage.shape[axes:], block_size)
    return Storage(name, shape, "fp32"), tuple(
        Tile(
            scales_of(tile.parameter),
            owned_scales(tile.box, block_size),
            name,
            tile.at[:axes] + _blocks_in(tile.at[axes:], block_size),
        )
        for tile in tiles
    )


def _stacked_scales(storage: Storage, tiles: Sequence[Tile], block_size: int) -> Piece:
    """Return the scales that the tiles of a storage own, on top of each other."""
    name, row, width = scales_of(storage.name), 0, 0
    scale_tiles: list[Tile] = []
    for tile in tiles:
        box = owned_scales(tile.box, block_size)
        if box.num_elements:
            scale_tiles.append(Tile(scales_of(tile.parameter), box, name, (row, 0)))
            row, width = row + box.shape[0], max(width, box.shape[1])
    return Storage(name, (row, width), "fp32"), tuple(scale_tiles)


def _cut_blocks(layout: Layout, quantisation: Quantisation) -> list[str]:
    """Return what keeps ranks from holding whole blocks in places where kernels look for them."""
    size = quantisation.block_size
    problems: dict[str, None] = {}
    for rank_layout in layout.ranks:
        for tile in rank_layout.tiles:
            shape = quantisation.shapes.get(tile.parameter)
            if shape is None:
                continue
            everywhere = _pattern(tile.parameter)
            if not _is_whole(tile.box, shape, size):
                part = " x ".join(map(str, tile.box.shape))
                problems[
                    f"{everywhere} {list(shape)} is cut into parts of {part}, FP8 needs whole "
                    f"blocks of {size} x {size}; cut it into {_possible_parts(shape, size)}"
                ] = None
            elif any(first % size for first in tile.at[-2:]):
                problems[
                    f"{everywhere} begins at {list(tile.at[-2:])} of {_pattern(tile.storage)}, FP8 "
                    f"needs multiples of {size}; its neighbour there is not one: serve the "
                    "weights' own dtype or smaller blocks"
                ] = None
    return list(problems)


def _is_whole(box: Box, shape: Index, block_size: int) -> bool:
    return not any(first % block_size for first in box.start) and not any(
        last % block_size and last != extent for last, extent in zip(box.stop, shape, strict=True)
    )


def _possible_parts(shape: Index, block_size: int) -> str:
    return " or ".join(
        f"{', '.join(map(str, _divisors(extent, block_size)))} equal parts along {axis}"
        for axis, extent in zip(("rows", "columns"), shape, strict=True)
    )


def _divisors(extent: int, block_size: int) -> list[int]:
    """Return the numbers of equal parts into which ``extent`` falls without cutting a block."""
    num_blocks, rest = divmod(extent, block_size)
    return [1] if rest else [n for n in range(1, num_blocks + 1) if num_blocks % n == 0]


def _blocks_in(extents: Index, block_size: int) -> Index:
    return tuple(-(-extent // block_size) for extent in extents)


def _pattern(name: str) -> str:
    """Return a name with its layer and expert numbers left open, so that one sentence does."""
    return re.sub(r"\b\d+\b", "*", name)
