"""What can never be served is refused with the same words by every backend, and alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from npr_megatron.engine.intake import refusals
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import DecodeMode
from tests.contract.backends import MODEL, ROUNDING, Backend
from tests.engines import assert_same_trajectory, drain, random_weights, request_for
from tests.unit.engine.test_intake import GOOD, SPOILED


def test_every_fault_is_refused_with_the_same_words(engine: Engine, backend: Backend) -> None:
    for field, value, _ in SPOILED:
        request = dataclasses.replace(GOOD, **{field: value})
        expected = refusals(request, MODEL, backend.config, ())
        assert set(expected) <= set(engine.problems(request))
        if expected:
            with pytest.raises(InputError) as refusal:
                engine.add(request)
            assert set(expected) <= set(str(refusal.value).splitlines())
    assert engine.num_unfinished == 0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"max_new_tokens": 40_000, "max_critical_path": 100}, "KV slots"),
        ({"max_new_tokens": 2047, "max_critical_path": 2047}, "2049 positions, the model has 2048"),
    ],
)
def test_what_can_never_fit_is_refused(engine: Engine, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        engine.add(dataclasses.replace(GOOD, **changes))


def test_an_id_that_is_unfinished_is_refused_and_then_free_again(engine: Engine) -> None:
    request = dataclasses.replace(GOOD, mode=DecodeMode.SEQUENTIAL, max_new_tokens=4)
    engine.add(request)
    with pytest.raises(InputError, match="a request of this id is unfinished"):
        engine.add(request)
    with pytest.raises(InputError, match="with 1 requests unfinished"):
        engine.generate([request_for((20,), rollout=5)])
    (first,) = drain(engine)
    (again,) = engine.generate([request])
    assert_same_trajectory(again, first, tolerance=ROUNDING)


def test_a_batch_with_one_bad_request_decodes_nothing(engine: Engine) -> None:
    with pytest.raises(InputError, match="of this id"):
        engine.generate([GOOD, GOOD])
    with pytest.raises(InputError, match="top_p is 0"):
        engine.generate([GOOD, dataclasses.replace(GOOD, rollout=1, top_p=0.0)])
    assert engine.num_unfinished == 0


def test_refusals_between_others_change_nothing_for_them(engine: Engine, backend: Backend) -> None:
    weights = random_weights(MODEL, 2)
    backend.load(engine, weights)
    plain = [
        dataclasses.replace(GOOD, rollout=i, seed=i, mode=DecodeMode.SEQUENTIAL) for i in range(4)
    ]
    finished = []
    for request in plain:
        engine.add(request)
        for field, value, _ in SPOILED[::9]:
            bad = dataclasses.replace(GOOD, **{"prompt_id": "bad", field: value})
            if engine.problems(bad):
                with pytest.raises(InputError):
                    engine.add(bad)
        finished += engine.step()
    finished += drain(engine)
    expected = backend.expected([(request, None) for request in plain], weights)
    for pair in zip(sorted(finished, key=lambda t: t.rollout), expected, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)
