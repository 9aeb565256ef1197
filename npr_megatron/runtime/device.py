"""Which device this process computes on, and the scope inside which Megatron-core may be called.

Everything above asks this module; nobody else tests for CUDA. With CUDA all of it is a no-op.
Without, Megatron-core (which names CUDA literally in some forty places) runs on the CPU through
``runtime.cuda_stand_in``.

Importing this module changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from npr_megatron.runtime import cuda_stand_in


def device_type() -> Literal["cuda", "cpu"]:
    """Return the kind of device tensors live on."""
    return "cuda" if torch.cuda.is_available() and not cuda_stand_in.is_installed() else "cpu"


def backend() -> Literal["nccl", "gloo"]:
    """Return the torch.distributed backend that moves tensors of :func:`device_type`."""
    return "nccl" if device_type() == "cuda" else "gloo"


def current_device() -> torch.device:
    """Return the device of this rank."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def install_cuda_stand_in() -> None:
    """Let Megatron-core run on this process's CPU; nothing where CUDA exists. Idempotent."""
    if device_type() == "cpu":
        cuda_stand_in.install()


@contextmanager
def device_scope() -> Iterator[None]:
    """Call Megatron-core inside this scope.

    The part of the stand-in that rewrites ``device="cuda"`` is bound to a thread, and an actor
    may be called from another thread than the one that built it: each public entry opens its own
    scope. Scopes nest.
    """
    if device_type() == "cuda":
        yield
        return
    cuda_stand_in.install()
    with cuda_stand_in.cuda_means_cpu():
        yield
