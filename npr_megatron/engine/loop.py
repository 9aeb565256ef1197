"""A thread that owns an engine: it decodes while there is work, and obeys between two steps.

The loop's thread is the only one that calls the engine, but for what ``engine.interface`` allows
others. Whatever else is to happen to the engine is handed over as an action and runs between two
steps, so that nothing changes under a half-computed one.

An error in the loop is kept and raised to every later caller; the loop does not go on after one.

Example::

    loop = EngineLoop(engine, on_step=print, on_failure=print)
    loop.start()
    loop.between_steps(lambda: engine.add(request))
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from npr_megatron.engine.interface import Engine
from npr_megatron.errors import EnvironmentFault, NprError
from npr_megatron.records.trajectory import Trajectory

Action = Callable[[], None]


class EngineLoop:
    """Steps ``engine`` whenever it has unfinished requests.

    Args:
        engine: ready to decode, or to be given weights by an action.
        on_step: given what each step returned, by the loop's thread, before any action behind it.
        on_failure: given the error that ends the loop, by its thread.
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[list[Trajectory]], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._orders: deque[tuple[Action, Future[int], int]] = deque()
        """What to do, whom to tell, and the steps that had ended when it was asked for."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: Exception | None = None
        """What ended the loop; every later caller gets it."""
        self.num_steps = 0
        """Steps that have ended."""

    @property
    def num_pending(self) -> int:
        """Actions that are waiting or being carried out."""
        return len(self._orders)

    def start(self) -> None:
        """Begin; call it once."""
        self._thread.start()

    def post(self, action: Action) -> Future[int]:
        """Have ``action`` run between two steps, at the next opportunity; do not wait for it.

        Returns:
            A future that fails with what ``action`` raises; else the number of steps that ended
            between this call and ``action``. Cancelled before its turn, ``action`` does not run.

        Raises:
            Exception: the one that ended the loop.
        """
        done: Future[int] = Future()
        with self._changed:
            if self.failure is not None:
                raise self.failure
            self._orders.append((action, done, self.num_steps))
            self._changed.notify()
        return done

    def between_steps(self, action: Action) -> int:
        """Do as :meth:`post` does, and wait until ``action`` has run."""
        return self.post(action).result()

    def stop(self, timeout_s: float) -> None:
        """End the loop behind the step that is being computed; safe to call twice.

        Actions that are waiting then, and all later ones, fail with ``EnvironmentFault``. The
        engine is the caller's again.

        Raises:
            EnvironmentFault: the step took longer than ``timeout_s``; the engine is still in use.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EnvironmentFault(
                f"the engine was to stop within {timeout_s:.0f} s, it is still computing a step; "
                "end the process"
            )

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._obey()
                self._step()
        except Exception as error:  # noqa: BLE001 - kept, and raised to every caller
            self._end(error)
            self._on_failure(error)
        else:
            self._end(EnvironmentFault("the engine was asked for something after it was stopped"))

    def _obey(self) -> None:
        """Wait for work; run the actions that have come in. A step follows before later ones."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._orders or self._engine.num_unfinished or self._is_stopping
            )
        for _ in range(len(self._orders)):
            action, done, arrived_at = self._orders[0]  # pending until it has taken effect
            if done.set_running_or_notify_cancel():
                self._carry_out(action, done, arrived_at)
            self._orders.popleft()

    def _carry_out(self, action: Action, done: Future[int], arrived_at: int) -> None:
        try:
            action()
        except NprError as error:
            done.set_exception(error)
        except Exception as error:
            self._orders.popleft()
            done.set_exception(error)
            raise
        else:
            done.set_result(self.num_steps - arrived_at)

    def _step(self) -> None:
        if self._is_stopping or not self._engine.num_unfinished:
            return
        self._on_step(self._engine.step())
        with self._changed:
            self.num_steps += 1

    def _end(self, reason: Exception) -> None:
        with self._changed:
            self.failure = reason
            for _, done, _ in self._orders:
                if done.set_running_or_notify_cancel():
                    done.set_exception(reason)
            self._orders.clear()
