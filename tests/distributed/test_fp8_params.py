"""Weights kept in FP8, through Megatron's own buffers, gathers and optimizer, over two replicas.

They start from what was loaded, to the last bit; what is published is what quantising the
optimizer's fp32 weights gives; a new stage goes on from those. Each fault below loses one of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npr_megatron.config.training import ParallelConfig, TrainerConfig
from tests.distributed.block_quantised import BLOCK, BlockQuantised, keep_weights_in_fp8
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, open_rank
from tests.distributed.samples import step_batches

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what stands in for TransformerEngine is on the CPU"
)
TRAINER = TrainerConfig(
    dtype="bf16", fp8="blockwise", fp8_params=True, row_tokens=448, max_logprob_gap=100.0
)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Seen:
    """Of one rank: its weights, and those of the optimizer over all replicas."""

    loaded: Arrays
    loaded_again: Arrays
    """What quantising ``started`` gives."""
    started: Arrays
    """The optimizer's before the first step."""
    trained: Arrays
    """The optimizer's after the last step."""
    published: Arrays
    stored: Arrays
    kept: Arrays
    """The optimizer's when a new stage has begun."""
    quantised: Arrays
    """What quantising ``trained`` gives, of the weights that are kept in FP8."""
    stale: list[str]
    """Weights whose copy for backward is not that of what was gathered."""
    losses: list[float]


def weights_are_not_written() -> None:
    """Slices of a quantised weight are filled, and nothing else."""
    from npr_megatron.train import rank

    rank.write_quantised = lambda parameters, weights: None


def the_optimizer_starts_from_fp8() -> None:
    """The digits that FP8 does not hold are lost when weights are loaded."""
    from npr_megatron.model import quantised_weights

    quantised_weights._start_from = lambda parameter, weights: None


def a_new_stage_starts_from_fp8() -> None:
    """They are lost between two stages."""
    from npr_megatron.train import rank

    @contextmanager
    def not_kept(parameters: Any) -> Iterator[None]:
        yield

    rank.fp32_weights_kept = not_kept


def backward_multiplies_what_was_before() -> None:
    """A gather outside of a forward leaves what is derived from the weights."""
    from npr_megatron.train import rank

    rank.finish_gather = lambda parameters: None


def train(
    rank: int,
    world_size: int,
    init_method: str,
    job: Job,
    block: int,
    changes: tuple[Callable[[], None], ...],
) -> Seen:
    """Change this process, then train; weights are quantised in blocks of ``block`` x ``block``."""
    from megatron.core.fp8_utils import is_float8tensor

    for change in changes:
        change()
    trainer = open_rank(rank, world_size, init_method, job)
    loaded = arrays(trainer.storages)
    started = optimizer_weights(trainer)
    results = [trainer.train_step(batch) for batch in job.batches]
    trained = optimizer_weights(trainer)
    trainer.gather_weights()
    if job.save_to is not None:
        trainer.save(job.save_to, {})
    in_fp8 = [name for name, held in trainer._parameters.items() if is_float8tensor(held)]
    seen = Seen(
        loaded=loaded,
        loaded_again={name: quantised_again(started[name], block) for name in in_fp8},
        started=started,
        trained=trained,
        published=pulled(trainer, world_size, job),
        stored=arrays(trainer.storages),
        kept=kept_by_a_new_stage(trainer, job),
        quantised={name: quantised_again(trained[name], block) for name in in_fp8},
        stale=[name for name in in_fp8 if is_stale(trainer._parameters[name])],
        losses=[result.loss for result in results],
    )
    trainer.close()
    return seen


def is_stale(parameter: Any) -> bool:
    if not isinstance(parameter, BlockQuantised):
        return False  # TransformerEngine's own is not looked into
    return not torch.equal(parameter.transposed, parameter.codes.t())


def resume(
    rank: int,
    world_size: int,
    init_method: str,
    job: Job,
    changes: tuple[Callable[[], None], ...],
) -> tuple[Arrays, Arrays]:
    """Return the weights that a checkpoint gives, and those of the optimizer."""
    for change in changes:
        change()
    trainer = open_rank(rank, world_size, init_method, job)
    trainer.load(job.load_from)
    found = arrays(trainer.storages), optimizer_weights(trainer)
    trainer.close()
    return found


def arrays(storages: dict[str, Any]) -> Arrays:
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in storages.items()}


def quantised_again(weights: np.ndarray, block: int) -> np.ndarray:
    from npr_megatron.weights.quantise import dequantise, quantise

    codes, scales = quantise(torch.from_numpy(weights).bfloat16(), block, "power_of_two")
    return dequantise(codes, scales, block).numpy()


def kept_by_a_new_stage(trainer: Any, job: Job) -> Arrays:
    trainer.begin_stage(job.optimizer, job.num_steps)
    return optimizer_weights(trainer)


