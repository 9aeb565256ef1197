"""The simulated push equals the closed forms where those hold, and shows what they cannot say."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.conditions import Conditions, draw_conditions
from npr_megatron.planning.push_floor import direct_time, relay_time
from npr_megatron.planning.push_simulation import simulate_direct, simulate_relay
from npr_megatron.planning.push_volume import PushVolume
from tests.unit.planning.volumes import even_volume

H100 = HardwareConfig()
GRID = [
    case
    for case in itertools.product((8.04, 65.5, 470), (8, 16, 64), (1, 3, 8, 64, 512), (1, 2, 4))
    if case[2] >= case[3]  # every kind has a node
]


@pytest.mark.parametrize(("model_gb", "sources", "nodes", "kinds"), GRID)
def test_an_undisturbed_push_takes_what_the_closed_forms_say(model_gb, sources, nodes, kinds):
    volume = even_volume(model_gb, sources, nodes, num_kinds=kinds)
    relayed = relay_time(volume, H100).seconds
    assert simulate_relay(volume, H100).seconds == pytest.approx(relayed, rel=0.02)
    direct = direct_time(volume, H100).seconds
    assert simulate_direct(volume, H100).seconds == pytest.approx(direct, rel=0.02)


@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_small_engines_that_share_a_node_agree_too(nodes):
    volume = even_volume(8.04, 8, nodes, gpu_gb=8.04)
    relayed, direct = relay_time(volume, H100).seconds, direct_time(volume, H100).seconds
    assert simulate_relay(volume, H100).seconds == pytest.approx(relayed, rel=0.02)
    assert simulate_direct(volume, H100).seconds == pytest.approx(direct, rel=0.02)


def test_a_half_empty_last_node_stands_last_in_a_chain_of_the_others():
    full = even_volume(8.04, 8, 8, gpu_gb=8.04).kinds[0]
    last = replace(full, nodes=(7,), gpu_bytes=full.gpu_bytes[:5])
    volume = PushVolume(
        model_bytes=8_040_000_000, kinds=(replace(full, nodes=tuple(range(7))), last)
    )
    result = simulate_relay(volume, H100)
    assert result.depth == 8
    assert result.seconds == result.finish_s[7]
    assert result.seconds == pytest.approx(relay_time(volume, H100).seconds, rel=0.02)
    # its five NICs alone need 36 ms, the others' eight need 22
    assert result.finish_s[7] > 0.036
    assert max(result.finish_s[:7]) < 0.029


def test_235b_from_64_to_4096_gpus():
    volume = even_volume(471.7, 64, 512)
    assert simulate_relay(volume, H100).seconds == pytest.approx(1.44, rel=0.02)
    assert simulate_direct(volume, H100).seconds == pytest.approx(84, rel=0.02)


def test_relaying_is_flat_in_the_fleet():
    small, large = even_volume(470, 64, 8), even_volume(470, 64, 64)
    ratio = simulate_relay(large, H100).seconds / simulate_relay(small, H100).seconds
    assert 1.0 < ratio < 1.15


def test_a_slow_nic_delays_only_what_stands_behind_it():
    volume = even_volume(471.7, 8, 16)
    known_to_nobody = Conditions(slow={7: 0.5}, are_rates_known=False)
    finish = simulate_relay(volume, H100, known_to_nobody).finish_s
    healthy = simulate_relay(volume, H100).finish_s
    assert finish[:7] == healthy[:7]
    assert max(finish[:7]) < 1.37
    assert all(2.6 < time < 2.75 for time in finish[7:])


def test_a_slow_nic_that_stands_last_delays_nobody_else():
    volume = even_volume(471.7, 8, 16)
    finish = simulate_relay(volume, H100, Conditions(slow={7: 0.5})).finish_s
    assert max(time for node, time in enumerate(finish) if node != 7) < 1.38
    assert finish[7] > 2.6


def test_jitter_costs_a_deep_chain_a_fifth_and_is_the_same_for_the_same_seed():
    volume = even_volume(471.7, 8, 512)
    steady = simulate_relay(volume, H100).seconds
    shaken = [simulate_relay(volume, H100, Conditions(jitter=0.3, seed=s)).seconds for s in (1, 2)]
    assert steady == pytest.approx(1.70, rel=0.01)
    for seconds in shaken:
        assert 1.9 < seconds < 2.2
    assert shaken[0] != shaken[1]
    again = simulate_relay(volume, H100, Conditions(jitter=0.3, seed=1))
    assert again.seconds == shaken[0]


def test_jitter_leaves_the_mean_rate_of_a_link_as_it_is():
    volume = even_volume(471.7, 8, 1)
    steady = simulate_direct(volume, H100).seconds
    shaken = simulate_direct(volume, H100, Conditions(jitter=0.3)).seconds
    assert shaken == pytest.approx(steady, rel=0.01)


def test_an_orphan_is_fed_no_faster_than_its_slow_ancestor_sends():
    volume = even_volume(471.7, 8, 3)
    troubles = Conditions(slow={0: 0.5}, deaths={1: 1.31}, are_rates_known=False)
    finish = simulate_relay(volume, H100, troubles).finish_s
    # half was received at half the rate when node 1 died; the rest takes as long, after detection
    assert finish[0] == pytest.approx(2 * 1.31, rel=0.02)
    assert finish[2] == pytest.approx(1.31 + 0.5 + 1.31, rel=0.02)


def test_orphans_of_a_death_half_way_lose_the_detection_time():
    volume = even_volume(471.7, 8, 16)
    healthy = simulate_relay(volume, H100).finish_s
    finish = simulate_relay(volume, H100, Conditions(deaths={7: 0.69})).finish_s
    assert finish[:7] == healthy[:7]
    assert finish[7] == math.inf
    for time, before in zip(finish[8:], healthy[8:], strict=True):
        assert time == pytest.approx(before + 0.5, abs=0.02)


def test_neighbours_that_die_together_are_detected_together():
    volume = even_volume(471.7, 8, 16)
    one = simulate_relay(volume, H100, Conditions(deaths={7: 0.69})).seconds
    two = simulate_relay(volume, H100, Conditions(deaths={6: 0.69, 7: 0.69})).seconds
    assert two == pytest.approx(one, rel=0.01)


def test_an_orphan_of_a_first_node_is_fed_by_the_source():
    volume = even_volume(471.7, 8, 3)
    finish = simulate_relay(volume, H100, Conditions(deaths={0: 0.0})).finish_s
    healthy = simulate_relay(volume, H100).finish_s
    assert finish[0] == math.inf
    assert finish[1] == pytest.approx(0.5 + healthy[0], rel=0.02)


def test_a_death_after_the_push_changes_nothing():
    volume = even_volume(471.7, 8, 16)
    late = Conditions(deaths={3: 100.0})
    assert simulate_relay(volume, H100, late) == simulate_relay(volume, H100)
    assert simulate_direct(volume, H100, late).seconds == simulate_direct(volume, H100).seconds


def test_a_direct_push_skips_a_node_known_to_be_dead():
    volume = even_volume(471.7, 8, 16)
    whole = simulate_direct(volume, H100).seconds
    result = simulate_direct(volume, H100, Conditions(deaths={3: whole / 2}))
    assert result.finish_s[3] == math.inf
    # a sixteenth of the second half need not be sent, but for the time of detection
    saved = (whole / 2 - 0.5) / 16
    assert result.seconds == pytest.approx(whole - saved, rel=0.005)


def test_a_direct_push_waits_for_a_slow_node_only_once_it_is_the_bottleneck():
    one = even_volume(471.7, 64, 8)
    healthy = simulate_direct(one, H100).seconds
    assert simulate_direct(one, H100, Conditions(slow={2: 0.5})).seconds == pytest.approx(
        2 * healthy, rel=0.02
    )
    many = even_volume(471.7, 64, 64)
    assert simulate_direct(many, H100, Conditions(slow={2: 0.5})).seconds == pytest.approx(
        simulate_direct(many, H100).seconds, rel=0.02
    )


def test_drawn_conditions_name_distinct_nodes_and_repeat_with_the_seed():
    drawn = draw_conditions(10, num_slow=4, num_dead=6, dead_within_s=2.0, seed=3)
    assert sorted([*drawn.slow, *drawn.deaths]) == list(range(10))
    assert all(0 <= time <= 2 for time in drawn.deaths.values())
    assert drawn == draw_conditions(10, num_slow=4, num_dead=6, dead_within_s=2.0, seed=3)
    assert drawn != draw_conditions(10, num_slow=4, num_dead=6, dead_within_s=2.0, seed=4)
