"""Texts to token ids: the inverse of the parser.

What ``render`` returns always parses into a document, and ``texts_of`` gives the texts back. Blocks
and the conclusion are set off by one newline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from npr_megatron.errors import InputError
from npr_megatron.schema.parse import Block, Document, Span
from npr_megatron.schema.tags import Vocabulary

Ids = Sequence[int]


class BlockTexts(NamedTuple):
    """What one block says, without tags and indices; a plain tuple of the three does as well."""

    plans: Sequence[Ids]
    steps: Sequence[Ids]
    """One per plan."""
    takeaway: Ids


def render(
    blocks: Sequence[tuple[Sequence[Ids], Sequence[Ids], Ids]],
    conclusion: Ids,
    vocabulary: Vocabulary,
) -> list[int]:
    """Return the response that says these texts, end-of-sequence token included.

    Args:
        blocks: at least one (plans, steps, takeaway), see :class:`BlockTexts`.
        conclusion: ids behind the last block.
        vocabulary: ids of the tags around them.

    Raises:
        InputError: no response can say it; lists every text at fault.
    """
    texts = [BlockTexts(*block) for block in blocks]
    problems = _problems(texts, conclusion, vocabulary)
    if problems:
        raise InputError(
            "a response was to be rendered, but its texts break the schema: "
            f"{'; '.join(problems)}; correct these texts"
        )
    ids: list[int] = []
    for block in texts:
        ids += [*_block_ids(block, vocabulary), vocabulary.newline]
    return [*ids, *conclusion, vocabulary.eos]


def texts_of(document: Document, response_ids: Ids) -> tuple[list[BlockTexts], list[int]]:
    """Return the blocks and the conclusion of a parsed response, as :func:`render` takes them."""

    def text(span: Span) -> list[int]:
        return [int(token_id) for token_id in response_ids[span.start : span.stop]]

    def block_texts(block: Block) -> BlockTexts:
        plans, steps = ([text(span) for span in spans] for spans in (block.plans, block.steps))
        return BlockTexts(plans, steps, text(block.takeaway))

    return [block_texts(block) for block in document.blocks], text(document.conclusion)


def _block_ids(block: BlockTexts, vocabulary: Vocabulary) -> list[int]:
    newline = vocabulary.newline
    ids = [vocabulary.guideline_open, newline]
    for number, plan in enumerate(block.plans, start=1):
        index = vocabulary.index_ids[number - 1]
        ids += [vocabulary.plan_open, *index, *plan, vocabulary.plan_close, newline]
    ids += [vocabulary.guideline_close, newline]
    for number, step in enumerate(block.steps, start=1):
        ids += [*vocabulary.step_header(number), *step, vocabulary.step_close, newline]
    return [*ids, *vocabulary.takeaway_header, *block.takeaway, vocabulary.takeaway_close]


def _problems(blocks: Sequence[BlockTexts], conclusion: Ids, vocabulary: Vocabulary) -> list[str]:
    problems = [] if blocks else ["there is no block"]
    texts = {"the conclusion": conclusion}
    for number, block in enumerate(blocks, start=1):
        num_plans, num_steps = len(block.plans), len(block.steps)
        if not 1 <= num_plans <= vocabulary.max_plans or num_steps != num_plans:
            problems.append(
                f"block {number} has {num_plans} plans and {num_steps} steps; both must be equal "
                f"and within 1..{vocabulary.max_plans}"
            )
        texts |= {f"plan {i} of block {number}": plan for i, plan in enumerate(block.plans, 1)}
        texts |= {f"step {i} of block {number}": step for i, step in enumerate(block.steps, 1)}
        texts[f"the takeaway of block {number}"] = block.takeaway
    reserved = {*vocabulary.tags, vocabulary.eos}
    blank = {*vocabulary.blank_ids, vocabulary.newline}
    for name, text in texts.items():
        if not set(text) - blank:
            problems.append(f"{name} is empty")
        if reserved.intersection(text):
            problems.append(f"{name} holds a tag or the end token")
    return problems
