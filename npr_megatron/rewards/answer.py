r"""Find the short answer of a response and compare it with the reference.

Exact after normalisation: equal as strings, as numbers (``0.50`` = ``1/2`` = ``\frac{1}{2}``), or
item by item as comma-separated lists of these. No symbolic algebra: ``2x+2`` differs from
``2(x+1)``.
"""

from __future__ import annotations

import re
from fractions import Fraction

BOX_WINDOW_CHARS = 300
"""A box must open and close in the last so many characters (released reward, npr.md section 2)."""

_BOX = "\\boxed{"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_RATIO = re.compile(r"([+-]?\d+)/(\d+)")
_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
# Behind a digit it is a mixed number; around a sum, a slash would bind differently. Both are kept.
_FRACTION = re.compile(r"(?<!\d)\\[dt]?frac(?:\{([+-]?[\w.\\]+)\}|(\d))(?:\{([\w.\\]+)\}|(\d))")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")
_DECORATION = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|\$|\s+")


def boxed_answer(text: str, window: int = BOX_WINDOW_CHARS) -> str | None:
    r"""Return what the last ``\boxed{...}`` with balanced braces holds, or None.

    Looks at the last ``window`` characters only.
    """
    tail = text[-window:]
    start = tail.rfind(_BOX)
    while start >= 0:
        content = _balanced(tail[start + len(_BOX) :])
        if content is not None:
            return content
        start = tail.rfind(_BOX, 0, start)
    return None


def answers_match(found: str, expected: str) -> bool:
    """Whether an answer the model wrote equals the reference.

    A reference with commas is a list: as many items, in the same order. A reference without commas
    is one value; the answer may then group its thousands (``1,234``).

    Example:
        ``answers_match("$17, 11$", "17,11")`` and ``answers_match("0.75", "3/4")`` hold;
        ``answers_match("1711", "17,11")`` does not.
    """
    left, right = normalise(found), normalise(expected)
    if left == right:
        return bool(left)
    expected_items = _items(right)
    if len(expected_items) == 1:
        if _GROUPED.fullmatch(left):
            left = left.replace(",", "")
        return _values_match(left, right)
    found_items = _items(left)
    return len(found_items) == len(expected_items) and all(
        map(_values_match, found_items, expected_items)
    )


def normalise(answer: str) -> str:
    """Remove what only dresses an answer up: spaces, dollars, LaTeX wrappers, a final full stop.

    Fractions become ``a/b``.
    """
    text = _WRAPPER.sub(r"\1", answer)
    text = _DECORATION.sub("", text)
    text = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    return text.removesuffix(".")


def _balanced(text: str) -> str | None:
    """Return ``text`` up to the brace that closes the one opened just before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return None


def _items(answer: str) -> list[str]:
    return answer.split(",")


def _values_match(left: str, right: str) -> bool:
    if left == right:
        return bool(left)
    left_number, right_number = _number(left), _number(right)
    return left_number is not None and left_number == right_number


def _number(text: str) -> Fraction | None:
    """Read an integer, a decimal or a ratio exactly; None for anything else."""
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    ratio = _RATIO.fullmatch(text)
    if ratio and int(ratio[2]) != 0:
        return Fraction(int(ratio[1]), int(ratio[2]))
    return None
