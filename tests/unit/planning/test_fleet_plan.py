"""Bytes of whole fleets, counted from real plans, against what can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.errors import ConfigError, LayoutError
from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.fleet_bytes import served_bytes
from npr_megatron.planning.fleet_plan import FleetPlan, plan_fleet, require_proven
from npr_megatron.planning.fleet_sweep import sweep_fleet
from npr_megatron.planning.forecast import forecast
from npr_megatron.planning.models import KNOWN_MODELS
from npr_megatron.planning.push_floor import direct_time, push_floor, relay_time
from npr_megatron.planning.push_request import PushRequest, read_engine, read_trainer
from npr_megatron.planning.push_simulation import simulate_direct, simulate_relay
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.plans.plan import TransferPlan

H100 = HardwareConfig()
TINY = ModelConfig(
    num_hidden_layers=4,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=128,
    vocab_size=512,
    tie_word_embeddings=False,
)
TINY_MOE = TINY.model_copy(
    update={
        "family": "qwen3_moe",
        "moe": MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
    }
)


def replica_bytes(model: ModelConfig) -> int:
    return 2 * sum(math.prod(parameter.shape) for parameter in canonical_parameters(model))


def request(model: ModelConfig, trainer: str, engine: str, num_engines: int) -> PushRequest:
    tp, ep = read_engine(engine)
    return PushRequest(
        model=model,
        parallel=read_trainer(trainer),
        engine_tp=tp,
        engine_ep=ep,
        num_engines=num_engines,
    )


@pytest.mark.parametrize(
    ("trainer", "engine", "num_engines", "num_nodes", "num_replicas"),
    [
        ("tp2,pp2,dp2", "tp1", 8, 1, 1),  # eight engines share one node
        ("tp2,pp2,dp2", "tp1", 20, 3, 3),  # the last node is half empty
        ("tp4,dp2", "tp4", 6, 3, 3),
        ("tp2,pp2", "tp8", 4, 4, 4),
        ("tp8", "tp8", 512, 512, 512),
    ],
)
def test_each_node_receives_one_replica_whoever_shares_it(
    trainer, engine, num_engines, num_nodes, num_replicas
):
    fleet = plan_fleet(request(TINY, trainer, engine, num_engines), H100)
    assert fleet.volume.num_nodes == num_nodes
    assert fleet.volume.wire_bytes == fleet.minimum_bytes == num_replicas * replica_bytes(TINY)
    nodes = sorted(node for kind in fleet.volume.kinds for node in kind.nodes)
    assert nodes == list(range(num_nodes))
    require_proven(fleet)


def test_engines_that_span_nodes_share_nothing_between_them_but_replicated_rows():
    cluster = HardwareConfig(gpus_per_node=2)
    fleet = plan_fleet(request(TINY, "tp2,dp2", "tp4", 3), cluster)
    first, second = fleet.volume.groups
    assert [kind.nodes for kind in (*first, *second)] == [(0, 2, 4), (1, 3, 5)]
    norms = 2 * sum(p.shape[0] for p in canonical_parameters(TINY) if len(p.shape) == 1)
    assert fleet.volume.wire_bytes == 3 * (replica_bytes(TINY) + norms)


def test_engines_that_straddle_nodes_are_planned_together():
    cluster = HardwareConfig(gpus_per_node=4)
    fleet = plan_fleet(request(TINY_MOE, "ep4,dp4", "tp2,ep2", 5), cluster)
    assert [(unit.num_engines, unit.num_nodes, unit.count) for unit in fleet.units] == [
        (2, 1, 2),
        (1, 1, 1),
    ]
    # all three nodes hold whole models, so they may forward to each other
    assert [len(group) for group in fleet.volume.groups] == [2]
    assert fleet.volume.wire_bytes == fleet.minimum_bytes == 3 * replica_bytes(TINY_MOE)


def test_fp8_moves_half_of_the_quantised_bytes_and_their_scales():
    model = TINY.model_copy(update={"hidden_size": 128, "head_dim": 128})
    small = served_bytes(model, "fp8")
    matrices = [p for p in canonical_parameters(model) if p.name.endswith("_proj.weight")]
    num_blocks = sum(
        math.ceil(r / 128) * math.ceil(c / 128) for r, c in (p.shape for p in matrices)
    )
    saved = sum(math.prod(p.shape) for p in matrices) - 4 * num_blocks
    assert replica_bytes(model) - small == saved
    asked = PushRequest(model=model, parallel=read_trainer("tp2,dp2"), num_engines=3, dtype="fp8")
    fleet = plan_fleet(asked, HardwareConfig(gpus_per_node=1))
    assert fleet.volume.wire_bytes == fleet.minimum_bytes == 3 * small
    require_proven(fleet)


@pytest.mark.parametrize(
    ("model", "trainer", "engine", "num_engines"),
    [
        ("qwen3-30b-a3b", "tp2,pp2,dp4,ep4,etp1", "tp8,ep8", 24),
        ("qwen3-1.7b", "tp2,pp2,dp4", "tp2", 33),
    ],
)
def test_closed_forms_and_simulation_agree_on_real_plans(model, trainer, engine, num_engines):
    volume = plan_fleet(request(KNOWN_MODELS[model], trainer, engine, num_engines), H100).volume
    direct, relayed = direct_time(volume, H100), relay_time(volume, H100)
    assert simulate_direct(volume, H100).seconds == pytest.approx(direct.seconds, rel=0.02)
    assert simulate_relay(volume, H100).seconds == pytest.approx(relayed.seconds, rel=0.02)


def test_every_problem_of_both_layouts_is_listed():
    with pytest.raises(ConfigError) as caught:
        plan_fleet(request(TINY, "tp3,pp3", "tp5", 1), H100)
    problems = caught.value.problems
    assert {problem.split(":")[0] for problem in problems} == {"trainer", "engine"}
    assert len(problems) >= 4


def test_a_cluster_that_is_too_small_is_refused_in_nodes_and_in_memory():
    cluster = HardwareConfig(num_nodes=3, gpu_memory_gb=1e-4)
    with pytest.raises(ConfigError) as caught:
        plan_fleet(request(TINY, "tp2", "tp1", 20), cluster)
    nodes, memory = caught.value.problems
    assert "need 1 + 3 nodes of 8, the cluster has num_nodes 3" in nodes
    assert "gpu_memory_gb 0.0001" in memory


def test_a_wrong_plan_is_not_called_proven():
    fleet = plan_fleet(request(TINY, "tp2", "tp1", 1), H100)
    (unit,) = fleet.units
    broken = TransferPlan.of(
        unit.plan.source_id,
        unit.plan.target_id,
        unit.plan.copies[1:],
        target_nodes=unit.plan.target_nodes,
    )
    wrong = FleetPlan(
        source=fleet.source,
        units=(type(unit)(target=unit.target, plan=broken, num_engines=1, nodes=unit.nodes),),
        volume=fleet.volume,
        minimum_bytes=fleet.minimum_bytes,
    )
    with pytest.raises(LayoutError, match="report this"):
        require_proven(wrong)


def test_movements_add_up_to_the_bytes_of_a_unit():
    fleet = plan_fleet(request(TINY_MOE, "tp2,dp2,ep2", "tp4,ep2", 4), H100)
    result = forecast(fleet, "bf16", H100)
    over_nics = [one for one in result.movements if one.crosses_nodes]
    assert sum(one.num_bytes for one in over_nics) == replica_bytes(TINY_MOE)
    assert sum(one.num_copies for one in result.movements) == len(
        fleet.units[0].plan.copy_table
    ) + len(fleet.units[0].plan.share_table)
    assert len({(one.source, one.target) for one in over_nics}) == len(over_nics)
    (w2,) = [one for one in over_nics if one.target.endswith("experts.w2_weight")]
    assert w2.num_bytes == 2 * 4 * 8 * 64 * 32  # layers, experts, hidden, inner
    assert result.wire_ratio == 1.0


def test_a_movement_names_its_copies_and_the_largest_of_them():
    fleet = plan_fleet(request(TINY, "tp1", "tp1", 1), H100)
    movements = forecast(fleet, "bf16", H100).movements
    (qkv,) = [one for one in movements if "qkv" in one.target]
    assert qkv.source == "decoder.layers.*.self_attention.linear_qkv.weight"
    assert qkv.target == "layers.*.qkv_proj.weight"
    # per layer and kv head two query heads in one copy, a key and a value head in one each
    assert qkv.num_copies == 4 * 4 * 3
    assert qkv.largest_bytes == 2 * 2 * 16 * 64


@pytest.mark.parametrize(("engine", "num_engines"), [("tp2", 32), ("tp8", 8)])
def test_a_sweep_passes_through_the_times_of_the_fleets_it_stands_for(engine, num_engines):
    cluster = HardwareConfig(gpus_per_node=4)
    volume = plan_fleet(request(TINY, "tp2,dp4", engine, num_engines), cluster).volume
    points = sweep_fleet(plan_fleet(request(TINY, "tp2,dp4", engine, 4), cluster), cluster)
    (point,) = [one for one in points if one.num_gpus == 64]
    assert point.direct_s == direct_time(volume, cluster).seconds
    assert point.relay_s == relay_time(volume, cluster).seconds
    assert point.floor_s == push_floor(volume, cluster).seconds
    assert points[-1].num_gpus >= 512 * 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tp0", "'tp0' is no size"),
        ("tp2,tp4", "tp is given twice"),
        ("dp=2;tp=2", "'dp=2;tp=2' is no size"),
        ("", "'' is no size"),
    ],
)
def test_sizes_that_cannot_be_read_are_named(text, problem):
    with pytest.raises(ConfigError, match=problem):
        read_trainer(text)


def test_sizes_are_read_with_and_without_equals_signs_and_from_a_run_file():
    assert read_trainer("tp=2, pp3,etp1") == read_trainer("etp1,pp3,tp2")
    assert read_trainer("tp2,pp3").world_size == 6
    assert read_engine("ep4,tp8") == (8, 4)
    with pytest.raises(ConfigError, match="'pp2' is no size"):
        read_engine("tp8,pp2")
    assert read_trainer("examples/quickstart/run.toml").pp_size == 2
