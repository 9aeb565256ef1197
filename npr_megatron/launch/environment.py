"""Which rank this process is: what torchrun or srun says in the environment, nothing else.

Pure: a mapping in, a place out. Neither torch nor Ray is imported here.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from npr_megatron.errors import ConfigError

_FIRST_PORT, _NUM_PORTS = 20_000, 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRank:
    """Place of this process among those that were launched together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Which of the node's devices is this process's."""
    address: str
    """``tcp://host:port`` where the ranks meet."""
    num_threads: int = 1
    launcher: str = "a single process"


def launched_rank(environment: Mapping[str, str]) -> LaunchedRank:
    """Return the place that the launcher wrote into ``environment``; alone without a launcher.

    ``torchrun`` sets RANK and its kin. ``srun`` sets SLURM_PROCID and its kin in the tasks of a
    step (not in the batch script itself, which is therefore a single process); the ranks meet on
    the step's first node, at MASTER_PORT or at a port derived from the job and step.

    Raises:
        ConfigError: a launcher's variables are there in part, or are no numbers.
    """
    num_threads = int(environment.get("OMP_NUM_THREADS", "1"))
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size, local_rank, port = _numbers(
            environment, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        host, launcher = _texts(environment, ("MASTER_ADDR",))[0], "torchrun"
    elif "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        rank, world_size, local_rank, job, step = _numbers(
            environment,
            (
                "SLURM_PROCID",
                "SLURM_STEP_NUM_TASKS",
                "SLURM_LOCALID",
                "SLURM_JOB_ID",
                "SLURM_STEP_ID",
            ),
        )
        nodes = _texts(environment, ("SLURM_STEP_NODELIST",))[0]
        host = environment.get("MASTER_ADDR", first_node(nodes))
        derived = _FIRST_PORT + (job * 7 + step) % _NUM_PORTS
        port = int(environment.get("MASTER_PORT", derived))
        launcher = "srun"
    else:
        return LaunchedRank(address=f"tcp://127.0.0.1:{_free_port()}", num_threads=num_threads)
    return LaunchedRank(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        address=f"tcp://{host}:{port}",
        num_threads=num_threads,
        launcher=launcher,
    )


def first_node(nodes: str) -> str:
    """Return the first host of SLURM's short list.

    Example:
        ``gpu[03-05,09],login1`` gives ``gpu03``.
    """
    head = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,\[]*)", nodes)
    assert head is not None, "every part of the pattern may be empty"
    before, inside, behind = head.groups()
    return before + re.split(r"[-,]", inside or "")[0] + behind


def _numbers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    texts = _texts(environment, names)
    wrong = [f"{n} = {t!r}" for n, t in zip(names, texts, strict=True) if not t.isdecimal()]
    if wrong:
        raise ConfigError(
            f"a launcher's variables must be numbers, found {', '.join(wrong)}; start with "
            "torchrun or srun, or unset them"
        )
    return [int(text) for text in texts]


def _texts(environment: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"a launcher set some of its variables and not {', '.join(missing)}; start with "
            "torchrun or srun, or unset the others (RANK, WORLD_SIZE)"
        )
    return [environment[name] for name in names]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
