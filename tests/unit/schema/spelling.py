"""Responses written as words, for examples a person can check: ``ids("<plan> 1: a </plan>")``."""

from __future__ import annotations

from tests.structures import SMALL, SPACE, WORDS

_IDS = {
    **{str(tag): token_id for token_id, tag in SMALL.tags.items()},
    **{f"{i}:": index[0] for i, index in enumerate(SMALL.index_ids, start=1)},
    **dict(zip("abcdefghij", WORDS, strict=False)),
    "NL": SMALL.newline,
    "_": SPACE,
    "EOS": SMALL.eos,
}


def ids(words: str) -> list[int]:
    """Return the ids of space-separated words."""
    return [_IDS[word] for word in words.split()]


TWO_BRANCHES = (
    "<guideline> NL <plan> 1: a </plan> NL <plan> 2: b </plan> NL </guideline> NL "
    "<step> NL 1: c </step> NL <step> NL 2: d e </step> NL "
    "<takeaway> NL f </takeaway> NL g h EOS"
)
"""Offsets: plan texts 4 and 9, fork newline 13, branches 14..20 and 20..27, takeaway text 29,
conclusion 32..34, end token 34."""
