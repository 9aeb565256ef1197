"""What two layouts must be like for a transfer between them; refusals name the parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npr_megatron.errors import LayoutError
from npr_megatron.weights.plans.intersect import Boxes, first_overlap
from npr_megatron.weights.plans.tile_table import PINNED_DTYPES, Ints, TileTable

_MAX_NAMED = 20


def require_dtypes(
    source_kind: str,
    have: TileTable,
    target_kind: str,
    want: TileTable,
    parameters: Sequence[str],
) -> None:
    """Require one dtype of each parameter that both sides hold: copies do not cast.

    Raises:
        LayoutError: the message lists every parameter.
    """
    held = np.zeros((len(parameters), len(PINNED_DTYPES)), np.bool_)
    wanted = held.copy()
    held[have.parameter, have.dtype] = True
    wanted[want.parameter, want.dtype] = True
    both = held.any(axis=1) & wanted.any(axis=1)
    problems = [
        f"{parameters[number]} is {_named(held[number])} in the {source_kind} layout and "
        f"{_named(wanted[number])} in the {target_kind} layout; a plan moves bytes and casts "
        "nothing, declare one dtype (quantise or cast at the source)"
        for number in np.flatnonzero(both & ((held | wanted).sum(axis=1) > 1)).tolist()
    ]
    _refuse(problems)


def require_disjoint(kind: str, boxes: Boxes, parameters: Sequence[str]) -> None:
    """Require distinct boxes of one parameter to be disjoint.

    Raises:
        LayoutError: two overlap without being equal.
    """
    if (overlap := first_overlap(boxes)) is not None:
        one, other = overlap
        raise LayoutError(
            f"{parameters[boxes.parameter[one]]}: {kind} boxes {_box(boxes, one)} and "
            f"{_box(boxes, other)} overlap in part, replicas must be equal boxes; cut both at the "
            "same places"
        )


def require_covered(
    source_kind: str,
    target_kind: str,
    want: TileTable,
    box_of_tile: Ints,
    found: Ints,
    parameters: Sequence[str],
) -> None:
    """Require that all elements of every target box were ``found`` in the source.

    Raises:
        LayoutError: the message lists what is missing, one tile per parameter.
    """
    needed = (want.stop - want.start).prod(axis=1)
    lacking = np.flatnonzero(found[box_of_tile] != needed)
    _, firsts = np.unique(want.parameter[lacking], return_index=True)
    problems = [
        f"{target_kind} rank {want.rank[tile]} needs {needed[tile]} elements of "
        f"{parameters[int(want.parameter[tile])]} {_span(want.start[tile], want.stop[tile])}, the "
        f"{source_kind} layout gives {found[box_of_tile[tile]]}; the layouts are of different "
        "models or a declaration is wrong"
        for tile in lacking[np.sort(firsts)]
    ]
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _MAX_NAMED} more"] if len(problems) > _MAX_NAMED else []
        raise LayoutError("\n".join([*problems[:_MAX_NAMED], *more]))


def _named(dtypes: Ints) -> str:
    names = [PINNED_DTYPES[number] or "of the weights' dtype" for number in np.flatnonzero(dtypes)]
    return " and ".join(names)


def _box(boxes: Boxes, index: int) -> str:
    axes = int(boxes.num_axes[index])
    return _span(boxes.start[index, -axes:], boxes.stop[index, -axes:])


def _span(start: Ints, stop: Ints) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"
