"""From one version of the weights to the next, with trajectories under way."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Literal

from npr_megatron.engine.sglang import controls
from npr_megatron.engine.sglang.client.conductor import Conductor
from npr_megatron.engine.sglang.client.jobs import Era, FlowJob
from npr_megatron.engine.sglang.weights.pushed_weights import PushedWeights


class Switch:
    """Has SGLang serve what is staged and carries the trajectories over.

    Runs in the thread of the caller, who waits for it; flows are touched in the loop's thread.

    Args:
        kv_after_push: as ``EngineConfig`` has it.
        run: runs a coroutine in the loop's thread.
        beside: runs a function beside SGLang's tokenizer manager.
        unfinished: the requests that have not ended; called in the loop's thread.
    """

    def __init__(
        self,
        kv_after_push: Literal["drop", "recompute", "keep"],
        weights: PushedWeights,
        conductor: Conductor,
        era: Era,
        *,
        run: Callable[[Coroutine[Any, Any, None]], None],
        beside: Callable[..., Any],
        unfinished: Callable[[], list[FlowJob]],
    ) -> None:
        self._kv_after_push = kv_after_push
        self._weights = weights
        self._conductor = conductor
        self._era = era
        self._run = run
        self._beside = beside
        self._unfinished = unfinished

    def to(self, version: int) -> None:
        """Serve what is staged as ``version``.

        Raises:
            EnvironmentFault: SGLang did not take it; its ranks may hold a mixture.
        """
        if self._kv_after_push == "keep":
            self._beneath(version)
        else:
            self._between(version)

    def _between(self, version: int) -> None:
        """Give up what is under way; go on from prompts, or from the tokens there are."""
        self._run(self._conductor.halt())
        self._weights.commit(version, keeps_cache=False)
        self._run(self._resume(version))

    async def _resume(self, version: int) -> None:
        self._era.turn(version)
        for job in self._unfinished():
            if self._kv_after_push == "drop":
                job.start_again()
            job.look()
        self._conductor.resume()

    def _beneath(self, version: int) -> None:
        """Replace the weights beneath the stages under way; their keys and values stay."""
        self._run(self._hold())
        self._beside(controls.pause)
        self._weights.commit(version, keeps_cache=True)
        self._run(self._enter(version))
        self._beside(controls.go_on)
        self._run(self._let_go())

    async def _hold(self) -> None:
        self._conductor.hold()

    async def _enter(self, version: int) -> None:
        self._era.turn(version)
        for job in self._unfinished():
            job.enter(version)

    async def _let_go(self) -> None:
        self._conductor.let_go()
