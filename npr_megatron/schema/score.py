"""The format score of Stage 1: 0.0 for a valid response, down to -2.0 for a broken one.

Grave faults decide the score on their own, the worst one counts; without one, small faults add up.
The amounts are those of the scorer released with NPR (arXiv 2512.07461), carried over from rules on
text to rules on tokens; what it does not check (numbering, newlines, the end token) is priced like
its nearest neighbour, and the floor is the one the paper states.

=========================================================  =============================
grave                                                      score
=========================================================  =============================
nothing at all                                             -2.0
no complete block; a tag loose before the last block ends  -1.5
a tag loose behind the last block; no end, or none due     -1.0
no plan, too many plans, number of steps differs           -1.0
conclusion without a box, or with an empty one             -1.0
=========================================================  =============================

=========================================================  =============================
small                                                      deduction
=========================================================  =============================
a plan, step or takeaway that is too short, holds a tag    0.4 each
or has a wrong number; a misplaced tag inside a block
text besides plans in a guideline                          0.6 per block
text or wrong white space between other parts              0.2 per block
=========================================================  =============================
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from npr_megatron.schema.parse import ParseResult
from npr_megatron.schema.rules import Rule, Violation

FLOOR = -2.0
_NO_BLOCK = -1.5
_NO_BOX = -1.0
_LOOSE_TAG_BEFORE_END = -1.5
_LOOSE_TAG_BEHIND = -1.0
_TOO_SHORT = 0.4
_GRAVE = {
    Rule.EMPTY_RESPONSE: -2.0,
    Rule.NO_PLANS: -1.0,
    Rule.TOO_MANY_PLANS: -1.0,
    Rule.STEP_COUNT: -1.0,
    Rule.OPEN_BLOCK: -1.0,
    Rule.EMPTY_CONCLUSION: -1.0,
    Rule.NO_END: -1.0,
    Rule.AFTER_END: -1.0,
}
_EACH = {
    Rule.WRONG_INDEX: 0.4,
    Rule.EMPTY_TEXT: 0.4,
    Rule.TAG_IN_TEXT: 0.4,
    Rule.MISPLACED_TAG: 0.4,
}
_PER_BLOCK = {
    Rule.TEXT_IN_GUIDELINE: 0.6,
    Rule.TEXT_BETWEEN_STEPS: 0.2,
    Rule.TEXT_OUTSIDE_BLOCK: 0.2,
    Rule.SPACING: 0.2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatLimits:
    """Shortest texts that count as said [tokens]; the release asks for 3, 6 and 6 characters."""

    min_plan_tokens: int = 1
    min_step_tokens: int = 1
    min_takeaway_tokens: int = 1


def format_score(
    result: ParseResult, conclusion_text: str, limits: FormatLimits | None = None
) -> float:
    """Return 0.0 for a valid response, else a score in [-2.0, 0.0).

    Args:
        result: the parsed response.
        conclusion_text: the decoded ids of ``result.conclusion``; empty where that is None.
        limits: shortest texts; None asks for one token each.
    """
    grave = min(_grave_scores(result, conclusion_text), default=0.0)
    if grave < 0.0:
        return grave
    return max(FLOOR, 0.0 - sum(_deductions(result, limits or FormatLimits())))


def boxed_contents(text: str) -> tuple[str, ...]:
    r"""Return what stands in each ``\boxed{...}``, braces matched; an unclosed box is empty."""
    opener = "\\boxed{"
    contents: list[str] = []
    start = text.find(opener)
    while start >= 0:
        start += len(opener)
        stop = _closing_brace(text, start)
        contents.append("" if stop is None else text[start:stop])
        start = text.find(opener, start if stop is None else stop)
    return tuple(contents)


def _grave_scores(result: ParseResult, conclusion_text: str) -> Iterator[float]:
    if not result.blocks:
        yield _NO_BLOCK
    boxes = boxed_contents(conclusion_text)
    if not boxes or not all(content.strip() for content in boxes):
        yield _NO_BOX
    last_stop = result.blocks[-1].extent.stop if result.blocks else 0
    for violation in result.violations:
        if violation.rule in _GRAVE:
            yield _GRAVE[violation.rule]
        elif _is_loose_tag(violation, result):
            is_before = violation.position < last_stop
            yield _LOOSE_TAG_BEFORE_END if is_before else _LOOSE_TAG_BEHIND


def _is_loose_tag(violation: Violation, result: ParseResult) -> bool:
    """Whether a tag belongs to no complete block; a nested <guideline> cuts off the outer one."""
    if violation.rule is Rule.MISPLACED_TAG:
        extents = (block.extent for block in result.blocks)
        return not any(start <= violation.position < stop for start, stop in extents)
    return violation.rule in (Rule.STRAY_TAG, Rule.NESTED_GUIDELINE)


def _deductions(result: ParseResult, limits: FormatLimits) -> Iterator[float]:
    starts = [block.guideline.start for block in result.blocks]
    seen: set[tuple[Rule, int]] = set()
    for violation in result.violations:
        rule, block = violation.rule, bisect_right(starts, violation.position)
        if rule in _EACH:
            yield _EACH[rule]
        elif (rule, block) not in seen:
            seen.add((rule, block))
            yield _PER_BLOCK[rule]
    for block in result.blocks:
        for spans, shortest in (
            (block.plans, limits.min_plan_tokens),
            (block.steps, limits.min_step_tokens),
            ((block.takeaway,), limits.min_takeaway_tokens),
        ):
            # An empty text is a violation of its own, priced above.
            num_short = sum(0 < span.num_tokens < shortest for span in spans)
            yield _TOO_SHORT * num_short


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
    return None
