"""The rules of the tag language: what a violation can break, and where it was broken."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """What a violation breaks."""

    EMPTY_RESPONSE = "empty_response"
    TEXT_OUTSIDE_BLOCK = "text_outside_block"
    STRAY_TAG = "stray_tag"
    NESTED_GUIDELINE = "nested_guideline"
    TEXT_IN_GUIDELINE = "text_in_guideline"
    NO_PLANS = "no_plans"
    TOO_MANY_PLANS = "too_many_plans"
    WRONG_INDEX = "wrong_index"
    EMPTY_TEXT = "empty_text"
    TAG_IN_TEXT = "tag_in_text"
    TEXT_BETWEEN_STEPS = "text_between_steps"
    STEP_COUNT = "step_count"
    MISPLACED_TAG = "misplaced_tag"
    SPACING = "spacing"
    OPEN_BLOCK = "open_block"
    EMPTY_CONCLUSION = "empty_conclusion"
    NO_END = "no_end"
    AFTER_END = "after_end"

    @property
    def explanation(self) -> str:
        """One sentence for a person."""
        return _EXPLANATIONS[self]


_EXPLANATIONS: dict[Rule, str] = {
    Rule.EMPTY_RESPONSE: "the response holds nothing",
    Rule.TEXT_OUTSIDE_BLOCK: "text stands before the first block or between two blocks",
    Rule.STRAY_TAG: "a tag other than <guideline> stands outside a block",
    Rule.NESTED_GUIDELINE: "<guideline> opens inside an open block",
    Rule.TEXT_IN_GUIDELINE: "a guideline holds something besides plans",
    Rule.NO_PLANS: "a guideline closes without a plan",
    Rule.TOO_MANY_PLANS: "a guideline holds more plans than allowed",
    Rule.WRONG_INDEX: "a plan or step does not start with its number and a colon",
    Rule.EMPTY_TEXT: "a plan, step or takeaway is empty",
    Rule.TAG_IN_TEXT: "a tag stands inside the text of a plan, step or takeaway",
    Rule.TEXT_BETWEEN_STEPS: "text stands between the steps of a block",
    Rule.STEP_COUNT: "a block has not exactly one step per plan",
    Rule.MISPLACED_TAG: "a tag stands where another one is due",
    Rule.SPACING: "white space other than exactly one newline separates two parts",
    Rule.OPEN_BLOCK: "the response ends inside a block or before the first one",
    Rule.EMPTY_CONCLUSION: "the response ends without a conclusion",
    Rule.NO_END: "the response stops without the end-of-sequence token",
    Rule.AFTER_END: "tokens follow the end-of-sequence token",
}


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule broken at one token.

    Example: ``Violation(position=17, rule=Rule.WRONG_INDEX)``
    """

    position: int
    """Index into the response; its length where the response stops too early."""
    rule: Rule

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return f"response token {self.position}: {self.rule.explanation}"
