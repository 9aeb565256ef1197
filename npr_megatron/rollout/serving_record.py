"""What a fleet serves, as a small JSON file for people and tools outside the run.

::

    {"version": 7, "digest": "0x0123456789abcdef",
     "replicas": [{"replica": 0, "pid": 4711, "health": "healthy", "version": 7}]}

``version`` and ``digest`` are null before the first push, a replica's ``version`` before its first.
The file is replaced as a whole: a reader sees one moment, never two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from npr_megatron.rollout.health import ReplicaState, Stamp


def write_serving(
    path: Path,
    serving: Stamp | None,
    states: Sequence[ReplicaState],
    pids: Sequence[int | None],
) -> None:
    """Replace the record at ``path``."""
    record = {
        "version": None if serving is None else serving.version,
        "digest": None if serving is None else f"{serving.digest:#018x}",
        "replicas": [
            {
                "replica": index,
                "pid": pid,
                "health": state.health.value,
                "version": None if state.serving is None else state.serving.version,
            }
            for index, (state, pid) in enumerate(zip(states, pids, strict=True))
        ],
    }
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w") as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
