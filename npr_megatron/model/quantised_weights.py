"""Weights that layers keep in FP8 only: read, written, and started from, as the numbers they mean.

TransformerEngine's quantised parameter poses as a tensor of the compute dtype. Three things go
wrong in silence if it is taken for one, and are seen to here:

* a slice of it is a dequantised copy, so what is written there is lost: weights are read from
  :func:`readable` and written by :func:`write_quantised`;
* Megatron starts the optimizer's fp32 weights from what the parameter was initialised with, which
  here is nothing, for weights are loaded later; after that from the FP8 numbers, which would cost
  most of the digits at every new stage: :func:`write_quantised` and :func:`fp32_weights_kept`;
* a gather that did not wait for the next forward leaves the copy for backward, scaled along the
  other axis, as it was: :func:`finish_gather`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import fp8_utils
from torch import Tensor
from torch.nn import Parameter

_FP32_WEIGHTS = "main_param"
"""Attribute under which Megatron's optimizer leaves its shard of a parameter."""
_EXACT_WEIGHTS = "get_high_precision_init_val"
"""Method of a parameter that Megatron's optimizer asks what to start from."""


@torch.no_grad()
def readable(storages: dict[str, Tensor], parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Return ``storages`` as plain tensors: what is quantised as a copy of the numbers it means,
    the rest itself.

    Args:
        parameters: of the same names, where a storage has one. Only the parameter itself is up to
            date where it is quantised: what it consists of may be replaced.
    """
    quantised = {name: _quantised(held) for name, held in parameters.items() if _is_quantised(held)}
    return storages | {name: held.dequantize() for name, held in quantised.items()}


@torch.no_grad()
def write_quantised(parameters: Mapping[str, Parameter], weights: Mapping[str, Tensor]) -> None:
    """Quantise ``weights`` into those of ``parameters`` that are quantised; the rest stays.

    The optimizer that is built next starts from ``weights`` as they are here, to the last bit.
    """
    for name, parameter in parameters.items():
        if _is_quantised(parameter):
            parameter.copy_(weights[name])
            _start_from(parameter, weights[name].to("cpu", copy=True))


@contextmanager
def fp32_weights_kept(parameters: Iterable[Parameter]) -> Iterator[None]:
    """The optimizer that is built inside starts from the fp32 weights of the one before it."""
    quantised = [parameter for parameter in parameters if _is_quantised(parameter)]
    # None where other replicas have all of a parameter.
    kept = [(parameter, parameter.__dict__.get(_FP32_WEIGHTS)) for parameter in quantised]
    for parameter in quantised:
        if parameter.__dict__.get(_EXACT_WEIGHTS, _nothing)() is None:
            # Megatron would take the FP8 numbers then, and autograd's record of how with them.
            _start_from(parameter, _quantised(parameter.detach()).dequantize())
    yield
    for parameter, fp32_weights in kept:
        if fp32_weights is not None:
            parameter.__dict__[_FP32_WEIGHTS].copy_(fp32_weights)


def finish_gather(parameters: Iterable[Parameter]) -> None:
    """Make whole what is derived from quantised weights; after a gather outside of a forward."""
    gathered = [parameter for parameter in parameters if _is_quantised(parameter)]
    if gathered:
        fp8_utils.post_all_gather_processing(gathered)


def _is_quantised(tensor: Tensor) -> bool:
    return fp8_utils.is_float8tensor(tensor)


def _quantised(tensor: Tensor) -> Any:
    """Return ``tensor``, of a class that exists with TransformerEngine only."""
    return tensor


def _nothing() -> None:
    return None


def _start_from(parameter: Any, weights: Tensor) -> None:
    """Answer Megatron's question for the exact initial weights with ``weights``, once."""

    def forget() -> None:
        del parameter.get_high_precision_init_val, parameter.clear_high_precision_init_val

    # TransformerEngine kept the uninitialised weights for the same question; and the fp32 weights
    # of an optimizer that is gone are not those of the new weights.
    for name in ("_high_precision_init_val", _FP32_WEIGHTS):
        parameter.__dict__.pop(name, None)
    parameter.get_high_precision_init_val = lambda: weights
    parameter.clear_high_precision_init_val = forget
