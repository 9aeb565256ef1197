"""Weights enter and leave the trainer unchanged, whatever its layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.storages import box_reader, check_storages, empty_storages, load_tiles
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, train
from tests.distributed.planted import weights_are_read_before_they_are_gathered
from tests.distributed.samples import step_batches

UNTIED = MODEL.model_copy(update={"tie_word_embeddings": False})
LAYOUTS = [
    *(ParallelConfig(tp_size=tp, pp_size=pp) for tp in (1, 2) for pp in (1, 2)),
    ParallelConfig(dp_size=2),
    ParallelConfig(tp_size=2, dp_size=2),
    ParallelConfig(cp_size=2, tp_size=2),
    ParallelConfig(pp_size=2, vpp_size=2),
    ParallelConfig(pp_size=2, vpp_size=2, pipeline_layout="E|ttt|t|L"),
    ParallelConfig(pp_size=3, num_layers_in_first_stage=1, num_layers_in_last_stage=1),
    ParallelConfig(tp_size=2, pp_size=2, vpp_size=2),
]
OVERLAPPED = ParallelConfig(dp_size=2, overlap_data_parallel=True)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loaded_weights_are_exported_and_published_bit_by_bit(
    tied, parallel, hf_folder, untied_hf_folder, tmp_path
):
    folder, model = (hf_folder, MODEL) if tied else (untied_hf_folder, UNTIED)
    exported = tmp_path / "exported"
    job = Job(hf_folder=folder, model=model, parallel=parallel, publish=7, export_to=exported)
    outcomes = run_ranks(train, parallel.world_size, tmp_path, job)

    original = load_file(folder / "model.safetensors")
    written = load_file(exported / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())

    expected = empty_storages(engine_layout(model).ranks[0], torch.float32)
    load_tiles(engine_layout(model).ranks[0], box_reader(original), expected)
    for outcome in outcomes:
        assert outcome.received.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(outcome.received[name], tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_a_layout_that_disagrees_with_megatron_is_refused(parallel, hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=parallel)
    held = run_ranks(train, parallel.world_size, tmp_path, job)
    for rank, outcome in enumerate(held):
        storages = {name: torch.from_numpy(array) for name, array in outcome.storages.items()}
        check_storages(trainer_layout(MODEL, parallel).ranks[rank], storages)
        wider = MODEL.model_copy(update={"intermediate_size": 2 * MODEL.intermediate_size})
        with pytest.raises(LayoutError, match=r"linear_fc1\.weight has shape"):
            check_storages(trainer_layout(wider, parallel).ranks[rank], storages)


def test_training_moves_what_is_published(hf_folder, tmp_path):
    parallel = ParallelConfig(tp_size=2)
    job = Job(hf_folder=hf_folder, parallel=parallel, publish=0)
    before = run_ranks(train, 2, tmp_path, job)[0].received
    job = Job(
        hf_folder=hf_folder,
        parallel=parallel,
        publish=1,
        batches=step_batches("sft", 1),
    )
    after = run_ranks(train, 2, tmp_path, job)[0].received
    assert all(not np.array_equal(before[name], after[name]) for name in before)


def two_steps_then(rank, world_size, init_method, job, fault):
    if fault is not None:
        fault()
    return train(rank, world_size, init_method, job)


def test_what_leaves_an_overlapped_trainer_is_the_last_step(hf_folder, tmp_path):
    def leave(name, parallel, *, publish=1, fault=None):
        job = Job(
            hf_folder=hf_folder,
            parallel=parallel,
            batches=step_batches("sft", 2),
            publish=publish,
            export_to=tmp_path / name,
        )
        ranks = run_ranks(two_steps_then, parallel.world_size, tmp_path, job, fault)
        return ranks[0].received, load_file(tmp_path / name / "model.safetensors")

    received, written = leave("plain", ParallelConfig(dp_size=2))
    also_received, also_written = leave("overlapped", OVERLAPPED)
    assert all(torch.equal(also_written[name], tensor) for name, tensor in written.items())
    for name, tensor in received.items():
        np.testing.assert_array_equal(also_received[name], tensor, err_msg=name)

    fault = weights_are_read_before_they_are_gathered
    _, stale = leave("stale", OVERLAPPED, publish=None, fault=fault)
    assert any(not torch.equal(stale[name], tensor) for name, tensor in written.items())
    with pytest.raises(AssertionError, match="replicas of the weights differ between trainer"):
        leave("refused", OVERLAPPED, fault=fault)
