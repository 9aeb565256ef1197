"""The weights a rank holds, under the names that ``weights.layouts`` plans with.

Megatron numbers layers within a model chunk and TransformerEngine spells some weights differently;
here every weight has the name that the local spec gives it, with the layer's number in the model.
This is the only place that knows both spellings. Weights are the parameters and one buffer that is
trained without gradients (the router's expert bias).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Module, Parameter

from npr_megatron.errors import LayoutError

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_TE_SPELLINGS = (
    # TransformerEngine keeps a norm inside the linear layer that follows it, ...
    (re.compile(r"^self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"^mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    # ... and all experts of a rank inside one layer.
    (
        re.compile(r"^mlp\.experts\.(linear_fc[12])\.weight(\d+)$"),
        r"mlp.experts.local_experts.\2.\1.weight",
    ),
)


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A parameter or persistent buffer of a chunk."""

    chunk: GPTModel
    local_name: str
    """As Megatron says it."""
    layer: int | None
    """Number of the decoder layer in the model, from 0; None outside the layers."""
    inner_name: str
    """Name inside the layer as the local spec says it; the whole name outside the layers."""
    tensor: Tensor

    @property
    def name(self) -> str:
        """Name of the storage."""
        if self.layer is None:
            return self.inner_name
        return f"decoder.layers.{self.layer}.{self.inner_name}"

    @property
    def owner(self) -> Any:
        """The module that holds the tensor."""
        return self.chunk.get_submodule(self.local_name.rpartition(".")[0])


def local_spec_name(inner_name: str) -> str:
    """Return the local spec's name of a weight of a layer, in whichever spec it was built."""
    for pattern, name in _TE_SPELLINGS:
        inner_name = pattern.sub(name, inner_name)
    return inner_name


def live_tensors(chunks: Sequence[GPTModel]) -> list[LiveTensor]:
    """Return every parameter and persistent buffer of a rank's model chunks, in order.

    Raises:
        LayoutError: layers do not ascend in the order in which they run; the message lists all.
    """
    found: list[LiveTensor] = []
    problems: list[str] = []
    previous = 0
    for chunk in chunks:
        layers: Any = chunk.decoder.layers
        numbers = [int(layer.layer_number) for layer in layers]
        for index, number in enumerate(numbers):
            if number <= previous:
                problems.append(
                    f"decoder.layers.{index} runs after layer number {previous} but has number "
                    f"{number}; numbers must ascend over the chunks of a rank"
                )
            previous = number
        for local_name, tensor in _tensors(chunk):
            layer, inner_name = None, local_name
            if match := _LAYER.match(local_name):
                layer = numbers[int(match[1])] - 1
                inner_name = local_spec_name(local_name[match.end() :])
            found.append(LiveTensor(chunk, local_name, layer, inner_name, tensor))
    if problems:
        raise LayoutError("\n".join(problems))
    return found


def _tensors(chunk: Module) -> Iterator[tuple[str, Tensor]]:
    yield from chunk.named_parameters()
    for path, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def stage_parameters(chunks: Sequence[GPTModel]) -> dict[str, Parameter]:
    """Return the live parameters of a rank by storage name."""
    return {
        live.name: live.tensor
        for live in live_tensors(chunks)
        if isinstance(live.tensor, Parameter)
    }


def stage_storages(chunks: Sequence[GPTModel]) -> dict[str, Tensor]:
    """Return the live weights of a rank, outside autograd: writing here changes the model.

    Call it after the chunks were wrapped for training, which moves parameters into one buffer.
    """
    return {live.name: live.tensor.detach() for live in live_tensors(chunks)}
