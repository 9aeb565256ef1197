"""Content to token ids: the inverse of the parser.

``parse(render(content, vocabulary), vocabulary).document`` always exists, and ``content_of`` gives
the content back. Blocks and the conclusion are set off by one newline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npr_megatron.errors import InputError
from npr_megatron.schema.parse import Document, Span
from npr_megatron.schema.tags import Vocabulary

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockContent:
    """The texts of one block, without tags and indices."""

    plans: tuple[Ids, ...]
    steps: tuple[Ids, ...]
    """One per plan."""
    takeaway: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentContent:
    """The texts of a response."""

    blocks: tuple[BlockContent, ...]
    conclusion: Ids


def render(content: DocumentContent, vocabulary: Vocabulary) -> Ids:
    """Return the response that says ``content``, end-of-sequence token included.

    Raises:
        InputError: no response can say it (counts differ, a text is empty or holds a tag).
    """
    problems = _problems(content, vocabulary)
    if problems:
        raise InputError(
            "a response was to be rendered, but its content breaks the schema: "
            f"{'; '.join(problems)}; correct these texts"
        )
    ids: list[int] = []
    for block in content.blocks:
        ids += _block_ids(block, vocabulary)
        ids.append(vocabulary.newline)
    return (*ids, *content.conclusion, vocabulary.eos)


def content_of(document: Document, response_ids: Sequence[int]) -> DocumentContent:
    """Return the texts of a parsed response."""

    def text(span: Span) -> Ids:
        return tuple(int(token_id) for token_id in response_ids[span.start : span.stop])

    return DocumentContent(
        blocks=tuple(
            BlockContent(
                plans=tuple(text(plan) for plan in block.plans),
                steps=tuple(text(step) for step in block.steps),
                takeaway=text(block.takeaway),
            )
            for block in document.blocks
        ),
        conclusion=text(document.conclusion),
    )


def _block_ids(block: BlockContent, vocabulary: Vocabulary) -> list[int]:
    newline = vocabulary.newline
    ids = [vocabulary.guideline_open, newline]
    for index, plan in zip(vocabulary.index_ids, block.plans, strict=False):
        ids += [vocabulary.plan_open, *index, *plan, vocabulary.plan_close, newline]
    ids += [vocabulary.guideline_close, newline]
    for number, step in enumerate(block.steps, start=1):
        ids += [*vocabulary.step_header(number), *step, vocabulary.step_close, newline]
    return [*ids, *vocabulary.takeaway_header, *block.takeaway, vocabulary.takeaway_close]


def _problems(content: DocumentContent, vocabulary: Vocabulary) -> list[str]:
    problems = [] if content.blocks else ["there is no block"]
    texts = {"the conclusion": content.conclusion}
    for number, block in enumerate(content.blocks, start=1):
        num_plans, num_steps = len(block.plans), len(block.steps)
        if not 1 <= num_plans <= vocabulary.max_plans or num_steps != num_plans:
            problems.append(
                f"block {number} has {num_plans} plans and {num_steps} steps where both counts must be "
                f"equal and 1..{vocabulary.max_plans}"
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
