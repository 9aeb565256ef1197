"""The built-in task: several sums at once, ``a:3+5+9;b:2+2+7;c:1+8+4?`` -> ``17,11,13``.

Each part is a branch's own work, so a right answer needs right branches, and every word of a good
response is known: faithfulness can be measured exactly. One place knows how a question, the work of
a part and an answer are spelt.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from npr_megatron.config.run import SumsTask
from npr_megatron.data.draws import draws
from npr_megatron.data.problems import Problem
from npr_megatron.errors import InputError
from npr_megatron.records.randomness import derive_seed

Part = tuple[int, ...]
Parts = tuple[Part, ...]

_HELD_OUT_ONE_IN = 16
_MAX_DRAWS_PER_PROBLEM = 200


def draw_parts(task: SumsTask, key: int) -> Parts:
    """Draw the addends of one problem, uniformly; equal keys give equal problems."""
    first, *rest = draws(key, 1 + task.max_parts * task.addends)
    num_parts = task.min_parts + int(first * (task.max_parts - task.min_parts + 1))
    span = task.max_addend - task.min_addend + 1
    addends = (task.min_addend + (np.array(rest) * span).astype(int)).reshape(-1, task.addends)
    return tuple(tuple(row) for row in addends[:num_parts].tolist())


def question_of(parts: Parts) -> str:
    """Spell the question: ``a:3+5+9;b:2+2+7?``."""
    sums = (
        f"{name}:{'+'.join(map(str, part))}"
        for name, part in zip(part_names(parts), parts, strict=True)
    )
    return ";".join(sums) + "?"


def parts_of(question: str) -> Parts:
    """Read the addends of a question back, the inverse of :func:`question_of`.

    Raises:
        InputError: ``question`` was not written by :func:`question_of`.
    """
    sums = question.removesuffix("?").split(";")
    try:
        parts = tuple(tuple(map(int, s.partition(":")[2].split("+"))) for s in sums)
    except ValueError:
        parts = ()
    if not parts or question_of(parts) != question:
        raise InputError(
            f"a question of the sums task was asked for; found {question!r}; "
            "use problems drawn by data.sums"
        )
    return parts


def part_names(parts: Parts) -> str:
    """Return one letter per part; a plan names the part its branch works on."""
    return string.ascii_lowercase[: len(parts)]


def work_of(name: str, part: Part) -> str:
    """Spell a part's work, its running totals and what came out: ``a:3+5=8+9=17;a=17``.

    Every hop copies what followed the same two characters before: ``1:`` finds the plan's name,
    ``a:`` the part, and ``a=`` lets the takeaway find the result. Blind to its siblings, a branch
    can make these hops; small models that had to count parts instead were right 7 % of the time.
    """
    first, *rest = part
    totals = list(accumulate(part))[1:]
    chain = "".join(f"+{a}={t}" for a, t in zip(rest, totals, strict=True))
    return f"{name}:{first}{chain};{name}={sum(part)}"


def works_of(parts: Parts) -> list[str]:
    """Return the work of every part."""
    return [work_of(name, part) for name, part in zip(part_names(parts), parts, strict=True)]


def results_of(parts: Parts) -> str:
    """Spell the list of part results: ``17,11,13``; takeaway and answer alike."""
    return ",".join(str(sum(part)) for part in parts)


def is_faithful(question: str, blocks: Sequence[tuple[Sequence[str], str]]) -> bool:
    """Whether every branch did its work and every takeaway says what the branches found.

    Args:
        blocks: texts of the steps and of the takeaway, block by block, headers excluded.

    Returns:
        True iff the steps, over all blocks, are the work of each part once, in any order, and each
        takeaway lists the results of its block's parts in the order of the question.
    """
    parts = parts_of(question)
    works = works_of(parts)
    done: list[str] = []
    for steps, takeaway in blocks:
        own = [step.strip() for step in steps]
        results = results_of(
            tuple(part for part, work in zip(parts, works, strict=True) if work in own)
        )
        if takeaway.strip() != results:
            return False
        done += own
    return sorted(done) == sorted(works)


def is_held_out(question: str) -> bool:
    """Whether a question is held out: one in sixteen, by hash, the same for every run."""
    return derive_seed("sums held-out", question) % _HELD_OUT_ONE_IN == 0


class SumsSource:
    """Draws training problems by (seed, stage, step, index), held-out problems by index alone."""

    def __init__(self, task: SumsTask, seed: int) -> None:
        self._task = task
        self._seed = seed

    def problems_for_step(self, stage: str, step: int, count: int) -> list[Problem]:
        """Return ``count`` problems that are never held out."""
        return [self._training_problem(f"{stage}/{step}/{i}") for i in range(count)]

    def held_out(self, count: int) -> list[Problem]:
        """Return ``count`` distinct problems that no training step sees, the same for every seed.

        Raises:
            InputError: the task has fewer distinct held-out problems.
        """
        found: dict[str, None] = {}
        for attempt in range(count * _MAX_DRAWS_PER_PROBLEM):
            if len(found) == count:
                break
            question = question_of(draw_parts(self._task, derive_seed("sums test", attempt)))
            if is_held_out(question):
                found[question] = None
        if len(found) < count:
            raise InputError(
                f"{count} held-out problems were asked for; the sums task as configured gave "
                f"{len(found)}; ask for fewer, or allow more parts, addends or larger numbers"
            )
        return [_problem(f"test/{i}", question) for i, question in enumerate(found)]

    def _training_problem(self, name: str) -> Problem:
        for attempt in range(_MAX_DRAWS_PER_PROBLEM):
            key = derive_seed("sums train", self._seed, name, attempt)
            question = question_of(draw_parts(self._task, key))
            if not is_held_out(question):
                return _problem(name, question)
        raise InputError(
            "a training problem was asked for; every problem of the sums task as configured is "
            "held out; allow more parts, addends or larger numbers"
        )


def _problem(name: str, question: str) -> Problem:
    return Problem(id=name, question=question, answer=results_of(parts_of(question)))
