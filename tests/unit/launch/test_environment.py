"""What torchrun and srun write, and what half of it means."""

from __future__ import annotations

import pytest

from npr_megatron.errors import ConfigError
from npr_megatron.launch.environment import first_node, launched_rank

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.3",
    "MASTER_PORT": "29511",
    "OMP_NUM_THREADS": "4",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_torchrun_says_who_and_where():
    place = launched_rank(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank) == (5, 8, 1)
    assert (place.address, place.num_threads) == ("tcp://10.0.0.3:29511", 4)


def test_srun_tasks_meet_on_the_first_node_of_their_step():
    place = launched_rank(SRUN)
    assert (place.rank, place.world_size, place.local_rank) == (9, 16, 1)
    assert place.address == f"tcp://gpu007:{20_000 + 1234 * 7}"
    assert launched_rank({**SRUN, "SLURM_STEP_ID": "1"}).address != place.address
    given = launched_rank({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "77"})
    assert given.address == "tcp://head:77"


def test_torchrun_inside_a_job_step_is_torchrun():
    assert launched_rank({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_a_batch_script_is_a_single_process_although_its_job_has_tasks():
    place = launched_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1234"})
    assert (place.rank, place.world_size) == (0, 1)
    assert place.address.startswith("tcp://127.0.0.1:")


def test_half_of_a_launchers_variables_is_refused_by_name():
    with pytest.raises(ConfigError, match="not LOCAL_RANK, MASTER_PORT"):
        launched_rank({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"})
    with pytest.raises(ConfigError, match="RANK = 'x'"):
        launched_rank({**TORCHRUN, "RANK": "x"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("a[2,7]", "a2"),
        ("rack1-n[10-11]-ib", "rack1-n10-ib"),
    ],
)
def test_the_first_node_of_slurms_short_list(nodes, first):
    assert first_node(nodes) == first
