"""From the events of one answer to text: in linear order, and cut before a stop. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from npr_megatron.data.tokenizer import TextStream, Tokenizer
from npr_megatron.engine.events import ForkEvent, JoinEvent, TokenEvent
from npr_megatron.records.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token and the text it adds to its stream."""

    text: str
    """Nothing for the end token, and inside a character that later tokens complete."""
    token_id: int
    logprob: float
    position: int


class Speller:
    """The text of every stream of one answer, token by token.

    Streams end with whole tokens, so those of the next block go on where these have ended.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[int, TextStream] = {}
        """By branch, 0 for the trunk."""

    def spell(self, branch: int, token_id: int, logprob: float, position: int) -> Piece:
        """Return the next token of a stream as a piece."""
        if token_id == self._tokenizer.vocabulary.eos:
            return Piece("", token_id, logprob, position)
        if branch not in self._streams:
            self._streams[branch] = TextStream(self._tokenizer)
        return Piece(self._streams[branch].add(token_id), token_id, logprob, position)


class LinearOrder:
    """Lets pieces through in linear order: the first branch at once, the others in their turn.

    A branch ends with the newline behind its ``</step>``; then the next one, and what it has said
    meanwhile, is let through.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._speller = Speller(tokenizer)
        self._step_close = tokenizer.vocabulary.step_close
        self._held: list[list[Piece]] = []
        """Per branch of the block, what was not let through."""
        self._turn = 0
        """Index of the branch whose turn it is."""
        self._ended: set[int] = set()
        self._closed: set[int] = set()
        """Branches that have written ``</step>``."""

    def take(self, event: TokenEvent | ForkEvent | JoinEvent) -> list[Piece]:
        """Return the pieces that ``event`` lets through."""
        match event:
            case TokenEvent():
                return self._take_token(event)
            case ForkEvent():
                self._held = [[] for _ in range(event.num_branches)]
                self._turn = 0
                self._ended, self._closed = set(), set()
                return []
            case JoinEvent():
                return self.rest()

    def rest(self) -> list[Piece]:
        """Return what is held back: the block, or the answer, has ended."""
        pieces = [piece for held in self._held for piece in held]
        self._held = []
        return pieces

    def _take_token(self, event: TokenEvent) -> list[Piece]:
        piece = self._speller.spell(event.branch, event.token_id, event.logprob, event.position)
        if not event.branch:
            return [piece]
        index = event.branch - 1
        self._held[index].append(piece)
        if index in self._closed:
            self._ended.add(index)
        if event.token_id == self._step_close:
            self._closed.add(index)
        return list(self._let_through())

    def _let_through(self) -> Iterator[Piece]:
        while self._turn < len(self._held):
            yield from self._held[self._turn]
            self._held[self._turn] = []
            if self._turn not in self._ended:
                return
            self._turn += 1


def pieces_of(trajectory: Trajectory, tokenizer: Tokenizer) -> list[Piece]:
    """Return the pieces of a finished answer in linear order: those that a stream of it shows."""
    speller = Speller(tokenizer)
    start = trajectory.prompt_length
    tokens = zip(
        trajectory.branch[start:].tolist(),
        trajectory.response_ids.tolist(),
        trajectory.logprobs[start:].tolist(),
        trajectory.position_ids[start:].tolist(),
        strict=True,
    )
    return [speller.spell(*token) for token in tokens]


class StopFilter:
    """Cuts text before the first stop; holds back what may be the beginning of one.

    Args:
        stops: not empty, none of them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._text = ""
        """Held back: a proper prefix of some stop, or nothing."""
        self.is_found = False

    def cut(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return ``pieces`` with the text that may be shown by now; the last one completes a stop
        if one ``is_found``.
        """
        shown: list[Piece] = []
        for piece in pieces:
            if self.is_found:
                break
            shown.append(replace(piece, text=self._push(piece.text)))
        return shown

    def rest(self) -> str:
        """Return what is held back: the answer has ended without a stop."""
        text, self._text = self._text, ""
        return text

    def _push(self, added: str) -> str:
        text = self._text + added
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_found, self._text = True, ""
            return text[: min(places)]
        num_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._text = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
