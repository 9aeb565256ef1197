"""The processes that decode as one engine: sums of partial results, a vote, and a line of commands.

Rank 0 leads. Each rank holds one shard of the weights (``weights.layouts.engine_layout``) and the
keys and values of its heads. Three groups, because they may wait for different lengths of time:
tensors and votes belong to work that every rank is in, so a rank that does not answer within the
timeout is gone; a command may be hours away when nobody asks anything, so waiting for one has no
deadline (a leader that dies closes its connections, which ends the wait). Giving one has: whoever
does not come to take it is gone.

Reads no environment and knows no model. Messages are bytes of any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.errors import EnvironmentFault

_PACKET_BYTES = 32_768
"""What one broadcast carries; the commands of most steps fit. Up to 64 KiB cost no more than a few
bytes do (gloo between two processes), and a second broadcast costs as much as the first.
"""
_LENGTH_BYTES = 8
_NO_DEADLINE = timedelta(days=3650)


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process's place among the ranks of one engine, and the groups they talk through."""

    rank: int
    size: int
    timeout_s: float
    tensors: dist.ProcessGroup
    """Moves tensors of the device."""
    votes: dist.ProcessGroup
    """Moves host memory; waits as long as ``tensors``."""
    commands: dist.ProcessGroup
    """Moves host memory; all but rank 0 wait for ever."""

    @classmethod
    def join(
        cls, rank: int, size: int, init_method: str, *, device: torch.device, timeout_s: float = 600
    ) -> Ranks:
        """Meet the other ranks; blocks until all ``size`` have come.

        Args:
            init_method: ``tcp://host:port``, ``file:///path`` or ``env://``, equal on every rank.
            device: where this rank computes; NCCL moves tensors of CUDA, gloo those of the CPU.
            timeout_s: longest wait for a rank in the middle of common work [s].

        Raises:
            EnvironmentFault: the process is in a group already, or the others did not come.
        """
        if dist.is_initialized():
            raise EnvironmentFault(
                "this process was to become a rank of an engine and already belongs to a process "
                "group; leave it first or use a process of its own"
            )
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend, init_method=init_method, rank=rank, world_size=size, timeout=timeout
            )
            tensors = _is_group(dist.group.WORLD)
            votes = tensors if backend == "gloo" else _gloo_group(timeout)
            commands = _gloo_group(_NO_DEADLINE if rank else timeout)
        except RuntimeError as error:
            raise EnvironmentFault(
                f"rank {rank} of {size} could not meet the others at {init_method} within "
                f"{timeout_s} s ({error}); start all ranks with the same address"
            ) from error
        return cls(rank, size, timeout_s, tensors, votes, commands)

    def leave(self) -> None:
        """Close all groups; the others' next words to this rank fail."""
        dist.destroy_process_group()

    def sum(self, partial: Tensor) -> Tensor:
        """Add ``partial`` over all ranks, in place, and return it."""
        try:
            dist.all_reduce(partial, group=self.tensors)
        except RuntimeError as error:
            raise self._fault("partial sums were to be added", error) from error
        return partial

    def join_columns(self, part: Tensor) -> Tensor:
        """Return [M, size * N]: the parts [M, N] of all ranks side by side, on every rank."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        try:
            dist.all_gather(parts, part, group=self.tensors)
        except RuntimeError as error:
            raise self._fault("columns were to be gathered", error) from error
        return torch.cat(parts, dim=-1)

    def vote(self, mine: int) -> list[int]:
        """Return the number that each rank gives, on every rank alike."""
        ballots = torch.zeros(self.size, dtype=torch.int64)
        ballots[self.rank] = mine
        try:
            dist.all_reduce(ballots, group=self.votes)
        except RuntimeError as error:
            raise self._fault("a vote was to be taken", error) from error
        return ballots.tolist()

    def command(self, message: bytes) -> None:
        """Send ``message`` to all other ranks, each of which is in :meth:`await_command` or will
        be."""
        packet = bytearray(_PACKET_BYTES)
        packet[:_LENGTH_BYTES] = len(message).to_bytes(_LENGTH_BYTES, "little")
        room = _PACKET_BYTES - _LENGTH_BYTES
        packet[_LENGTH_BYTES : _LENGTH_BYTES + len(message)] = message[:room]
        self._broadcast(packet)
        if len(message) > room:
            self._broadcast(bytearray(message[room:]))

    def await_command(self) -> bytes:
        """Return the next message of rank 0, however long it takes."""
        packet = bytearray(_PACKET_BYTES)
        self._broadcast(packet)
        length = int.from_bytes(packet[:_LENGTH_BYTES], "little")
        message = packet[_LENGTH_BYTES : _LENGTH_BYTES + length]
        rest = bytearray(length - len(message))
        if rest:
            self._broadcast(rest)
        return bytes(message + rest)

    def _broadcast(self, buffer: bytearray) -> None:
        try:
            dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), 0, group=self.commands)
        except RuntimeError as error:
            raise self._fault("a command was to be passed on", error) from error

    def _fault(self, what: str, error: RuntimeError) -> EnvironmentFault:
        return EnvironmentFault(
            f"{what} among {self.size} ranks of an engine, rank {self.rank} found another gone or "
            f"silent for {self.timeout_s} s ({error}); end all ranks and open the engine anew"
        )


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    return _is_group(dist.new_group(backend="gloo", timeout=timeout))


def _is_group(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), "every rank is in every group"
    return group
