"""Which number of which stream a row takes, whatever SGLang has seen of it."""

import numpy as np
import pytest

from npr_megatron.engine.sglang.scheduler.draws import Draws
from npr_megatron.engine.sglang.stage import UNTAUGHT, Draw, Orders, Stage
from npr_megatron.records.randomness import branch_key, uniforms


def orders_of(length: int = 4, **draw: object) -> Orders:
    stage = Stage(
        trajectory="t",
        namespace="n",
        token_ids=[0] * length,
        offset=-3,
        draw=Draw(**draw),  # pyright: ignore[reportArgumentType]
    )
    orders = Orders.of(stage.custom_params())
    assert orders is not None
    return orders


def test_the_row_says_which_token_of_the_stage_comes_next():
    key = branch_key(123, 2, 3)
    orders = orders_of(key=key, first_index=5, taught=(UNTAUGHT, 9))
    found = [Draws.of([orders], [length]) for length in (4, 5, 9)]
    assert [draws.counters.tolist() for draws in found] == [[5], [6], [10]]
    assert [draws.taught.tolist() for draws in found] == [[UNTAUGHT], [9], [UNTAUGHT]]
    assert found[2].uniforms == uniforms(np.array([key], np.uint64), np.array([10], np.uint64))


def test_a_piece_of_a_long_prefill_draws_the_first_number():
    assert Draws.of([orders_of(length=100, first_index=1)], [32]).counters.tolist() == [1]


def test_ordinary_requests_are_left_out():
    shaped = orders_of(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125)
    draws = Draws.of([None, shaped, None, orders_of()], [7, 8, 9, 4])
    assert draws.rows.tolist() == [1, 3]
    assert draws.shape.tolist() == [[0.5, 3.0, 0.25, 0.125], [1.0, 0.0, 1.0, 0.0]]
    assert draws.counters.tolist() == [4, 0]


@pytest.mark.parametrize("key", [0, 1 << 63, (1 << 64) - 1])
def test_keys_of_64_bits_arrive_whole(key):
    assert Draws.of([orders_of(key=key)], [4]).keys.tolist() == [key]
