"""Requests that can never be served: refused alone, with every reason, before they run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.intake import request_problems
from npr_megatron.errors import InputError
from npr_megatron.records.request import RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode
from tests.engines import TINY, drain, request_for, tiny_engine

CONFIG = EngineConfig(num_kv_slots=600)
GOOD = request_for((20, 21), max_new_tokens=40, max_critical_path=40)

SPOILED: list[tuple[str, Any, str]] = [
    ("prompt_id", "", "prompt_id is ''"),
    ("prompt_id", None, "prompt_id is None"),
    ("rollout", -1, "rollout is -1"),
    ("rollout", "3", "rollout is '3'"),
    ("rollout", True, "rollout is True"),
    ("seed", -1, "seed is -1"),
    ("seed", 1 << 64, f"seed is {1 << 64}"),
    ("seed", 0.5, "seed is 0.5"),
    ("mode", "parallel", "must be DecodeMode.SEQUENTIAL or DecodeMode.PARALLEL"),
    ("on_refusal", None, "must be RefusalPolicy.TERMINATE or RefusalPolicy.SEQUENTIAL"),
    ("prompt_ids", (), "prompt is empty"),
    ("prompt_ids", [20, 21], "of type list; give a tuple"),
    ("prompt_ids", "hello", "of type str; give a tuple"),
    ("prompt_ids", (20, 40), "from 20 to 40, the model has 0..39"),
    ("prompt_ids", (20, -1), "from -1 to 20"),
    ("prompt_ids", (20, 21.0), "prompt_ids[1] is 21.0 of type float"),
    ("prompt_ids", (20, True), "prompt_ids[1] is True of type bool"),
    ("prompt_ids", (20, None, "x"), "prompt_ids[1] is None of type NoneType"),
    ("prompt_ids", (np.int32(20),), "of type int32; token ids must be plain integers"),
    ("prompt_ids", (20,) * 480, "may reach 520 positions, the model has 512"),
    ("max_new_tokens", 0, "max_new_tokens is 0"),
    ("max_new_tokens", -5, "max_new_tokens is -5"),
    ("max_new_tokens", 2.5, "max_new_tokens is 2.5"),
    ("max_new_tokens", math.nan, "max_new_tokens is nan"),
    ("max_new_tokens", 599, "601 KV slots, the pool has 600"),
    ("max_critical_path", 0, "max_critical_path 0"),
    ("max_critical_path", None, "max_critical_path None"),
    ("temperature", -0.1, "temperature is -0.1"),
    ("temperature", math.nan, "temperature is nan"),
    ("temperature", math.inf, "temperature is inf"),
    ("temperature", 1e-40, "temperature is 1e-40"),
    ("temperature", "hot", "temperature is 'hot'"),
    ("top_p", 0.0, "top_p is 0.0"),
    ("top_p", 1.01, "top_p is 1.01"),
    ("top_p", math.nan, "top_p is nan"),
    ("top_k", -1, "top_k is -1"),
    ("top_k", 2.5, "top_k is 2.5"),
    ("top_k", False, "top_k is False"),
    ("min_p", -0.01, "min_p is -0.01"),
    ("min_p", 1.5, "min_p is 1.5"),
    ("min_p", math.nan, "min_p is nan"),
    ("repetition_penalty", 0.0, "repetition_penalty is 0.0"),
    ("repetition_penalty", -1.0, "repetition_penalty is -1.0"),
    ("repetition_penalty", math.inf, "repetition_penalty is inf"),
    ("step_repetition_penalty", 0, "step_repetition_penalty is 0"),
    ("step_repetition_penalty", math.nan, "step_repetition_penalty is nan"),
    ("timeout_s", 0.0, "timeout_s is 0.0"),
    ("timeout_s", -3, "timeout_s is -3"),
    ("timeout_s", math.nan, "timeout_s is nan"),
    ("timeout_s", "soon", "timeout_s is 'soon'"),
]

ACCEPTED: dict[str, list[Any]] = {
    "rollout": [0, 10**6],
    "seed": [0, (1 << 64) - 1],
    "mode": list(DecodeMode),
    "on_refusal": list(RefusalPolicy),
    "prompt_ids": [(0,), (39,) * 472],
    "max_new_tokens": [1, 598],
    "max_critical_path": [1, 10**9],
    "temperature": [0.0, 0, 1e-5, 1, 1e5],
    "top_p": [1e-9, 1],
    "top_k": [0, 1, 10**9],
    "min_p": [0, 1.0],
    "repetition_penalty": [1e-5, 1, 1.02],
    "step_repetition_penalty": [0.5, 2],
    "timeout_s": [None, 1e-3, 1],
}


def problems(**changes: Any) -> list[str]:
    return request_problems(dataclasses.replace(GOOD, **changes), TINY, CONFIG)


@pytest.mark.parametrize(("field", "value", "part"), SPOILED)
def test_each_fault_is_named_alone_with_what_was_found(field: str, value: Any, part: str) -> None:
    (problem,) = problems(**{field: value})
    assert part in problem


def test_everything_at_its_limit_is_accepted() -> None:
    assert [
        (field, value, found)
        for field, values in ACCEPTED.items()
        for value in values
        if (found := problems(**{field: value}))
    ] == []


def test_all_faults_are_named_at_once() -> None:
    worst = {field: value for field, value, _ in reversed(SPOILED)}
    assert len(problems(**worst)) == len(worst) - 1, "both budgets share a sentence"


def test_every_field_of_a_request_is_looked_at() -> None:
    assert {field for field, _, _ in SPOILED} == {f.name for f in dataclasses.fields(GOOD)}


def test_an_engine_refuses_one_request_and_goes_on_serving_the_others() -> None:
    """Before, between and after: what the others get is what they get without the bad ones."""
    plain = [
        dataclasses.replace(GOOD, rollout=i, seed=i, mode=DecodeMode.SEQUENTIAL) for i in range(4)
    ]
    expected = tiny_engine().generate(plain)
    engine, finished, spoiled = tiny_engine(num_kv_slots=600), [], iter(SPOILED)
    for request in plain:
        engine.add(request)
        for field, value, part in itertools.islice(spoiled, 13):
            with pytest.raises(InputError) as refusal:
                engine.add(dataclasses.replace(GOOD, **{"prompt_id": "bad", field: value}))
            assert part in str(refusal.value)
            finished += engine.step()
    assert next(spoiled, None) is None
    finished += drain(engine)
    for found, wanted in zip(sorted(finished, key=lambda t: t.rollout), expected, strict=True):
        assert found.token_ids.tolist() == wanted.token_ids.tolist()
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)
    assert max(len(found.token_ids) for found in finished) == 42
