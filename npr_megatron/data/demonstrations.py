"""Seed demonstrations of the sums task: what an instruct model would have read, good and bad.

Well-formed responses are rendered from ids by ``schema.render``, so a tag never passes through
text. A hasty demonstration skips the last addend of about every second part; a broken one has
exactly one defect in its form. Equal keys give equal demonstrations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import numpy as np

from npr_megatron.data.draws import draws
from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.samples import sft_sample
from npr_megatron.data.sums import (
    Parts,
    is_held_out,
    part_names,
    parts_of,
    question_of,
    results_of,
    works_of,
)
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.errors import ConfigError
from npr_megatron.records.randomness import derive_seed
from npr_megatron.records.sample import TrainingSample
from npr_megatron.schema.render import render
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.topology.layout import plain_layout

HASTY_FRAC = 0.5
"""Share of the parts whose last addend a hasty demonstration skips."""
MIXED_FRAC = 0.5
"""Share of the short demonstrations that take the parts in another order than the question.

Order is then no clue to the part a step works on; only its plan is. A branch has no other clue: it
neither sees nor follows its siblings. Without this a seed model counts steps, and BETA on it stayed
at 0 right answers for 140 steps, then jumped to 95 %; with it BETA improves steadily.
"""


class Kind(StrEnum):
    """A kind of demonstration; the keys of a seed phase's ``mixture``."""

    WELL_FORMED = "well_formed"  # one block, a step per part, the right answer
    SEQUENTIAL = "sequential"  # the same work line by line, without tags
    BROKEN = "broken"  # well-formed but for one defect
    HASTY = "hasty"  # well-formed, work skipped
    HASTY_SEQUENTIAL = "hasty_sequential"
    HASTY_BROKEN = "hasty_broken"
    SHORT = "short"  # well-formed, for a smaller problem; every second one in mixed order
    SHORT_SEQUENTIAL = "short_sequential"


_HASTY = {Kind.HASTY, Kind.HASTY_SEQUENTIAL, Kind.HASTY_BROKEN}
_SEQUENTIAL = {Kind.SEQUENTIAL, Kind.HASTY_SEQUENTIAL, Kind.SHORT_SEQUENTIAL}
_BROKEN = {Kind.BROKEN, Kind.HASTY_BROKEN}
_SHORT = {Kind.SHORT, Kind.SHORT_SEQUENTIAL}


def demonstration_samples(
    problems: Sequence[Problem],
    mixture: Mapping[str, float],
    tokenizer: Tokenizer,
    prompts: PromptBuilder,
    seed: int,
) -> list[TrainingSample]:
    """Return one sample per problem for plain causal training, kinds in the shares of ``mixture``.

    ``seed`` and a problem's id decide its demonstration.

    Raises:
        ConfigError: ``mixture`` names an unknown kind or has no positive share.
    """
    samples = []
    kinds = draw_kinds(mixture, len(problems), derive_seed("kinds", seed, problems[0].id))
    for problem, kind in zip(problems, kinds, strict=True):
        key = derive_seed("demonstration", seed, problem.id)
        if kind in _SHORT:
            problem = shortened(problem, key)
        prompt = prompts.prompt_ids(problem)
        ids = [*prompt, *demonstration(kind, problem.question, tokenizer, key)]
        samples.append(sft_sample(ids, len(prompt), plain_layout(len(ids))))
    return samples


def shortened(problem: Problem, key: int) -> Problem:
    """Return the problem with fewer parts and addends, each drawn from 2 up to all of them.

    A model learns the arithmetic sooner from small problems. What would become a held-out problem
    is left as it is.
    """
    parts = parts_of(problem.question)
    num_parts, num_addends = (
        min(size, 2 + int(draw * (size - 1)))
        for size, draw in zip((len(parts), len(parts[0])), draws(key, 2), strict=True)
    )
    cut = tuple(part[:num_addends] for part in parts[:num_parts])
    question = question_of(cut)
    if is_held_out(question):
        return problem
    return Problem(id=problem.id, question=question, answer=results_of(cut))


