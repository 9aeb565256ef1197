"""The objects of OpenAI's protocol: chunks of streams, and responses in one piece."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.serving.choices import Ending, Shown
from npr_megatron.serving.linear import Piece

DONE = b"data: [DONE]\n\n"


class Format(ABC):
    """One response.

    Args:
        response_id: of the response and of each of its chunks.
        name: of the model.
        tokenizer: spells single tokens, where log-probs are told; None tells none.
    """

    kind: str
    chunk_kind: str
    prefix: str
    """How ids of such responses begin."""

    def __init__(self, response_id: str, name: str, tokenizer: Tokenizer | None) -> None:
        self._head = {"id": response_id, "created": int(time.time()), "model": name}
        self._tokenizer = tokenizer

    def chunk(self, index: int, shown: Shown) -> dict[str, Any]:
        """Return the chunk that shows something of choice ``index``."""
        choice = self._choice(index, None, shown.pieces) | self._added(shown.text)
        return self._chunk([choice], shown.tag)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that stands before all others of a choice, if there is one."""
        del index
        return None

    def closing(self, index: int, ending: Ending, *, is_watched: bool) -> dict[str, Any]:
        """Return the last chunk of a choice."""
        choice = self._choice(index, ending, []) | self._added("")
        return self._chunk([choice], {"event": "finish"} if is_watched else None)

    def accounts(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk behind all choices that tells the usage."""
        return self._chunk([], None) | {"usage": usage}

    def response(
        self, choices: Sequence[tuple[Shown, Ending]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the response in one piece."""
        listed = [
            self._choice(index, ending, shown.pieces) | self._said(shown.text)
            for index, (shown, ending) in enumerate(choices)
        ]
        return {**self._head, "object": self.kind, "choices": listed, "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]], tag: dict[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        return chunk if tag is None else {**chunk, "npr": tag}

    def _choice(self, index: int, ending: Ending | None, pieces: Sequence[Piece]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": None,
            "finish_reason": None if ending is None else ending.finish,
        }
        if self._tokenizer is not None and pieces:
            choice["logprobs"] = self._logprobs(pieces, self._tokenizer)
        if ending is not None:
            choice["npr"] = ending.extension()
        return choice

    @abstractmethod
    def _said(self, text: str) -> dict[str, Any]:
        """Return the part of a choice that holds all its text."""

    @abstractmethod
    def _added(self, text: str) -> dict[str, Any]:
        """Return the part of a choice of a chunk that holds the text it adds."""

    @abstractmethod
    def _logprobs(self, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the log-probs of some tokens."""


class ChatFormat(Format):
    """Objects of ``/v1/chat/completions``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self, index: int) -> dict[str, Any]:
        """Return the chunk that says who speaks."""
        delta = {"delta": {"role": "assistant", "content": ""}}
        return self._chunk([self._choice(index, None, []) | delta], None)

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _added(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
        tokens = []
        for piece in pieces:
            text = tokenizer.decode([piece.token_id])
            is_part = "\ufffd" in text
            tokens.append(
                {
                    "token": text,
                    "logprob": piece.logprob,
                    "bytes": None if is_part else list(text.encode()),
                    "top_logprobs": [],
                }
            )
        return {"content": tokens, "refusal": None}


class CompletionFormat(Format):
    """Objects of ``/v1/completions``."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _added(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "tokens": [tokenizer.decode([piece.token_id]) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": None,
            "text_offset": None,
        }


def usage_of(num_prompt_tokens: int, endings: Sequence[Ending]) -> dict[str, Any]:
    """Return what a response took; the longest path of its choices is an extension."""
    num_tokens = sum(ending.completion_tokens for ending in endings)
    longest = max((ending.critical_path_tokens for ending in endings), default=0)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "npr": {"critical_path_tokens": longest},
    }


def sse(value: dict[str, Any]) -> bytes:
    """Return ``value`` as a server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
