"""From the texts of an exchange to token ids and their places in the tree.

The ids are those an engine would have seen: the prompt in the one template, the response cut where
an engine inserts or ends something (at tags, at the newline behind one, at the numbers of plans and
steps), and the end token. A response with a tag in it is read by the project's grammar; one without
is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from npr_megatron.data.conversations import Exchange
from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.rows import Fault
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.errors import InputError, LayoutError
from npr_megatron.records.trajectory import IntArray
from npr_megatron.schema.parse import parse
from npr_megatron.schema.rules import Violation
from npr_megatron.schema.tags import Tag
from npr_megatron.topology.layout import BranchLayout, layout_of, plain_layout

_ANY_TAG = "|".join(re.escape(tag.value) for tag in Tag)
_BORDER = re.compile(rf"({_ANY_TAG})(\n?)((?:(?<=<step>\n)|(?<=<plan>))\d+:)?")
_MAX_VIOLATIONS = 3
_EXCERPT_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenised:
    """One exchange as ids."""

    place: str
    token_ids: IntArray
    """[T] prompt, response, end token."""
    prompt_length: int
    layout: BranchLayout


class ExchangeReader:
    """Tokenises exchanges one by one.

    Example::

        reader = ExchangeReader(tokenizer, max_tokens=4096, max_positions=40960)
        found = reader.read(exchange)       # Tokenised, or a Fault that says why not
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, max_positions: int) -> None:
        """Take nothing longer than ``max_tokens`` or with a position past ``max_positions``."""
        self._tokenizer = tokenizer
        self._prompts = PromptBuilder(tokenizer)
        self._max_tokens, self._max_positions = max_tokens, max_positions
        self._tags = frozenset(tokenizer.vocabulary.tags)

    def read(self, exchange: Exchange) -> Tokenised | Fault:
        """Return the ids of ``exchange`` and their layout, or why it cannot be learnt."""
        try:
            response = response_ids(exchange.response, self._tokenizer)
            is_tree = not self._tags.isdisjoint(response)
            prompt = self._prompt_ids(exchange, is_tree=is_tree)
        except InputError as error:
            return Fault(exchange.place, "corrupt", str(error))
        if not is_tree and self._tokenizer.vocabulary.eos in response[:-1]:
            cut = "response: the end token stands before its end"
            return Fault(exchange.place, "malformed", cut)
        ids = [*prompt, *response]
        if len(ids) > self._max_tokens:
            return Fault(
                exchange.place,
                "over_long",
                f"{len(prompt)} tokens of prompt and {len(response)} of response do not fit a row "
                f"of {self._max_tokens} (trainer.row_tokens)",
            )
        try:
            layout = self._layout(ids, len(prompt), is_tree=is_tree)
        except LayoutError:
            return Fault(exchange.place, "malformed", self._grammar_problem(response))
        if (last := int(layout.position_ids.max())) >= self._max_positions:
            return Fault(
                exchange.place,
                "over_long",
                f"its position {last} is past the model's {self._max_positions} "
                "(max_position_embeddings)",
            )
        return Tokenised(
            place=exchange.place,
            token_ids=np.array(ids, dtype=np.int32),
            prompt_length=len(prompt),
            layout=layout,
        )

    def _prompt_ids(self, exchange: Exchange, *, is_tree: bool) -> list[int]:
        """A response in branches was asked for by the instruction to branch; plain text was not."""
        if exchange.prompt is None:
            if not self._tokenizer.has_chat_template:
                raise InputError(
                    "a conversation needs a chat template and the tokenizer has no such thing; "
                    'give "prompt" and "response"'
                )
            turns = [(message.role, message.content) for message in exchange.context]
            return self._tokenizer.encode_turns(turns)
        if is_tree or not self._tokenizer.has_chat_template:
            problem = Problem(id=exchange.place, question=exchange.prompt, answer="")
            return [*self._prompts.prompt_ids(problem)]
        return self._tokenizer.encode_user_turn(exchange.prompt)

    def _layout(self, ids: list[int], prompt_length: int, *, is_tree: bool) -> BranchLayout:
        if is_tree:
            return layout_of(ids, prompt_length, self._tokenizer.vocabulary)
        return plain_layout(len(ids), prompt_length)

    def _grammar_problem(self, response: list[int]) -> str:
        violations = parse(response, self._tokenizer.vocabulary).violations
        listed = [self._sentence(violation, response) for violation in violations[:_MAX_VIOLATIONS]]
        more = len(violations) - len(listed)
        return "response: " + "; ".join(listed + ([f"and {more} more"] if more > 0 else []))

    def _sentence(self, violation: Violation, response: list[int]) -> str:
        first = max(violation.position - _EXCERPT_TOKENS, 0)
        before = self._tokenizer.decode(response[first : violation.position])
        return f"{violation.rule.explanation} ({violation.rule}, after {before!r})"


def read_here(
    reader: ExchangeReader, exchanges: Iterable[Exchange | Fault]
) -> Iterator[Tokenised | Fault]:
    """Yield what ``reader`` makes of each exchange; faults are handed on."""
    for exchange in exchanges:
        yield exchange if isinstance(exchange, Fault) else reader.read(exchange)


def response_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a response, end token included, cut where an engine cuts it.

    Raises:
        InputError: the tokenizer has no token for a character.
    """
    ids: list[int] = []
    done = 0
    for match in _BORDER.finditer(text):
        tag, newline, number = match.groups()
        ids += tokenizer.encode(text[done : match.start()])
        ids += tokenizer.encode(tag)
        ids += [tokenizer.vocabulary.newline] if newline else []
        ids += tokenizer.encode(number) if number else []
        done = match.end()
    ids += tokenizer.encode(text[done:])
    eos = tokenizer.vocabulary.eos
    return ids if ids and ids[-1] == eos else [*ids, eos]


def turn_end_problem(tokenizer: Tokenizer) -> str | None:
    """Return how the chat template ends an answer, where that is not the end token.

    A model that learns to end with the one and is asked to go on behind the other meets what it has
    never seen.
    """
    if not tokenizer.has_chat_template:
        return None
    answer = "the answer itself"
    turns = [("user", "a question"), ("assistant", answer), ("user", "another")]
    text = tokenizer.decode(tokenizer.encode_turns(turns))
    behind = text.partition(answer)[2]
    eos = tokenizer.decode([tokenizer.vocabulary.eos])
    if behind.startswith(eos):
        return None
    return (
        f"the chat template goes on behind an answer with {behind[:40]!r}, the tokenizer's end "
        f"token is {eos!r}; set eos_token in tokenizer_config.json to what ends a turn"
    )
