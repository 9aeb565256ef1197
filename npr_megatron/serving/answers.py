"""From an order to its response: all at once, or as it grows; given up when the client hangs up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from npr_megatron.serving.choices import (
    Choice,
    Ending,
    PlainChoice,
    Shown,
    WatchedChoice,
    whole,
)
from npr_megatron.serving.errors import ApiError
from npr_megatron.serving.formats import DONE, Format, sse, usage_of
from npr_megatron.serving.orders import Order, Served
from npr_megatron.serving.service import Answer, Service, engine_failed

Result = TypeVar("Result")


class Job:
    """One order given to the engine.

    Args:
        on_first_text: told how long the first text of a stream took [s].
    """

    def __init__(
        self,
        order: Order,
        served: Served,
        service: Service,
        form: Format,
        on_first_text: Callable[[float], None],
    ) -> None:
        self._order = order
        self._served = served
        self._service = service
        self._format = form
        self._on_first_text = on_first_text
        self._begun = time.monotonic()
        self._changed = asyncio.Event()
        self._answers: list[Answer] = []

    async def submit(self) -> None:
        """Give the order to the engine.

        Raises:
            ApiError: it is refused, or there is no room.
        """
        asked = self._order.asked
        self._answers = await self._service.submit(
            self._order.requests, self._changed, is_live=asked.stream or bool(asked.stop)
        )

    def give_up(self) -> None:
        """End what is unfinished; harmless when nothing is."""
        self._service.release(self._answers)

    async def submit_and_wait(self) -> dict[str, Any]:
        """Give the order to the engine, wait for all answers, return them in one object.

        Raises:
            ApiError: the order is refused, or an answer came to no end.
        """
        await self.submit()
        if self._order.asked.stop:
            choices = await self._listen()
        else:
            while not all(answer.is_over for answer in self._answers):
                await self._wait()
            choices = [self._whole(answer) for answer in self._answers]
        endings = [ending for _, ending in choices]
        usage = usage_of(self._order.num_prompt_tokens, endings)
        return self._format.response(choices, usage)

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events; an error that comes up on the way is the last one."""
        try:
            async for value in self._chunks():
                yield sse(value)
            yield DONE
        except ApiError as error:
            yield sse(error.body())

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        asked = self._order.asked
        for index in range(len(self._answers)):
            if (opening := self._format.opening(index)) is not None:
                yield opening
        endings: dict[int, Ending] = {}
        async for index, shown, ending in self._shown():
            if ending is not None:
                endings[index] = ending
                yield self._format.closing(index, ending, is_watched=asked.npr.branches)
            elif shown.text or asked.tells_logprobs or not shown.pieces:
                yield self._format.chunk(index, shown)
        if asked.stream_options is not None and asked.stream_options.include_usage:
            listed = [endings[index] for index in range(len(self._answers))]
            yield self._format.accounts(usage_of(self._order.num_prompt_tokens, listed))

    async def _listen(self) -> list[tuple[Shown, Ending]]:
        """Return what each choice has said, and how it ended."""
        said = [Shown() for _ in self._answers]
        endings: dict[int, Ending] = {}
        async for index, shown, ending in self._shown():
            said[index].text += shown.text
            said[index].pieces += shown.pieces
            if ending is not None:
                endings[index] = ending
        return [(shown, endings[index]) for index, shown in enumerate(said)]

    async def _shown(self) -> AsyncIterator[tuple[int, Shown, Ending | None]]:
        """Yield what each choice shows, and at its end how it ended."""
        growing = {index: self._choice(answer) for index, answer in enumerate(self._answers)}
        is_first = True
        while growing:
            await self._wait()
            for index, choice in list(growing.items()):
                for shown in _progress(choice, self._answers[index]):
                    if is_first and shown.text:
                        is_first = False
                        self._on_first_text(time.monotonic() - self._begun)
                    yield index, shown, None
                if choice.ending is not None:
                    del growing[index]
                    self._service.release([self._answers[index]])  # a stop ended it
                    yield index, Shown(), choice.ending

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _choice(self, answer: Answer) -> Choice:
        asked, tokenizer = self._order.asked, self._served.tokenizer
        if asked.npr.branches:
            return WatchedChoice(tokenizer)
        return PlainChoice(tokenizer, len(answer.request.prompt_ids), asked.stop)

    def _whole(self, answer: Answer) -> tuple[Shown, Ending]:
        if answer.trajectory is None:
            raise _failure_of(answer)
        if self._order.asked.tells_logprobs:
            return whole(answer.trajectory, self._served.tokenizer)
        shown, ending = whole(answer.trajectory, self._served.tokenizer)
        return Shown(shown.text), ending


def _progress(choice: Choice, answer: Answer) -> list[Shown]:
    shown = choice.take(answer.news())
    if answer.failure is not None:
        raise _failure_of(answer)
    if answer.trajectory is not None:
        shown += choice.finish(answer.trajectory)
    return shown


def _failure_of(answer: Answer) -> ApiError:
    assert answer.failure is not None
    return engine_failed(answer.failure)


class EventStream(Response):
    """A stream of server-sent events that ends when the client does.

    Args:
        events: what is sent.
        on_end: called once, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (an ASGI application)."""
        del scope
        try:
            await unless_hung_up(self._send_all(send), receive)
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_hung_up(
    work: Coroutine[Any, Any, Result], receive: Callable[[], Awaitable[Any]]
) -> Result | None:
    """Return what ``work`` does; None, with ``work`` cancelled, if the client hangs up before.

    Args:
        receive: the messages of a request whose body has been read.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait([working, listening], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _hang_up(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
