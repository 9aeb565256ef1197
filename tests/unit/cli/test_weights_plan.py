"""``npr weights plan`` and ``simulate``: tables that teach, stable JSON, no torch, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LARGE = [
    "qwen3-235b-a22b",
    *("--trainer", "tp4,pp2,dp8,ep8,etp1"),
    *("--engine", "tp8,ep8"),
    *("--engines", "512"),
]


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_help_has_an_example_that_works(npr, command):
    result = npr("weights", command, "--help")
    assert result.code == 0
    examples = [line.strip() for line in result.out.splitlines() if " npr weights " in line]
    first = next(line for line in examples if line.startswith(f"npr weights {command} qwen3"))
    assert npr(*first.split()[1:]).code == 0


def test_235b_from_64_to_4096_gpus_needs_no_weights(npr):
    found = json.loads(npr("weights", "plan", *LARGE, "--json").out)
    assert found["trainer"]["gpus"] == 64
    assert found["fleet_nodes"] == 512
    assert found["bytes"]["wire_ratio"] == 1.0
    assert found["bytes"]["wire"] == 512 * found["bytes"]["model"] == 512 * 470_187_269_120
    assert found["bytes"]["largest_gpu"] == pytest.approx(58.96e9, rel=1e-3)
    assert found["egress"]["imbalance"] < 1.02
    assert found["floor"]["seconds"] == pytest.approx(1.18, rel=0.01)
    assert found["direct"]["seconds"] == pytest.approx(84, rel=0.01)
    assert found["relay"]["seconds"] == pytest.approx(1.44, rel=0.01)
    assert (found["relay"]["num_chains"], found["relay"]["depth"]) == (8, 64)
    pauses = {pause["mode"]: pause for pause in found["pauses"]}
    assert pauses["shadow"]["seconds"] == pytest.approx(0.045, rel=0.02)
    assert not pauses["shadow"]["is_feasible"]
    assert found["is_proven"]


def test_the_keys_of_the_json_are_stable(npr):
    found = json.loads(npr("weights", "plan", "qwen3-0.6b", "--json").out)
    assert set(found) == {
        *("model", "dtype", "trainer", "engine", "engines", "cluster", "is_proven"),
        *("plan", "bytes", "egress", "fleet_nodes", "floor", "direct", "relay", "pauses"),
    }
    assert set(found["plan"]["movements"][0]) == {
        *("source", "target", "crosses_nodes", "num_copies", "num_bytes", "largest_bytes")
    }
    assert found["cluster"]["nic_gb_per_s"] == 45.0


def test_the_tables_say_what_moves_how_long_it_takes_and_what_bounds_it(npr):
    arguments = ("--trainer", "tp2,dp4", "--engines", "64", "--no-verify")
    result = npr("weights", "plan", "qwen3-4b", *arguments)
    assert result.code == 0
    for part in ("gate_up_proj", "mlp.linear_fc1", "1.000 x the minimum", "179 ms"):
        assert part in result.out
    assert re.search(r"relayed .* 28\.\d ms .* 1 chain of 8 nodes", result.out)
    assert "not verified" in result.out
    assert "proven" in npr("weights", "plan", "qwen3-4b").out


def test_a_chart_is_drawn_where_asked(npr, tmp_path):
    path = tmp_path / "push.png"
    result = npr("weights", "plan", "qwen3-4b", "--plot", str(path))
    assert result.code == 0
    assert result.out.endswith(f"{path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")
    refused = npr("weights", "plan", "qwen3-4b", "--plot", str(tmp_path / "none" / "push.png"))
    assert refused.code == 2
    assert "cannot be written" in refused.err


def test_fp8_and_the_names_of_sglang(npr):
    options = ("--dtype", "fp8", "--dialect", "sglang", "--engine", "tp4")
    found = json.loads(npr("weights", "plan", "qwen3-8b", *options, "--json").out)
    targets = {movement["target"] for movement in found["plan"]["movements"]}
    assert "model.layers.*.mlp.gate_up_proj.weight_scale_inv" in targets
    assert found["bytes"]["model"] < 0.6 * 2 * 8_190_735_360


def test_every_problem_of_the_arguments_is_listed(npr):
    arguments = ("--trainer", "tq4", "--engine", "tp8,pp2", "--set", "nic", "--engines", "3")
    result = npr("weights", "plan", "qwen3-4", *arguments)
    assert (result.code, result.out) == (2, "")
    for part in ("did you mean qwen3-4b?", "'tq4' is no size", "'pp2' is no size", "--set 'nic'"):
        assert part in result.err
    assert "4 problems found" in result.err


def test_what_cannot_be_cut_or_does_not_fit_is_refused(npr):
    indivisible = npr("weights", "plan", "qwen3-4b", "--trainer", "tp3", "--engine", "tp3")
    assert indivisible.code == 2
    assert "trainer: num_attention_heads 32 is not a multiple" in indivisible.err
    assert "engine: num_attention_heads 32 is not a multiple" in indivisible.err
    too_large = npr("weights", "plan", *LARGE, "--set", "num_nodes=100")
    assert too_large.code == 2
    assert "8 + 512 nodes of 8, the cluster has num_nodes 100" in too_large.err


def test_a_cluster_file_is_read(npr, tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text("nic_gb_per_s = 22.5\nnic_line_gb_per_s = 25.0\n")
    options = ("--cluster", str(path), "--json")
    slower = json.loads(npr("weights", "plan", "qwen3-4b", *options).out)
    usual = json.loads(npr("weights", "plan", "qwen3-4b", "--json").out)
    assert slower["direct"]["seconds"] == pytest.approx(2 * usual["direct"]["seconds"])


def test_a_simulation_agrees_with_the_closed_forms_until_something_goes_wrong(npr):
    found = json.loads(npr("weights", "simulate", *LARGE, "--json").out)
    for way, seconds in (("direct", 84), ("relayed", 1.44)):
        assert found[way]["closed_form_s"] == pytest.approx(seconds, rel=0.02)
        assert found[way]["seconds"] == found[way]["undisturbed_s"]
        assert found[way]["seconds"] == pytest.approx(found[way]["closed_form_s"], rel=0.02)


def test_troubles_cost_time_and_less_of_it_where_slow_nodes_are_known(npr):
    fleet = ("qwen3-32b", "--trainer", "tp8,dp2", "--engine", "tp4", "--engines", "256", "--json")
    calm = json.loads(npr("weights", "simulate", *fleet).out)
    troubles = ("--jitter", "0.3", "--slow-nodes", "5", "--dead-nodes", "2", "--seed", "7")
    disturbed = json.loads(npr("weights", "simulate", *fleet, *troubles).out)
    assert len(disturbed["conditions"]["slow"]) == 5
    dead = [node for node, time in enumerate(disturbed["relayed"]["finish_s"]) if time is None]
    assert dead == sorted(int(node) for node in disturbed["conditions"]["deaths_s"])
    assert disturbed["relayed"]["seconds"] > calm["relayed"]["seconds"] * 1.5
    blind = json.loads(npr("weights", "simulate", *fleet, *troubles, "--blind").out)
    assert blind["relayed"]["half_s"] > disturbed["relayed"]["half_s"]


def test_a_simulation_shows_who_was_slow_and_who_died(npr):
    options = ("--trainer", "dp8", "--engines", "64", "--slow-nodes", "1", "--dead-nodes", "1")
    result = npr("weights", "simulate", "qwen3-4b", *options)
    assert result.code == 0
    for part in ("at 50% of the rate", "dead: node", "closed form", "relayed", "direct"):
        assert part in result.out


def test_more_troubles_than_nodes_are_refused(npr):
    result = npr("weights", "simulate", "qwen3-4b", "--dead-nodes", "2")
    assert result.code == 2
    assert "the fleet has 1" in result.err


def test_planning_works_where_nothing_heavy_is_installed():
    code = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'ray', 'transformers', 'safetensors', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"  # importing it now fails
        "sys.argv = ['npr', 'weights', 'plan', 'qwen3-0.6b', '--json']\n"
        "from npr_megatron.cli.main import main\nmain()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["bytes"]["model"] == 2 * 596_049_920
