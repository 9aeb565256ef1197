"""Where every token of a sample stands: positions, branch labels, predecessors, forced tokens.

``layout_of`` reads a complete, well-formed response; a trajectory from an engine carries the same
streams and needs no layout. ``predecessors`` is pure from the two label streams, so it serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npr_megatron.errors import LayoutError
from npr_megatron.records.trajectory import BoolArray, IntArray
from npr_megatron.schema.grammar import Grammar, State
from npr_megatron.schema.rules import Rule, Violation
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.topology.cursor import Convention, Place, TopologyCursor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BranchLayout:
    """Aligned streams of one sample, prompt first.

    Example (one prompt token; two branches of one token behind a trunk of two; not a legal
    response, but short)::

        position_ids=[0, 1, 2, 2, 3]  block=[0, 0, 1, 1, 0]  branch=[0, 0, 1, 2, 0]
        predecessor=[-1, 0, 1, -1, -1]
    """

    position_ids: IntArray
    """[T] logical position, shared by siblings."""
    block: IntArray
    """[T] 1-based parallel block of a branch token; 0 on the trunk."""
    branch: IntArray
    """[T] 1-based branch inside the block; 0 on the trunk."""
    predecessor: IntArray
    """[T] index of the token whose logits predict this one; -1 where none does."""
    forced: BoolArray
    """[T] True on the prompt and where the structure alone decides the token."""


def layout_of(
    token_ids: Sequence[int] | IntArray,
    prompt_length: int,
    vocabulary: Vocabulary,
    convention: Convention = "canonical",
) -> BranchLayout:
    """Return the layout of a prompt (trunk) and its complete response.

    Forced by structure: the newline after ``</guideline>``, ``<step>`` newline ``i:``, the newline
    after ``</step>``, and ``<takeaway>`` newline.

    Args:
        token_ids: [T] prompt and response, end-of-sequence token included.
        prompt_length: leading tokens that are prompt, 0..T; tags inside the prompt mean nothing.

    Raises:
        LayoutError: the response breaks the grammar; the message names the first rule and token.
    """
    ids: list[int] = [int(token_id) for token_id in token_ids]
    if not 0 <= prompt_length <= len(ids):
        raise LayoutError(
            f"a layout with a prompt of {prompt_length} tokens was asked for, but the sample has "
            f"{len(ids)}; pass the length of the prompt inside the sample"
        )
    cursor = TopologyCursor(convention)
    places = [cursor.place_trunk() for _ in range(prompt_length)]
    forced = [True] * prompt_length
    grammar = Grammar(vocabulary)
    state = grammar.start
    for position, token_id in enumerate(ids[prompt_length:]):
        before = state
        state, rule = grammar.advance(before, token_id)
        if rule is not None:
            raise _malformed(position, rule)
        places.append(_place(cursor, before, state))
        forced.append(before.next_is_forced)
    rule = grammar.end_rule(state)
    if rule is not None:
        raise _malformed(len(ids) - prompt_length, rule)
    return _layout(places, forced)


def plain_layout(num_tokens: int, prompt_length: int = 0) -> BranchLayout:
    """Return the layout of sequential text: everything on the trunk, only the prompt forced."""
    zeros = np.zeros(num_tokens, dtype=np.int32)
    return BranchLayout(
        position_ids=np.arange(num_tokens, dtype=np.int32),
        block=zeros,
        branch=zeros,
        predecessor=np.arange(-1, num_tokens - 1, dtype=np.int32),
        forced=np.arange(num_tokens) < prompt_length,
    )


def predecessors(block: IntArray, branch: IntArray) -> IntArray:
    """Return, per token, the index of the token whose logits predict it; -1 where none does.

    That is the token before, except at borders: the fork newline predicts the header of branch 1
    only, and neither the header of a later branch nor the first token after a join has a
    predecessor. So no index occurs twice, and the last token of a branch predicts nothing.

    Args:
        block: [T] 1-based parallel block of a branch token; 0 on the trunk.
        branch: [T] 1-based branch inside the block; 0 on the trunk.

    Returns:
        [T] int32.
    """
    result = np.arange(-1, len(block) - 1, dtype=np.int32)
    is_border = (block[1:] != block[:-1]) | (branch[1:] != branch[:-1])
    opens_first_branch = (block[:-1] == 0) & (branch[1:] == 1)
    result[1:][is_border & ~opens_first_branch] = -1
    return result


def _place(cursor: TopologyCursor, before: State, after: State) -> Place:
    """Place the token read between two grammar states; fork and join where they say so."""
    if not (before.in_branch or after.in_branch):
        place = cursor.place_trunk()
        if after.at_fork:
            cursor.fork(after.num_plans)
        return place
    place = cursor.place_branch(after.step_index)
    if after.at_join:
        cursor.join()
    return place


def _layout(places: Sequence[Place], forced: Sequence[bool]) -> BranchLayout:
    streams = np.array(places, dtype=np.int32).reshape(-1, 3)
    position_ids, block, branch = (np.ascontiguousarray(stream) for stream in streams.T)
    return BranchLayout(
        position_ids=position_ids,
        block=block,
        branch=branch,
        predecessor=predecessors(block, branch),
        forced=np.array(forced, dtype=np.bool_),
    )


def _malformed(position: int, rule: Rule) -> LayoutError:
    return LayoutError(
        "a branch layout was asked for, but the response is malformed: "
        f"{Violation(position, rule).message} ({rule}); lay it out as plain text or drop the sample"
    )
