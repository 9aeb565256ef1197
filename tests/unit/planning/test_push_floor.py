"""Closed forms against published numbers, against each other, and at their limits."""

from __future__ import annotations

import math

import pytest

from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.pause import pauses
from npr_megatron.planning.push_floor import best_chunks, direct_time, push_floor, relay_time
from npr_megatron.planning.push_volume import NodeKind, PushVolume
from tests.unit.planning.volumes import even_volume

H100 = HardwareConfig()
LINE_RATE = HardwareConfig(nic_gb_per_s=50.0)

# model [GB], GB per GPU, source GPUs, nodes, kinds; floor and direct at line rate, relay at 45 GB/s
TABLE = {
    "4b tp1 x 8": (8.04, 8.04, 8, 1, 1, 0.020, 0.020, 0.022),
    "4b tp1 x 64": (8.04, 8.04, 8, 8, 1, 0.020, 0.161, 0.028),
    "4b tp1 x 512": (8.04, 8.04, 8, 64, 1, 0.020, 1.29, 0.042),
    "32b tp4 x 8": (65.5, 16.4, 16, 4, 1, 0.164, 0.328, 0.188),
    "32b tp4 x 64": (65.5, 16.4, 16, 32, 1, 0.164, 2.6, 0.206),
    "32b tp4 x 512": (65.5, 16.4, 16, 256, 1, 0.164, 21.0, 0.256),
    "235b tp8 x 8": (470, 59, 64, 8, 1, 1.18, 1.18, 1.31),
    "235b tp8 x 64": (470, 59, 64, 64, 1, 1.18, 9.4, 1.35),
    "235b tp8 x 512": (470, 59, 64, 512, 1, 1.18, 75.0, 1.44),
    "235b fp8 tp8 x 64": (239, 30, 64, 64, 1, 0.60, 4.8, 0.69),
    "235b tp32 x 2": (470, 15, 64, 8, 4, 0.29, 0.29, 0.33),
    "1t fp8 tp16 x 16": (1050, 66, 256, 32, 2, 1.31, 1.31, 1.46),
    "1t fp8 tp16 x 128": (1050, 66, 256, 256, 2, 1.31, 10.5, 1.50),
    "1t fp8 ep64 x 4": (1050, 16.5, 256, 32, 8, 0.33, 0.33, 0.36),
    "1t bf16 tp32 x 8": (2060, 65, 256, 32, 4, 1.29, 1.29, 1.43),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_published_table_comes_out_within_its_rounding(case):
    model_gb, gpu_gb, sources, nodes, kinds, floor, direct, relay = TABLE[case]
    volume = even_volume(model_gb, sources, nodes, num_kinds=kinds, gpu_gb=gpu_gb)
    assert push_floor(volume, H100).node_ingress_s == pytest.approx(floor, rel=0.02, abs=5e-4)
    assert direct_time(volume, LINE_RATE).seconds == pytest.approx(direct, rel=0.02)
    assert relay_time(volume, H100).seconds == pytest.approx(relay, rel=0.02, abs=5e-4)


def test_each_bound_is_what_its_definition_says():
    floor = push_floor(even_volume(80, num_sources=4, num_nodes=2, gpu_gb=40), H100)
    assert floor.node_ingress_s == pytest.approx(80 / (8 * 50))
    assert floor.gpu_fill_s == pytest.approx(40 / (50 + 450))
    assert floor.nvlink_s == pytest.approx((40 - 80 / 8) / 450)
    assert floor.source_egress_s == pytest.approx(80 / (4 * 50))
    assert floor.all_nics_s == pytest.approx(160 / ((4 + 16) * 50))
    assert floor.source_pack_s == pytest.approx(80 / 4 / 1300)
    assert floor.seconds == floor.source_egress_s


def test_no_prediction_beats_the_floor():
    for model_gb, gpu_gb, sources, nodes, kinds, *_ in TABLE.values():
        volume = even_volume(model_gb, sources, nodes, num_kinds=kinds, gpu_gb=gpu_gb)
        floor = push_floor(volume, LINE_RATE).seconds
        assert direct_time(volume, LINE_RATE).seconds >= floor
        assert relay_time(volume, LINE_RATE).seconds >= floor


def test_direct_is_no_slower_than_relayed_while_the_source_has_as_many_nics():
    for nodes in (1, 4, 8):
        volume = even_volume(470, 64, nodes)
        assert direct_time(volume, H100).seconds == pytest.approx(
            relay_time(volume, H100).seconds, rel=1e-6
        )
    larger = even_volume(470, 64, 9)
    assert direct_time(larger, H100).seconds > relay_time(larger, H100).seconds


def test_a_small_source_of_many_kinds_bounds_the_relay_by_its_own_nics():
    volume = even_volume(470, num_sources=16, num_nodes=64, num_kinds=8)
    result = relay_time(volume, H100)
    assert result.bottleneck == "source egress"
    assert result.seconds >= 470e9 / (16 * 45e9)


def test_an_unbalanced_source_is_as_slow_as_its_busiest_nic():
    busy, idle = 40_000_000_000, 10_000_000_000
    kind = NodeKind(nodes=(0,), content=0, bytes_from=(busy, idle), gpu_bytes=(idle,) * 8)
    result = direct_time(PushVolume(model_bytes=busy + idle, kinds=(kind,)), H100)
    assert result.bottleneck == "source egress"
    assert result.seconds == pytest.approx(busy / 45e9)


def test_slow_nvlink_bounds_nodes_of_many_small_engines():
    cluster = HardwareConfig(nvlink_gb_per_s=20.0)
    volume = even_volume(8.04, 8, 1, gpu_gb=8.04)
    assert direct_time(volume, cluster).bottleneck == "NVLink"
    # seven eighths of the model come from neighbours
    assert direct_time(volume, cluster).seconds == pytest.approx(8.04 * 7 / 8 / 20, rel=1e-6)


def test_no_other_number_of_chunks_is_quicker_than_the_best():
    volume = even_volume(470, 8, 512)
    (kind,) = volume.kinds
    best = best_chunks(kind, H100, depth=512, source_s=0.0)

    def seconds(num_chunks: float) -> float:
        chunk = kind.node_bytes / 8 / num_chunks
        return (num_chunks + 511) * (chunk / 45e9 + 50e-6)

    assert kind.node_bytes / 8 / best == pytest.approx(16.1e6, rel=0.01)
    assert seconds(best) < min(seconds(best * 0.9), seconds(best * 1.1))
    assert seconds(best) == pytest.approx(relay_time(volume, H100).seconds)
    closed = (math.sqrt(kind.node_bytes / 360e9) + math.sqrt(511 * 50e-6)) ** 2
    assert seconds(best) == pytest.approx(closed)


def test_a_depth_cap_shortens_chains_and_pays_at_the_source():
    volume = even_volume(470, 64, 512)
    capped = relay_time(volume, H100, max_depth=16)
    assert capped.bottleneck == "source egress"
    # 32 chains out of 8 source nodes: each is fed at a quarter of its rate
    assert capped.seconds == pytest.approx(4 * 470 / 360, rel=0.02)
    assert relay_time(volume, H100).seconds < capped.seconds / 3


def test_pauses_of_the_published_table():
    expected = {  # weights of a GPU [GB]: shadow [ms], host [s], the shadow fits 80 GB
        8.04: (6, 0.15, True),
        16.4: (13, 0.30, True),
        58.96: (45, 1.07, False),
        29.9: (23, 0.54, True),
    }
    for weights_gb, (shadow_ms, host_s, fits) in expected.items():
        by_mode = {p.mode: p for p in pauses(round(weights_gb * 1e9), 1.5, H100)}
        assert round(by_mode["shadow"].seconds * 1e3) == shadow_ms
        assert by_mode["host"].seconds == pytest.approx(host_s, abs=0.01)
        assert by_mode["shadow"].is_feasible is fits
        assert by_mode["in place"].seconds == 1.5
        assert by_mode["in place"].is_feasible
