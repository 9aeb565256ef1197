"""The engine against transformers: fork, join and positions are exact, not approximate.

Oracle: Qwen3ForCausalLM on the linear form of a trajectory, with an explicit 4-D mask and explicit
positions. The oracle's mask is built here from labels, one pair at a time, not by the code under
test. ``NPR_PARITY_STRUCTURES`` raises the number of random structures (CI: 32).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from npr_megatron.config.model import ModelConfig
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.schema.render import BlockTexts, render
from npr_megatron.topology.layout import predecessors
from tests.engines import (
    TINY,
    UNTIED,
    request_for,
    run_one,
    skeleton_of,
    steered_weights,
    tiny_engine,
)
from tests.structures import SMALL, SPLIT, WORDS

NUM_STRUCTURES = int(os.environ.get("NPR_PARITY_STRUCTURES", "32"))
TOLERANCE = 1e-5
MODELS = (
    UNTIED,
    UNTIED.model_copy(update={"num_attention_heads": 2, "head_dim": 16, "rope_theta": 1e6}),
    UNTIED.model_copy(
        update={"num_attention_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 3}
    ),
)


def hf_model(model: ModelConfig, weights: dict[str, torch.Tensor]) -> Qwen3ForCausalLM:
    """Split the fused storages into the parameters of the reference model."""
    config = Qwen3Config(
        **model.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        attn_implementation="eager",
    )
    reference = Qwen3ForCausalLM(config).eval()
    head = model.head_dim
    rows_q, rows_kv = model.num_attention_heads * head, model.num_key_value_heads * head
    state = {}
    for name, tensor in weights.items():
        match name.split(".")[-2]:
            case "qkv_proj":
                parts = zip("qkv", tensor.split((rows_q, rows_kv, rows_kv)), strict=True)
                for part, rows in parts:
                    state["model." + name.replace("qkv_proj", f"self_attn.{part}_proj")] = rows
            case "gate_up_proj":
                for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                    state["model." + name.replace("gate_up_proj", f"mlp.{part}_proj")] = rows
            case "o_proj" | "q_norm" | "k_norm" as part:
                state["model." + name.replace(part, f"self_attn.{part}")] = tensor
            case "down_proj":
                state["model." + name.replace("down_proj", "mlp.down_proj")] = tensor
            case "lm_head":
                state[name] = tensor
            case _:
                state["model." + name] = tensor
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.tie_word_embeddings else [])
    return reference


def tree_sees(block: np.ndarray, branch: np.ndarray, query: int, key: int) -> bool:
    """The visibility rule in words: nothing later, and no sibling branch of one's own block."""
    if key > query:
        return False
    is_sibling = block[key] == block[query] != 0 and branch[key] != branch[query]
    return not is_sibling


def oracle_logprobs(
    reference: Qwen3ForCausalLM,
    trajectory: Trajectory,
    *,
    position_ids: np.ndarray | None = None,
    sees: Callable[[np.ndarray, np.ndarray, int, int], bool] = tree_sees,
) -> torch.Tensor:
    """Return [T, V] log-probs after each token of the linear form."""
    length = len(trajectory.token_ids)
    block, branch = trajectory.block, trajectory.branch
    visible = [[sees(block, branch, q, k) for k in range(length)] for q in range(length)]
    bias = torch.where(torch.tensor(visible), 0.0, torch.finfo(torch.float32).min)
    positions = trajectory.position_ids if position_ids is None else position_ids
    with torch.inference_mode():
        logits = reference(
            input_ids=torch.tensor(trajectory.token_ids)[None].long(),
            position_ids=torch.tensor(positions)[None].long(),
            attention_mask=bias[None, None],
            use_cache=False,
        ).logits[0]
    return logits.log_softmax(-1)


