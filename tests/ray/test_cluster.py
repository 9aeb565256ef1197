"""Private Ray sessions come up quietly, refuse a taken port, and vanish with their driver."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from npr_megatron.launch.reaper import writers

pytestmark = pytest.mark.slow
DRIVER = """
import json, os, sys, time
import ray
from npr_megatron.config.engine import ClusterConfig, FleetConfig
from npr_megatron.errors import EnvironmentFault
from npr_megatron.launch.placement import place
from npr_megatron.launch.ray_cluster import RayCluster

@ray.remote
class Busy:
    def pid(self):
        return os.getpid()
    def spin(self):
        while True:
            pass

config = ClusterConfig(ray_port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
with RayCluster(config, place(None, FleetConfig(num_replicas=1), config)) as cluster:
    busy = Busy.options(**cluster.replica_seats[0].options()).remote()
    pid = ray.get(busy.pid.remote())
    busy.spin.remote()
    folder = os.path.dirname(os.path.dirname(ray._private.worker._global_node.get_logs_dir_path()))
    address = ray.get_runtime_context().gcs_address
    print(json.dumps({"pid": pid, "folder": folder, "address": address}), flush=True)
    time.sleep(300)
"""


@pytest.fixture
def driver():
    """Starts a driver in a process of its own; ends it if the test has not."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_driver_that_ends_takes_every_process_and_its_folder_with_it(driver, sign):
    port = free_port()
    process = driver(str(port))
    assert process.stdout is not None
    session = json.loads(process.stdout.readline())  # the first thing ever printed
    assert session["address"].endswith(f":{port}")
    folder = Path(session["folder"])
    family = psutil.Process(process.pid).children(recursive=True)
    assert session["pid"] in {member.pid for member in family}
    assert {session["pid"], process.pid} < writers(folder)

    os.kill(process.pid, sign)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [" ".join(member.cmdline()) for member in alive] == []
    deadline = time.monotonic() + 10
    while folder.exists():
        assert time.monotonic() < deadline, f"{folder} is left behind"
        time.sleep(0.05)


def test_a_reader_of_a_log_is_not_a_writer(tmp_path):
    (tmp_path / "log").write_text("")
    with (tmp_path / "log").open():
        assert os.getpid() not in writers(tmp_path)
        with (tmp_path / "log").open("a"):
            assert os.getpid() in writers(tmp_path)
