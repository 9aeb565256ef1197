"""Declared layouts are those of live Megatron models, and both are what Megatron itself says."""

from __future__ import annotations

import pytest

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.storages import box_reader, load_tiles
from npr_megatron.weights.tiles import RankLayout
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL
from tests.distributed.live_models import Case, build_chunks, disagreements, element_ids

UNTIED = MODEL.model_copy(update={"tie_word_embeddings": False})
LLAMA = MODEL.model_copy(update={"family": "llama", "has_qk_norm": False})
EXPERTS = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
QWEN3_MOE = UNTIED.model_copy(update={"family": "qwen3_moe", "moe": EXPERTS})
GLM4_MOE = UNTIED.model_copy(
    update={
        "family": "glm4_moe",
        "moe": EXPERTS.model_copy(
            update={"num_dense_layers": 1, "shared_intermediate_size": 12, "has_expert_bias": True}
        ),
    }
)


def with_layers(model: ModelConfig, num_layers: int) -> ModelConfig:
    return model.model_copy(update={"num_hidden_layers": num_layers})


def case(name: str, model: ModelConfig, **parallel) -> Case:
    return Case(name=name, model=model, parallel=ParallelConfig(**parallel))


CASES = [
    case("one rank", UNTIED),
    case("tp2 tied", MODEL, tp_size=2),
    case("tp2 padded", UNTIED.model_copy(update={"vocab_size": 61}), tp_size=2, vocab_divisor=16),
    case("pp2 tied", MODEL, pp_size=2),
    case("pp2 vpp2", UNTIED, pp_size=2, vpp_size=2),
    case(
        "pp2 uneven",
        with_layers(LLAMA, 5),
        pp_size=2,
        num_layers_in_first_stage=2,
        num_layers_in_last_stage=3,
    ),
    case(
        "pp2 vpp2 string",
        with_layers(LLAMA, 5),
        pp_size=2,
        vpp_size=2,
        pipeline_layout="Et|t*2|t|tL",
    ),
    case(
        "pp2 vpp2 string, empty chunk",
        with_layers(LLAMA, 5),
        pp_size=2,
        vpp_size=2,
        pipeline_layout="E|t*3|t|tL",
    ),
    case(
        "pp2 vpp2 counting",
        with_layers(UNTIED, 6),
        pp_size=2,
        vpp_size=2,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    ),
    case("etp2 over dp2", GLM4_MOE, dp_size=2, etp_size=2),
    case("ep2 over cp2", QWEN3_MOE, cp_size=2, ep_size=2),
    case("ep2", QWEN3_MOE, dp_size=2, ep_size=2),
    case("ep2 in tp2", GLM4_MOE, tp_size=2, ep_size=2, etp_size=1),
    case("moe pp2 vpp2", GLM4_MOE, pp_size=2, vpp_size=2),
    case("tp2 pp2 tied", MODEL, tp_size=2, pp_size=2),
    case("tp2 pp2 vpp2 llama", LLAMA, tp_size=2, pp_size=2, vpp_size=2),
    case("tp4, two kv heads", UNTIED, tp_size=4),
    case(
        "tp4, padding alone on two ranks",
        UNTIED.model_copy(update={"vocab_size": 20}),
        tp_size=4,
        vocab_divisor=16,
    ),
    case("ep2 tp2 etp1", QWEN3_MOE, tp_size=2, dp_size=2, ep_size=2, etp_size=1),
    case("ep2 tp2 etp2", GLM4_MOE, tp_size=2, dp_size=2, ep_size=2, etp_size=2),
    case("moe tp2 pp2", GLM4_MOE, tp_size=2, pp_size=2, ep_size=2, etp_size=1),
]
WORLD_SIZES = sorted({case.parallel.world_size for case in CASES})
NAMES = {size: [c.name for c in CASES if c.parallel.world_size == size] for size in WORLD_SIZES}


class World:
    """One process as a rank of one case after another."""

    def __init__(self, rank: int, world_size: int, init_method: str) -> None:
        self.rank, self._world_size, self._init_method = rank, world_size, init_method

    def chunks(self, case: Case):
        from npr_megatron.runtime import process_group

        process_group.stop()
        info = process_group.RankInfo(
            rank=self.rank,
            world_size=self._world_size,
            init_method=f"{self._init_method}-{case.name.replace(' ', '-')}",
        )
        process_group.start(info, case.parallel)
        return build_chunks(case.model, case.parallel)


def fill(chunks, layout: RankLayout, case: Case):
    """Write element ids through ``layout``; return Megatron's disagreements."""
    from npr_megatron.model.storages import stage_storages

    ids = element_ids(case.model)
    storages = stage_storages(chunks)
    for tensor in storages.values():
        tensor.zero_()
    load_tiles(layout, box_reader(ids), storages)
    problems, num_compared = disagreements(chunks, case, ids)
    assert num_compared == layout.num_elements, "Megatron does not speak of every element"
    return problems


def probe(rank, world_size, init_method, cases):
    """Return by case what is wrong with its layouts, nothing being expected."""
    from npr_megatron.model.live_layout import check_live_layout, live_layout
    from npr_megatron.runtime.device import device_scope

    world = World(rank, world_size, init_method)
    found: dict[str, list[str]] = {}
    for case in cases:
        with device_scope():
            chunks = world.chunks(case)
            live = live_layout(chunks, case.model)
            found[case.name] = fill(chunks, live, case)
            try:
                check_live_layout(live, trainer_layout(case.model, case.parallel).ranks[rank])
            except LayoutError as error:
                found[case.name].append(str(error))
    return found


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return {
        size: run_ranks(probe, size, folder, [c for c in CASES if c.parallel.world_size == size])
        for size in WORLD_SIZES
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_live_modules_agree_with_the_configuration_and_with_megatron(case, probed):
    for rank, found in enumerate(probed[case.parallel.world_size]):
        assert found[case.name] == [], f"rank {rank}"
