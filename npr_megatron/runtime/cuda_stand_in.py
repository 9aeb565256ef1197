"""Make a CPU-only torch answer for the CUDA device that Megatron-core takes for granted.

Two halves, because Megatron reaches CUDA in two ways:

* functions of ``torch.cuda`` (current_device, streams, events, RNG state) are replaced once per
  process by :func:`install`, together with Megatron internals that cannot be reached through
  torch: its RNG accessors (they queue behind a CUDA initialisation that never comes), its choice of
  Adam (``runtime.adam``), how it splits an optimizer between the GPU and the CPU
  (``runtime.offload_stand_in``), the queue of its checkpoint writer (a manager process, where every
  save of ours begins and ends in one process), and two places in its experts (split sizes that
  are moved off the GPU or else stay tensors; shards of unequal lengths,
  ``runtime.unequal_shards``);
* ``device="cuda"`` arguments and the comparison of ``tensor.type()`` with
  ``"torch.cuda.FloatTensor"`` are rewritten by a torch function mode, active inside
  :func:`cuda_means_cpu` and in that thread only.

No Megatron file is edited, and nothing here runs where CUDA is available. Verified against
megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_CPU = torch.device("cpu")


def install() -> None:
    """Replace what Megatron-core calls of ``torch.cuda`` and the internals named above. Idempotent.

    Also switches ``torch.compile`` off, here and in child processes: Megatron decorates small
    functions with it, which on a CPU costs a C++ compiler run each.
    """
    if is_installed():
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.compiler.set_stance("force_eager")  # what was decorated before the variable was set
    _replace_torch_cuda()
    _replace_megatron_internals()


def is_installed() -> bool:
    """Return whether :func:`install` ran in this process."""
    return torch.cuda.current_device is _current_device


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Read ``device="cuda"`` as the CPU in this thread. Nesting costs nothing."""
    if any(isinstance(mode, _CudaMeansCpu) for mode in _get_current_function_mode_stack()):
        yield
        return
    with _CudaMeansCpu():
        yield


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the arguments of torch calls; costs about 1 us a call."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if not kwargs:
            return func(*args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return False


class _Stream:
    """Work on a CPU is done when the call returns, so every wait is over."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: _Event) -> float:
        return 0.0


def _current_device() -> torch.device:
    return _CPU


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _no_bytes(*_: Any, **__: Any) -> int:
    return 0


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _replace_torch_cuda() -> None:
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _nothing)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(cuda, name, _no_bytes)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = contextlib.nullcontext
    cuda.manual_seed = _manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    cuda.current_device = _current_device


def _replace_megatron_internals() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    from npr_megatron.runtime.adam import install_adam
    from npr_megatron.runtime.offload_stand_in import split_on_one_device
    from npr_megatron.runtime.unequal_shards import (
        gather_of_any_lengths,
        reduce_scatter_of_any_lengths,
    )

    rng: Any = megatron_random
    rng._get_cuda_rng_state, rng._set_cuda_rng_state = _get_rng_state, _set_rng_state
    logging.getLogger(megatron_random.__name__).addFilter(_is_not_about_cpu_rng)

    install_adam()
    split_on_one_device()

    writer: Any = filesystem_async
    writer._get_write_results_queue = _checkpoint_queue

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = _on_cpu
    moves: Any = mappings
    moves._gather_along_first_dim = gather_of_any_lengths(moves._gather_along_first_dim)
    moves._reduce_scatter_along_first_dim = reduce_scatter_of_any_lengths(
        moves._reduce_scatter_along_first_dim
    )


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    del record_stream
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _is_not_about_cpu_rng(record: logging.LogRecord) -> bool:
    # Megatron warns on every fork of its RNG that the CPU state moved: here that *is* the
    # device's state.
    return "CPU RNG state changed" not in record.getMessage()


def _checkpoint_queue() -> Any:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer: Any = filesystem_async
    if writer._results_queue is None:
        # A manager's child would keep copies of this rank's sockets open, so that neither Ray nor
        # the other ranks noticed this rank's death.
        writer._results_queue = queue.SimpleQueue()
    return writer._results_queue
