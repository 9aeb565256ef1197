"""Bundles of a run, and what a cluster lacks for them."""

import pytest

from npr_megatron.config.engine import ClusterConfig, FleetConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import ConfigError
from npr_megatron.launch.placement import Need, place, require_room

RUN = place(
    ParallelConfig(tp_size=2, pp_size=2),
    FleetConfig(num_replicas=3),
    ClusterConfig(
        cpus_per_trainer=2, gpus_per_trainer=1, cpus_per_replica=1.5, gpus_per_replica=0.5
    ),
)


def test_trainer_ranks_come_first_and_every_process_has_its_own_bundle():
    assert RUN.bundles == [{"CPU": 2.0, "GPU": 1.0}] * 4 + [{"CPU": 1.5, "GPU": 0.5}] * 3
    assert RUN.total == Need(num_cpus=12.5, num_gpus=5.5)


def test_a_role_that_is_not_wanted_takes_nothing_and_a_zero_is_not_asked_of_ray():
    generate_only = place(None, FleetConfig(num_replicas=2), ClusterConfig())
    assert generate_only.trainers == ()
    assert generate_only.bundles == [{"CPU": 1.0}, {"CPU": 1.0}]
    assert place(ParallelConfig(), None, ClusterConfig()).replicas == ()


def test_shares_of_several_gpus_are_refused_all_at_once():
    with pytest.raises(ConfigError) as caught:
        place(
            ParallelConfig(),
            FleetConfig(),
            ClusterConfig(gpus_per_trainer=1.5, gpus_per_replica=2.5),
        )
    assert len(caught.value.problems) == 2
    assert "gpus_per_trainer = 1.5" in caught.value.problems[0]
    assert "gpus_per_replica = 2.5" in caught.value.problems[1]


@pytest.mark.parametrize(
    "nodes", [[Need(12.5, 5.5)], [Need(1, 0), Need(64, 8)]], ids=["exactly", "second node"]
)
def test_a_node_with_room_is_enough(nodes):
    require_room(RUN, nodes)


def test_room_spread_over_nodes_is_not_room_and_the_nearest_shortage_is_named():
    with pytest.raises(ConfigError) as caught:
        require_room(RUN, [Need(64, 4), Need(8, 8)])
    message = str(caught.value)
    assert "4 trainer ranks and 3 replicas" in message
    assert "12.5 CPUs and 5.5 GPUs" in message
    assert "the nearest of 2 nodes lacks 4.5 CPUs and 0 GPUs" in message


def test_a_cluster_without_nodes_is_named_as_such():
    with pytest.raises(ConfigError, match="no live node"):
        require_room(RUN, [])