def gap(trajectory: Trajectory, logprobs: torch.Tensor) -> float:
    """Largest |engine - oracle| over generated tokens that have a predecessor."""
    sources = predecessors(trajectory.block, trajectory.branch)
    targets = np.flatnonzero(sources >= 0)
    targets = targets[targets >= trajectory.prompt_length]
    expected = logprobs[sources[targets], trajectory.token_ids[targets]].numpy()
    return float(np.abs(trajectory.logprobs[targets] - expected).max())


def random_trajectory(number: int) -> tuple[ModelConfig, dict[str, torch.Tensor], Trajectory]:
    """Greedy text of a random model inside a random structure of 1..3 blocks of 1..5 branches."""
    rng = random.Random(number)
    vocabulary = rng.choice([SMALL, SPLIT])

    def text() -> tuple[int, ...]:
        return tuple(rng.choices(WORDS, k=rng.randint(1, 6)))

    def block() -> BlockTexts:
        num_branches = rng.randint(1, 5)
        plans, steps = ([text() for _ in range(num_branches)] for _ in range(2))
        return BlockTexts(tuple(plans), tuple(steps), text())

    prompt = [rng.randrange(40) for _ in range(rng.randint(1, 12))]
    response = render([block() for _ in range(rng.randint(1, 3))], text(), vocabulary)
    model = MODELS[number % len(MODELS)]
    weights = steered_weights(model, number, WORDS)
    engine = tiny_engine(model=model, weights=weights, vocabulary=vocabulary)
    request = request_for(prompt, temperature=0.0, max_new_tokens=480, max_critical_path=480)
    teacher = skeleton_of([*prompt, *response], len(prompt), vocabulary)
    trajectory = run_one(engine, request, teacher)
    assert trajectory.finish is FinishReason.STOP
    assert len(trajectory.response_ids) == len(response)
    return model, weights, trajectory


def test_greedy_tokens_and_logprobs_of_branch_parallel_decoding_equal_transformers() -> None:
    num_greedy, worst = 0, 0.0
    for number in range(NUM_STRUCTURES):
        model, weights, trajectory = random_trajectory(number)
        logprobs = oracle_logprobs(hf_model(model, weights), trajectory)
        worst = max(worst, gap(trajectory, logprobs))
        sources = predecessors(trajectory.block, trajectory.branch)
        is_free = ~trajectory.forced & np.isin(trajectory.token_ids, WORDS)
        is_free &= np.arange(len(is_free)) >= trajectory.prompt_length
        expected = logprobs[sources[is_free]].argmax(-1).numpy()
        assert np.array_equal(trajectory.token_ids[is_free], expected), f"structure {number}"
        num_greedy += int(is_free.sum())
    assert num_greedy > 30 * NUM_STRUCTURES
    assert worst <= TOLERANCE


@pytest.mark.parametrize("model", [TINY, UNTIED], ids=["tied", "untied"])
def test_sequential_decoding_equals_transformers(model: ModelConfig) -> None:
    engine = tiny_engine(model=model, seed=5)
    request = request_for(
        range(2, 9), mode=DecodeMode.SEQUENTIAL, temperature=0.0, max_new_tokens=48
    )
    trajectory = run_one(engine, request)
    logprobs = oracle_logprobs(hf_model(model, engine.weights), trajectory)
    expected = logprobs[trajectory.prompt_length - 1 : -1].argmax(-1).numpy()
    assert np.array_equal(trajectory.response_ids, expected)
    assert gap(trajectory, logprobs) <= TOLERANCE


def test_an_oracle_that_lets_siblings_see_each_other_disagrees() -> None:
    model, weights, trajectory = random_trajectory(2)
    assert trajectory.branch.max() > 1
    causal = oracle_logprobs(hf_model(model, weights), trajectory, sees=lambda b, r, q, k: k <= q)
    assert gap(trajectory, causal) > 1e-3


def test_an_oracle_with_flattened_positions_disagrees() -> None:
    model, weights, trajectory = random_trajectory(2)
    flat = np.arange(len(trajectory.token_ids))
    logprobs = oracle_logprobs(hf_model(model, weights), trajectory, position_ids=flat)
    assert gap(trajectory, logprobs) > 1e-3
