"""Messages must carry every element once, within the budget, of one dtype, in turn."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import product

import pytest

from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.box import Box
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.messages import Round, message_rounds
from npr_megatron.weights.plans.plan import plan_transfer
from tests.unit.weights.oracles import tiny_model

COPIES = plan_transfer(
    trainer_layout(tiny_model(), ParallelConfig(tp_size=2, pp_size=2)),
    engine_layout(tiny_model(), 4),
).copies
WEIGHT_BYTES = 2


def places(box: Box):
    return product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True)))


def written(copies) -> Counter:
    """How often each element of each target storage is written, and from where."""
    elements = Counter()
    for copy in copies:
        for read, write in zip(places(copy.source_box), places(copy.target_box), strict=True):
            source = (copy.source_rank, copy.source_storage, read)
            elements[(copy.target_rank, copy.target_storage, write, source)] += 1
    return elements


def rounds_of(copies, message_bytes: int, sources=(0, 0, 1, 1), targets=(1, 1, 2, 2)):
    return message_rounds(
        copies,
        source_processes=sources,
        target_processes=targets,
        message_bytes=message_bytes,
        weight_bytes=WEIGHT_BYTES,
    )


def carried(rounds: list[Round]) -> list[Copy]:
    return [copy for one in rounds for message in one for copy in message.copies]


@pytest.mark.parametrize("message_bytes", [1, 12, 100, 1000, 2**20])
def test_every_element_that_leaves_its_process_travels_once(message_bytes):
    leaving = [c for c in COPIES if (c.source_rank // 2, 1 + c.target_rank // 2) != (1, 1)]
    assert 0 < len(leaving) < len(COPIES)
    assert written(carried(rounds_of(COPIES, message_bytes))) == written(leaving)


@pytest.mark.parametrize("message_bytes", [12, 100, 1000])
def test_no_process_stages_more_than_its_budget_in_either_direction(message_bytes):
    widest_row = WEIGHT_BYTES * max(copy.shape[-1] for copy in COPIES if len(copy.shape) == 2)
    for one in rounds_of(COPIES, message_bytes):
        staged = defaultdict(list)
        for message in one:
            staged[("out", message.sender)].append(message)
            staged[("in", message.receiver)].append(message)
            assert message.num_bytes == WEIGHT_BYTES * message.num_elements
            assert message.num_elements == sum(copy.num_elements for copy in message.copies)
        for messages in staged.values():
            total = sum(message.num_bytes for message in messages)
            alone = len(messages) == 1 and len(messages[0].copies) == 1
            assert total <= message_bytes or (alone and total <= widest_row)


def test_the_budget_is_used():
    total = sum(WEIGHT_BYTES * copy.num_elements for copy in COPIES)
    rounds = rounds_of(COPIES, 400, sources=(0, 0, 0, 0), targets=(1, 1, 1, 1))
    assert len(rounds) <= 1 + total / (0.75 * 400)


def test_a_message_holds_one_dtype():
    dtypes = ("fp8_e4m3", "fp32", None, None, "fp32")
    copies = [Copy(0, "w", (n, 0), 0, "w", (n, 0), (1, 8), t) for n, t in enumerate(dtypes)]
    rounds = rounds_of(copies, 2**20, sources=(0,), targets=(1,))
    assert [[message.dtype for message in one] for one in rounds] == [
        ["fp8_e4m3"],
        ["fp32"],
        [None],
        ["fp32"],
    ]
    assert [message.num_bytes for one in rounds for message in one] == [8, 32, 32, 32]


def test_senders_begin_with_different_receivers():
    copies = [
        Copy(target, "w", (0, 0), source, "w", (0, 0), (100, 4))
        for target in range(4)
        for source in range(4)
    ]
    rounds = rounds_of(copies, 1000, sources=range(4), targets=range(4, 8))
    assert len(rounds) == 4  # 100 rows of 8 bytes fill the budget: every round is a permutation
    for one in rounds:
        assert sorted(message.sender for message in one) == [0, 1, 2, 3]
        assert sorted(message.receiver for message in one) == [4, 5, 6, 7]
