"""``npr sft`` from files to a model: on one rank and on two, resumed, launched, and refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from npr_megatron.cli.sft import load_checked_sft
from npr_megatron.config.loader import load_as
from npr_megatron.config.model import InitConfig
from npr_megatron.config.sft import SftConfig
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.errors import ConfigError, InputError, NprError
from npr_megatron.launch.environment import LaunchedRank
from npr_megatron.observability.metrics import read_metrics
from npr_megatron.report.live import LiveView
from npr_megatron.weights.checkpoints.hf import random_init, write_hf
from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/sft/run.toml"
BIN = Path(sys.executable).parent
NUM_STEPS, SAVED_AT, STOPPED_AT = 8, 4, 6
SMALL = (
    f"sft.num_steps={NUM_STEPS}",
    f"sft.checkpoint_every_steps={SAVED_AT}",
    "sft.validate_every_steps=4",
    "sft.show_rows=1",
    "sft.optimizer.warmup_steps=2",
    "model.architecture.num_hidden_layers=2",
    f"data.train=['{ROOT / 'examples/sft/train.jsonl'}']",
)
FOUR_STAGES = ("parallel.pp_size=2", "parallel.vpp_size=2", "parallel.pipeline_layout='E|t|t|L'")


class Stopped(Exception):
    """What a Ctrl-C does, without a signal."""


class StoppingView(LiveView):
    """A view that ends the run behind a step."""

    def __init__(self, stop_at: int | None) -> None:
        super().__init__(Console(file=io.StringIO(), quiet=True))
        self._stop_at = stop_at

    def advance(self, step, values):
        super().advance(step, values)
        if step == self._stop_at:
            raise Stopped


def write_run_file(output: Path) -> Path:
    """Write the example, smaller by ``SMALL``; it counts steps instead of epochs."""
    output.mkdir(exist_ok=True)
    run_file = output / "run.toml"
    run_file.write_text(EXAMPLE.read_text().replace("num_epochs", "# num_epochs"))
    return run_file


def train(rank, world_size, init_method, run_file, changes, stop_at):
    """Run on one rank of a fork; return what ended the run before its end, if anything did."""
    from npr_megatron.pipeline.sft_run import SftRun

    config, model = load_checked_sft(run_file, changes)
    place = LaunchedRank(rank=rank, world_size=world_size, address=init_method)
    try:
        SftRun(config, model, place, StoppingView(stop_at)).run(fresh=False)
    except (Stopped, NprError) as error:
        return error
    return None


def trained(tmp_path, name, *more, ranks=1, stop_at=None):
    """Run and return the run folder."""
    output = tmp_path / name
    changes = [f"run.output_dir={output}", *SMALL, *more]
    ends = run_ranks(train, ranks, tmp_path, write_run_file(output), changes, stop_at)
    assert {type(end) for end in ends} == {Stopped if stop_at else type(None)}, ends
    return output / "sft-seed0"


def refused(tmp_path, name, *more, ranks=1):
    """Run and return the error of each rank."""
    output = tmp_path / name
    changes = [f"run.output_dir={output}", *SMALL, *more]
    return run_ranks(train, ranks, tmp_path, write_run_file(output), changes, None)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "hf" / "model.safetensors")


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Return everything measured but speeds, by step."""
    lines = read_metrics(folder / "metrics.jsonl")
    speeds = {"train/tokens_per_s", "step/s", "train/mfu_frac"}
    return {
        line.step: {n: value for n, value in line.values.items() if n not in speeds}
        for line in lines
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run on one rank that nothing stopped."""
    return trained(tmp_path_factory.mktemp("sft"), "unbroken", "sft.peak_tflops=1")


def test_a_run_learns_measures_shows_and_leaves_a_model(unbroken):
    steps = logged(unbroken)
    assert sorted(steps) == [*range(NUM_STEPS + 1)]
    assert [step for step in steps if "validation/loss" in steps[step]] == [0, 4, 8]
    assert steps[8]["validation/loss"] < steps[0]["validation/loss"] - 1
    assert steps[8]["train/loss"] < steps[1]["train/loss"] - 1
    speeds = read_metrics(unbroken / "metrics.jsonl")[-1].values
    assert 0 < speeds["train/mfu_frac"] < 1
    assert speeds["train/tokens_per_s"] > 0
    assert "learnt" in (unbroken / "first-rows.html").read_text()
    assert not (unbroken / "checkpoints").exists()
    assert load_tokenizer(unbroken / "hf").num_tokens == 56


def assert_same_run(found: Path, expected: Path, tolerance: float) -> None:
    assert logged(found).keys() == logged(expected).keys()
    for step, values in logged(expected).items():
        assert logged(found)[step] == pytest.approx(values, rel=tolerance, abs=0), step
    for name, tensor in weights(expected).items():
        np.testing.assert_allclose(
            weights(found)[name], tensor, err_msg=name, rtol=0, atol=tolerance
        )


def test_a_stopped_run_goes_on_bit_by_bit_but_never_with_other_data_or_as_another_model(
    unbroken, tmp_path
):
    data = tmp_path / "train.jsonl"
    own = f"data.train=['{data}']"
    text = (ROOT / "examples/sft/train.jsonl").read_text()
    data.write_text(text)
    folder = trained(tmp_path, "stopped", own, stop_at=STOPPED_AT)
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{SAVED_AT:08d}"
    assert not (folder / "hf").exists()

    data.write_text(text.partition("\n")[2])
    (error,) = refused(tmp_path, "stopped", own)
    assert isinstance(error, InputError)
    assert "step-00000004 was to be continued and is not of this run: data is of" in str(error)

    data.write_text(text)
    shutil.copytree(folder / "checkpoints", tmp_path / "other" / "sft-seed0" / "checkpoints")
    (error,) = refused(tmp_path, "other", own, "model.architecture.intermediate_size=96")
    assert isinstance(error, InputError)
    assert "is not of this run: intermediate_size is 160 there, 96 here (" in str(error)

    trained(tmp_path, "stopped", own)
    assert_same_run(folder, unbroken, 0)


def test_two_ranks_share_the_work_and_go_on_in_another_layout(unbroken, tmp_path):
    folder = trained(tmp_path, "moved", "parallel.dp_size=2", ranks=2, stop_at=STOPPED_AT)
    trained(tmp_path, "moved", "parallel.cp_size=2", ranks=2)
    assert_same_run(folder, unbroken, 1e-4)


def test_torchrun_starts_the_same_run_through_four_stages_on_two_ranks(unbroken, tmp_path):
    run_file = write_run_file(tmp_path / "launched")
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [BIN / "npr", "sft", run_file, f"run.output_dir={tmp_path}", *SMALL]
    ended = subprocess.run(
        [*command, *FOUR_STAGES, "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["model"] == str(tmp_path / "sft-seed0" / "hf")
    assert ended.stderr.count("samples are held out") == 1
    assert "Warning" not in ended.stderr
    assert_same_run(tmp_path / "sft-seed0", unbroken, 1e-4)


def test_bad_rows_end_every_rank_and_only_one_tells(tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a:1+2?"}\n{"prompt": "a:1+2?", "response": "<step>"}\n')
    told, silent = refused(tmp_path, "bad", f"data.train=['{data}']", "parallel.dp_size=2", ranks=2)
    assert isinstance(told, ConfigError)
    assert told.problems[0] == f"{data}:1: response is missing; it must be text"
    assert told.problems[1].startswith(f"{data}:2: response: ")
    assert type(silent).__name__ == "ToldElsewhere"


def blind_model(tmp_path) -> Path:
    """Write a model that has no number for the letter z."""
    model = load_as(SftConfig, write_run_file(tmp_path), ["sft.num_steps=1"]).model.architecture
    model = model.model_copy(update={"num_hidden_layers": 2, "tie_word_embeddings": False})
    build_sums_tokenizer(tmp_path / "tokenizer")
    tensors = random_init(model, InitConfig(embedding_std=0.2), seed=1)
    (letter,) = load_tokenizer(tmp_path / "tokenizer").encode("z")
    tensors["model.embed_tokens.weight"][letter] = float("nan")
    write_hf(tmp_path / "model", model, tensors, source_folder=tmp_path / "tokenizer")
    return tmp_path / "model"


def test_a_loss_that_is_no_number_names_the_rows(tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"{name}:1+2?", "response": "3"} for name in "abczde"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = blind_model(tmp_path)
    run_file = write_run_file(tmp_path)
    text = run_file.read_text()
    described = text[text.index("[model.architecture]") : text.index("[data]")]
    run_file.write_text(text.replace(described, f'[model]\npath = "{model}"\n'))
    changes = [change for change in SMALL if not change.startswith(("model.", "data."))]
    changes += [f"run.output_dir={tmp_path}", f"data.train=['{data}']", "data.validation_frac=0"]
    (error,) = run_ranks(train, 1, tmp_path, run_file, changes, None)
    assert "needs a finite loss" in str(error)
    assert f"1 of the 6 samples of the batch have log-probs that are not finite: {data}:4;" in (
        str(error)
    )
