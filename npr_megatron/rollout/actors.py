"""Ray actors as this project uses them: where they sit, how they are called, how they fail.

Two kinds of failure are kept apart everywhere. An *error* was raised by our code in the actor: it
would be raised again by a replacement, so it goes to the caller in its own type. A *death* took the
process (killed, out of memory, lost node, or silent beyond its deadline), or those that compute for
it: the caller decides whether somebody replaces it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from npr_megatron.errors import EngineLost, EnvironmentFault, NprError

_LAST_WORDS_S = 5.0


@dataclass(frozen=True, slots=True)
class Seat:
    """One bundle of a placement group, and the process that may live in it."""

    placement_group: PlacementGroup
    bundle: int
    num_cpus: float
    num_gpus: float

    @property
    def device(self) -> str:
        """Torch device type of the process in this seat."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    def options(self, *, max_concurrency: int = 1) -> dict[str, Any]:
        """Return the options of an actor in this seat: never restarted by Ray, one thread per CPU
        it holds."""
        environment = {"OMP_NUM_THREADS": str(max(1, int(self.num_cpus)))}
        if self.num_gpus == 0:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a CPU process must not see an idle GPU
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": max_concurrency,
            "runtime_env": {"env_vars": environment},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.placement_group, placement_group_bundle_index=self.bundle
            ),
        }


@dataclass(frozen=True, slots=True)
class Death:
    """A call that was not answered because its process is gone or silent."""

    cause: str
    """One line for people."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that was answered by an error."""

    error: NprError
    is_ours: bool
    """Raised on purpose; otherwise ``error`` wraps the trace of something unexpected."""


def outcome(call: ray.ObjectRef, what: str) -> Any:
    """Return the result of a call that is ready, or its :class:`Death` or :class:`Failure`."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, EngineLost):
            return Death(str(error.cause).splitlines()[0])
        if isinstance(error.cause, NprError):
            return Failure(error.cause, is_ours=True)
        return Failure(_unexpected(error, what), is_ours=False)
    except RayActorError as error:
        if "error raised in its creation task" in str(error):  # its code could not be loaded
            return Failure(_unexpected(error, what), is_ours=False)
        return Death(_cause(error))


def gather(calls: Sequence[ray.ObjectRef], *, timeout_s: float, what: str) -> list[Any]:
    """Return the results of independent ``calls`` in order, a :class:`Death` for each lost process.

    Raises the first error in its own type. A call unanswered after ``timeout_s`` is a death.
    """
    deadline = time.monotonic() + timeout_s
    results: dict[ray.ObjectRef, Any] = {}
    for call, result in _arrivals(calls, deadline, what):
        if isinstance(result, Failure):
            raise result.error
        results[call] = result
    silent = Death(f"no answer to {what} within {timeout_s:g} s")
    return [results.get(call, silent) for call in calls]


def gather_collective(calls: Sequence[ray.ObjectRef], *, timeout_s: float, what: str) -> list[Any]:
    """Return the results of ``calls`` that wait for each other, in rank order.

    When one rank fails, the others fail of it or hang, so after the first failure they get only a
    few seconds to say more. A death tells more than an error of ours, that more than any other.

    Raises:
        EnvironmentFault: a process is gone or silent beyond ``timeout_s``.
        NprError: what a rank raised, in its own type.
    """
    results: dict[ray.ObjectRef, Any] = {}
    bad: dict[int, Death | Failure] = {}
    for call, result in _arrivals(calls, time.monotonic() + timeout_s, what):
        results[call] = result
        if isinstance(result, Death | Failure):
            bad[calls.index(call)] = result
            break
    if bad:
        rest = [call for call in calls if call not in results]
        for call, result in _arrivals(rest, time.monotonic() + _LAST_WORDS_S, what):
            if isinstance(result, Death | Failure):
                bad[calls.index(call)] = result
    elif len(results) < len(calls):
        silent = Death(f"no answer within {timeout_s:g} s")
        bad = {rank: silent for rank, call in enumerate(calls) if call not in results}
    if bad:
        raise _most_telling(bad, what)
    return [results[call] for call in calls]


def _arrivals(
    calls: Sequence[ray.ObjectRef], deadline: float, what: str
) -> Iterator[tuple[ray.ObjectRef, Any]]:
    """Yield each call with its outcome as it arrives; stop at ``deadline``."""
    waiting = list(calls)
    while waiting:
        left_s = max(0.0, deadline - time.monotonic())
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=left_s)
        if not ready:
            return
        yield ready[0], outcome(ready[0], what)


def _most_telling(bad: dict[int, Death | Failure], what: str) -> NprError:
    for rank, result in sorted(bad.items()):
        if isinstance(result, Death):
            return EnvironmentFault(
                f"{what} needs every rank, the process of rank {rank} is gone ({result.cause}); "
                "look for memory "
                "pressure on the node and resume from the last checkpoint"
            )
    failures = [result for _, result in sorted(bad.items()) if isinstance(result, Failure)]
    return min(failures, key=lambda failure: not failure.is_ours).error


def _unexpected(error: Exception, what: str) -> EnvironmentFault:
    trace = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without terminal colours
    return EnvironmentFault(
        f"{what} failed unexpectedly, a defect of this program or of the machine:\n{trace}"
    )


def _cause(error: RayActorError) -> str:
    """Return the line in which Ray says what happened, without its general advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit detail:" in line] or lines[-1:]
    return telling[0].split("exit detail:")[-1].split("Some common causes")[0].strip()
