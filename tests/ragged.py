"""Random rows of a pool, streams and feeds that read them, and who reads what by a plain rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from npr_megatron.engine.flow.flow import Flow, Stream
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.batch import Batch
from npr_megatron.engine.schedule.feed import Feed
from npr_megatron.schema.grammar import Grammar
from tests.engines import request_for
from tests.structures import SMALL

_NUM_SLOTS = 1 << 13
_CAPACITY = 8192


@dataclass(eq=False)
class RaggedRows:
    """Prompts, trunks on them and branches on those, each decoding or fed a run of tokens."""

    rng: np.random.Generator
    pool: SlotPool = field(default_factory=lambda: SlotPool(_NUM_SLOTS))
    streams: list[Stream] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    reads: dict[int, list[int]] = field(default_factory=dict)
    """Slots read by a fed token, by the slot it is written to; of feeds."""
    _flow: Flow = field(
        default_factory=lambda: Flow(request_for((20, 21)), Grammar(SMALL), SMALL.eos)
    )

    def add_prompt(self, length: int, num_rollouts: int, num_feeds: int, parent: int | None) -> int:
        """Add a prompt behind ``parent``, rollouts that decode or fork, and feeds."""
        prompt = self.open(parent, length)
        for _ in range(num_rollouts):
            trunk = self.open(prompt, self._integer(0, 12))
            if self._integer(0, 2):
                self.decode(trunk)
                continue
            for _ in range(self._integer(1, 4)):
                self.decode(self.open(trunk, self._integer(0, 6)))
        for _ in range(num_feeds):
            trunk = self.open(prompt, self._integer(0, 12))
            if self._integer(0, 1):
                self.feed_tail(trunk, self._integer(1, 9))
            else:
                self.feed_tree(trunk, self._integer(1, 20))
        return prompt

    def open(self, parent: int | None, num_own: int) -> int:
        """Open a row and give it ``num_own`` slots."""
        row = self.pool.open_row(parent, _CAPACITY)
        self.pool.append(row, num_own)
        return row

    def decode(self, row: int) -> Stream:
        """Add a stream that feeds its last token through ``row``."""
        stream = self._stream(row)
        self._write(stream.segment, 1)
        self.streams.append(stream)
        return stream

    def feed_tail(self, row: int, num_tokens: int) -> Feed:
        """Add a feed of ``num_tokens`` behind ``row``, sampled or not."""
        stream = self._stream(row)
        self._write(stream.segment, num_tokens)
        sampled = stream if self._integer(0, 1) else None
        feed = Feed.of_tail(stream.segment, num_tokens, row, self.pool, sampled)
        readable = self.pool.read(row).tolist()
        for end in range(len(readable) - num_tokens, len(readable)):
            self.reads[readable[end]] = readable[: end + 1]
        self.feeds.append(feed)
        return feed

    def feed_tree(self, row: int, num_tokens: int) -> Feed:
        """Add the replay of ``num_tokens`` labelled at random behind ``row``."""
        num_shared = int(self.pool.length[row])
        self.pool.append(row, num_tokens)
        slots = self.pool.read(row)
        block = np.zeros(len(slots), np.int32)
        branch = np.zeros(len(slots), np.int32)
        block[num_shared:] = np.sort(self.rng.integers(1, 3, num_tokens))
        branch[num_shared:] = self.rng.integers(1, 4, num_tokens)
        streams = {
            "token_ids": self.rng.integers(0, 40, len(slots)).astype(np.int32),
            "position_ids": np.arange(len(slots), dtype=np.int32),
            "block": block,
            "branch": branch,
        }
        self.feeds.append(Feed.of_tree(streams, slots, num_shared))
        for query in range(num_shared, len(slots)):
            self.reads[int(slots[query])] = [
                int(slots[key])
                for key in range(query + 1)
                if block[key] != block[query] or branch[key] == branch[query]
            ]
        return self.feeds[-1]

    def reads_of(self, batch: Batch) -> list[list[int]]:
        """Return, per token of an assembled batch, the slots it reads."""
        rows = {
            int(self.pool.read(s.row)[-1]): self.pool.read(s.row).tolist() for s in self.streams
        }
        return [(rows | self.reads)[slot] for slot in batch.slots.tolist()]

    def _stream(self, row: int) -> Stream:
        return Stream(self._flow, Segment(0, 0), self._flow.trunk.state, key=0, row=row)

    def _write(self, segment: Segment, num_tokens: int) -> None:
        for position in range(num_tokens + 1):
            segment.append(self._integer(0, 39), position, False, 0.0, 0)

    def _integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))


def random_rows(seed: int, prompt_lengths: Sequence[int] = (0, 3, 40, 300)) -> RaggedRows:
    """Return one to three prompts, perhaps behind a common beginning, with what decodes on them."""
    rng = np.random.default_rng(seed)
    rows = RaggedRows(rng)
    common = rows.open(None, int(rng.choice([0, 1, 150])))
    for _ in range(int(rng.integers(1, 4))):
        rows.add_prompt(
            int(rng.choice(prompt_lengths)),
            num_rollouts=int(rng.integers(0, 12)),
            num_feeds=int(rng.integers(0, 4)),
            parent=common,
        )
    if not rows.streams and not rows.feeds:
        rows.decode(rows.open(common, 1))
    return rows
