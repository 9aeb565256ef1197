"""Where branches lie in a linear form."""

from array import array

from npr_megatron.engine.sglang.scheduler.joins import branch_paths


def test_each_branch_stands_behind_the_trunk_alone():
    linear = array("q", range(9))
    paths = [path.tolist() for path in branch_paths(linear, (2, 3, 1, 3))]
    assert paths == [[0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 6, 7, 8]]
