"""Proof that a plan is right, from the declarations alone.

Independent of the planner: no shared geometry, no notion of replicas or balance. It asks of every
copy which canonical elements its bytes are at the source and which they must be at the target, and
of every target storage whether its elements are written exactly once. Interval arithmetic only, so
a plan for a large model is checked without a tensor or a loop over elements.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from npr_megatron.weights.plan import Copy, TransferPlan
from npr_megatron.weights.tiles import Layout, Tile

_Intervals = tuple[tuple[int, int], ...]
_Place = tuple[int, str]


def verify_transfer(plan: TransferPlan, source: Layout, target: Layout) -> list[str]:
    """Return what is wrong with ``plan``, one sentence each; empty means proven correct.

    Proven are: every target element under a tile is written exactly once, no other element is
    written, and every element comes from a tile that holds that same canonical element.
    """
    problems: list[str] = []
    if plan.source_id != source.layout_id:
        problems.append(f"the plan is for source layout {plan.source_id}, not {source.layout_id}")
    if plan.target_id != target.layout_id:
        problems.append(f"the plan is for target layout {plan.target_id}, not {target.layout_id}")
    source_shapes, source_tiles = _places(source)
    target_shapes, target_tiles = _places(target)
    written: defaultdict[_Place, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        there = (copy.source_rank, copy.source_storage)
        here = (copy.target_rank, copy.target_storage)
        outside = [
            f"{copy} leaves {side} storage {place}"
            for side, place, shapes, start in (
                ("source", there, source_shapes, copy.source_start),
                ("target", here, target_shapes, copy.target_start),
            )
            if not _inside(start, copy.shape, shapes.get(place))
        ]
        problems += outside
        if not outside:
            problems += _same_elements(copy, source_tiles[there], target_tiles[here])
            written[here].append(copy)
    for place, tiles in target_tiles.items():
        problems += _written_once(place, tiles, written[place])
    return problems


def _places(layout: Layout) -> tuple[dict[_Place, tuple[int, ...]], dict[_Place, list[Tile]]]:
    shapes: dict[_Place, tuple[int, ...]] = {}
    tiles: dict[_Place, list[Tile]] = {}
    for rank, rank_layout in enumerate(layout.ranks):
        for storage in rank_layout.storages:
            shapes[(rank, storage.name)] = storage.shape
            tiles[(rank, storage.name)] = []
        for tile in rank_layout.tiles:
            tiles[(rank, tile.storage)].append(tile)
    return shapes, tiles


def _inside(start: Sequence[int], shape: Sequence[int], whole: Sequence[int] | None) -> bool:
    if whole is None or not len(start) == len(shape) == len(whole):
        return False
    return all(a >= 0 and n > 0 and a + n <= w for a, n, w in zip(start, shape, whole, strict=True))


def _same_elements(
    copy: Copy, source_tiles: Iterable[Tile], target_tiles: Iterable[Tile]
) -> list[str]:
    """Check each part of ``copy`` that lies in one target tile against the source's tiles.

    A tile maps storage to canonical coordinates by a shift. Source and target agree on an element
    if it has the same parameter and the same canonical coordinates on both sides.
    """
    move = _minus(copy.source_start, copy.target_start)
    read = _span(copy.source_start, copy.shape)
    wrong: list[str] = []
    for want in target_tiles:
        part = _common(_span(copy.target_start, copy.shape), _place_of(want))
        if part is None:
            continue
        shift = _minus(_minus(want.box.start, want.at), move)
        part_at_source = tuple((a + m, b + m) for (a, b), m in zip(part, move, strict=True))
        found = 0
        for have in source_tiles:
            if have.parameter == want.parameter and _minus(have.box.start, have.at) == shift:
                common = _common(_common(part_at_source, _place_of(have)), read)
                found += _volume(common)
        if found != _volume(part):
            wrong.append(
                f"{copy} brings {found} of {_volume(part)} right elements of {want.parameter}"
            )
    return wrong


def _written_once(place: _Place, tiles: Sequence[Tile], copies: Sequence[Copy]) -> list[str]:
    spans = sorted(_span(copy.target_start, copy.shape) for copy in copies)
    problems = [
        f"target storage {place}: {spans[index]} and {other} are both written"
        for index in range(len(spans))
        for other in _until(spans[index + 1 :], spans[index][0][1])
        if _common(spans[index], other) is not None
    ]
    total = 0
    for tile in tiles:
        covered = sum(_volume(_common(_place_of(tile), span)) for span in spans)
        wanted = _volume(_place_of(tile))
        total += wanted
        if covered != wanted:
            problems.append(
                f"target storage {place}: {covered} of {wanted} elements of {tile.parameter} "
                f"{tile.box} are written"
            )
    if (volume := sum(map(_volume, spans))) > total:
        problems.append(f"target storage {place}: {volume} elements written, {total} declared")
    return problems


def _until(spans: Iterable[_Intervals], stop: int) -> Iterable[_Intervals]:
    """Yield the leading spans that begin before ``stop`` on the first axis."""
    for span in spans:
        if span[0][0] >= stop:
            return
        yield span


def _span(start: Sequence[int], shape: Sequence[int]) -> _Intervals:
    return tuple((a, a + n) for a, n in zip(start, shape, strict=True))


def _place_of(tile: Tile) -> _Intervals:
    """Return the intervals of the storage that ``tile`` fills."""
    return tuple(
        (at, at + stop - start)
        for at, start, stop in zip(tile.at, tile.box.start, tile.box.stop, strict=True)
    )


def _common(one: _Intervals | None, other: _Intervals) -> _Intervals | None:
    if one is None:
        return None
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(a < b for a, b in both) else None


def _volume(span: _Intervals | None) -> int:
    return 0 if span is None else math.prod(b - a for a, b in span)


def _minus(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(one, other, strict=True))
