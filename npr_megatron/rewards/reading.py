"""What a response says: its parse, its text and its format score, read once and used by everyone.

Knows no tokenizer; whoever has one passes ``decode``, which must keep special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from npr_megatron.records.trajectory import IntArray
from npr_megatron.schema.grammar import Grammar
from npr_megatron.schema.parse import Parser, ParseResult, Span
from npr_megatron.schema.score import FormatLimits, format_score
from npr_megatron.schema.tags import Vocabulary

Decode = Callable[[Sequence[int]], str]
BlockStrings = tuple[tuple[str, ...], str]
"""Texts of the steps of a block, and of its takeaway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One response, read."""

    result: ParseResult
    text: str
    """The whole response."""
    format_score: float
    """0.0 if valid (well-formed, and a conclusion with a boxed answer), else down to -2.0."""

    @property
    def is_valid(self) -> bool:
        """Whether format and box are in order."""
        return self.format_score == 0.0


class Reader:
    """Reads responses; one grammar table serves all of them."""

    def __init__(
        self, decode: Decode, vocabulary: Vocabulary, limits: FormatLimits | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self._grammar = Grammar(vocabulary)
        self._decode = decode
        self._limits = limits

    def read(self, response_ids: IntArray) -> Reading:
        """Read a response; broken ones never raise."""
        ids: list[int] = response_ids.tolist()
        parser = Parser(self._grammar)
        for token_id in ids:
            parser.feed(token_id)
        result = parser.result()
        conclusion = "" if result.conclusion is None else self._text(ids, result.conclusion)
        return Reading(
            result=result,
            text=self._decode(ids),
            format_score=format_score(result, conclusion, self._limits),
        )

    def block_strings(self, response_ids: IntArray, reading: Reading) -> tuple[BlockStrings, ...]:
        """Return what the steps and takeaways of the complete blocks say."""
        ids: list[int] = response_ids.tolist()
        return tuple(
            (
                tuple(self._text(ids, step) for step in block.steps),
                self._text(ids, block.takeaway),
            )
            for block in reading.result.blocks
        )

    def _text(self, ids: list[int], span: Span) -> str:
        return self._decode(ids[span.start : span.stop])
