"""What the checker of ``[parallel]`` accepts Megatron builds, on any rank, as it was declared.

One process stands in turn at ranks of worlds that were never started: torch's fake process group
answers every collective at once.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest

from npr_megatron.config.device_memory import rank_memory
from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.training import ParallelConfig, TrainerConfig
from npr_megatron.weights.layouts import trainer_layout
from tests.distributed.harness import run_ranks
from tests.distributed.live_models import Case, build_chunks

NUM_LAYOUTS = 120
STRINGS = (None, None, None, "Et|ttL", "E|t|tt|tL", "Ett|t*2L", "EtttL", "E(t)*2|(|t)*2L", "E|tL")


def draw(rng: random.Random) -> tuple[ModelConfig, ParallelConfig]:
    """Return anything one may ask for, sensible or not."""
    maybe = (None, None, None, 1, 2, 3)
    parallel = ParallelConfig(
        tp_size=rng.choice((1, 1, 2, 2, 3, 4)),
        pp_size=rng.choice((1, 2, 2, 3, 4)),
        dp_size=rng.choice((1, 2, 3)),
        cp_size=rng.choice((1, 1, 2)),
        vpp_size=rng.choice((1, 1, 2, 3)),
        ep_size=rng.choice((1, 1, 1, 2)),
        etp_size=rng.choice((None, None, 1, 2)),
        num_layers_in_first_stage=rng.choice(maybe),
        num_layers_in_last_stage=rng.choice(maybe),
        account_for_embedding_in_pipeline_split=rng.random() < 0.2,
        account_for_loss_in_pipeline_split=rng.random() < 0.2,
        pipeline_layout=rng.choice(STRINGS),
        vocab_divisor=rng.choice((1, 1, 1, 5)),
    )
    experts = MoeConfig(
        num_experts=rng.choice((2, 3, 4)),
        num_experts_per_tok=2,
        moe_intermediate_size=rng.choice((4, 6)),
        num_dense_layers=rng.choice((0, 1)),
        shared_intermediate_size=rng.choice((0, 4)),
    )
    model = ModelConfig(
        num_hidden_layers=rng.randint(1, 9),
        hidden_size=8,
        num_attention_heads=rng.choice((1, 2, 3, 4, 6, 8)),
        num_key_value_heads=rng.choice((1, 2, 3, 4)),
        head_dim=rng.choice((2, 4)),
        intermediate_size=rng.choice((6, 8, 12)),
        vocab_size=rng.choice((6, 8, 12)),
        tie_word_embeddings=rng.random() < 0.5,
        moe=experts if rng.random() < 0.4 else None,
    )
    return model, parallel


def accepted() -> list[Case]:
    """Return what the checker lets through."""
    rng, cases = random.Random(6), []
    trainer = TrainerConfig(row_tokens=192)
    while len(cases) < NUM_LAYOUTS:
        model, parallel = draw(rng)
        if not parallel_problems(parallel, trainer, model):
            cases.append(Case(name=f"case {len(cases)}", model=model, parallel=parallel))
    return cases


def build_all(rank, world_size, init_method, cases):
    """Return what Megatron or the declared layout have against each case."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers "fake"

    from npr_megatron.model.live_layout import check_live_layout, live_layout
    from npr_megatron.model.storages import stage_storages
    from npr_megatron.runtime import process_group
    from npr_megatron.runtime.device import device_scope

    process_group.backend = lambda: "fake"
    parallel_state.initialize_model_parallel = functools.partial(
        parallel_state.initialize_model_parallel, create_gloo_process_groups=False
    )
    rng, complaints = random.Random(1), []
    for case in cases:
        stand = rng.randrange(case.parallel.world_size)
        try:
            with device_scope():
                info = process_group.RankInfo(
                    rank=stand,
                    world_size=case.parallel.world_size,
                    init_method=f"{init_method}-{case.name.replace(' ', '-')}",
                )
                process_group.start(info, case.parallel)
                chunks = build_chunks(case.model, case.parallel)
                declared = trainer_layout(case.model, case.parallel).ranks[stand]
                check_live_layout(live_layout(chunks, case.model), declared)
                stage = parallel_state.get_pipeline_model_parallel_rank()
                estimate = rank_memory(case.model, case.parallel, TrainerConfig(), stage)
                held = sum(t.numel() * t.element_size() for t in stage_storages(chunks).values())
                assert estimate.weights == held, f"{estimate.weights} bytes are not {held}"
        except Exception as error:  # noqa: BLE001 - whatever it is, the test reports it
            complaints.append(f"{case} on rank {stand}: {error!r}")
        process_group.stop()
    return complaints


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return accepted()


def test_the_cases_hold_every_kind_of_split(cases):
    for field, default in (
        ("tp_size", 1),
        ("vpp_size", 1),
        ("pipeline_layout", None),
        ("num_layers_in_first_stage", None),
        ("num_layers_in_last_stage", None),
        ("account_for_embedding_in_pipeline_split", False),
        ("account_for_loss_in_pipeline_split", False),
        ("ep_size", 1),
        ("etp_size", None),
        ("cp_size", 1),
        ("vocab_divisor", 1),
    ):
        met = sum(getattr(case.parallel, field) != default for case in cases)
        assert met >= 3, f"{field} in {met} cases only"


def test_what_is_accepted_is_built_as_declared(cases, tmp_path):
    ((*complaints,),) = run_ranks(build_all, 1, tmp_path, cases)
    assert complaints == [], "\n".join(complaints)


def test_what_is_refused_is_not_built(tmp_path):
    """The oracle of the test above can fail."""
    model = ModelConfig(
        num_hidden_layers=3,
        hidden_size=8,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=2,
        intermediate_size=8,
        vocab_size=8,
    )
    refused = Case(name="refused", model=model, parallel=ParallelConfig(tp_size=2))
    uneven = replace(refused, name="uneven", parallel=ParallelConfig(pp_size=2))
    (complaints,) = run_ranks(build_all, 1, tmp_path, [refused, uneven])
    assert len(complaints) == 2
