"""A plan for 235 billion parameters is a matter of seconds and proven, on a laptop."""

from __future__ import annotations

import time

import numpy as np
import pytest

from npr_megatron.config.training import ParallelConfig
from npr_megatron.planning.models import KNOWN_MODELS
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer

MODEL = KNOWN_MODELS["qwen3-235b-a22b"]
ON_64_GPUS = ParallelConfig(
    tp_size=4,
    pp_size=4,
    dp_size=4,
    ep_size=16,
    etp_size=1,
    num_layers_in_first_stage=23,
    num_layers_in_last_stage=23,
)
MOST_SECONDS = 5.0


@pytest.mark.parametrize("engine_ep_size", [8, 1])
def test_a_plan_from_64_gpus_to_tp8_takes_seconds(engine_ep_size):
    started = time.process_time()
    source = trainer_layout(MODEL, ON_64_GPUS)
    target = engine_layout(MODEL, 8, engine_ep_size, "sglang")
    plan = plan_transfer(source, target, target_nodes=[0] * 8)
    assert plan.plan_id
    planned = time.process_time()
    assert verify_transfer(plan, source, target) == []
    verified = time.process_time()
    assert planned - started <= MOST_SECONDS
    assert verified - planned <= MOST_SECONDS
    loads = np.bincount(plan.copy_table.source_rank, weights=plan.copy_table.num_bytes(2))
    assert loads.max() <= 1.02 * loads.mean()
