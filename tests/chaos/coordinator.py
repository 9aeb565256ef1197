"""The coordinator of a case: ``rollout.push`` decides, this shell carries out over sockets.

The Ray shell of the product is ``rollout.crew``; this one drives the same machine, the same
replicas and the same publishers, and may itself be killed and started again at any point. Orders go
out from threads; what they answer comes back as events through one queue.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npr_megatron.errors import NprError, StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.rollout.health import Event, Health, Stamp
from npr_megatron.rollout.orders import (
    Abort,
    Action,
    Answered,
    CatchUp,
    Commit,
    Committed,
    Failed,
    Fence,
    Noticed,
    Pushed,
    PushEvent,
    Replace,
    Replaced,
    SourceLost,
    Stage,
    Staged,
    TimedOut,
)
from npr_megatron.rollout.push import Swap, restart
from npr_megatron.weights.publication import Publication
from tests.chaos.lines import Gone, Late, call
from tests.chaos.parts import NUM_SOURCES, replica_address, source_address

ORDER_TIMEOUT_S = 0.4
_DECODE_S = 2.0
"""Answers may be lost: a report that a killed coordinator had asked for takes them with it."""
_PATIENCE_S = 40.0
"""A case that takes longer than this hangs, however busy the machine."""


class Coordinator:
    """Pushes ``num_pushes`` versions while replicas decode, then waits until all is well."""

    def __init__(self, folder: Path, num_replicas: int, seed: int, is_reordering: bool) -> None:
        self._folder = folder
        self._addresses = [replica_address(folder, index) for index in range(num_replicas)]
        self._events: queue.Queue[tuple[int, PushEvent]] = queue.Queue()
        self._lives = [0] * num_replicas
        """How often each seat was taken anew: answers of earlier lives are void."""
        self._pids = [0] * num_replicas
        self._buried_lives: list[set[int]] = [set() for _ in range(num_replicas)]
        self._funerals = threading.Lock()
        self._numbers = itertools.count()
        self._terms = [0] * num_replicas
        self._busy = [False] * num_replicas
        self._publications: dict[Stamp, Publication] = {}
        self._chance = random.Random(seed)
        self._is_reordering = is_reordering
        self._num_requests = 0
        self._is_feeding = True
        self._deadline = time.monotonic() + _PATIENCE_S
        self._swap = Swap.of(num_replicas)

    def run(self, num_pushes: int) -> None:
        """Do it all; what was seen is in the folder's files."""
        self._begin()
        num_pushed = 0
        while num_pushed < num_pushes:
            self._until(lambda: self._swap.is_settled)
            num_pushed += self._push()
        self._until(self._is_well)
        asked = self._num_requests
        self._until(lambda: self._num_requests >= asked + 4 * len(self._addresses))
        self._is_feeding = False
        self._until(lambda: self._is_well() and not any(self._busy))
        (self._folder / "end").write_bytes(pickle.dumps(self._swap))

    # A life of a coordinator

    def _begin(self) -> None:
        """Ask what an earlier coordinator left behind, and go on from there."""
        known = self._folder / "publication"
        if known.exists():
            publication: Publication = pickle.loads(known.read_bytes())
            self._publications[_stamp(publication)] = publication
        answers: list[Stamp | None] = [None] * len(self._addresses)
        silent: list[int] = []
        for index, address in enumerate(self._addresses):
            try:
                settled = call(address, "settle", timeout_s=ORDER_TIMEOUT_S)
                self._pids[index] = call(address, "pid", timeout_s=ORDER_TIMEOUT_S)
                answers[index], self._terms[index] = settled.serving, settled.term
            except (Gone, Late):
                silent.append(index)
        newest = max((stamp for stamp in answers if stamp), default=None)
        swap, actions = restart(answers, silent, has_source=newest in self._publications)
        self._swap = swap
        self._carry_out(actions)

    def _push(self) -> bool:
        """Publish the next version and begin its push; False if a trainer rank is not well."""
        version = self._next_version()
        try:
            parts = [
                call(source_address(self._folder, rank), "publish", version, timeout_s=0.8)
                for rank in range(NUM_SOURCES)
            ]
            publication = Publication.assemble(parts)
        except (Gone, Late, NprError):
            self._pass_time(0.05)
            return False
        stamp = _stamp(publication)
        self._publications[stamp] = publication
        _write(self._folder / "publication", pickle.dumps(publication))
        self._take(Pushed(stamp))
        return True

    def _next_version(self) -> int:
        """Return a version never used before, by this coordinator or another."""
        used = self._folder / "version"
        version = int(used.read_text()) + 1 if used.exists() else 1
        _write(used, str(version).encode())
        return version

    def _is_well(self) -> bool:
        is_nowhere = self._swap.serving is None or self._swap.is_lost
        if is_nowhere and self._swap.is_settled:
            self._push()  # the weights are nowhere left: only the trainer can help
        everybody = range(len(self._addresses))
        return self._swap.is_settled and all(self._swap.is_routable(index) for index in everybody)

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"the fleet does not come to rest: {self._swap}")
            self._pass_time(0.01)

    def _pass_time(self, seconds: float) -> None:
        """Take the events of ``seconds``, and have idle replicas decode."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._feed()
            try:
                life, event = self._events.get(timeout=left)
            except queue.Empty:
                return
            assert not isinstance(event, Pushed | SourceLost)
            if life == self._lives[event.replica]:
                self._take(event)

    def _take(self, event: PushEvent) -> None:
        self._swap, actions = self._swap.after(event)
        self._carry_out(actions)
        if isinstance(event, Replaced):
            self._lives[event.replica] += 1
            self._take(Noticed(event.replica, Event.STARTED))

    # Orders

    def _carry_out(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Stage(replica, stamp):
                    self._order(replica, Staged, stamp, self._stage, self._publications[stamp])
                case CatchUp(replica, stamp, peer):
                    self._order(replica, Staged, stamp, self._catch_up, stamp, peer)
                case Commit(replica, stamp):
                    self._order(replica, Committed, stamp, self._commit, stamp)
                case Abort(replica, stamp):
                    self._in_thread(self._drop, replica, stamp)
                case Fence(replica):
                    self._in_thread(self._ask, replica, self._lives[replica])
                case Replace(replica):
                    os.kill(self._pids[replica], signal.SIGKILL)
                    self._buried(replica, self._lives[replica])

    def _order(
        self,
        replica: int,
        answer: type[Staged] | type[Committed],
        stamp: Stamp,
        act: Callable[..., None],
        *arguments: Any,
    ) -> None:
        """Have ``act`` carry out an order, late and twice if the network is bad; report its end."""
        life, term = self._lives[replica], self._terms[replica]
        delays = [0.0]
        if self._is_reordering:
            delays = [self._chance.uniform(0, 0.2) for _ in range(self._chance.choice((1, 2)))]

        def once(delay_s: float) -> None:
            time.sleep(delay_s)
            try:
                act(replica, term, *arguments)
                event: PushEvent = answer(replica, stamp)
            except NprError:
                event = Failed(replica, stamp)
            except Late:
                event = TimedOut(replica)
            except Gone:
                self._buried(replica, life)
                return
            self._events.put((life, event))

        for delay_s in delays:
            self._in_thread(once, delay_s)

    def _stage(self, replica: int, term: int, publication: Publication) -> None:
        self._call(replica, "stage", publication, term)

    def _commit(self, replica: int, term: int, stamp: Stamp) -> None:
        self._call(replica, "commit", stamp, term)

    def _catch_up(self, replica: int, term: int, stamp: Stamp, peer: int | None) -> None:
        if peer is None:
            self._stage(replica, term, self._publications[stamp])
            return
        name = f"loan-{os.getpid()}-{next(self._numbers)}"
        try:
            loan = self._call(peer, "lend", name, str(self._folder / "arenas"))
        except (Gone, Late) as error:
            raise StaleWeightsError(f"peer {peer} cannot lend ({error}); try another") from error
        try:
            self._stage(replica, term, loan)
        finally:
            with contextlib.suppress(Gone, Late):  # what the dead lent is swept with the rest
                self._call(peer, "end_loan", name)

    def _drop(self, replica: int, stamp: Stamp) -> None:
        with contextlib.suppress(Gone, Late):  # noticed at its next order
            self._call(replica, "drop_staged", stamp)

    def _ask(self, replica: int, life: int) -> None:
        """Ask a fenced replica what it serves until it answers or is gone."""
        while True:
            try:
                settled = self._call(replica, "settle")
                self._pids[replica] = self._call(replica, "pid")
            except Late:
                continue
            except Gone:
                self._buried(replica, life)
                return
            self._terms[replica] = settled.term
            self._events.put((life, Answered(replica, settled.serving)))
            return

    def _buried(self, replica: int, life: int) -> None:
        """Report a death, once per life, and look out for who takes the seat."""
        with self._funerals:
            if life in self._buried_lives[replica]:
                return
            self._buried_lives[replica].add(life)
        self._events.put((life, Noticed(replica, Event.DIED)))
        self._in_thread(self._await_successor, replica, life)

    def _await_successor(self, replica: int, life: int) -> None:
        """Report the process that takes the seat; who watches starts it."""
        while life == self._lives[replica]:
            try:
                pid = self._call(replica, "pid")
                if pid != self._pids[replica]:  # else it was killed and is not yet gone
                    settled = self._call(replica, "settle")
                    self._pids[replica], self._terms[replica] = pid, settled.term
                    self._events.put((life, Replaced(replica)))
                    return
            except (Gone, Late):
                pass
            time.sleep(0.01)

    def _call(self, replica: int, name: str, *arguments: Any) -> Any:
        return call(self._addresses[replica], name, *arguments, timeout_s=ORDER_TIMEOUT_S)

    # Decoding

    def _feed(self) -> None:
        swap = self._swap
        for replica in range(len(self._addresses)):
            if self._is_feeding and not self._busy[replica] and swap.is_routable(replica):
                assert swap.serving is not None
                self._busy[replica] = True
                # What is served is read here: when the thread runs, a push may have been decided
                # that this replica has still to be told of.
                self._in_thread(self._decode, replica, self._lives[replica], swap.serving.version)

    def _decode(self, replica: int, life: int, served: int) -> None:
        """Have two requests decoded; write down what came and what the fleet served at the time."""
        term = self._terms[replica]
        numbers = [self._num_requests, self._num_requests + 1]
        self._num_requests += len(numbers)
        try:
            self._call(replica, "submit", [_request(replica, number) for number in numbers])
            found: list[Any] = []
            end = time.monotonic() + _DECODE_S
            while len(found) < len(numbers) and time.monotonic() < end:
                if not self._is_heard(replica, life, term):
                    break
                found += self._call(replica, "report", 0.1).trajectories()
            with (self._folder / f"trajectories-{os.getpid()}-{replica}").open("ab") as file:
                pickle.dump((served, found), file)
        except (Late, StaleWeightsError):
            pass  # stale: it died, and its successor was asked before it was given weights
        except Gone:
            self._buried(replica, life)
        finally:
            self._busy[replica] = False

    def _is_heard(self, replica: int, life: int, term: int) -> bool:
        """Whether requests are still known there: a fence drops them, and ends the term."""
        is_fenced = self._swap.replicas[replica].state.health is Health.FENCED
        return (life, term) == (self._lives[replica], self._terms[replica]) and not is_fenced

    def _in_thread(self, act: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=act, args=arguments, daemon=True).start()


def _stamp(publication: Publication) -> Stamp:
    return Stamp(publication.version, publication.digest)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _request(replica: int, number: int) -> GenerationRequest:
    return GenerationRequest(
        prompt_id=f"{os.getpid()}-{replica}-{number}",
        rollout=0,
        prompt_ids=(5, 6, 7),
        mode=DecodeMode.SEQUENTIAL,
        max_new_tokens=10,
        max_critical_path=10,
        seed=number,
    )


def coordinator_process(
    folder: Path, num_replicas: int, num_pushes: int, seed: int, is_reordering: bool
) -> None:
    """Run a coordinator to its end."""
    Coordinator(folder, num_replicas, seed, is_reordering).run(num_pushes)
