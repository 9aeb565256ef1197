"""Bad input and bad machines: one clear message, exit code 2, no trace, nothing left running."""

import json
import signal
import socket
import string
import subprocess
import time

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from npr_megatron.config.loader import load_run
from npr_megatron.weights.checkpoints.hf import hf_config
from tests.end_to_end.runs import (
    GPU_EXAMPLE,
    ON_A_LAPTOP,
    QUICKSTART,
    SMALL,
    Run,
    descendants,
    start,
    survivors,
)

pytestmark = pytest.mark.slow


def refused(run: Run) -> str:
    """Return what a refused run printed."""
    assert run.wait() == 2, run.output()
    output = run.output()
    assert "Traceback" not in output
    assert "error: " in output
    return output


def test_a_bad_configuration_lists_every_problem(tmp_path):
    output = refused(start(tmp_path, "parallel.tp_size=3", "task.min_parts=9", "zero.num_stesp=3"))
    assert "num_stesp" in output and "num_steps" in output  # the nearest name is offered

    output = refused(start(tmp_path, "parallel.tp_size=3", "task.min_parts=9"))
    assert "parallel.tp_size 3" in output and "task.min_parts 9" in output


def test_a_missing_problem_file_is_named(tmp_path):
    output = refused(
        start(
            tmp_path,
            'task={kind="jsonl", train_path="nowhere.jsonl", test_path="nothing.jsonl"}',
            "model.path=no-model",
        )
    )
    assert "nowhere.jsonl" in output and "nothing.jsonl" in output and "no-model" in output


def test_a_tokenizer_without_tags_is_refused_before_anything_starts(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(string.printable)}))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "g"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    architecture = load_run(QUICKSTART).model.architecture
    assert architecture is not None
    (folder / "config.json").write_text(json.dumps(hf_config(architecture)))
    for name in ("train", "test"):
        problem = {"id": name, "question": f"{name}?", "answer": "1"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(problem) + "\n")

    output = refused(
        start(
            tmp_path,
            f"model.path={folder}",
            f"task.train_path={tmp_path / 'train.jsonl'}",
            f"task.test_path={tmp_path / 'test.jsonl'}",
            *ON_A_LAPTOP,
            run_file=GPU_EXAMPLE,
        )
    )
    assert "<guideline>" in output and "</takeaway>" in output
    assert not (tmp_path / "small-seed0").exists()


def test_an_occupied_ray_port_is_named(tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert str(port) in refused(start(tmp_path, f"cluster.ray_port={port}"))


def test_a_full_arena_folder_is_refused(tmp_path):
    arena = tmp_path / "arena"
    arena.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(arena)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        assert str(arena) in refused(start(tmp_path, f"cluster.arena_dir={arena}"))
    finally:
        subprocess.run(["umount", str(arena)], check=True)


def test_ctrl_c_ends_everything_with_one_line(tmp_path):
    run = start(tmp_path, *SMALL)
    run.wait_for_step("seed", 1)
    started = descendants(run.process)
    run.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert run.wait() == 130, run.output()
    assert time.monotonic() - began < 60
    assert "Traceback" not in run.output()
    assert survivors(started) == []
    assert json.loads((run.folder / "config.json").read_text())["run"]["name"] == "small"
