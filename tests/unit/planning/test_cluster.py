"""A cluster is read from TOML and overrides; every problem is named."""

from __future__ import annotations

import pytest

from npr_megatron.errors import ConfigError
from npr_megatron.planning.cluster import HardwareConfig, read_cluster


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text("nic_gb_per_s = 22.5\ngpus_per_node = 4\n")
    cluster = read_cluster(path, {"gpus_per_node": "2"})
    assert cluster == HardwareConfig(nic_gb_per_s=22.5, gpus_per_node=2)


def test_every_problem_is_listed():
    with pytest.raises(ConfigError) as caught:
        read_cluster(overrides={"nic_gb_per_s": "-1", "gpus_per_nod": "4"})
    problems = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 2
    assert "nic_gb_per_s" in problems
    assert "gpus_per_nod " in problems


def test_a_missing_file_is_one_problem(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster file .* does not exist"):
        read_cluster(tmp_path / "none.toml")
