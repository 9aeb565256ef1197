"""Tiny engines with random weights, and teachers that lead them along a known response."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig, MoeConfig, RopeScaling
from npr_megatron.engine.compute.model import storage_layout
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.interface import Engine
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode, IntArray, Trajectory
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.topology.layout import layout_of
from tests.structures import NUM_IDS, SMALL, WORDS

TINY = ModelConfig(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=NUM_IDS,
    max_position_embeddings=512,
)
UNTIED = TINY.model_copy(update={"tie_word_embeddings": False})
EXPERTS = UNTIED.model_copy(
    update={
        "family": "qwen3_moe",
        "num_hidden_layers": 3,
        "moe": MoeConfig(
            num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, num_dense_layers=1
        ),
    }
)
LLAMA = UNTIED.model_copy(
    update={
        "family": "llama",
        "has_qk_norm": False,
        "rope_scaling": RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    }
)


def random_weights(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights large enough that every layer and every token changes the distribution."""
    generator = torch.Generator().manual_seed(seed)
    return {
        storage.name: 1.0 + 0.2 * torch.randn(storage.shape, generator=generator)
        if storage.name.endswith("norm.weight")
        else torch.randn(storage.shape, generator=generator)
        * (0.3 if "embed" in storage.name else 1.0 * storage.shape[-1] ** -0.5)
        for storage in storage_layout(model).ranks[0].storages
    }


def steered_weights(
    model: ModelConfig, seed: int, spoken: Sequence[int], margin: float = 6.0
) -> dict[str, torch.Tensor]:
    """Random weights whose distribution is spread over ``spoken`` ids only.

    Channel 0 carries a constant through the residual stream (no layer writes it) and the untied
    head reads it as a bias of a few ``margin`` against all other ids: 6 decides a greedy choice and
    keeps fp32 log-probs sharp, 30 decides every draw. Everything else is random, so the text still
    depends on the whole context.
    """
    weights = random_weights(model, seed)
    weights["embed_tokens.weight"][:, 0] = 1.0
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.w2_weight")):
            weight[..., 0, :] = 0.0
    bias = torch.full((model.vocab_size,), -margin)
    bias[list(spoken)] = 0.0
    weights["norm.weight"][0] = 1.0
    weights["lm_head.weight"][:, 0] = bias
    return weights


def tiny_engine(
    *,
    model: ModelConfig = TINY,
    weights: dict[str, torch.Tensor] | None = None,
    vocabulary: Vocabulary = SMALL,
    num_kv_slots: int = 4096,
    max_running: int = 64,
    max_streams: int = 512,
    max_step_tokens: int = 2048,
    max_plans: int = 5,
    seed: int = 0,
    kv_after_push: Literal["drop", "recompute", "keep"] = "recompute",
    record_routes: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """An engine with random weights of version 0 that checks its slots after every step."""
    config = EngineConfig(
        num_kv_slots=num_kv_slots,
        max_running=max_running,
        max_streams=max_streams,
        max_step_tokens=max_step_tokens,
        max_plans=max_plans,
        kv_after_push=kv_after_push,
        record_routes=record_routes,
        debug_checks=True,
    )
    engine = EmbeddedEngine(model, config, vocabulary, clock=clock)
    engine.load(random_weights(model, seed) if weights is None else weights)
    return engine


def request_for(
    prompt_ids: Sequence[int],
    *,
    rollout: int = 0,
    prompt_id: str = "p",
    mode: DecodeMode = DecodeMode.PARALLEL,
    max_new_tokens: int = 400,
    max_critical_path: int = 400,
    seed: int = 0,
    temperature: float = 1.0,
    **options: Any,
) -> GenerationRequest:
    """A request with the defaults of these tests; ``options`` are its other fields."""
    return GenerationRequest(
        prompt_id=prompt_id,
        rollout=rollout,
        prompt_ids=tuple(prompt_ids),
        mode=mode,
        max_new_tokens=max_new_tokens,
        max_critical_path=max_critical_path,
        seed=seed,
        temperature=temperature,
        **options,
    )


def teacher_of(
    token_ids: Sequence[int] | IntArray, prompt_length: int, vocabulary: Vocabulary
) -> Teacher:
    """Return the teacher that makes a branch-parallel engine write this response."""
    layout = layout_of(token_ids, prompt_length, vocabulary)
    return teacher_of_labels(
        token_ids[prompt_length:], layout.block[prompt_length:], layout.branch[prompt_length:]
    )


def teacher_of_labels(
    response_ids: Sequence[int] | IntArray, block: IntArray, branch: IntArray
) -> Teacher:
    """Return the teacher of a response whose tokens carry these labels; silent beyond its end."""
    streams: dict[tuple[int, int], list[int]] = defaultdict(list)
    for token_id, *label in zip(response_ids, block.tolist(), branch.tolist(), strict=True):
        streams[label[0], label[1]].append(int(token_id))

    def teach(block: int, branch: int, index: int) -> int | None:
        stream = streams[block, branch]
        return stream[index] if index < len(stream) else None

    return teach


def skeleton_of(
    token_ids: Sequence[int] | IntArray, prompt_length: int, vocabulary: Vocabulary
) -> Teacher:
    """Return the teacher that dictates the structure only and leaves every word of the texts to the
    model.
    """
    teach = teacher_of(token_ids, prompt_length, vocabulary)

    def teach_structure(block: int, branch: int, index: int) -> int | None:
        token_id = teach(block, branch, index)
        return None if token_id in WORDS else token_id

    return teach_structure


def drain(engine: Engine) -> list[Trajectory]:
    """Step until nothing is left; return what ended, in order of ending."""
    return step_until(engine, lambda: not engine.num_unfinished)


def step_until(
    engine: Engine, is_enough: Callable[[], bool], within_s: float = 300.0
) -> list[Trajectory]:
    """Step until ``is_enough``; return what ended. An engine that stands still fails the test."""
    finished, deadline = list[Trajectory](), time.monotonic() + within_s
    while not is_enough():
        unfinished = sorted(engine.unfinished)
        assert time.monotonic() < deadline, f"{unfinished} unfinished after {within_s} s"
        finished += engine.step()
    return finished


def drain_preempting(
    engine: Engine, request_ids: Sequence[str], every: int, seed: int = 0
) -> list[Trajectory]:
    """Drain; at every so many-th step preempt one of ``request_ids``, whether it runs or waits."""
    rng, finished, open_ids, num_steps = random.Random(seed), list[Trajectory](), [*request_ids], 0
    while engine.num_unfinished:
        num_steps += 1
        if num_steps % every == 0:
            engine.preempt(rng.choice(open_ids))
        for trajectory in engine.step():
            finished.append(trajectory)
            open_ids.remove(f"{trajectory.prompt_id}#{trajectory.rollout}")
    return finished


def assert_nothing_is_left(engine: Engine) -> None:
    """After a drain every slot is free or holds an idle prompt."""
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_kv_slots_held == 0


def assert_same_trajectory(found: Trajectory, expected: Trajectory, tolerance: float) -> None:
    """Hold everything recorded against ``expected``, log-probs up to ``tolerance``."""
    assert (found.prompt_id, found.rollout) == (expected.prompt_id, expected.rollout)
    assert (found.finish, found.finish_detail) == (expected.finish, expected.finish_detail)
    streams = ("token_ids", "position_ids", "block", "branch", "forced", "weight_versions")
    for name in (*streams, "routed_experts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=tolerance, rtol=0)


def run_one(
    engine: Engine, request: GenerationRequest, teacher: Teacher | None = None
) -> Trajectory:
    """Decode a single request."""
    engine.add(request, teacher)
    return drain(engine)[0]
