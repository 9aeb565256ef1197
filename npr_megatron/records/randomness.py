"""All randomness derives from names, so neither scheduling nor a restart changes a sample.

``derive_seed(run_seed, "zero/7", prompt_id, rollout)`` keys one request, ``branch_key`` splits it
per branch, ``uniforms`` gives the i-th number of each stream. Counter based (splitmix64),
vectorised, no state.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def derive_seed(*names: str | int) -> int:
    """Return a 64-bit key that depends on every name and on their order."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def branch_key(seed: int, block: int, branch: int) -> int:
    """Return the key of one branch (0, 0 for the trunk) of the request keyed by ``seed``."""
    place = np.array([block << 20 | branch], dtype=np.uint64)
    return int(mix(np.uint64(seed) ^ mix(place))[0])


def uniforms(keys: UInt64Array, counters: UInt64Array) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) per (key, counter) pair; equal pairs give equal numbers."""
    bits = mix(keys + counters * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(value: UInt64Array) -> UInt64Array:
    """Return splitmix64 of each number. Of arrays: they wrap around silently, single numbers do
    not.
    """
    z = value + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
