"""What the loops decide without machines: epochs, versions, the run folder."""

import json
from pathlib import Path

import pytest

from npr_megatron.config.loader import load_run
from npr_megatron.config.stages import STAGES
from npr_megatron.errors import InputError
from npr_megatron.observability.metrics import MetricsLog, read_metrics
from npr_megatron.pipeline.folder import RunFolder
from npr_megatron.pipeline.sft import epoch_indices
from npr_megatron.pipeline.versions import num_steps, weight_version

QUICKSTART = Path(__file__).parents[3] / "examples/quickstart/run.toml"


def test_each_epoch_takes_every_sample_once_across_step_borders():
    taken = [index for step in range(1, 22) for index in epoch_indices(7, 5, step, seed=3)]
    epochs = [taken[start : start + 7] for start in range(0, 105, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10


def test_a_step_larger_than_an_epoch_spans_several():
    assert sorted(epoch_indices(3, 7, 1, seed=0)[:6]) == [0, 0, 1, 1, 2, 2]


def test_batches_depend_on_the_seed():
    assert epoch_indices(50, 8, 1, seed=0) != epoch_indices(50, 8, 1, seed=1)


def test_versions_grow_over_the_whole_run_without_collision():
    config = load_run(QUICKSTART)
    versions = [
        weight_version(config, stage, step)
        for stage in STAGES
        for step in range(num_steps(config, stage) + 1)
    ]
    assert versions == list(range(1, len(versions) + 1))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    config = load_run(QUICKSTART, [f'run.output_dir="{tmp_path}"'])
    folder = RunFolder.of(config)
    folder.open(config, fresh=False)
    return folder


def test_rewind_drops_what_came_after_the_checkpoint_and_a_torn_line(folder):
    log = MetricsLog(folder.metrics)
    log.write("seed", 900, {"train/loss": 1.0})
    for step in (1, 2, 3):
        log.write("zero", step, {"train/loss": float(step)})
    with folder.metrics.open("a") as file:
        file.write('{"stage": "zero", "st')
    folder.rewind("zero", 2)
    kept = [(line.stage, line.step) for line in read_metrics(folder.metrics)]
    assert kept == [("seed", 900), ("zero", 1), ("zero", 2)]


def test_finishing_a_stage_drops_its_checkpoints_and_keeps_the_order(folder):
    (folder.checkpoints("zero") / "step-3").mkdir(parents=True)
    folder.finish("zero")
    folder.finish("seed")
    assert folder.finished() == ("seed", "zero")
    assert not folder.checkpoints("zero").exists()


def test_another_configuration_is_refused_and_named(folder, tmp_path):
    other = load_run(QUICKSTART, [f'run.output_dir="{tmp_path}"', "zero.num_steps=7"])
    with pytest.raises(InputError, match="zero section differs"):
        RunFolder.of(other).open(other, fresh=False)
    fleet = load_run(QUICKSTART, [f'run.output_dir="{tmp_path}"', "fleet.num_replicas=1"])
    RunFolder.of(fleet).open(fleet, fresh=False)  # replicas may change between starts


def test_fresh_discards_an_earlier_run(folder, tmp_path):
    folder.finish("seed")
    other = load_run(QUICKSTART, [f'run.output_dir="{tmp_path}"', "zero.num_steps=7"])
    RunFolder.of(other).open(other, fresh=True)
    assert RunFolder.of(other).finished() == ()
    recorded = json.loads((folder.path / "config.json").read_text())
    assert recorded["zero"]["num_steps"] == 7
