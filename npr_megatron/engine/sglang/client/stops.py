"""At which tokens SGLang must hand a stream back: where the structure takes over, or is broken.

Derived from the grammar alone. What a stage does not stop at is accepted token by token; what it
stops at needlessly costs a round trip and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.schema.grammar import Grammar, State
from npr_megatron.schema.tags import Vocabulary

_TEXT = -1


@dataclass(frozen=True, slots=True)
class Stops:
    """Stop tokens of stages."""

    trunk: tuple[int, ...]
    """The end token and the tags that lead a trunk to a fork or are never legal on it."""
    branch: tuple[int, ...]
    """The end token and all tags: each ends a branch, by closing or by breaking it."""
    plain: tuple[int, ...]
    """The end token: tags are text."""

    @classmethod
    def of(cls, grammar: Grammar) -> Stops:
        """Return the stop tokens of a grammar."""
        decisive = _decisive_ids(grammar.vocabulary)
        states = _trunk_states(grammar)
        trunk = [x for x in decisive if not any(_goes_on(grammar, state, x) for state in states)]
        return cls(tuple(trunk), decisive, (grammar.vocabulary.eos,))


def _decisive_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    return (*vocabulary.tags, vocabulary.eos)


def _goes_on(grammar: Grammar, state: State, token_id: int) -> bool:
    """Whether the model decides again right behind a legal ``token_id``."""
    following, rule = grammar.advance(state, token_id)
    return rule is None and not following.next_is_forced and not following.is_terminal


def _trunk_states(grammar: Grammar) -> set[State]:
    """Return every state in which a legal trunk lets the model decide."""
    vocabulary = grammar.vocabulary
    symbols = {_TEXT, vocabulary.newline, *_decisive_ids(vocabulary)}
    symbols.update(token_id for index in vocabulary.index_ids for token_id in index)
    found, open_states = set[State](), [grammar.start]
    while open_states:
        state = open_states.pop()
        if state in found:
            continue
        if state.next_is_forced:
            open_states.append(_behind_block(grammar, state))
            continue
        found.add(state)
        steps = (grammar.advance(state, symbol) for symbol in symbols)
        open_states += [following for following, rule in steps if rule is None]
    return found


def _behind_block(grammar: Grammar, closed: State) -> State:
    """Return the state in which the model goes on once a closed guideline's branches are joined."""
    fork, _ = grammar.advance(closed, grammar.vocabulary.newline)
    state = grammar.after_join(fork)
    for token_id in grammar.vocabulary.takeaway_header:
        state, _ = grammar.advance(state, token_id)
    return state
