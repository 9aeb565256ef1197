"""Where the first number that is not finite appeared: the same step again, under watch.

Only a step that went wrong pays for it. Every microbatch is run by itself, forward and backward,
with hooks on all modules; the first in which any rank sees something ends the search (replicas run
one each at a time). What comes first in it is the cause: forward before backward, a low layer
before a high one (in backward the other way round), and inside a layer in order of execution.
Several ranks may see it at once, where a sum over ranks has spread it; a weight that is not finite
says which of them it came from.

Gradients are garbage afterwards, weights are untouched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.model.build import Stage
from npr_megatron.records.sample import PackedBatch
from npr_megatron.runtime.process_group import RankPlace
from npr_megatron.train.passes import backward_losses

_FORWARD, _LOSS, _BACKWARD, _GRADIENT = range(4)
_BEHIND_ALL_LAYERS = 1_000_000
_CONTAINERS = ("", "decoder")
"""Return what their last part returns, and stand at no depth of their own."""


@dataclass(frozen=True, slots=True, order=True)
class Sighting:
    """Something that is not finite. Sorts by what came first."""

    phase: int
    microbatch: int
    """In the global batch, counted from 0."""
    depth: int
    """The layer, counted from 0; below 0 in front of the layers, huge behind them; in backward
    with the opposite sign."""
    order: int
    """Of execution on its rank; equal on all ranks of a pipeline stage."""
    what: str
    """The sentence's subject: ``the output of layer 3 (mlp.linear_fc1)``."""
    rank: int = dataclasses.field(compare=False)


def second_look(
    stage: Stage,
    batches: Sequence[PackedBatch],
    loss: LossConfig,
    place: RankPlace,
    parallel: ParallelConfig,
    cpu_world: ProcessGroup,
) -> str:
    """Return where the step first went wrong, in words that are equal on every rank. Collective.

    Args:
        batches: this rank's microbatches of the step.
        cpu_world: all ranks, for messages.
    """
    weights = _weights_not_finite(stage)
    # An interleaved schedule takes as many microbatches as there are stages, no fewer.
    count = parallel.pp_size if parallel.vpp_size > 1 else 1
    for first in range(0, len(batches), count):
        numbers = [place.dp_rank + (first + i) * parallel.dp_size for i in range(count)]
        seen = _watched(stage, batches[first : first + count], numbers, loss, place)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (seen, weights), group=cpu_world)
        sightings = [sighting for sighting, _ in everywhere if sighting is not None]
        if sightings:
            return _told(sightings, [names for _, names in everywhere])
    return (
        "each microbatch by itself gives finite numbers, so it was their sum, or that over "
        "replicas, that overflowed"
    )


def _told(sightings: list[Sighting], weights: list[list[str]]) -> str:
    """Put the first of what the ranks saw into words."""
    first = min(sightings)
    ranks = sorted(sighting.rank for sighting in sightings if sighting == first)
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    told = f"first seen on {named} in microbatch {first.microbatch}: {first.what} is not finite"
    bad = [f"{name} on rank {rank}" for rank, names in enumerate(weights) for name in names]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        told += f"; so are these weights: {', '.join(bad[:3])}{more}"
    return told


def _weights_not_finite(stage: Stage) -> list[str]:
    """Return the weights of this rank that are not finite, as the output is spoken of."""
    return [
        f"{_Module(name.rpartition('.')[0], chunk).spoken} {name.rpartition('.')[2]}"
        for chunk in stage.chunks
        for name, weight in chunk.named_parameters()
        if not _is_finite(weight)
    ]


def _watched(
    stage: Stage,
    batches: Sequence[PackedBatch],
    numbers: Sequence[int],
    loss: LossConfig,
    place: RankPlace,
) -> Sighting | None:
    """Run ``batches`` and return what this rank saw first."""
    for chunk in stage.wrapped:
        chunk.zero_grad_buffer()
    watch = _Watch(numbers, place.rank)
    handles = [
        watch.hook(_Module(name, chunk), module)
        for chunk in stage.chunks
        for name, module in chunk.named_modules()
        if name not in _CONTAINERS
    ]
    try:
        share = backward_losses(stage, _Announced(batches, watch), loss)
    finally:
        for handle in handles:
            handle.remove()
    if place.reports and not math.isfinite(float(share[0])):
        watch.see(_LOSS, 0, "the loss")
    _watch_gradients(stage, watch)
    return watch.first


def _watch_gradients(stage: Stage, watch: _Watch) -> None:
    for chunk in stage.chunks:
        for name, weight in chunk.named_parameters():
            owner, _, own = name.rpartition(".")
            if not _is_finite(getattr(weight, "main_grad", None)):
                module = _Module(owner, chunk)
                watch.see(_GRADIENT, -module.depth, f"the gradient of {module.spoken} {own}")


class _Module:
    """What a module is called and how deep it lies."""

    def __init__(self, name: str, chunk: Any) -> None:
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
            # Megatron counts layers of the whole model from 1, checkpoints from 0.
            self.depth = int(chunk.decoder.layers[int(parts[2])].layer_number) - 1
            inner = ".".join(parts[3:])
            self.spoken = f"layer {self.depth}" + (f" ({inner})" if inner else "")
            return
        self.depth = -1 if name.startswith("embedding") else _BEHIND_ALL_LAYERS
        self.spoken = name or "the model"


class _Watch:
    """Keeps the first sighting of this rank. ``microbatch`` is set from outside as they pass."""

    def __init__(self, numbers: Sequence[int], rank: int) -> None:
        self.numbers = numbers
        self.microbatch = numbers[0]
        self.first: Sighting | None = None
        self._rank = rank
        self._num_calls = 0

    def see(self, phase: int, depth: int, what: str, microbatch: int | None = None) -> None:
        """Take down something that is not finite."""
        number = self.microbatch if microbatch is None else microbatch
        sighting = Sighting(phase, number, depth, self._num_calls, what, self._rank)
        self.first = sighting if self.first is None else min(self.first, sighting)

    def hook(self, place: _Module, module: torch.nn.Module) -> RemovableHandle:
        """Watch what ``module`` returns, and the gradient of that."""

        def forward(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._num_calls += 1
            number = self.microbatch
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if not _is_finite(tensor):
                    self.see(_FORWARD, place.depth, f"the output of {place.spoken}", number)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: backward(gradient, number))

        def backward(gradient: Tensor, number: int) -> None:
            self._num_calls += 1
            if not _is_finite(gradient):
                what = f"the gradient of the output of {place.spoken}"
                self.see(_BACKWARD, -place.depth, what, number)

        return module.register_forward_hook(forward)


class _Announced(Sequence[PackedBatch]):
    """Microbatches that tell a watch which of them is on its way."""

    def __init__(self, batches: Sequence[PackedBatch], watch: _Watch) -> None:
        self._batches, self._watch = batches, watch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __iter__(self) -> Iterator[PackedBatch]:
        for number, batch in zip(self._watch.numbers, self._batches, strict=True):
            self._watch.microbatch = number
            yield batch


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())
