"""The random topologies are what they promise: counted, family by family and feature by feature."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from npr_megatron.weights.checkpoints.hf_config import hf_config
from tests.unit.weights.oracles import KINDS, Topology, topologies

PER_KIND = 40


def drawn(kind: str) -> list[Topology]:
    found: list[Topology] = []

    @settings(
        max_examples=PER_KIND,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(topologies(kind))
    def collect(topology: Topology) -> None:
        found.append(topology)

    collect()
    return found


@pytest.fixture(scope="module")
def by_kind() -> dict[str, list[Topology]]:
    return {kind: drawn(kind) for kind in KINDS}


def is_trainer_above(topology: Topology) -> bool:
    return topology.parallel.tp_size > topology.model.num_key_value_heads


def is_engine_above(topology: Topology) -> bool:
    return topology.engine_tp_size > topology.model.num_key_value_heads


def is_split_specially(topology: Topology) -> bool:
    parallel = topology.parallel
    return (
        parallel.vpp_size > 1
        or parallel.num_layers_in_first_stage is not None
        or parallel.pipeline_layout is not None
    )


def has_experts(topology: Topology) -> bool:
    return topology.model.moe is not None and topology.parallel.ep_size > 1


def test_every_kind_has_what_its_name_says(by_kind):
    for name, kind in KINDS.items():
        for topology in by_kind[name]:
            assert is_trainer_above(topology) or not kind.is_trainer_above
            assert is_engine_above(topology) or not kind.is_engine_above
            assert is_split_specially(topology) or "even" in kind.splits
            assert has_experts(topology) == ("qwen3" not in kind.families)


@pytest.mark.parametrize(
    ("feature", "least_share"),
    [
        (is_trainer_above, 0.1),
        (is_engine_above, 0.1),
        (is_split_specially, 0.3),
        (lambda t: t.parallel.vpp_size > 1, 0.1),
        (lambda t: t.parallel.num_layers_in_first_stage is not None, 0.1),
        (lambda t: t.parallel.pipeline_layout is not None, 0.1),
        (has_experts, 0.3),
        (lambda t: has_experts(t) and (t.parallel.etp_size or t.parallel.tp_size) > 1, 0.1),
        (lambda t: has_experts(t) and t.parallel.etp_size not in (None, t.parallel.tp_size), 0.05),
        (lambda t: 1 < t.engine_ep_size < t.engine_tp_size, 0.05),
        (lambda t: t.engine == "sglang" and t.model.vocab_size % 64 > 0, 0.1),
        (lambda t: t.model.vocab_size % (t.parallel.tp_size * t.parallel.vocab_divisor) > 0, 0.1),
        (lambda t: t.model.tie_word_embeddings and t.parallel.pp_size > 1, 0.1),
        (lambda t: t.model.family == "qwen3", 0.1),
        (lambda t: t.model.family == "llama", 0.1),
        (lambda t: t.model.family == "qwen3_moe", 0.1),
        (lambda t: t.model.family == "glm4_moe", 0.1),
        (lambda t: t.parallel.dp_size > 1, 0.1),
        (lambda t: t.parallel.cp_size > 1, 0.02),
    ],
)
def test_no_feature_is_rare(by_kind, feature, least_share):
    found = [topology for kind in by_kind.values() for topology in kind]
    assert sum(map(feature, found)) >= least_share * len(found)


def test_every_model_has_a_config_json(by_kind):
    for found in by_kind.values():
        for topology in found:
            assert hf_config(topology.model)["model_type"] == topology.model.family


def test_worlds_and_models_are_small(by_kind):
    for found in by_kind.values():
        for topology in found:
            assert topology.parallel.world_size <= 128
            assert topology.model.num_hidden_layers <= 16
