"""Experts and padded vocabularies travel: to other layouts, to engines, and out of the trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, check_weights, train, whole_model
from tests.distributed.models import MOE, with_dense_layers, write_model
from tests.distributed.samples import step_batches

BATCHES = step_batches("sft", 4)
MODELS = {"experts": with_dense_layers(MOE, 1), "padded": MODEL}
ONE = ParallelConfig()
LAYOUTS = {
    "one rank": ONE,
    "ep2": ParallelConfig(dp_size=2, ep_size=2),
    "ep2 tp2": ParallelConfig(tp_size=2, ep_size=2, etp_size=1),
    "ep2 tp2 etp2": ParallelConfig(tp_size=2, dp_size=2, ep_size=2, etp_size=2),
    "pp2": ParallelConfig(pp_size=2),
    "tp2 padded": ParallelConfig(tp_size=2, vocab_divisor=24),
    "pp2 padded more": ParallelConfig(pp_size=2, vocab_divisor=80),
}
PAIRS = [
    ("experts", "ep2", "one rank"),
    ("experts", "one rank", "ep2 tp2"),
    ("experts", "ep2 tp2", "pp2"),
    ("experts", "ep2 tp2 etp2", "ep2"),
    ("padded", "tp2 padded", "one rank"),
    ("padded", "one rank", "tp2 padded"),
    ("padded", "tp2 padded", "pp2 padded more"),
]


def run(tmp_path, model: ModelConfig, parallel: ParallelConfig, **job):
    outcomes = run_ranks(
        train, parallel.world_size, tmp_path, Job(model=model, parallel=parallel, **job)
    )
    weights = whole_model([outcome.storages for outcome in outcomes], model, parallel)
    return outcomes[0], weights


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Starting weights and four steps of one rank, by model; and two steps, by layout."""
    folder = tmp_path_factory.mktemp("begun")
    whole = {}
    for name, model in MODELS.items():
        weights = write_model(folder / name, model)
        whole[name] = run(folder, model, ONE, hf_folder=weights, batches=BATCHES)
    for name, written in {(name, written) for name, written, _ in PAIRS}:
        saved = folder / f"{name} of {written}"
        job = {"hf_folder": folder / name, "batches": BATCHES[:2], "save_to": saved}
        run(folder, MODELS[name], LAYOUTS[written], **job)
    return folder, whole


@pytest.mark.parametrize(("name", "written", "read"), PAIRS)
def test_a_checkpoint_continues_under_another_layout(name, written, read, begun, tmp_path):
    folder, whole = begun
    uninterrupted, expected = whole[name]
    resumed, weights = run(
        tmp_path,
        MODELS[name],
        LAYOUTS[read],
        hf_folder=folder / name,
        load_from=folder / f"{name} of {written}",
        batches=BATCHES[2:],
    )
    assert resumed.progress == {"trained": 2}
    for got, want in zip(resumed.results, uninterrupted.results[2:], strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
        assert got.learning_rate == want.learning_rate
    check_weights(weights, expected)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("experts", LAYOUTS["ep2"]),
        ("experts", LAYOUTS["ep2 tp2"]),
        ("padded", LAYOUTS["tp2 padded"]),
    ],
)
def test_what_was_learnt_is_published_and_exported(name, parallel, begun, tmp_path):
    folder, _ = begun
    model, exported = MODELS[name], tmp_path / "exported"
    job = Job(
        hf_folder=folder / name,
        model=model,
        parallel=parallel,
        batches=BATCHES[:2],
        publish=3,
        export_to=exported,
    )
    outcomes = run_ranks(train, parallel.world_size, tmp_path, job)
    alone, _ = run(tmp_path, model, ONE, hf_folder=folder / name, batches=BATCHES[:2], publish=3)
    learnt = whole_model([outcome.storages for outcome in outcomes], model, parallel)
    written = load_file(exported / "model.safetensors")
    assert written.keys() == learnt.keys()
    assert all(np.array_equal(written[key].numpy(), values) for key, values in learnt.items())

    engine = engine_layout(model).ranks[0]
    expected = empty_storages(engine, torch.float32)
    load_tiles(engine, box_reader(written), expected)
    for outcome in outcomes:
        assert outcome.received.keys() == expected.keys() == alone.received.keys()
        for key, tensor in expected.items():
            np.testing.assert_array_equal(outcome.received[key], tensor.numpy(), err_msg=key)
    check_weights(outcomes[0].received, alone.received)
