"""A trainer that broadcasts its weights to an SGLang engine, tensor by tensor under HF names.

For an engine that shares no memory with the trainer. Both sides cut the parameters into the same
buckets, so that SGLang asks for a bucket when the trainer sends it; ranks of the engine are ranks
1, 2, ... of the group, the trainer's one is rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import EnvironmentFault, LayoutError
from npr_megatron.weights.digest import census_of, digests
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.names import Parameter, canonical_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where a trainer and the ranks of an engine meet."""

    address: str
    port: int
    """On the trainer's side; free."""
    backend: Literal["gloo", "nccl"]
    name: str = "npr_weights"
    bucket_bytes: int = 2**29
    """What a rank receives before it writes it to its parameters."""


class Broadcaster:
    """The trainer's side of one meeting."""

    def __init__(self, model: ModelConfig, meeting: Meeting, num_ranks: int) -> None:
        """Prepare; :meth:`join` meets.

        Args:
            num_ranks: of the engine.
        """
        self._model, self._meeting, self._num_ranks = model, meeting, num_ranks
        self._group: dist.ProcessGroup | None = None

    def join(self, timeout_s: float) -> None:
        """Meet the ranks of the engine, which join at the same time.

        Raises:
            EnvironmentFault: they do not come within ``timeout_s``.
        """
        try:
            from sglang.srt.utils import (  # pyright: ignore[reportMissingImports]
                init_custom_process_group,
            )
        except ImportError as error:
            raise EnvironmentFault(
                f"weights were to be broadcast to SGLang, which cannot be imported ({error})"
            ) from error
        meeting = self._meeting
        try:
            self._group = init_custom_process_group(
                backend=meeting.backend,
                init_method=f"tcp://{meeting.address}:{meeting.port}",
                world_size=self._num_ranks + 1,
                rank=0,
                group_name=meeting.name,
                timeout=timedelta(seconds=timeout_s),
            )
        except (RuntimeError, dist.DistError) as error:
            raise EnvironmentFault(
                f"{self._num_ranks} ranks of SGLang were awaited at {meeting.address}:"
                f"{meeting.port} for {timeout_s:g} s: {error}"
            ) from error

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Broadcast all parameters, on whose devices ``backend`` works.

        Raises:
            LayoutError: a parameter is missing or has another shape.
        """
        assert self._group is not None, "join first"
        parameters = canonical_parameters(self._model)
        problems = [
            f"parameter {parameter.name} {list(parameter.shape)} was to be sent, found "
            + (f"{list(tensors[parameter.name].shape)}" if parameter.name in tensors else "nothing")
            for parameter in parameters
            if parameter.name not in tensors or tensors[parameter.name].shape != parameter.shape
        ]
        if problems:
            raise LayoutError("\n".join(problems))
        for parameter in parameters:
            dist.broadcast(tensors[parameter.name].contiguous(), src=0, group=self._group)

    def leave(self) -> None:
        """End the meeting; safe to call twice."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def digest_of(model: ModelConfig, tensors: Mapping[str, Tensor]) -> int:
    """Return the digest of whole parameters, which is that of every layout of them."""
    [digest] = digests([census_of(canonical_layout(model)).shares(0, tensors)])
    return digest


def buckets_of(model: ModelConfig, bucket_bytes: int, dtype: torch.dtype) -> list[list[Parameter]]:
    """Return all parameters in order, in buckets of up to ``bucket_bytes`` or of a single one."""
    buckets: list[list[Parameter]] = []
    room = 0
    for parameter in canonical_parameters(model):
        num_bytes = math.prod(parameter.shape) * dtype.itemsize
        if num_bytes > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= num_bytes
    return buckets