def optimizer_weights(trainer: Any) -> Arrays:
    """Return the optimizer's fp32 weights, put together from the shards of the replicas."""
    import torch.distributed as dist

    from npr_megatron.runtime.device import current_device

    found: Arrays = {}
    (optimizer,) = trainer._optimizer.chained_optimizers
    for name, parameter in trainer._parameters.items():
        whole = torch.zeros(parameter.numel(), device=current_device())
        if parameter.__dict__["main_param"] is not None:
            own = optimizer._get_model_param_range_map(parameter)["param"]
            whole[own.start : own.end] = parameter.main_param.detach()
        dist.all_reduce(whole)
        found[name] = whole.view(parameter.shape).cpu().numpy()
    return found


def pulled(trainer: Any, world_size: int, job: Job) -> Arrays:
    """Publish, and pull all of it as a trainer of one rank would hold it."""
    import torch.distributed as dist

    from npr_megatron.weights.executors.shared_memory import Receiver
    from npr_megatron.weights.layouts import trainer_layout
    from npr_megatron.weights.publication import Publication
    from npr_megatron.weights.storages import empty_storages

    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, trainer.publish(1))
    target = trainer_layout(job.model, ParallelConfig())
    staging = empty_storages(target.ranks[0], torch.bfloat16)
    receiver = Receiver(trainer_layout(job.model, job.parallel), target)
    receiver.pull(Publication.assemble(parts), staging)
    receiver.close()
    dist.barrier()
    return arrays(staging)


@pytest.fixture(scope="module")
def run(hf_folder, tmp_path_factory) -> Callable[..., list[Seen]]:
    folder = tmp_path_factory.mktemp("fp8-params")

    def seen(
        parallel: ParallelConfig,
        fault: Callable[[], None] | None = None,
        save_to: Path | None = None,
    ) -> list[Seen]:
        job = Job(
            hf_folder=hf_folder,
            parallel=parallel,
            trainer=TRAINER,
            batches=step_batches("papo", 3),
            save_to=save_to,
        )
        changes = (keep_weights_in_fp8, *([fault] if fault else []))
        return run_ranks(train, parallel.world_size, folder, job, BLOCK, changes)

    return seen


def check(seen: Seen) -> None:
    """Require everything that the module promises."""
    assert len(seen.quantised) == 4 * MODEL.num_hidden_layers
    for name, numbers in seen.quantised.items():
        assert np.array_equal(seen.loaded[name], seen.loaded_again[name]), (
            f"{name} was loaded otherwise"
        )
        digits = np.abs(seen.started[name] - seen.loaded[name]).max()
        assert digits > 0, f"the optimizer starts {name} from FP8"
        assert not np.array_equal(seen.trained[name], seen.started[name])
        assert np.array_equal(seen.published[name], numbers), f"{name} was published otherwise"
        assert np.array_equal(seen.kept[name], seen.trained[name]), f"a new stage lost {name}"
    assert seen.stale == [], "backward multiplies other weights than forward"
    for name, published in seen.published.items():
        assert np.array_equal(seen.stored[name], published)


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_what_is_published_is_what_quantising_the_fp32_weights_gives(is_overlapped, run):
    first, second = run(ParallelConfig(dp_size=2, overlap_data_parallel=is_overlapped))
    check(first)
    for name, stored in first.stored.items():
        assert np.array_equal(stored, second.stored[name]), f"replicas differ in {name}"
    assert np.isfinite(first.losses).all()


def test_a_checkpoint_holds_what_the_weights_mean_for_any_trainer(run, hf_folder, tmp_path):
    saved, _ = run(ParallelConfig(dp_size=2), save_to=tmp_path / "saved")
    plain = TrainerConfig(dtype="bf16", row_tokens=448)
    for num_replicas, trainer, changes in (
        (2, TRAINER, (keep_weights_in_fp8,)),
        (1, TRAINER, (keep_weights_in_fp8,)),
        (1, plain, ()),
    ):
        job = Job(
            hf_folder=hf_folder,
            parallel=ParallelConfig(dp_size=num_replicas),
            trainer=trainer,
            load_from=tmp_path / "saved",
        )
        (weights, in_optimizer), *_ = run_ranks(resume, num_replicas, tmp_path, job, changes)
        for name, stored in saved.stored.items():
            assert np.array_equal(weights[name], stored), f"{name} came back otherwise"
        for name, trained in saved.trained.items():
            assert np.array_equal(in_optimizer[name], trained), f"the optimizer lost {name}"


FAULTS = {
    weights_are_not_written: (False, "starts|loaded otherwise"),
    the_optimizer_starts_from_fp8: (False, "from FP8"),
    a_new_stage_starts_from_fp8: (False, "a new stage lost"),
    backward_multiplies_what_was_before: (True, "backward multiplies"),
}
"""Whether gathers overlap, and what is said."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_shows(fault, run):
    is_overlapped, complaint = FAULTS[fault]
    first, _ = run(ParallelConfig(dp_size=2, overlap_data_parallel=is_overlapped), fault)
    with pytest.raises(AssertionError, match=complaint):
        check(first)


def test_a_rank_that_has_no_fp8_says_so_before_it_joins_the_others(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(dp_size=2), trainer=TRAINER)
    said = 'EnvironmentFault: trainer.fp8 = "blockwise" was asked for and this process sees no NVID'
    with pytest.raises(AssertionError, match=said):
        run_ranks(resume, 1, tmp_path, job, ())  # alone: joining would wait for the other
