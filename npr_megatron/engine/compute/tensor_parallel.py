"""One engine over several ranks: a leader that decides, followers that compute what it says.

::

    rank 0                                         the others
    runner = LeaderRunner(LocalRunner(...), ranks) follower = Follower(LocalRunner(...), ranks)
    engine = Engine(..., runner=runner)            load_tiles(..., follower.staging())
    engine.load(...)                               follower.seal(version)
    engine.generate(requests)                      follower.follow()  # until the leader closes
    runner.close()

The scheduler, the pool and the draw of tokens exist on the leader only, so ranks cannot disagree
about them: a follower gets each batch as it is, runs its shard of the model on it and throws the
logits away. Followers hold their own shard of live and of staged weights. A version becomes live
when the leader commits it, on all ranks or on none: before anybody copies, each says whether it has
that version staged, whole and finite.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from npr_megatron.engine.compute.ranks import Ranks
from npr_megatron.engine.compute.runner import Runner
from npr_megatron.engine.live_weights import LiveWeights
from npr_megatron.engine.memory.pool import SlotArray
from npr_megatron.engine.schedule.batch import Batch
from npr_megatron.errors import DivergenceError, EnvironmentFault, StaleWeightsError
from npr_megatron.records.trajectory import FloatArray, RouteArray, Trajectory

_READY, _NOT_STAGED, _NOT_FINITE = range(3)
"""What a rank says of a version that is to be committed."""


class _Order(NamedTuple):
    """What followers are told to do."""

    kind: Literal["run", "score", "take", "stop"]
    content: Any = None
    """A batch, trajectories, a version, nothing."""


class LeaderRunner:
    """The runner of rank 0: says what is to be computed, and computes its own part."""

    def __init__(self, local: Runner, ranks: Ranks) -> None:
        self._local = local
        self._ranks = ranks
        self.weights: dict[str, Tensor] = local.weights
        """Live storages of this rank; written in place only."""
        self.device: torch.device = local.device
        self._is_midway = False

    def run(self, batch: Batch) -> Tensor:
        """Write the keys and values of ``batch`` on all ranks; return [M, V] fp32 logits.

        Raises:
            EnvironmentFault: a rank is gone or silent; the engine is of no further use.
        """
        with self._ordered(_Order("run", batch)):
            return self._local.run(batch)

    def routes(self, slots: SlotArray) -> RouteArray | None:
        """Return the experts that computed the tokens in ``slots``: all ranks route alike."""
        return self._local.routes(slots)

    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] log-probs by one masked pass.

        Raises:
            EnvironmentFault: a rank is gone or silent; the engine is of no further use.
        """
        with self._ordered(_Order("score", trajectories)):
            return self._local.score(trajectories)

    def agree(self, version: int) -> None:
        """Let all ranks take over ``version``, of which this one is ready; the others do so now.

        Raises:
            DivergenceError: another rank staged NaN or infinity; nobody takes anything over.
            StaleWeightsError: another rank has not staged and sealed ``version``; likewise.
            EnvironmentFault: a rank is gone or silent; the engine is of no further use.
        """
        with self._ordered(_Order("take", version)):
            ballots = self._ranks.vote(_READY)
        if any(ballots):
            raise _refusal(version, ballots)

    def close(self) -> None:
        """Let the followers end.

        Where this rank broke off in the middle of something, or another is gone, they are not
        told: they wait for a part of it, and end as soon as this process leaves the group.
        """
        if not self._is_midway:
            with suppress(EnvironmentFault), self._ordered(_Order("stop")):
                pass

    @contextmanager
    def _ordered(self, order: _Order) -> Iterator[None]:
        """Tell the followers what to do; the block is this rank's part of it."""
        self._is_midway = True
        self._ranks.command(pickle.dumps(order, protocol=5))
        yield
        self._is_midway = False


class Follower:
    """A rank other than 0: carries out what the leader says.

    Weights may be staged from another thread while :meth:`follow` runs.
    """

    def __init__(self, local: Runner, ranks: Ranks) -> None:
        self._local = local
        self._ranks = ranks
        self._live = LiveWeights(local.weights)
        self._shadow = threading.Lock()
        self._sealed_version = -1
        self._verdict = _NOT_STAGED

    @property
    def weight_version(self) -> int:
        """Version of the live weights; -1 until some are taken over."""
        return self._live.version

    def staging(self) -> dict[str, Tensor]:
        """Return the shadow storages of this rank, to be filled anew; what was sealed is void."""
        with self._shadow:
            self._verdict = _NOT_STAGED
            return self._live.staging()

    def seal(self, version: int) -> None:
        """Check what was staged, and declare it to be ``version``.

        Raises:
            DivergenceError: a storage holds NaN or infinity; no rank will commit ``version``.
        """
        with self._shadow:
            self._sealed_version = version
            try:
                self._live.seal()
            except DivergenceError:
                self._verdict = _NOT_FINITE
                raise
            self._verdict = _READY

    @torch.inference_mode()
    def follow(self) -> None:
        """Carry out the leader's orders until it closes.

        Raises:
            EnvironmentFault: the leader or another rank is gone or silent.
        """
        while True:
            order: _Order = pickle.loads(self._ranks.await_command())
            match order.kind:
                case "run":
                    self._local.run(order.content)
                case "score":
                    self._local.score(order.content)
                case "take":
                    self._take(order.content)
                case "stop":
                    return

    def _take(self, version: int) -> None:
        with self._shadow:
            is_other = self._verdict == _READY and self._sealed_version != version
            ballots = self._ranks.vote(_NOT_STAGED if is_other else self._verdict)
            if not any(ballots):
                self._live.take(version)


def _refusal(version: int, ballots: Sequence[int]) -> DivergenceError | StaleWeightsError:
    broken = [rank for rank, ballot in enumerate(ballots) if ballot == _NOT_FINITE]
    if broken:
        return DivergenceError(
            f"version {version} was to be committed, but ranks {broken} staged NaN or infinity; "
            "the live weights of all ranks are as before, check the trainer"
        )
    missing = [rank for rank, ballot in enumerate(ballots) if ballot]
    return StaleWeightsError(
        f"version {version} was to be committed, but ranks {missing} have not staged and sealed "
        "it; the live weights of all ranks are as before, stage that version on every rank"
    )
