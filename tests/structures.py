"""Random well-formed responses over a small vocabulary, for schema, topology and parity tests.

``SMALL`` spells every index with one token, ``SPLIT`` with two (digit, colon) that also occur in
text. All ids are below ``NUM_IDS``, so a tiny model can embed them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st

from npr_megatron.schema.render import BlockTexts, render
from npr_megatron.schema.tags import Vocabulary

NUM_IDS = 40
SPACE = 17
WORDS = tuple(range(20, NUM_IDS))
SMALL = Vocabulary(
    guideline_open=2,
    guideline_close=3,
    plan_open=4,
    plan_close=5,
    step_open=6,
    step_close=7,
    takeaway_open=8,
    takeaway_close=9,
    newline=10,
    eos=1,
    index_ids=((11,), (12,), (13,), (14,), (15,)),
    blank_ids=frozenset({10, SPACE}),
)
SPLIT = dataclasses.replace(SMALL, index_ids=tuple((digit, 16) for digit in range(11, 16)))

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
"""Settings of property tests: the same examples everywhere, no limit on one example's time."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A response and the texts it was rendered from."""

    vocabulary: Vocabulary
    prompt_ids: tuple[int, ...]
    blocks: tuple[BlockTexts, ...]
    conclusion: tuple[int, ...]

    @property
    def response_ids(self) -> list[int]:
        """The linearised response, end token included."""
        return render(self.blocks, self.conclusion, self.vocabulary)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and response."""
        return [*self.prompt_ids, *self.response_ids]

    @property
    def prompt_length(self) -> int:
        """Leading tokens that are prompt."""
        return len(self.prompt_ids)


def texts(vocabulary: Vocabulary, max_tokens: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Texts of at least one word; blanks, newlines and index ids occur inside."""
    index_ids = sorted({token_id for index in vocabulary.index_ids for token_id in index})
    fillers = st.sampled_from([*WORDS, SPACE, vocabulary.newline, *index_ids])
    words = st.sampled_from(WORDS)
    several = st.lists(fillers, max_size=max_tokens - 1)
    return st.one_of(
        st.tuples(words),
        st.builds(lambda ids, word: (*ids, word), several, words),
        st.builds(lambda ids, word: (word, *ids), several, words),
    )


@st.composite
def block_texts(
    draw: st.DrawFn, vocabulary: Vocabulary, max_branches: int = 5, max_tokens: int = 5
) -> BlockTexts:
    """One block of 1..``max_branches`` branches of unequal lengths."""
    text = texts(vocabulary, max_tokens)
    num_branches = draw(st.integers(1, min(max_branches, vocabulary.max_plans)))
    plans = draw(st.lists(text, min_size=num_branches, max_size=num_branches))
    steps = draw(st.lists(text, min_size=num_branches, max_size=num_branches))
    return BlockTexts(tuple(plans), tuple(steps), draw(text))


@st.composite
def structures(
    draw: st.DrawFn, max_blocks: int = 4, max_branches: int = 5, max_tokens: int = 5
) -> Structure:
    """Well-formed responses of 1..``max_blocks`` blocks behind a prompt that may hold tags."""
    vocabulary = draw(st.sampled_from([SMALL, SPLIT]))
    block = block_texts(vocabulary, max_branches, max_tokens)
    return Structure(
        vocabulary=vocabulary,
        prompt_ids=tuple(draw(st.lists(st.integers(0, NUM_IDS - 1), min_size=1, max_size=6))),
        blocks=tuple(draw(st.lists(block, min_size=1, max_size=max_blocks))),
        conclusion=draw(texts(vocabulary, max_tokens)),
    )


def random_structure(
    rng: random.Random,
    prompt_ids: Sequence[int],
    vocabulary: Vocabulary,
    *,
    num_blocks: tuple[int, int],
    max_branches: int = 5,
    max_tokens: int = 5,
) -> Structure:
    """A well-formed response of words, with as many blocks as ``num_blocks`` (from, to) allows."""

    def text() -> tuple[int, ...]:
        return tuple(rng.choices(WORDS, k=rng.randint(1, max_tokens)))

    def block() -> BlockTexts:
        num_branches = rng.randint(1, max_branches)
        plans, steps = ([text() for _ in range(num_branches)] for _ in range(2))
        return BlockTexts(tuple(plans), tuple(steps), text())

    blocks = tuple(block() for _ in range(rng.randint(*num_blocks)))
    return Structure(
        vocabulary=vocabulary, prompt_ids=tuple(prompt_ids), blocks=blocks, conclusion=text()
    )


@st.composite
def damaged_responses(draw: st.DrawFn) -> tuple[Vocabulary, list[int]]:
    """Responses with one to three ids dropped, doubled, swapped or inserted; a few stay legal."""
    structure = draw(structures(max_blocks=2, max_branches=3, max_tokens=2))
    ids = structure.response_ids
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(ids) - 1))
        match draw(st.sampled_from(["drop", "double", "swap", "insert"])):
            case "drop" if len(ids) > 1:
                del ids[at]
            case "double":
                ids.insert(at, ids[at])
            case "swap":
                other = draw(st.integers(0, len(ids) - 1))
                ids[at], ids[other] = ids[other], ids[at]
            case _:
                ids.insert(at, draw(st.integers(1, NUM_IDS - 1)))
    return structure.vocabulary, ids
