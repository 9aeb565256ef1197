"""One choice of a response while its answer grows: what is to be shown next. Pure.

A plain choice shows text in linear order; a watched one shows every branch as it runs. Both take
what the engine tells and return :class:`Shown` values, which ``formats`` spells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.engine.events import (
    Event,
    FinishEvent,
    ForkEvent,
    JoinEvent,
    RestartEvent,
    TokenEvent,
)
from npr_megatron.records.trajectory import FinishReason, Trajectory
from npr_megatron.serving.errors import ApiError
from npr_megatron.serving.linear import LinearOrder, Piece, Speller, StopFilter, pieces_of


@dataclass(slots=True)
class Shown:
    """What one chunk of a stream shows."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list[Piece])
    """The tokens behind ``text``."""
    tag: dict[str, Any] | None = None
    """For watchers: what this is, and of which branch."""

    def add(self, piece: Piece) -> None:
        """Go on by a token."""
        self.text += piece.text
        self.pieces.append(piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an answer ended, and after how much."""

    finish: str
    """What OpenAI's clients know: ``stop`` or ``length``."""
    reason: str
    """The engine's reason, or ``stop_text`` where a text of the client's ended it."""
    detail: str = ""
    completion_tokens: int
    critical_path_tokens: int
    num_blocks: int

    def extension(self) -> dict[str, Any]:
        """Return what is told under ``npr`` of the choice."""
        return {
            "finish": self.reason,
            "detail": self.detail,
            "completion_tokens": self.completion_tokens,
            "critical_path_tokens": self.critical_path_tokens,
            "num_blocks": self.num_blocks,
        }


class Choice(ABC):
    """An answer that grows."""

    def __init__(self) -> None:
        self.ending: Ending | None = None
        """Once nothing more will be shown."""

    @abstractmethod
    def take(self, events: Sequence[Event]) -> list[Shown]:
        """Return what ``events`` let be shown.

        Raises:
            ApiError: what was shown is void.
        """

    def finish(self, trajectory: Trajectory) -> list[Shown]:
        """Return what is shown at the end; ``ending`` says how it came.

        Raises:
            ApiError: the answer was not brought to an end.
        """
        if self.ending is not None:
            return []
        self.ending = ending_of(trajectory)
        return self._rest()

    @abstractmethod
    def _rest(self) -> list[Shown]:
        """Return what was held back."""


class PlainChoice(Choice):
    """Text in linear order, up to a stop."""

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, stops: Sequence[str]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._stops = stops
        self._has_shown = False
        self._begin()

    def _begin(self) -> None:
        self._order = LinearOrder(self._tokenizer)
        self._filter = StopFilter(self._stops)
        self._num_tokens = self._num_blocks = self._last_position = 0

    def take(self, events: Sequence[Event]) -> list[Shown]:
        """Return what ``events`` let be shown, as one value."""
        shown = Shown()
        for event in events:
            if self.ending is not None:
                break
            match event:
                case RestartEvent() if self._has_shown or shown.pieces:
                    raise ApiError(
                        500,
                        "answer_restarted",
                        f"weights of version {event.weight_version} made the engine begin anew "
                        "after text had been sent; ask again",
                    )
                case RestartEvent():
                    self._begin()
                case TokenEvent() | ForkEvent() | JoinEvent():
                    self._num_blocks += isinstance(event, ForkEvent)
                    self._show(self._order.take(event), shown)
        return self._shown(shown)

    def _show(self, pieces: Sequence[Piece], shown: Shown) -> None:
        for piece in self._filter.cut(pieces):
            shown.add(piece)
            self._num_tokens += 1
            self._last_position = max(self._last_position, piece.position)
        if self._filter.is_found:
            self.ending = Ending(
                finish="stop",
                reason="stop_text",
                completion_tokens=self._num_tokens,
                critical_path_tokens=self._last_position + 1 - self._prompt_length,
                num_blocks=self._num_blocks,
            )

    def _rest(self) -> list[Shown]:
        shown = Shown()
        ending, self.ending = self.ending, None
        self._show(self._order.rest(), shown)
        self.ending = self.ending or ending
        shown.text += self._filter.rest()
        return self._shown(shown)

    def _shown(self, shown: Shown) -> list[Shown]:
        self._has_shown |= bool(shown.pieces)
        return [shown] if shown.pieces or shown.text else []


class WatchedChoice(Choice):
    """Every branch as it runs.

    What is told at once is put together per stream, so a slow reader gets longer chunks.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._speller = Speller(tokenizer)

    def take(self, events: Sequence[Event]) -> list[Shown]:
        """Return what ``events`` let be shown, each value with its tag."""
        shown: list[Shown] = []
        growing: dict[int, Shown] = {}
        for event in events:
            if isinstance(event, TokenEvent):
                if event.branch not in growing:
                    place = {"block": event.block, "branch": event.branch}
                    growing[event.branch] = Shown(tag={"event": "token", **place})
                    shown.append(growing[event.branch])
                growing[event.branch].add(
                    self._speller.spell(event.branch, event.token_id, event.logprob, event.position)
                )
            elif not isinstance(event, FinishEvent):
                growing.clear()
                if isinstance(event, RestartEvent):
                    self._speller = Speller(self._tokenizer)
                shown.append(Shown(tag=_tag_of(event)))
        return shown

    def _rest(self) -> list[Shown]:
        return []


def _tag_of(event: ForkEvent | JoinEvent | RestartEvent) -> dict[str, Any]:
    match event:
        case ForkEvent():
            return {"event": "fork", "block": event.block, "num_branches": event.num_branches}
        case JoinEvent():
            return {"event": "join", "block": event.block}
        case RestartEvent():
            return {"event": "restart", "weight_version": event.weight_version}


def whole(trajectory: Trajectory, tokenizer: Tokenizer) -> tuple[Shown, Ending]:
    """Return all that a plain choice without stops shows of a finished answer.

    Raises:
        ApiError: the answer was not brought to an end.
    """
    ending = ending_of(trajectory)
    pieces = pieces_of(trajectory, tokenizer)
    return Shown("".join(piece.text for piece in pieces), pieces), ending


def ending_of(trajectory: Trajectory) -> Ending:
    """Return how ``trajectory`` ended.

    Raises:
        ApiError: the model failed, or the server ended it.
    """
    match trajectory.finish:
        case FinishReason.FAILED:
            raise ApiError(500, "model_failed", f"no answer: {trajectory.finish_detail}")
        case FinishReason.ABORTED | FinishReason.TIMEOUT:
            raise ApiError(503, "shutting_down", "the server ended the answer: it shuts down")
    cut = (FinishReason.LENGTH, FinishReason.CRITICAL_PATH)
    return Ending(
        finish="length" if trajectory.finish in cut else "stop",
        reason=str(trajectory.finish),
        detail=trajectory.finish_detail,
        completion_tokens=trajectory.num_tokens,
        critical_path_tokens=trajectory.critical_path_tokens,
        num_blocks=trajectory.num_blocks,
    )