def draw_kinds(mixture: Mapping[str, float], count: int, key: int) -> list[Kind]:
    """Return ``count`` kinds whose numbers match the shares as closely as whole numbers can.

    Systematic sampling: one draw shifts an even comb over the cumulated shares.

    Raises:
        ConfigError: ``mixture`` names an unknown kind or has no positive share.
    """
    check_mixture(mixture)
    cumulated = np.cumsum(list(mixture.values()))
    comb = (np.arange(count) + draws(key, 1)[0]) / count * cumulated[-1]
    chosen = np.searchsorted(cumulated, comb, side="right").clip(max=len(mixture) - 1)
    names = list(mixture)
    return [Kind(names[index]) for index in chosen]


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Refuse a mixture that cannot be drawn from.

    Raises:
        ConfigError: listing every unknown kind and negative share, or an empty mixture.
    """
    known = ", ".join(Kind)
    problems = [
        f"mixture kind {name!r} is unknown; choose among {known}"
        for name in mixture
        if name not in set(Kind)
    ]
    problems += [
        f"the share of mixture kind {name!r} is {share}; give a share of 0 or more"
        for name, share in mixture.items()
        if share < 0
    ]
    if not problems and sum(mixture.values()) <= 0:
        problems.append(f"a mixture needs a positive share of some kind; choose among {known}")
    if problems:
        raise ConfigError(problems)


def demonstration(kind: Kind, question: str, tokenizer: Tokenizer, key: int) -> list[int]:
    """Return the response ids of one demonstration, end token included."""
    parts = parts_of(question)
    vocabulary = tokenizer.vocabulary
    worked = _skip_work(parts, key) if kind in _HASTY else parts
    order = _mixed_order(len(parts), key) if kind in _SHORT else range(len(parts))
    if kind in _SEQUENTIAL:
        return [*tokenizer.encode(_plain_text(worked, order)), vocabulary.eos]
    ids = _well_formed(worked, order, tokenizer)
    if kind in _BROKEN:
        choice = int(draws(derive_seed("defect", key), 1)[0] * len(DEFECTS))
        ids = DEFECTS[choice](ids, vocabulary)
    return ids


def _well_formed(parts: Parts, order: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    names, works = part_names(parts), works_of(parts)
    plans = [tokenizer.encode(names[index]) for index in order]
    steps = [tokenizer.encode(works[index]) for index in order]
    takeaway = tokenizer.encode(results_of(parts))
    conclusion = tokenizer.encode(_boxed(parts))
    return render([(plans, steps, takeaway)], conclusion, tokenizer.vocabulary)


def _plain_text(parts: Parts, order: Sequence[int]) -> str:
    works = works_of(parts)
    return "".join(f"{works[index]}\n" for index in order) + _boxed(parts)


def _mixed_order(count: int, key: int) -> Sequence[int]:
    is_mixed, *ranks = draws(derive_seed("order", key), 1 + count)
    return np.argsort(ranks).tolist() if is_mixed < MIXED_FRAC else range(count)


def _boxed(parts: Parts) -> str:
    return f"\\boxed{{{results_of(parts)}}}"


def _skip_work(parts: Parts, key: int) -> Parts:
    skipped = draws(key, len(parts)) < HASTY_FRAC
    return tuple(
        part[:-1] if skip and len(part) > 1 else part
        for part, skip in zip(parts, skipped, strict=True)
    )


def drop_guideline_close(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Leave the guideline open."""
    at = ids.index(vocabulary.guideline_close)
    return ids[:at] + ids[at + 2 :]


def drop_last_step(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Leave the last plan without its step."""
    start = _last(ids, vocabulary.step_open)
    return ids[:start] + ids[ids.index(vocabulary.takeaway_open) :]


def drop_step_close(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Leave the first step open."""
    at = ids.index(vocabulary.step_close)
    return ids[:at] + ids[at + 1 :]


def drop_takeaway(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Go from the steps to the conclusion."""
    start, end = ids.index(vocabulary.takeaway_open), ids.index(vocabulary.takeaway_close)
    return ids[:start] + ids[end + 2 :]


def repeat_step_number(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """Number the last step like the one before it; a single step is numbered 2."""
    number = ids.count(vocabulary.step_open)
    header, wrong = vocabulary.step_header(number), number - 1 or 2
    start = _last(ids, vocabulary.step_open)
    return ids[:start] + list(vocabulary.step_header(wrong)) + ids[start + len(header) :]


def drop_conclusion(ids: list[int], vocabulary: Vocabulary) -> list[int]:
    """End after the takeaway, without an answer."""
    end = _last(ids, vocabulary.takeaway_close)
    return [*ids[: end + 2], vocabulary.eos]


DEFECTS: tuple[Callable[[list[int], Vocabulary], list[int]], ...] = (
    drop_guideline_close,
    drop_last_step,
    drop_step_close,
    drop_takeaway,
    repeat_step_number,
    drop_conclusion,
)


def _last(ids: list[int], token_id: int) -> int:
    return len(ids) - 1 - ids[::-1].index(token_id)
