"""Many requests on one pool: sharing, waiting, aborting, new weights, nothing leaked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import DivergenceError, InputError, LayoutError, StaleWeightsError
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from tests.engines import TINY, drain, random_weights, request_for, run_one, tiny_engine
from tests.structures import SMALL
from tests.unit.engine.test_decoding import PROMPT, RESPONSE, TEACHER


def commit(engine: Engine, seed: int, version: int) -> None:
    staged = engine.staging()
    for name, tensor in random_weights(TINY, seed).items():
        staged[name].copy_(tensor)
    engine.commit(version)


def test_rollouts_of_one_prompt_store_it_once() -> None:
    engine = tiny_engine()
    prompt = tuple(range(2, 40))
    for rollout in range(10):
        engine.add(
            request_for(prompt, rollout=rollout, mode=DecodeMode.SEQUENTIAL, max_new_tokens=4)
        )
    engine.step()
    assert engine.stats().num_kv_slots_held == len(prompt) - 1 + 10


def test_generate_returns_trajectories_in_the_order_of_requests() -> None:
    engine = tiny_engine(max_running=3)
    requests = [
        request_for(PROMPT, rollout=i, seed=i, mode=DecodeMode.SEQUENTIAL, max_new_tokens=20 - i)
        for i in range(12)
    ]
    ended: list[Trajectory] = []
    trajectories = engine.generate(requests, ended.append)
    assert [t.rollout for t in trajectories] == list(range(12))
    assert {t.rollout for t in ended} == set(range(12))


def test_a_pool_that_fits_one_request_serves_all_of_them() -> None:
    size = len(PROMPT) + len(RESPONSE)
    engine = tiny_engine(num_kv_slots=size)
    for rollout in range(5):
        prompt = (*PROMPT[:-1], 20 + rollout % 3) if rollout % 2 else (30 + rollout, *PROMPT[1:])
        engine.add(request_for(prompt, rollout=rollout, max_new_tokens=len(RESPONSE)), TEACHER)
    trajectories = drain(engine)
    assert [t.response_ids.tolist() for t in trajectories] == [RESPONSE] * 5
    assert engine.stats().num_kv_slots_held == 0


def test_a_request_that_can_never_fit_is_refused_with_every_reason() -> None:
    engine = tiny_engine(num_kv_slots=64)
    with pytest.raises(InputError) as error:
        engine.add(request_for([20, 99], max_new_tokens=63, max_critical_path=511, top_p=0.0))
    message = str(error.value)
    assert "0..39" in message
    assert "top_p" in message
    assert "65 KV slots" in message
    assert "positions" not in message
    with pytest.raises(InputError, match="513 positions"):
        engine.add(request_for([20], max_new_tokens=600, max_critical_path=512))
    with pytest.raises(InputError, match="empty"):
        engine.add(request_for([]))
    assert engine.num_unfinished == 0


def test_generate_decodes_nothing_when_one_request_is_refused() -> None:
    engine = tiny_engine()
    with pytest.raises(InputError, match="of this id"):
        engine.generate([request_for(PROMPT), request_for(PROMPT)])
    assert engine.num_unfinished == 0
    assert len(engine.generate([request_for(PROMPT)])) == 1


def test_an_aborted_request_returns_what_it_wrote() -> None:
    engine = tiny_engine(max_running=1)
    engine.add(request_for(PROMPT, rollout=0), TEACHER)
    engine.add(request_for(PROMPT, rollout=1), TEACHER)
    for _ in range(5):
        engine.step()
    engine.abort("p#0")
    engine.abort("p#1")
    first, second = sorted(drain(engine), key=lambda t: t.rollout)
    assert first.finish is second.finish is FinishReason.ABORTED
    assert first.response_ids.tolist() == RESPONSE[:5]
    assert second.num_tokens == 0
    assert engine.stats().num_kv_slots_held == 0
    with pytest.raises(InputError, match="p#0"):
        engine.abort("p#0")


@pytest.mark.parametrize("num_steps", range(0, 44, 3))
def test_after_a_commit_every_later_token_is_of_the_new_weights(num_steps: int) -> None:
    """Also of tokens whose context was decoded before: keys and values are recomputed, not kept."""
    engine = tiny_engine()
    engine.add(request_for(PROMPT), TEACHER)
    for _ in range(num_steps):
        engine.step()
    commit(engine, seed=7, version=3)
    (trajectory,) = drain(engine)
    versions = trajectory.weight_versions[len(PROMPT) :]
    assert set(versions.tolist()) <= {0, 3}
    new = tiny_engine(seed=7).score([trajectory])[0]
    old = tiny_engine(seed=0).score([trajectory])[0]
    expected = np.where(trajectory.weight_versions == 3, new, old)
    np.testing.assert_allclose(trajectory.logprobs, expected, atol=1e-5, rtol=0)
    assert trajectory.token_ids[len(PROMPT) :].tolist() == RESPONSE


def test_a_commit_writes_in_place_and_refuses_what_is_not_newer() -> None:
    engine = tiny_engine()
    before = {name: tensor.data_ptr() for name, tensor in engine.weights.items()}
    with pytest.raises(StaleWeightsError, match="nothing is staged"):
        engine.commit(1)
    commit(engine, seed=1, version=4)
    assert {name: tensor.data_ptr() for name, tensor in engine.weights.items()} == before
    assert engine.weight_version == 4
    with pytest.raises(StaleWeightsError, match="version 4"):
        engine.commit(4)


def test_an_engine_without_weights_refuses_to_decode() -> None:
    engine = EmbeddedEngine(TINY, EngineConfig(num_kv_slots=512), SMALL)
    engine.add(request_for(PROMPT))
    with pytest.raises(StaleWeightsError, match="holds no weights"):
        engine.step()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_never_become_live(number: float) -> None:
    engine = tiny_engine()
    before = {name: tensor.clone() for name, tensor in engine.weights.items()}
    weights = random_weights(TINY, 5)
    weights["layers.1.down_proj.weight"][3, 3] = number
    for name, tensor in weights.items():
        engine.staging()[name].copy_(tensor)
    for refused in (engine.seal, lambda: engine.commit(3), lambda: engine.load(weights, 3)):
        with pytest.raises(DivergenceError, match=r"layers\.1\.down_proj\.weight of shape"):
            refused()
    assert engine.weight_version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.weights.items())


def test_weights_that_give_nan_fail_the_request_and_not_the_engine() -> None:
    engine = tiny_engine()
    weights = random_weights(TINY, 0)
    weights["layers.1.down_proj.weight"][:] = 1e38
    engine.load(weights, version=9)
    lost = run_one(engine, request_for(PROMPT))
    assert lost.finish is FinishReason.FAILED
    assert "weight version 9" in lost.finish_detail
    engine.load(random_weights(TINY, 0), version=10)
    again = run_one(engine, request_for(PROMPT))
    assert (
        again.token_ids.tolist() == run_one(tiny_engine(), request_for(PROMPT)).token_ids.tolist()
    )


def test_loading_names_every_storage_that_does_not_fit() -> None:
    weights = random_weights(TINY, 0)
    weights["norm.weight"] = torch.ones(3)
    weights["extra"] = weights.pop("embed_tokens.weight")
    engine = tiny_engine()
    before = engine.weights["layers.0.qkv_proj.weight"].clone()
    with pytest.raises(LayoutError) as error:
        engine.load(weights)
    assert str(error.value).splitlines() == [
        "storage embed_tokens.weight is missing",
        "storage extra is unknown",
        "storage norm.weight has shape (3,), expected (32,)",
    ]
    assert torch.equal(engine.weights["layers.0.qkv_proj.weight"], before)


def test_prompts_longer_than_one_pass_are_filled_in_pieces() -> None:
    model = TINY.model_copy(update={"max_position_embeddings": 4096})
    engine = tiny_engine(model=model)
    prompt = [20 + i % 19 for i in range(2500)]
    request = request_for(prompt, mode=DecodeMode.SEQUENTIAL, max_new_tokens=3, temperature=0.0)
    trajectory = run_one(engine, request)
    np.testing.assert_allclose(
        trajectory.logprobs, engine.score([trajectory])[0], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("num_kv_slots", [68, 72, 80])
def test_idle_prompts_give_way_to_the_streams_of_a_round_under_way(num_kv_slots) -> None:
    engine = tiny_engine(num_kv_slots=num_kv_slots, max_running=4)
    for number in range(30):
        prompt = [20 + number % 20, *range(21, 28), 20 + number % 19]
        request = request_for(
            prompt,
            prompt_id=f"p{number}",
            mode=DecodeMode.SEQUENTIAL,
            max_new_tokens=5 + number % 4,
        )
        engine.add(request)
        while engine.num_unfinished == 4:
            engine.step()
    drain(engine)
