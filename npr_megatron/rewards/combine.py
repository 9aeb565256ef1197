"""Rewards of the two reinforcement stages (arXiv 2512.07461, sections 2.2 and 2.4).

ZERO learns the format, NPR takes it for granted and learns the answer::

    ZERO   format score - 1, in [-3, -1), if malformed, else +1 right, -1 wrong; all count
    NPR    +1 right, -1 wrong; malformed rollouts are dropped, or count as wrong

The paper gives a malformed rollout its format score alone. A small fault (-0.4) then pays more than
a well-formed wrong answer (-1), and a policy that is often wrong learns the fault: in a quickstart
at learning rate 2e-3 validity went 0.32, 0.84 (step 4), 0.00 (step 7) and stayed there at reward
-0.42. One point less keeps every malformed rollout below every well-formed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from npr_megatron.records.trajectory import Trajectory
from npr_megatron.rewards.answer import answers_match, boxed_answer
from npr_megatron.rewards.reading import Reader, Reading
from npr_megatron.rewards.structure import drop_reason, is_own_fault
from npr_megatron.topology.cursor import Convention

RIGHT, WRONG = 1.0, -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The judgement of one rollout.

    Example, a well-formed right answer::

        Score(format_score=0.0, is_correct=True, reward=1.0, drop_reason="")
    """

    format_score: float
    """0.0 if valid, else down to -2.0."""
    is_correct: bool
    """The boxed answer equals the reference, whatever the format."""
    reward: float
    drop_reason: str = ""
    """Why the rollout must not be learnt from; empty if it may be."""

    @property
    def is_valid(self) -> bool:
        """Whether the format is in order."""
        return self.format_score == 0.0

    @property
    def kept(self) -> bool:
        """Whether the rollout may be learnt from."""
        return not self.drop_reason


def score_zero(trajectory: Trajectory, answer: str, reader: Reader) -> Score:
    """Judge a rollout of stage ZERO: the format first, then the answer.

    Only what the policy did not end itself is dropped: its format is cut short by others.
    """
    reading = reader.read(trajectory.response_ids)
    is_correct = is_right(reading, answer)
    return Score(
        format_score=reading.format_score,
        is_correct=is_correct,
        reward=_sign(is_correct) if reading.is_valid else reading.format_score + WRONG,
        drop_reason="" if trajectory.finish.is_of_policy else trajectory.finish.value,
    )


def score_npr(
    trajectory: Trajectory,
    answer: str,
    reader: Reader,
    *,
    malformed: Literal["drop", "wrong"] = "drop",
    convention: Convention = "canonical",
) -> Score:
    """Judge a rollout of stage NPR: the answer alone, behind the structural filter.

    With ``malformed="wrong"`` a rollout that the model broke or did not end counts as a wrong
    answer instead of being dropped; what the engine placed elsewhere than the layout rule, or what
    did not end by itself (aborted, out of time, no distribution), is dropped all the same.
    """
    reading = reader.read(trajectory.response_ids)
    reason = drop_reason(trajectory, reader.vocabulary, convention)
    is_correct = is_right(reading, answer)
    if reason and malformed == "wrong" and is_own_fault(trajectory, reason):
        is_correct, reason = False, ""
    return Score(
        format_score=reading.format_score,
        is_correct=is_correct,
        reward=_sign(is_correct),
        drop_reason=reason,
    )


def is_right(reading: Reading, answer: str) -> bool:
    """Whether the last box of a response holds the reference answer."""
    found = boxed_answer(reading.text)
    return found is not None and answers_match(found, answer)


def _sign(is_correct: bool) -> float:
    return RIGHT if is_correct else WRONG
