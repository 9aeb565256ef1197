"""One rollout, token by token: what the engine did and what the trainer needs. Ids, never text.

All streams are aligned: entry ``t`` of each belongs to token ``t`` of ``token_ids`` (prompt first,
then the response linearised as trunk, branch 1, branch 2, ..., trunk). Nothing downstream
re-tokenises or re-parses to find out where a token was placed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
RouteArray = npt.NDArray[np.int16]


class DecodeMode(StrEnum):
    """How an engine decodes: plain causal text, or branches in parallel."""

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"


class FinishReason(StrEnum):
    """Why a trajectory ended."""

    STOP = "stop"  # the end-of-sequence token was sampled where it may stand
    LENGTH = "length"  # the total token budget is spent
    CRITICAL_PATH = "critical_path"  # the critical-path budget is spent
    MALFORMED = "malformed"  # the schema was broken; ``finish_detail`` names the rule
    ABORTED = "aborted"  # a caller or a fault ended it
    TIMEOUT = "timeout"  # the caller's time was up
    FAILED = "failed"  # the model gave no distribution (NaN); ``finish_detail`` names the weights

    @property
    def is_of_policy(self) -> bool:
        """Whether the policy itself came to this end, so that the end says something about it."""
        return self not in (FinishReason.ABORTED, FinishReason.TIMEOUT, FinishReason.FAILED)


_DTYPES = {
    "token_ids": np.int32,
    "position_ids": np.int32,
    "block": np.int32,
    "branch": np.int32,
    "forced": np.bool_,
    "logprobs": np.float32,
    "weight_versions": np.int32,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """A finished rollout of one prompt.

    Example (prompt of 2 tokens, then a sampled token and the end token)::

        token_ids=[5, 6, 9, 1]  position_ids=[0, 1, 2, 3]  block=branch=[0, 0, 0, 0]
        forced=[T, T, F, F]     logprobs=[0, 0, -0.2, -0.1]  weight_versions=[-1, -1, 3, 3]
    """

    prompt_id: str
    """Names the prompt; rollouts of one prompt share it."""
    rollout: int
    """Index inside the prompt group, from 0."""
    mode: DecodeMode
    prompt_length: int
    """Leading tokens that were given, not generated."""
    token_ids: IntArray
    """[T] prompt and response."""
    position_ids: IntArray
    """[T] logical position as RoPE saw it; siblings share positions."""
    block: IntArray
    """[T] 1-based parallel block of a branch token; 0 on the trunk."""
    branch: IntArray
    """[T] 1-based branch inside the block; 0 on the trunk."""
    forced: BoolArray
    """[T] True where the token was given (prompt) or inserted by the engine, not sampled."""
    logprobs: FloatArray
    """[T] natural-log probability given the predecessor; 0.0 for the prompt and without one."""
    weight_versions: IntArray
    """[T] weight version that produced ``logprobs``; -1 for the prompt."""
    finish: FinishReason
    finish_detail: str = ""
    """Rule or cause behind ``finish``, empty for a plain stop."""
    routed_experts: RouteArray | None = None
    """[T, M, K] the K experts that computed each token in each of the M layers that have experts;
    -1 where nothing was computed (the last token of a path). None where it was not recorded."""

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for name, dtype in _DTYPES.items():
            stream = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            if stream.shape != (length,):
                raise ValueError(
                    f"stream {name} has shape {stream.shape}, token_ids has ({length},)"
                )
            stream.flags.writeable = False
            object.__setattr__(self, name, stream)
        if self.routed_experts is not None:
            routes = np.ascontiguousarray(self.routed_experts, dtype=np.int16)
            if routes.ndim != 3 or len(routes) != length:
                raise ValueError(
                    f"routed_experts has shape {routes.shape}, token_ids has ({length},)"
                )
            routes.flags.writeable = False
            object.__setattr__(self, "routed_experts", routes)
        if not 0 <= self.prompt_length <= length:
            raise ValueError(f"prompt_length {self.prompt_length} is outside 0..{length}")

    @property
    def response_ids(self) -> IntArray:
        """[T - prompt_length] generated ids."""
        return self.token_ids[self.prompt_length :]

    @property
    def num_tokens(self) -> int:
        """Generated tokens, forced ones included, over all branches."""
        return len(self.token_ids) - self.prompt_length

    @property
    def critical_path_tokens(self) -> int:
        """Generated positions: the length of the longest path through the execution graph."""
        if self.num_tokens == 0:
            return 0
        return int(self.position_ids.max()) + 1 - self.prompt_length

    @property
    def num_blocks(self) -> int:
        """Parallel blocks executed."""
        return int(self.block.max(initial=0))

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and strings, the inverse of :meth:`from_json`.

        Routes are left out: hundreds of numbers a token, and nobody but the optimizer step that
        follows a rollout needs them.
        """
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            if field.name == "routed_experts":
                continue
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            out[field.name] = value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Trajectory:
        """Rebuild a trajectory written by :meth:`to_json`."""
        fields: dict[str, Any] = dict(data)
        fields["mode"] = DecodeMode(data["mode"])
        fields["finish"] = FinishReason(data["finish"])
        return cls(**fields)
