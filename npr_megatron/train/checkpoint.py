"""Trainer checkpoints: taken by all ranks at once, written behind their backs, read under any
layout.

A save is planned in collectives and copied to host memory, then each rank forks a process that
writes (``checkpoint_writer``) and trains on. How that becomes a checkpoint says
``checkpoint_folder``, what proves that it is whole ``checkpoint_manifest``.

A save that fails is a warning: the last checkpoint stays, training goes on, and the next save tries
again. What a run holds in memory is worth more than a copy of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from npr_megatron import __version__
from npr_megatron.config.checkpoint import CheckpointKeeping
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.runtime.first_rank import FirstRank
from npr_megatron.train.checkpoint_folder import (
    LATEST,
    StoredCheckpoint,
    begin_checkpoint,
    nothing_whole,
    remove_leftovers,
    whole_checkpoints,
)
from npr_megatron.train.checkpoint_manifest import Manifest, Origin, damaged_files
from npr_megatron.train.checkpoint_state import SavePlan, SavePlanner, TrainerState, load_state
from npr_megatron.train.checkpoint_writer import Ending, Shards, report_failure, write_part

_FORK = multiprocessing.get_context("fork")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A save that is being written."""

    partial: Path
    step: int
    process: ForkProcess
    outcome: Connection


class Checkpoints:
    """Saves and loads of one rank. All ranks call :meth:`save` and :meth:`load` alike; the other
    methods are each rank's own."""

    def __init__(self, keeping: CheckpointKeeping, parallel: ParallelConfig) -> None:
        """Collective."""
        self._keeping, self._parallel = keeping, parallel
        self._first_rank = FirstRank()
        self._rank = dist.get_rank()
        self._in_flight: _InFlight | None = None
        self._planner: SavePlanner | None = None

    def save(
        self, folder: Path, step: int, state: TrainerState, progress: Mapping[str, Any]
    ) -> None:
        """Begin to write a checkpoint of ``state`` to ``folder``, which all nodes share.

        Waits for the one before, then for as long as it takes to copy the state to host memory.
        What cannot be written is told as a warning by rank 0.

        Args:
            progress: JSON values that :meth:`load` returns; those of rank 0 count.
        """
        as_stored = json.loads(json.dumps(progress))
        self.finish()
        dist.barrier(self._first_rank.group)  # nobody writes to the folder any more
        partial, failure = self._first_rank.call(lambda: _begun(folder, step))
        if partial is None:
            self._tell(folder, step, failure)
            return
        if self._planner is None or self._planner.state.optimizer is not state.optimizer:
            self._planner = SavePlanner(state)
        plan = self._planner.plan(step, partial)
        ending = None
        if plan.metadata is not None:
            manifest = self._manifest(step, state.origin, as_stored)
            ending = Ending(
                world_size=dist.get_world_size(),
                writer=plan.writer,
                metadata=plan.metadata,
                common=plan.common,
                manifest=manifest,
                keep_last=self._keeping.keep_last,
            )
        self._fork(plan, ending, partial, step)
        if not self._keeping.in_background:
            self.finish()

    def look(self) -> None:
        """Tell what has become of the save under way, if it has ended. Does not wait."""
        if self._in_flight is not None and not self._in_flight.process.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until this rank's part of the save under way has ended; all of it, on rank 0."""
        saved, self._in_flight = self._in_flight, None
        if saved is None:
            return
        saved.process.join()
        try:
            failure = saved.outcome.recv()
        except EOFError:  # killed, by the kernel for want of memory perhaps
            failure = f"its process ended with {saved.process.exitcode}"
            self._give_up(saved.partial, failure)
        saved.outcome.close()
        if failure:
            self._tell(saved.partial.parent, saved.step, failure)

    def load(self, folder: Path, state: TrainerState) -> tuple[int, dict[str, Any]]:
        """Restore ``state`` in place; return the step and the progress that was stored with it.

        Every file is digested first, each by one rank. Where one is damaged, the next older whole
        checkpoint is taken, with a warning that names the file.

        Args:
            folder: of checkpoints, or one checkpoint.

        Raises:
            InputError: none is whole, or it is of another model, dtype or optimizer: each
                difference is named, before a tensor is read.
        """
        self.finish()
        found = self._sound(folder, state.origin)
        step = load_state(
            state, found.path, same_layout=found.manifest.parallel == self._parallel_json()
        )
        return step, found.manifest.progress

    def _sound(self, folder: Path, origin: Origin) -> StoredCheckpoint:
        """Return the first checkpoint of ``folder`` whose bytes are those written. Collective."""
        whole, problems = self._first_rank.call(lambda: _offered(folder))
        if not whole and not problems:
            raise InputError(
                f"a checkpoint was to be read from {folder}, which holds neither {LATEST} nor a "
                "whole checkpoint; name a folder that a trainer has saved to"
            )
        if whole and problems:
            self._warn("; ".join(problems))
        for stored in whole:
            if differing := origin.differences(stored.manifest.origin):
                raise InputError(
                    f"{stored.path} is of another trainer: {'; '.join(differing)}; name a "
                    "checkpoint of this one, or describe that one"
                )
            damaged = self._damage(stored)
            if not damaged:
                return stored
            problems = [*problems, *damaged]
            self._warn("; ".join(damaged))
        raise nothing_whole(folder, problems)

    def _damage(self, stored: StoredCheckpoint) -> list[str]:
        names = sorted(stored.manifest.files)[self._rank :: dist.get_world_size()]
        found = damaged_files(stored.path, stored.manifest, names)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found, group=self._first_rank.group)
        return [problem for part in everywhere for problem in part]

    def _manifest(self, step: int, origin: Origin, progress: dict[str, Any]) -> Manifest:
        return Manifest(
            step=step,
            progress=progress,
            origin=origin.to_json(),
            parallel=self._parallel_json(),
            versions={
                "npr_megatron": __version__,
                "megatron_core": importlib.metadata.version("megatron-core"),
                "torch": importlib.metadata.version("torch"),
            },
        )

    def _parallel_json(self) -> dict[str, Any]:
        return self._parallel.model_dump(mode="json")

    def _fork(self, plan: SavePlan, ending: Ending | None, partial: Path, step: int) -> None:
        shards = Shards(
            rank=self._rank,
            partial=partial,
            transforms=[plan.writer.transforms],
            buckets=plan.buckets,
        )
        receiving, sending = _FORK.Pipe(duplex=False)
        process = _FORK.Process(
            target=write_part, args=(shards, ending, sending, os.getpid()), name="checkpoint"
        )
        try:
            process.start()
        except OSError as error:  # no memory for another process
            self._give_up(partial, str(error))
            self._tell(partial.parent, step, str(error))
            return
        sending.close()
        self._in_flight = _InFlight(partial=partial, step=step, process=process, outcome=receiving)

    def _give_up(self, partial: Path, failure: str) -> None:
        """Do what a writer that does not live to do it would have done."""
        if self._rank:
            report_failure(partial, self._rank, failure)
        else:
            shutil.rmtree(partial, ignore_errors=True)

    def _warn(self, damage: str) -> None:
        if self._rank == 0:
            _log.warning("%s; the next checkpoint that is whole is taken", damage)

    def _tell(self, folder: Path, step: int, failure: str) -> None:
        if self._rank:
            return
        whole, _ = whole_checkpoints(folder)
        last = whole[0].path.name if whole else "none yet"
        _log.warning(
            "the checkpoint of step %d was not written to %s: %s; the last one there is %s, "
            "training goes on and the next save tries again: make room, or stop and start "
            "from there",
            step,
            folder,
            failure,
            last,
        )


def _begun(folder: Path, step: int) -> tuple[Path | None, str]:
    try:
        return begin_checkpoint(folder, step), ""
    except (OSError, EnvironmentFault) as error:
        return None, str(error)


def _offered(folder: Path) -> tuple[list[StoredCheckpoint], list[str]]:
    if folder.is_dir():
        remove_leftovers(folder)
    return whole_checkpoints(folder)
