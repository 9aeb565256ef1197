"""Where problems come from: by (seed, stage, step), so a resumed run asks what is due next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from npr_megatron.config.run import PromptFileTask, SumsTask
from npr_megatron.data.draws import draws
from npr_megatron.data.problems import Problem, read_jsonl
from npr_megatron.data.sums import SumsSource
from npr_megatron.errors import InputError
from npr_megatron.records.randomness import derive_seed


class ProblemSource(Protocol):
    """Problems without state: what a step gets depends on the arguments and the run seed only."""

    def problems_for_step(self, stage: str, step: int, count: int) -> list[Problem]:
        """Return ``count`` training problems with distinct ids."""
        ...

    def held_out(self, count: int) -> list[Problem]:
        """Return ``count`` problems that training never sees, the same for every seed."""
        ...


def open_source(task: SumsTask | PromptFileTask, seed: int) -> ProblemSource:
    """Return the source a run file describes.

    Raises:
        InputError: a file is missing or wrong, or training and test files share questions.
    """
    if isinstance(task, SumsTask):
        return SumsSource(task, seed)
    train, test = read_jsonl(task.train_path), read_jsonl(task.test_path)
    known = {_fold(problem.question) for problem in train}
    shared = [problem.id for problem in test if _fold(problem.question) in known]
    if shared:
        raise InputError(
            f"the questions of {task.test_path} must be held out; {len(shared)} of them are also "
            f"in {task.train_path}, the first with test id {shared[0]!r}; "
            "delete them from one of the two files"
        )
    return FileSource(train, test, seed)


class FileSource:
    """Given problems in epochs, each shuffled anew.

    An epoch is cut into whole steps; the remainder (fewer problems than one step takes, other ones
    each time) is left out, so no step asks a question twice.
    """

    def __init__(self, train: Sequence[Problem], test: Sequence[Problem], seed: int) -> None:
        self._train = tuple(train)
        self._test = tuple(test)
        self._seed = seed

    def problems_for_step(self, stage: str, step: int, count: int) -> list[Problem]:
        """Return the problems of one step.

        Raises:
            InputError: a step takes more problems than there are.
        """
        if count > len(self._train):
            raise InputError(
                f"{count} problems a step were asked for; the training file holds "
                f"{len(self._train)}; "
                "take fewer prompts per step or give more problems"
            )
        epoch, index = divmod(step, len(self._train) // count)
        key = derive_seed("problem order", self._seed, stage, epoch)
        order = np.argsort(draws(key, len(self._train)), kind="stable")
        return [self._train[i] for i in order[index * count : (index + 1) * count]]

    def held_out(self, count: int) -> list[Problem]:
        """Return the first ``count`` test problems.

        Raises:
            InputError: the test file holds fewer.
        """
        if count > len(self._test):
            raise InputError(
                f"{count} held-out problems were asked for; the test file holds {len(self._test)}; "
                "set evaluation.num_problems to at most that"
            )
        return list(self._test[:count])


def _fold(question: str) -> str:
    return " ".join(question.split()).casefold()
