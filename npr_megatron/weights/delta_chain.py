"""Which delta fits which base: versions, what both sides say of them, and what each side keeps.

A delta fits one base only. A source keeps the bytes it last served (``Baseline``) and moves on
only when all have acknowledged a newer version; a destination (``Chain``) refuses a delta unless it
holds exactly the base, with the base's digest, and what it holds counts as a version only once its
own digest was checked. Full weights need no base: they are the anchor from which a chain goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_megatron.errors import StaleWeightsError

_VERSION = struct.Struct("<?qQ")
_ID_BYTES = 64  # hexadecimal digits of a SHA-256


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """Weights that were served: two are the same if number and digest are."""

    number: int
    digest: int
    """Layout-independent digest of all weights (``weights.digest``)."""


@dataclass(frozen=True, slots=True)
class DeltaHeader:
    """What a delta turns into what."""

    plan_id: str
    base: ServedVersion | None
    """None: it writes every element, whatever was there (an anchor of a chain)."""
    version: ServedVersion

    NUM_BYTES = _ID_BYTES + 2 * _VERSION.size

    def pack(self) -> bytes:
        """Return ``NUM_BYTES`` bytes."""
        return self.plan_id.encode() + _packed(self.base) + _packed(self.version)

    @classmethod
    def unpack(cls, packed: bytes) -> DeltaHeader:
        """Return the header that ``pack`` wrote."""
        base = packed[_ID_BYTES : _ID_BYTES + _VERSION.size]
        version = _unpacked(packed[_ID_BYTES + _VERSION.size :])
        if version is None:
            raise StaleWeightsError("a delta does not say to which version it leads")
        return cls(packed[:_ID_BYTES].decode(), _unpacked(base), version)


@dataclass(frozen=True, slots=True)
class Held:
    """What a destination says before it is given anything."""

    plan_id: str
    version: ServedVersion | None

    NUM_BYTES = _ID_BYTES + _VERSION.size

    def pack(self) -> bytes:
        """Return ``NUM_BYTES`` bytes."""
        return self.plan_id.encode() + _packed(self.version)

    @classmethod
    def unpack(cls, packed: bytes) -> Held:
        """Return the statement that ``pack`` wrote."""
        return cls(packed[:_ID_BYTES].decode(), _unpacked(packed[_ID_BYTES:]))


def _packed(version: ServedVersion | None) -> bytes:
    number, digest = (version.number, version.digest) if version else (0, 0)
    return _VERSION.pack(version is not None, number, digest)


def _unpacked(packed: bytes) -> ServedVersion | None:
    is_there, number, digest = _VERSION.unpack(packed)
    return ServedVersion(number, digest) if is_there else None


class Baseline:
    """The bytes that the source ranks of a process last served, kept by the source."""

    def __init__(self) -> None:
        self.version: ServedVersion | None = None
        """None: nothing was acknowledged yet, a delta is not possible."""
        self.storages: dict[int, dict[str, Tensor]] = {}
        """By layout rank and name."""

    @torch.no_grad()
    def advance(self, version: ServedVersion, storages: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Keep a copy of ``storages``: every destination that is not fenced holds ``version`` now.

        To be called only after their acknowledgements; until then deltas must be against the
        version before, which all of them hold.
        """
        self.version = None
        for rank, held in storages.items():
            kept = self.storages.setdefault(rank, {})
            for name, tensor in held.items():
                if name not in kept:
                    kept[name] = torch.empty_like(tensor)
                kept[name].copy_(tensor)
        self.version = version


class Chain:
    """Which version a destination holds, and therefore which deltas it may be given."""

    def __init__(self, held: ServedVersion | None = None) -> None:
        self.held = held
        """None: nothing complete and checked."""

    def accept(self, headers: Iterable[DeltaHeader], plan_id: str) -> None:
        """Require that deltas with these headers may be applied together; nothing is held then.

        Raises:
            StaleWeightsError: a base is not what is held, or plans or new versions differ; what is
                held stays as it is.
        """
        headers = tuple(headers)
        for header in headers:
            if header.plan_id != plan_id:
                raise StaleWeightsError(
                    f"a delta was made by plan {header.plan_id}, expected was {plan_id}; "
                    "the layouts of the two sides differ, plan again"
                )
            if header.base is not None and self.held not in (header.base, header.version):
                raise StaleWeightsError(
                    f"a delta to {header.version} is on top of {header.base}, held is {self.held}; "
                    "nothing was written, push the full weights"
                )
        if len(versions := {header.version for header in headers}) > 1:
            raise StaleWeightsError(
                f"deltas to {sorted(map(str, versions))} were to be applied together; all sources "
                "must send the same version, push again"
            )
        self.held = None

    def confirm(self, version: ServedVersion) -> None:
        """Hold ``version`` from now on; only after the digest of what was written was checked."""
        self.held = version
