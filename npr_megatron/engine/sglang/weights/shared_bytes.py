"""Memory that SGLang's processes on this node can map, and that nobody has to clean up.

It has no name in any folder: whoever knows the owner's process id and descriptor opens it by
``/proc``, and the kernel frees it with its last mapping, however the owner ended.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

from npr_megatron.errors import EnvironmentFault, StaleWeightsError


class SharedBytes:
    """Zeroed memory of this process.

    Raises:
        EnvironmentFault: the machine has not so much memory.
    """

    def __init__(self, what: str, num_bytes: int) -> None:
        descriptor = os.memfd_create(f"npr-{what}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # else a full machine shows up as SIGBUS
        except OSError as error:
            os.close(descriptor)
            raise EnvironmentFault(
                f"{num_bytes} bytes of shared memory were asked for the {what} and not given "
                f"({error}); free memory on this machine"
            ) from error
        self._descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_WRITE)
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        """Where other processes of this user open it while this one lives."""

    @property
    def memory(self) -> Tensor:
        """All of it, uint8."""
        return torch.frombuffer(self._mapping, dtype=torch.uint8)

    def close(self) -> None:
        """Let go of it; tensors in it stay valid. Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def writable_memory(path: str) -> Tensor:
    """Return the memory of a :class:`SharedBytes` of another process, uint8.

    Raises:
        StaleWeightsError: its owner is gone.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        raise StaleWeightsError(
            f"shared memory {path} cannot be opened ({error}); the process that owns it is gone"
        ) from error
    try:
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_WRITE)
    finally:
        os.close(descriptor)
    return torch.frombuffer(mapping, dtype=torch.uint8)
