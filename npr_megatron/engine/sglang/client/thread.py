"""An event loop in a thread of its own, and what it hands to callers in other threads."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from npr_megatron.engine.events import Event
from npr_megatron.records.trajectory import Trajectory

T = TypeVar("T")


class LoopThread:
    """Runs coroutines and calls for threads that wait for them."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what ``coroutine`` returns, or raise what it raises."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def ask(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns in the loop's thread, or raise what it raises."""

        async def answer() -> T:
            return call()

        return self.run(answer())

    def close(self) -> None:
        """End the thread; what still runs in it is forgotten."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass(frozen=True, slots=True)
class News:
    """What happened to one request."""

    request_id: str
    listener: Callable[[Event], None] | None
    events: list[Event]
    trajectory: Trajectory | None
    """Its record, if it ended."""


class Mailbox:
    """News from the loop's thread to whoever calls ``step``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._news: deque[News] = deque()
        self._failure: Exception | None = None

    def post(self, news: News) -> None:
        """Leave news."""
        with self._changed:
            self._news.append(news)
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Raise ``error`` to whoever collects, from now on; the first one counts."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    @property
    def is_sound(self) -> bool:
        """Whether nothing was left by :meth:`fail`."""
        return self._failure is None

    def require_sound(self) -> None:
        """Raise what was left by :meth:`fail`."""
        if self._failure is not None:
            raise self._failure

    def collect(self, timeout_s: float) -> list[News]:
        """Return all news; wait for some, for a moment."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._failure, timeout_s)
            self.require_sound()
            news, self._news = list(self._news), deque()
        return news
