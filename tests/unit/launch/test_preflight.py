"""The judge on invented facts, and the probe on real ports, folders and file systems."""

import dataclasses
import socket
import subprocess
from pathlib import Path

import pytest

from npr_megatron.config.loader import load_run
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.run import RunConfig
from npr_megatron.errors import ConfigError
from npr_megatron.launch.preflight import check_environment, require_environment
from npr_megatron.launch.probe import Facts, Folder, gather_facts
from npr_megatron.launch.ray_cluster import OBJECT_STORE_BYTES
from npr_megatron.runtime.fused_kernels import NOT_INSTALLED

QUICKSTART = Path(__file__).parents[3] / "examples/quickstart/run.toml"
GIB = 2**30
FINE = Facts(
    arena=Folder("/shm", free_bytes=GIB, device=1),
    object_store=Folder("/shm", free_bytes=GIB, device=1),
    output=Folder("/runs", free_bytes=GIB, device=2),
)


def run_with(*overrides: str) -> RunConfig:
    return load_run(QUICKSTART, overrides)


def model_of(run: RunConfig) -> ModelConfig:
    assert run.model.architecture is not None
    return run.model.architecture


def problems_of(facts: Facts, *overrides: str) -> list[str]:
    run = run_with(*overrides)
    return check_environment(run, model_of(run), facts)


def num_parameters(model: ModelConfig) -> int:
    """Parameters of a tied Qwen3, written out."""
    heads, kv_heads, dim = (
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
    )
    hidden, inner = model.hidden_size, model.intermediate_size
    attention = 2 * hidden * heads * dim + 2 * hidden * kv_heads * dim + 2 * dim
    layer = attention + 3 * hidden * inner + 2 * hidden
    return model.vocab_size * hidden + model.num_hidden_layers * layer + hidden


def test_a_machine_with_everything_has_no_problem():
    assert problems_of(FINE) == []


def test_all_problems_are_reported_at_once():
    facts = Facts(
        port_problem="EADDRINUSE Address already in use",
        arena=Folder("/nowhere", problem="no such folder"),
        object_store=Folder("/shm", free_bytes=OBJECT_STORE_BYTES - 1, device=1),
        output=Folder("/locked", problem="not writable"),
        gpus=("H100",),
    )
    problems = problems_of(facts, "cluster.ray_port=6379", "cluster.gpus_per_trainer=1")
    assert len(problems) == 5
    for problem, words in zip(
        problems, ("ray_port = 6379", "/locked", "/nowhere", "/shm needs", "GPUs"), strict=True
    ):
        assert words in problem


def test_the_room_asked_for_is_two_versions_of_every_shard_and_the_object_store():
    run = run_with("parallel.tp_size=1", "parallel.pp_size=1", "parallel.dp_size=2")
    payload = 2 * 2 * 4 * num_parameters(model_of(run))  # replicas, versions, bytes
    overhead = 2 * 2 * 64 * 1024  # headers and alignment stay below this

    def problems(free_bytes: int) -> list[str]:
        folder = Folder("/shm", free_bytes=free_bytes, device=1)
        facts = dataclasses.replace(FINE, arena=folder, object_store=folder)
        return check_environment(run, model_of(run), facts)

    assert problems(OBJECT_STORE_BYTES + payload + overhead) == []
    (problem,) = problems(OBJECT_STORE_BYTES + payload - 1)
    assert "weights on their way to the engines and Ray's object store" in problem


def test_folders_on_different_file_systems_need_only_their_own_room():
    facts = dataclasses.replace(
        FINE, object_store=Folder("/shm", free_bytes=OBJECT_STORE_BYTES, device=3)
    )
    assert problems_of(facts) == []


def test_a_joined_cluster_is_not_asked_for_an_object_store():
    facts = dataclasses.replace(FINE, object_store=Folder("/shm", free_bytes=0, device=3))
    assert problems_of(facts, "cluster.ray_address=auto") == []
    assert len(problems_of(facts)) == 1


@pytest.mark.parametrize(("num_gpus", "num_problems"), [(2, 1), (3, 0)])
def test_gpus_are_counted_over_all_processes(num_gpus, num_problems):
    facts = dataclasses.replace(FINE, gpus=("H100",) * num_gpus)
    found = problems_of(
        facts,
        "parallel.tp_size=1",
        "parallel.pp_size=2",
        "parallel.dp_size=1",
        "fleet.num_replicas=2",
        "cluster.gpus_per_trainer=1",
        "cluster.gpus_per_replica=0.5",
    )
    assert len(found) == num_problems


def test_a_missing_driver_is_a_problem_only_when_gpus_are_asked_for():
    facts = dataclasses.replace(FINE, gpus=(), gpu_problem="the NVIDIA driver does not answer")
    (problem,) = problems_of(facts, "cluster.gpus_per_trainer=1")
    assert "the NVIDIA driver does not answer" in problem
    assert gather_facts(run_with()).gpus is None


def test_an_occupied_port_is_found_and_a_free_one_is_not(tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        run = run_with(f"cluster.ray_port={port}", f"run.output_dir={tmp_path}")
        with pytest.raises(ConfigError, match=f"ray_port = {port}.*EADDRINUSE"):
            require_environment(run, model_of(run))
    assert gather_facts(run).port_problem == ""


def test_a_file_in_the_place_of_the_output_folder_is_found(tmp_path):
    (tmp_path / "taken").write_text("")
    facts = gather_facts(run_with(f"run.output_dir={tmp_path / 'taken' / 'runs'}"))
    assert facts.output.problem == "no such folder"
    fine = gather_facts(run_with(f"run.output_dir={tmp_path / 'new' / 'runs'}"))
    assert fine.output.problem == ""


def test_a_full_memory_file_system_is_found(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        run = run_with(f"cluster.arena_dir={tmp_path}")
        with pytest.raises(ConfigError, match=f"{tmp_path} needs 1.. MiB .* 0.1 MiB are free"):
            require_environment(run, model_of(run))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


FP8 = ("trainer.fp8=mxfp8", "trainer.dtype=bf16", "cluster.gpus_per_trainer=1")


def test_fp8_is_refused_before_anything_starts_where_a_gpu_lacks_it():
    ask = dataclasses.replace(FINE, gpus=("B200", "H100"), gpu_capabilities=((10, 0), (9, 0)))
    (problem,) = problems_of(ask, *FP8)
    assert 'trainer.fp8 = "mxfp8" was asked for, which needs a GPU of compute capability' in problem
    assert problems_of(dataclasses.replace(ask, gpu_capabilities=((10, 0),)), *FP8) == []


def test_fp8_is_refused_before_anything_starts_without_transformer_engine():
    run = run_with(*FP8)
    facts = gather_facts(run)
    assert facts.without_transformer_engine == NOT_INSTALLED
    assert gather_facts(run_with()).without_transformer_engine == ""
    found = dataclasses.replace(
        FINE,
        gpus=("B200", "B200"),
        gpu_capabilities=((10, 0), (10, 0)),
        without_transformer_engine=facts.without_transformer_engine,
    )
    (problem,) = problems_of(found, *FP8)
    assert "TransformerEngine is not installed; install it (bash tools/setup_te)" in problem
