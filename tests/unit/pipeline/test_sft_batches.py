"""Which rows each step of ``npr sft`` takes, what it costs, and whom a NaN is blamed on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from npr_megatron.config.loader import load_as
from npr_megatron.config.sft import SftConfig
from npr_megatron.data.preparing import SampleLimits, prepare
from npr_megatron.data.rows import MAX_LISTED
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.errors import DivergenceError
from npr_megatron.pipeline.sft_batches import SftBatches, blame
from npr_megatron.planning.flops import training_flops
from tests.unit.config.test_check_sft import GOOD

NUM_ROWS = 300


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of samples of many lengths, their configuration, and its tokenizer."""
    folder = tmp_path_factory.mktemp("batches")
    build_sums_tokenizer(folder / "tokenizer")
    lines = [
        {"prompt": "a" * (1 + i % 90), "response": "b" * (i // 90 + 1)} for i in range(NUM_ROWS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.toml").write_text(GOOD)
    config = load_as(
        SftConfig,
        folder / "run.toml",
        [
            f"data.train=['{folder / 'train.jsonl'}']",
            "data.validation_frac=0.1",
            "sft.rows_per_step=4",
            "sft.num_epochs=2",
            "trainer.rows_per_microbatch=2",
        ],
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    limits = SampleLimits(max_tokens=256, max_positions=4096)
    data = prepare(
        config.data, tokenizer, folder / "tokenizer", folder / "data", limits, seed=config.run.seed
    )
    return config, data, tokenizer


def learnt(batches, step):
    """Return every sample of a step, as text of ids."""
    return [
        batch.token_ids[row][batch.segment[row] == segment].tobytes()
        for batch in batches.microbatches(step)
        for row in range(batch.shape[0])
        for segment in range(int(batch.segment[row].max()) + 1)
    ]


def test_a_run_of_epochs_learns_every_sample_so_often_and_no_more(prepared):
    config, data, _ = prepared
    batches = SftBatches(config, data)
    taken = [sample for step in range(1, batches.num_steps + 1) for sample in learnt(batches, step)]
    expected = [data.train.sample(i).token_ids.tobytes() for i in range(data.train.num_samples)]
    assert sorted(taken) == sorted(expected * 2)
    assert batches.epochs_done(batches.num_steps) == 2.0
    assert 0 < batches.epochs_done(1) < 0.2


def test_a_run_of_steps_takes_full_steps_as_long_as_it_is_asked_to(prepared):
    config, data, _ = prepared
    sft = config.sft.model_copy(update={"num_epochs": None, "num_steps": 50})
    batches = SftBatches(config.model_copy(update={"sft": sft}), data)
    assert batches.num_steps == 50
    assert batches.microbatches(49)[0].shape[0] == 2
    assert batches.epochs_done(50) > 2


def test_a_step_costs_what_its_samples_do(prepared):
    config, data, _ = prepared
    batches, model = SftBatches(config, data), config.model.architecture
    lengths = [len(sample) // 4 for sample in learnt(batches, 3)]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    assert batches.flops(3, model) == training_flops(model, sum(lengths), pairs)


def test_shown_rows_are_those_of_the_first_step(prepared):
    config, data, tokenizer = prepared
    batches = SftBatches(config, data)
    shown = batches.shown_rows(4, tokenizer)
    ids = [
        np.array([token.token_id for token in sample.tokens], dtype=np.int32).tobytes()
        for row in shown
        for sample in row
    ]
    assert sorted(ids) == sorted(learnt(batches, 1))


def scorer(logprob_of):
    """A stand-in for a model on ranks: log-probs by a function of the batch."""
    return SimpleNamespace(score=lambda batch: [logprob_of(b) for b in batch.microbatches])


def test_validation_loss_is_the_mean_over_all_held_out_responses(prepared):
    config, data, _ = prepared
    learner = scorer(lambda batch: np.where(batch.labels >= 0, -batch.labels / 8, 0.0))
    store = data.validation
    labels = [
        sample.token_ids[sample.loss_mask] for sample in map(store.sample, range(store.num_samples))
    ]
    expected = np.concatenate(labels).mean() / 8
    assert SftBatches(config, data).validation_loss(learner) == pytest.approx(expected)


def test_a_nan_that_spreads_over_its_row_is_blamed_on_the_one_sample_it_comes_from(prepared):
    config, data, _ = prepared
    store = data.validation
    culprit = int(store.lengths.argmax())
    ids = store.sample(culprit).token_ids

    def spoilt(batch):
        logprobs = np.zeros(batch.shape)
        for row in range(batch.shape[0]):
            if ids.tobytes() in batch.token_ids[row].tobytes():
                logprobs[row] = np.nan
        return logprobs

    with pytest.raises(DivergenceError) as error:
        SftBatches(config, data).validation_loss(scorer(spoilt))
    assert f"not finite: {store.places[culprit]};" in str(error.value)


def test_weights_and_gradients_are_blamed_where_no_row_stands_out():
    assert "so the weights are to blame" in blame(["f:1", "f:2"], 2)
    assert "so the gradient overflowed" in blame([], 2)
    many = blame([f"f:{i}" for i in range(MAX_LISTED + 5)], 100)
    assert "f:0, f:1" in many
    assert "and 5 more;" in many
