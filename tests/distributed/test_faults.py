"""A step that must not be taken leaves everything as it was; calls may come from any thread."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from npr_megatron.config.training import LossConfig, ParallelConfig, TrainerConfig
from npr_megatron.errors import ConfigError, DivergenceError, LayoutError
from npr_megatron.train.step import StepBatch
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, open_rank
from tests.distributed.samples import packed, step_batches

PP2 = ParallelConfig(pp_size=2)
GOOD, LATER = step_batches("papo", 2)


def refuse_then_step(rank, world_size, init_method, job, bad):
    """Return the refusal of ``bad``, whether weights moved, and the result of a good step after."""
    trainer = open_rank(rank, world_size, init_method, job)
    before = {name: tensor.clone() for name, tensor in trainer.storages.items()}
    message = ""
    try:
        trainer.train_step(bad)
    except DivergenceError as error:
        message = str(error)
    untouched = all(tensor.equal(trainer.storages[name]) for name, tensor in before.items())
    result = trainer.train_step(GOOD)
    trainer.close()
    return message, untouched, result


def with_stream(batch: StepBatch, name: str, value: float) -> StepBatch:
    """Put ``value`` at the first loss token of the last microbatch that has one."""
    microbatches = list(batch.microbatches)
    number = max(i for i, micro in enumerate(microbatches) if micro.num_loss_tokens)
    stream = getattr(microbatches[number], name).copy()
    stream.flat[np.flatnonzero(microbatches[number].labels >= 0)[0]] = value
    microbatches[number] = dataclasses.replace(microbatches[number], **{name: stream})
    return dataclasses.replace(batch, microbatches=tuple(microbatches))


@pytest.mark.parametrize(
    ("stream", "value", "limit", "complaint"),
    [
        ("advantages", np.inf, 100.0, "finite loss"),
        ("advantages", 3e38, 100.0, "finite gradient"),
        ("rollout_logprobs", np.nan, 100.0, "agree on log-probs"),
        ("rollout_logprobs", -60.0, 40.0, "agree on log-probs within 40.0"),
    ],
)
def test_a_diverged_step_is_refused_on_every_rank_and_changes_nothing(
    stream, value, limit, complaint, hf_folder, tmp_path
):
    trainer = TrainerConfig(max_logprob_gap=limit)
    job = Job(hf_folder=hf_folder, parallel=PP2, trainer=trainer)
    bad = with_stream(LATER, stream, value)
    (good,) = {
        result
        for message, untouched, result in run_ranks(refuse_then_step, 2, tmp_path, job, bad)
        if complaint in message and untouched
    }
    assert good.learning_rate == pytest.approx(job.optimizer.learning_rate / 2), "counted as a step"


def skip_then_step(rank, world_size, init_method, job):
    trainer = open_rank(rank, world_size, init_method, job)
    nothing = tuple(
        dataclasses.replace(micro, labels=np.full_like(micro.labels, -1)) for micro in packed(0)
    )
    skipped = trainer.train_step(StepBatch(microbatches=nothing, loss=LossConfig(kind="papo")))
    result = trainer.train_step(GOOD)
    trainer.close()
    return skipped, result


def test_a_batch_without_loss_tokens_is_skipped_and_does_not_count(hf_folder, tmp_path):
    ((skipped, result),) = run_ranks(skip_then_step, 1, tmp_path, Job(hf_folder=hf_folder))
    assert skipped.skipped and skipped.loss == skipped.grad_norm == 0
    assert not result.skipped
    assert result.learning_rate == skipped.learning_rate


def step_from_other_threads(rank, world_size, init_method, job):
    def in_a_new_thread(function, *args):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()

    trainer = in_a_new_thread(open_rank, rank, world_size, init_method, job)
    results = [in_a_new_thread(trainer.train_step, batch) for batch in (GOOD, LATER)]
    trainer.close()
    return results, threading.active_count()


def test_each_call_may_come_from_another_thread(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(tp_size=2))
    (first, _), (second, _) = run_ranks(step_from_other_threads, 2, tmp_path, job)
    assert first == second
    assert first[1].grad_norm > 0


def mlp_is_twice_as_wide() -> None:
    """Megatron is told of another model than the layout declares."""
    from npr_megatron.model import build

    original = build.transformer_config

    def config(*args):
        built = original(*args)
        built.ffn_hidden_size *= 2
        return built

    build.transformer_config = config


def open_with_error(rank, world_size, init_method, job, fault):
    if fault is not None:
        fault()
    try:
        open_rank(rank, world_size, init_method, job).close()
    except (ConfigError, LayoutError) as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    ("parallel", "model", "fault", "error"),
    [
        (
            ParallelConfig(dp_size=2),
            MODEL,
            None,
            ("ConfigError", "needs tp * cp * dp * pp = 2 ranks"),
        ),
        (
            ParallelConfig(),
            MODEL.model_copy(update={"num_key_value_heads": 3}),
            None,
            ("LayoutError", "num_key_value_heads 3"),
        ),
        (
            ParallelConfig(),
            MODEL,
            mlp_is_twice_as_wide,
            ("LayoutError", "linear_fc1.weight: Megatron built weights [192, 32]"),
        ),
    ],
)
def test_a_rank_refuses_an_impossible_layout_and_one_that_its_modules_do_not_have(
    parallel, model, fault, error, hf_folder, tmp_path
):
    job = Job(hf_folder=hf_folder, model=model, parallel=parallel)
    (found,) = run_ranks(open_with_error, 1, tmp_path, job, fault)
    assert found is not None and found[0] == error[0] and error[1] in found[1]
