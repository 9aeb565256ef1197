"""The verifier must refuse every wrong plan, and no right one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.plan import Copy, TransferPlan, plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from tests.unit.weights.oracles import tiny_model

MODEL = tiny_model(num_hidden_layers=2, tie_word_embeddings=False)
SOURCE = trainer_layout(MODEL, ParallelConfig(tp_size=2, dp_size=2))
TARGET = engine_layout(MODEL, 4)  # more ranks than kv heads: replicas on both sides
PLAN = plan_transfer(SOURCE, TARGET)


def refused(copies: list[Copy]) -> bool:
    return (
        verify_transfer(TransferPlan.of(PLAN.source_id, PLAN.target_id, copies), SOURCE, TARGET)
        != []
    )


def with_copy(index: int, **changes) -> list[Copy]:
    copies = list(PLAN.copies)
    copies[index] = replace(copies[index], **changes)
    return copies


def shifted(start: tuple[int, ...], axis: int, by: int) -> tuple[int, ...]:
    return tuple(value + by * (number == axis) for number, value in enumerate(start))


EVERY_COPY = range(len(PLAN.copies))


def test_the_plan_itself_is_accepted():
    assert verify_transfer(PLAN, SOURCE, TARGET) == []


def test_a_copy_served_by_another_replica_is_accepted():
    # ranks 0 and 2 are data-parallel replicas (tp fastest, then dp)
    for index in EVERY_COPY:
        rank = PLAN.copies[index].source_rank
        assert not refused(with_copy(index, source_rank=rank ^ 2))


def test_every_dropped_copy_is_noticed():
    for index in EVERY_COPY:
        assert refused([*PLAN.copies[:index], *PLAN.copies[index + 1 :]])


def test_every_doubled_copy_is_noticed():
    for copy in PLAN.copies:
        assert refused([*PLAN.copies, copy])


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("end", ["source_start", "target_start"])
def test_every_shift_by_one_is_noticed(end, by):
    for index in EVERY_COPY:
        for axis in range(len(PLAN.copies[index].shape)):
            start = shifted(getattr(PLAN.copies[index], end), axis, by)
            assert refused(with_copy(index, **{end: start}))


def test_every_common_shift_of_both_ends_is_noticed():
    for index in EVERY_COPY:
        copy = PLAN.copies[index]
        both = {
            "source_start": shifted(copy.source_start, 0, 1),
            "target_start": shifted(copy.target_start, 0, 1),
        }
        assert refused(with_copy(index, **both))


def test_every_shrunk_copy_is_noticed():
    for index in EVERY_COPY:
        shape = shifted(PLAN.copies[index].shape, 0, -1)
        assert refused(with_copy(index, shape=shape))


def test_every_wrong_source_rank_is_noticed():
    # same storage names on the tensor-parallel neighbour, other rows; norms are replicas there
    for index in EVERY_COPY:
        copy = PLAN.copies[index]
        if "norm" not in copy.source_storage:
            assert refused(with_copy(index, source_rank=copy.source_rank ^ 1))


def test_every_wrong_layer_is_noticed():
    for index in EVERY_COPY:
        storage = PLAN.copies[index].source_storage
        if ".layers." in storage:
            number = int(storage.split(".")[2])
            other = storage.replace(f".{number}.", f".{number ^ 1}.", 1)
            assert refused(with_copy(index, source_storage=other))


def test_every_swap_of_two_sources_within_one_storage_is_noticed():
    # among these are swapped heads, k against v, and gate against up
    swaps = 0
    for first in EVERY_COPY:
        for second in range(first + 1, len(PLAN.copies)):
            one, other = PLAN.copies[first], PLAN.copies[second]
            same = (one.target_storage, one.source_rank, one.source_storage, one.shape) == (
                (other.target_storage, other.source_rank, other.source_storage, other.shape)
            )
            if same and one.source_start != other.source_start:
                swaps += 1
                copies = with_copy(first, source_start=other.source_start)
                copies[second] = replace(other, source_start=one.source_start)
                assert refused(copies)
    assert swaps > 10


def test_gate_and_up_in_each_others_place_are_noticed():
    gates = [c for c in PLAN.copies if c.target_storage.endswith("gate_up_proj.weight")]
    half = MODEL.intermediate_size // 4
    rows = MODEL.intermediate_size // 2
    exchanged = [
        replace(c, source_start=((c.source_start[0] + rows) % (2 * rows), 0)) for c in gates
    ]
    assert {c.shape[0] for c in gates} == {half}
    assert refused([c for c in PLAN.copies if c not in gates] + exchanged)


@pytest.mark.parametrize(
    "change",
    [
        {"source_rank": 99},
        {"target_rank": 4},
        {"source_storage": "unknown.weight"},
        {"target_storage": "unknown.weight"},
        {"source_start": (0,)},
    ],
)
def test_copies_to_and_from_nowhere_are_noticed(change):
    assert refused(with_copy(0, **change))


def test_a_plan_for_other_layouts_is_noticed():
    other = trainer_layout(MODEL, ParallelConfig(tp_size=2))
    assert verify_transfer(TransferPlan.of(other.layout_id, PLAN.target_id, ()), SOURCE, TARGET)
    assert any("target layout" in p for p in verify_transfer(PLAN, SOURCE, engine_layout(MODEL)))
