"""TrainerGroup: all trainer ranks as Ray actors, acting as one trainer.

Each actor holds one ``train.rank.TrainerRank``, which knows nothing of Ray. A call goes to all
ranks at once; batches go through Ray's object store once and are read from there by every rank;
weights never pass through Ray. Ranks work in collectives, so the first failure ends the group: what
it held in memory is lost with it, and the run resumes from its last checkpoint. Megatron and torch
are imported in the actors only.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ray

from npr_megatron.config.checkpoint import CheckpointKeeping
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import OptimizerConfig, ParallelConfig, TrainerConfig
from npr_megatron.errors import ConfigError, EnvironmentFault
from npr_megatron.records.sample import FloatArray
from npr_megatron.rollout.actors import Seat, gather_collective
from npr_megatron.train.step import StepBatch, StepResult
from npr_megatron.weights.executors.arena import arena_path, remove_arenas
from npr_megatron.weights.publication import Publication, RankPublication

if TYPE_CHECKING:
    from npr_megatron.train.rank import TrainerRank

CALL_TIMEOUT_S = 3600.0
"""Longest call; collectives inside give up earlier, this catches a rank that hangs elsewhere."""
_CLOSE_TIMEOUT_S = 10.0


class TrainerActor:
    """One process of the trainer."""

    def __init__(self) -> None:
        self._rank: TrainerRank

    def rendezvous(self) -> str:
        """Return an address on this rank's node where the ranks can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, info: dict[str, Any], arguments: dict[str, Any]) -> int:
        """Join the other ranks and build this one; return the process id."""
        from npr_megatron.runtime.process_group import RankInfo
        from npr_megatron.train.rank import TrainerRank

        self._rank = TrainerRank(RankInfo(**info), **arguments)
        return os.getpid()

    def close(self) -> None:
        """Leave the other ranks and remove this rank's arena."""
        self._rank.close()

    def run(self, act: Callable[[TrainerRank, Any], Any], argument: Any) -> Any:
        """Return ``act(rank, argument)``."""
        return act(self._rank, argument)


class TrainerGroup:
    """Context manager over all trainer ranks; the methods are those of ``TrainerRank``.

    Every method raises what a rank raises, in its own type (``errors``), and EnvironmentFault when
    a rank's process is gone or silent for ``CALL_TIMEOUT_S``; the group has ended then.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        trainer: TrainerConfig,
        run_id: str,
        arena_dir: str,
        keeping: CheckpointKeeping | None = None,
    ) -> None:
        if len(seats) != parallel.world_size:
            raise ConfigError(
                f"the trainer needs tp * cp * dp * pp = {parallel.world_size} seats, {len(seats)} "
                "were placed; place it with the same [parallel] section"
            )
        self._seats = tuple(seats)
        self._arguments: dict[str, Any] = {
            "model": model,
            "parallel": parallel,
            "trainer": trainer,
            "run_id": run_id,
            "arena_dir": arena_dir,
            "keeping": keeping,
        }
        self._actors: list[Any] = []
        self.pids: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def load_hf(self, path: Path) -> None:
        """Load the weights of an HF folder."""
        self._all("load_hf", lambda rank, path: rank.load_hf(path), path)

    def begin_stage(self, optimizer: OptimizerConfig, num_steps: int) -> None:
        """Start a stage of ``num_steps`` with a fresh optimizer and schedule."""
        self._all("begin_stage", lambda rank, args: rank.begin_stage(*args), (optimizer, num_steps))

    def train_step(self, batch: StepBatch) -> StepResult:
        """Take one optimizer step; return the result, which is the same on every rank."""
        return self._all("train_step", lambda rank, batch: rank.train_step(batch), batch)[0]

    def score(self, batch: StepBatch) -> list[FloatArray]:
        """Return the log-probs of the labels, [B, S] per microbatch."""
        return self._all("score", lambda rank, batch: rank.score(batch), batch)[0]

    def save(self, path: Path, progress: dict[str, Any]) -> None:
        """Begin to write a checkpoint that :meth:`load` can continue from."""
        self._all("save", lambda rank, args: rank.save(*args), (path, progress))

    def load(self, path: Path) -> dict[str, Any]:
        """Continue from the last checkpoint under ``path``; return the progress stored with it."""
        return self._all("load", lambda rank, path: rank.load(path), path)[0]

    def publish(self, version: int) -> Publication:
        """Put the weights where the engines can pull them; return what they need to know."""
        parts: list[RankPublication] = self._all(
            "publish", lambda rank, version: rank.publish(version), version
        )
        return Publication.assemble(parts)

    def export_hf(self, path: Path, source_folder: Path) -> None:
        """Write the weights as an HF folder, with the tokenizer of ``source_folder``."""
        self._all("export_hf", lambda rank, args: rank.export_hf(*args), (path, source_folder))

    def close(self) -> None:
        """End all ranks and free their shared memory; safe to call twice."""
        self._end(grace_s=_CLOSE_TIMEOUT_S)

    def _start(self) -> None:
        actor_class = ray.remote(TrainerActor)
        self._actors = [actor_class.options(**seat.options()).remote() for seat in self._seats]
        address = self._gather([self._actors[0].rendezvous.remote()], "rendezvous")[0]
        starts = [
            actor.start.remote(
                {"rank": rank, "world_size": len(self._actors), "init_method": address},
                self._arguments,
            )
            for rank, actor in enumerate(self._actors)
        ]
        self.pids = tuple(self._gather(starts, "start"))

    def _all(self, name: str, act: Callable[[TrainerRank, Any], Any], argument: Any) -> list[Any]:
        """Run ``act`` on every rank; return the results in rank order."""
        if not self._actors:
            raise EnvironmentFault(
                f"trainer {name} was asked for, the trainer has ended; start it again and resume"
            )
        shared = ray.put(argument)
        return self._gather([actor.run.remote(act, shared) for actor in self._actors], name)

    def _gather(self, calls: list[ray.ObjectRef], name: str) -> list[Any]:
        try:
            return gather_collective(calls, timeout_s=CALL_TIMEOUT_S, what=f"trainer {name}")
        except EnvironmentFault:
            self._end(grace_s=0.0)
            raise

    def _end(self, grace_s: float) -> None:
        actors, self._actors = self._actors, []
        if not actors:
            return
        ends = [actor.close.remote() for actor in actors]
        ray.wait(ends, num_returns=len(ends), timeout=grace_s)
        for actor in actors:
            ray.kill(actor)
        self._remove_arenas()

    def _remove_arenas(self) -> None:
        """Free what killed ranks held, as soon as the kernel has taken them away."""
        arena_dir, run_id = self._arguments["arena_dir"], self._arguments["run_id"]
        paths = [arena_path(arena_dir, run_id, rank) for rank in range(len(self._seats))]
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while any(path.exists() for path in paths) and time.monotonic() < deadline:
            remove_arenas(arena_dir, run_id)
            time.sleep(0.02)
