"""Where two models differ: parameter by parameter, by digest, whatever their layouts and formats.

Both sides are read once, in canonical coordinates and in bands of rows, so memory stays small. The
digest of a parameter is of its bits: the same values in another dtype are different. Where digests
differ, the values are compared as fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.chunking import row_bands
from npr_megatron.weights.checkpoints.folders import open_checkpoint
from npr_megatron.weights.checkpoints.gather import Gather, Source
from npr_megatron.weights.checkpoints.live_run import LiveRun, is_run_folder
from npr_megatron.weights.checkpoints.progress import Progress, Report
from npr_megatron.weights.digest import digest_box
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.tiles import Layout, Storage

BAND_BYTES = 64 << 20
"""Bytes of a parameter that are held at a time, on either side."""


class State(StrEnum):
    """How a parameter compares."""

    EQUAL = "equal"
    DIFFERENT = "different"
    MISSING_IN_A = "missing in A"
    MISSING_IN_B = "missing in B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One parameter of two models."""

    parameter: str
    state: State
    digest_a: int | None = None
    """Share of the parameter in the digest of A."""
    digest_b: int | None = None
    max_delta: float | None = None
    """Largest absolute difference, nan where one side is nan; None: equal, or of other shape."""
    first: tuple[int, ...] | None = None
    """The first element that differs."""
    note: str = ""
    """Shapes or dtypes, where those differ."""


class Side(Source, Protocol):
    """One of the two models."""

    @property
    def model(self) -> ModelConfig:
        """Its architecture."""
        ...

    def check(self, digest: int | None) -> None:
        """Require what was read, of this digest, to be what was meant."""
        ...


def open_side(path: Path, hf_folder: Path | None) -> Side:
    """Open a checkpoint, or what the run in folder ``path`` serves.

    Raises:
        InputError: ``path`` is neither.
        StaleWeightsError: the run no longer holds what it serves.
    """
    return LiveRun(path) if is_run_folder(path) else open_checkpoint(path, hf_folder)


def compare(a: Side, b: Side, report: Report) -> list[Comparison]:
    """Return every parameter of both models, in the order of the forward pass, A's first.

    Raises:
        InputError: a side cannot be read to its end.
        StaleWeightsError: a run went on to another version meanwhile.
    """
    declared_a, declared_b = (_storages(side) for side in (a, b))
    gather_a, gather_b = (Gather(side, _canonical(side)) for side in (a, b))
    total = sum(
        math.prod(storage.shape)
        for name, storage in declared_a.items()
        if name in declared_b and declared_b[name].shape == storage.shape
    )
    done = 0

    def advance(num_elements: int) -> None:
        nonlocal done
        done += num_elements
        report(Progress(done, total))

    found: list[Comparison] = []
    for name, storage in declared_a.items():
        other = declared_b.get(name)
        if other is None:
            found.append(Comparison(parameter=name, state=State.MISSING_IN_B))
        elif other.shape != storage.shape:
            note = f"shape {list(storage.shape)} against {list(other.shape)}"
            found.append(Comparison(parameter=name, state=State.DIFFERENT, note=note))
        else:
            found.append(_compare_parameter(storage, gather_a, gather_b, advance))
    missing = [name for name in declared_b if name not in declared_a]
    found += [Comparison(parameter=name, state=State.MISSING_IN_A) for name in missing]
    for side, digest in zip((a, b), total_digests(found), strict=True):
        side.check(digest)
    return found


def total_digests(comparisons: list[Comparison]) -> tuple[int | None, int | None]:
    """Return the digests of A and of B; None where not every parameter of it was read."""
    digests = [(found.digest_a, found.digest_b) for found in comparisons]
    sides = zip(*digests, strict=True)
    missing = (State.MISSING_IN_A, State.MISSING_IN_B)
    totals: list[int | None] = []
    for own, side in zip(missing, sides, strict=True):
        held = [value for value, found in zip(side, comparisons, strict=True) if found.state != own]
        known = [value for value in held if value is not None]
        totals.append(sum(known) % 2**64 if len(known) == len(held) else None)
    return totals[0], totals[1]


def _storages(side: Side) -> dict[str, Storage]:
    return {storage.name: storage for storage in _canonical(side).ranks[0].storages}


def _canonical(side: Side) -> Layout:
    """Return the HF layout of ``side``; only an HF folder can have scales of FP8 blocks."""
    own = side.layout
    return own if own.kind == "canonical" else canonical_layout(side.model)


def _compare_parameter(
    storage: Storage, a: Gather, b: Gather, advance: Callable[[int], None]
) -> Comparison:
    name = storage.name
    dtype_a, dtype_b = a.dtype_of(name), b.dtype_of(name)
    sum_a = sum_b = 0
    max_delta: float | None = None
    first: tuple[int, ...] | None = None
    # the numbers of one side alone have scales
    is_comparable = (dtype_a == torch.float8_e4m3fn) == (dtype_b == torch.float8_e4m3fn)
    whole = Box((0,) * len(storage.shape), storage.shape)
    for box in row_bands(whole, BAND_BYTES // max(dtype_a.itemsize, dtype_b.itemsize)):
        values_a, values_b = a.box(name, box, dtype_a), b.box(name, box, dtype_b)
        share_a, share_b = (digest_box(name, box, values) for values in (values_a, values_b))
        sum_a, sum_b = sum_a + share_a, sum_b + share_b
        if share_a != share_b and is_comparable:
            delta, where = _largest_delta(values_a, values_b)
            max_delta = delta if max_delta is None else max(max_delta, delta)
            if first is None and where is not None:
                first = tuple(s + w for s, w in zip(box.start, where, strict=True))
        advance(box.num_elements)
    sum_a, sum_b = sum_a % 2**64, sum_b % 2**64
    return Comparison(
        parameter=name,
        state=State.EQUAL
        if sum_a == sum_b and max_delta is None and is_comparable
        else State.DIFFERENT,
        digest_a=sum_a,
        digest_b=sum_b,
        max_delta=max_delta,
        first=first,
        note="" if dtype_a == dtype_b else f"{dtype_a} against {dtype_b}",
    )


def _largest_delta(a: Tensor, b: Tensor) -> tuple[float, tuple[int, ...] | None]:
    """Return the largest |a - b| and the first place where values differ."""
    delta = (a.float() - b.float()).abs_()
    differing = torch.nonzero((delta != 0).flatten())  # nan differs from everything
    if not len(differing):
        return 0.0, None
    number = int(differing[0])
    place: list[int] = []
    for extent in reversed(delta.shape):
        number, index = divmod(number, extent)
        place.append(index)
    return float(delta.max()), tuple(reversed(place))
