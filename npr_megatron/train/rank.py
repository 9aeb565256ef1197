"""TrainerRank: everything one rank of the trainer can do, whoever started its process.

The same object runs under torchrun, srun, a Ray actor or a test's fork. All ranks make the same
calls in the same order with equal arguments; nearly every method is collective. Methods are
called one after another, from any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from npr_megatron.config.checkpoint import CheckpointKeeping
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import (
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainerConfig,
)
from npr_megatron.errors import DivergenceError
from npr_megatron.model.build import build_stage
from npr_megatron.model.live_layout import check_live_layout, live_layout
from npr_megatron.model.quantised_weights import (
    finish_gather,
    fp32_weights_kept,
    readable,
    write_quantised,
)
from npr_megatron.model.storages import stage_parameters, stage_storages
from npr_megatron.records.sample import FloatArray, PackedBatch
from npr_megatron.runtime import process_group
from npr_megatron.runtime.device import current_device, device_scope
from npr_megatron.runtime.fused_kernels import report_kernels, require_fp8
from npr_megatron.runtime.process_group import RankInfo
from npr_megatron.train.checkpoint import Checkpoints
from npr_megatron.train.checkpoint_manifest import Origin
from npr_megatron.train.checkpoint_state import TrainerState
from npr_megatron.train.export import export_hf
from npr_megatron.train.guard import Guard
from npr_megatron.train.optimizer import (
    build_optimizer,
    gradient_norm,
    require_optimizer,
    take_step,
)
from npr_megatron.train.passes import Sums, add_up, backward_losses, forward_logprobs
from npr_megatron.train.schedule import learning_rate
from npr_megatron.train.second_look import second_look
from npr_megatron.train.step import StepBatch, StepResult, check_microbatches
from npr_megatron.weights.checkpoints.hf import read_hf
from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.publication import RankPublication
from npr_megatron.weights.storages import DTYPES, load_tiles

if TYPE_CHECKING:
    # Not at run time: ``npr_megatron.model`` must be first to import anything of Megatron.
    from megatron.core.optimizer import MegatronOptimizer

_GUARD = "guard"
"""Where a checkpoint's progress keeps what ``train.guard`` remembers."""


class TrainerRank:
    """One rank: its stage and shards of the model, its share of the optimizer.

    A life: construct, ``load_hf``, then per training stage ``begin_stage`` and many ``train_step``,
    with ``publish``, ``save`` and ``export_hf`` in between; ``close`` at the end.
    """

    def __init__(
        self,
        info: RankInfo,
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        trainer: TrainerConfig,
        run_id: str,
        arena_dir: str,
        engine_dtype: Literal["fp32", "bf16"] | None = None,
        keeping: CheckpointKeeping | None = None,
    ) -> None:
        """Join the world (blocks until all ranks have) and build this rank's stage, weights unset.

        Args:
            info: this process's place and the rendezvous.
            model: architecture.
            parallel: layout; tp * cp * dp * pp ranks.
            trainer: numerics and limits.
            run_id: names this run's arenas; no two living runs of a node share it.
            arena_dir: memory-backed folder that :meth:`publish` writes to.
            engine_dtype: what :meth:`publish` casts to; the trainer's own if None.
            keeping: how :meth:`save` writes and how much it keeps; the defaults if None.

        Raises:
            ConfigError: the number of ranks is not what ``parallel`` asks for.
            EnvironmentFault: FP8 was asked for and this machine cannot train in it, or Muon and
                its package is not there.
            LayoutError: the model cannot be laid out as ``parallel`` asks, or what Megatron built
                is not what ``weights.layouts`` plans with; lists every difference.
        """
        self._model, self._parallel, self._trainer = model, parallel, trainer
        self._run_id, self._arena_dir = run_id, arena_dir
        self._dtype = DTYPES[trainer.dtype]
        self._engine_dtype = DTYPES[engine_dtype or trainer.dtype]
        self._layout = trainer_layout(model, parallel)
        self._own_layout = self._layout.ranks[info.rank]
        require_fp8(trainer.fp8)
        require_optimizer(trainer)
        with device_scope():
            self._place = process_group.start(info, parallel)
            self._stage = build_stage(model, parallel, trainer, self._place)
            self._cpu_world = process_group.cpu_world()
        if info.rank == 0:
            report_kernels()
        self._checkpoints = Checkpoints(keeping or CheckpointKeeping(), parallel)
        check_live_layout(live_layout(self._stage.chunks, model), self._own_layout)
        self._storages = stage_storages(self._stage.chunks)
        self._parameters = stage_parameters(self._stage.chunks)
        self._publisher: Publisher | None = None
        self._optimizer: MegatronOptimizer | None = None
        self._optimizer_config: OptimizerConfig | None = None
        self._num_steps = 0
        self._step = 0
        self._guard = Guard(limits=trainer)
        self._is_whole = True
        """Whether every rank holds the weights of the last step, not its own shard of them only."""

    @property
    def storages(self) -> dict[str, torch.Tensor]:
        """This rank's live weights, as ``weights.layouts.trainer_layout`` names and shapes them.

        Copies where weights are kept in FP8 (``TrainerConfig.fp8_params``). After a step under
        ``ParallelConfig.overlap_data_parallel`` they are those of the last step once
        :meth:`gather_weights` has run.
        """
        return readable(self._storages, self._parameters)

    def load_hf(self, path: str | Path) -> None:
        """Replace the weights by those of an HF folder; ends the training stage, if one had begun.

        Every rank reads its own shards only.

        Raises:
            InputError: the folder does not hold this architecture.
        """
        checkpoint = read_hf(path, self._model)
        weights = self.storages
        load_tiles(self._own_layout, checkpoint.read, weights)
        write_quantised(self._parameters, weights)
        self._is_whole = True
        self._optimizer = self._optimizer_config = None

    def begin_stage(self, optimizer: OptimizerConfig, num_steps: int) -> None:
        """Start a training stage of ``num_steps`` from the present weights, without momentum."""
        with device_scope(), fp32_weights_kept(self._parameters.values()):
            self._optimizer = build_optimizer(optimizer, self._stage.wrapped, self._trainer)
        self._optimizer_config, self._num_steps, self._step = optimizer, num_steps, 0
        self._guard = Guard(limits=self._trainer)

    def train_step(self, batch: StepBatch) -> StepResult:
        """Take one optimizer step on ``batch``, or skip it; the result is equal on every rank.

        A step whose numbers are wrong is skipped a few times, see ``train.guard``; the weights and
        the optimizer are then as before and the result says what was wrong.

        Raises:
            InputError: the microbatches differ in shape or do not divide over the ranks.
            DivergenceError: it is no longer skipped, or the trainer's log-probs left the engine's
                by more than ``TrainerConfig.max_logprob_gap``. The weights are as before.
        """
        optimizer, config = self._begun()
        self._checkpoints.look()
        rate = learning_rate(config, self._step, self._num_steps)
        share = batch.share(self._place.dp_rank, self._parallel)
        if batch.num_loss_tokens == 0:
            return _result(batch, Sums.nothing(), grad_norm=0.0, learning_rate=rate)
        with device_scope():
            for chunk in self._stage.wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            own = backward_losses(self._stage, share, batch.loss)
            sums = add_up(own, counts=self._place.reports)
            grad_norm = self._grad_norm(optimizer, sums)
            fault = self._guard.fault_of(sums.loss, grad_norm)
            if fault:
                fault = self._refuse(fault, share, batch.loss, grad_norm)
            else:
                take_step(optimizer, rate, grad_norm)
                self._guard = self._guard.after_step(grad_norm)
                self._is_whole = not self._parallel.overlap_data_parallel
        self._step += 1
        return _result(batch, sums, grad_norm=grad_norm, learning_rate=rate, fault=fault)

    def score(self, batch: StepBatch) -> list[FloatArray]:
        """Return the log-probs [B, S] of the labels of every microbatch, on every rank.

        Raises:
            InputError: as :meth:`train_step`.
        """
        parallel = self._parallel
        shape = check_microbatches(batch.microbatches, parallel)
        share = batch.share(self._place.dp_rank, parallel)
        logprobs_MBS = torch.zeros(len(batch.microbatches), *shape, device=current_device())
        with device_scope():
            own = forward_logprobs(self._stage, share)
            if self._place.reports:
                columns = self._stage.own_columns(shape[1])
                logprobs_MBS[self._place.dp_rank :: parallel.dp_size, :, columns] = torch.stack(own)
            dist.all_reduce(logprobs_MBS)
        return list(logprobs_MBS.cpu().numpy())

    def gather_weights(self) -> None:
        """Complete the weights of the last step on every rank, where that was left to the forward.

        Collective. :meth:`publish`, :meth:`save` and :meth:`export_hf` call it themselves.
        """
        if self._is_whole:
            return
        with device_scope():
            for chunk in self._stage.wrapped:
                chunk.start_param_sync(force_sync=True)
            finish_gather(self._parameters.values())
        self._is_whole = True

    def save(self, path: str | Path, progress: dict[str, Any]) -> None:
        """Begin to write weights, optimizer and step as a checkpoint in the folder ``path``.

        Training may go on when it returns. It counts when all of it is on disk; :meth:`export_hf`,
        :meth:`load`, :meth:`close` and the next save wait for that. What cannot be written is told
        as a warning, the checkpoint before stays and training goes on.

        ``progress`` (JSON values) is the caller's and comes back from :meth:`load`; the word
        "guard" in it is taken.
        """
        optimizer, _ = self._begun()
        self.gather_weights()
        progress = {**progress, _GUARD: self._guard.remembered()}
        with device_scope():
            self._checkpoints.save(Path(path), self._step, self._state(optimizer), progress)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Continue the stage begun with ``begin_stage`` from the latest checkpoint in ``path``.

        One whose files are damaged is passed over for the one before, with a warning.

        Raises:
            InputError: there is none, none is whole, or it is of another model or optimizer.
        """
        optimizer, _ = self._begun()
        with device_scope():
            self._step, progress = self._checkpoints.load(Path(path), self._state(optimizer))
        self._guard = Guard.restored(self._trainer, progress.pop(_GUARD, None))
        self._is_whole = True
        return progress

    def publish(self, version: int) -> RankPublication:
        """Copy this rank's weights to its shared-memory arena as ``version``.

        Collective under ``ParallelConfig.overlap_data_parallel``, not otherwise. Training may go
        on when it returns. The first call reserves memory for two versions.

        Raises:
            EnvironmentFault: no room in the arena's folder.
            StaleWeightsError: ``version`` is not above the last one.
        """
        self.gather_weights()
        if self._publisher is None:
            self._publisher = Publisher(
                self._layout,
                self._place.rank,
                self._engine_dtype,
                run_id=self._run_id,
                arena_dir=self._arena_dir,
            )
        return self._publisher.publish(version, self.storages)

    def export_hf(self, path: str | Path, source_folder: str | Path | None = None) -> None:
        """Write the whole model as an HF folder; it is complete when this returns.

        Args:
            path: replaced if it exists; must be reachable from rank 0.
            source_folder: tokenizer files and special token ids are copied from there.
        """
        self.gather_weights()
        self._checkpoints.finish()
        with device_scope():
            export_hf(
                path,
                self._model,
                self._layout,
                self.storages,
                self._cpu_world,
                source_folder=source_folder,
            )

    def close(self) -> None:
        """Finish the save under way, leave the world and delete the arena.

        The object is of no use afterwards.
        """
        self._checkpoints.finish()
        if self._publisher is not None:
            self._publisher.close()
        process_group.stop()

    def _state(self, optimizer: MegatronOptimizer) -> TrainerState:
        origin = Origin(
            model=self._model,
            dtype=self._trainer.dtype,
            optimizer=self._trainer.optimizer,
        )
        return TrainerState(chunks=self._stage.chunks, optimizer=optimizer, origin=origin)

    def _begun(self) -> tuple[MegatronOptimizer, OptimizerConfig]:
        assert self._optimizer is not None and self._optimizer_config is not None, (
            "begin_stage comes before train_step, save and load"
        )
        return self._optimizer, self._optimizer_config

    def _grad_norm(self, optimizer: MegatronOptimizer, sums: Sums) -> float:
        """Return the norm of the gradient; NaN where the loss already is no number.

        Raises:
            DivergenceError: trainer and engine disagree.
        """
        if not math.isfinite(sums.loss):
            return math.nan
        limit = self._trainer.max_logprob_gap
        if not sums.max_logprob_gap <= limit:
            raise DivergenceError(
                f"step {self._step}: trainer and engine must agree on log-probs within {limit}, "
                f"found {sums.max_logprob_gap:.3g}; the weights were not changed: check that the "
                "rollouts are of the current version, or raise trainer.max_logprob_gap"
            )
        return gradient_norm(optimizer)

    def _refuse(
        self, fault: str, share: Sequence[PackedBatch], loss: LossConfig, grad_norm: float
    ) -> str:
        """Skip a step; return what was wrong with it and where that began.

        Raises:
            DivergenceError: it is not to be skipped.
        """
        if not math.isfinite(grad_norm):
            stage, place = self._stage, self._place
            where = second_look(stage, share, loss, place, self._parallel, self._cpu_world)
            fault = f"{fault}; {where}"
        if self._guard.is_at_end:
            raise DivergenceError(
                f"step {self._step}: {fault}; {self._guard.why_it_ends}; the weights were not "
                "changed: resume from the last checkpoint with a lower learning rate, or inspect "
                "this batch"
            )
        self._guard = self._guard.after_skip()
        return fault


def _result(
    batch: StepBatch,
    sums: Sums,
    *,
    grad_norm: float,
    learning_rate: float,
    fault: str = "",
) -> StepResult:
    num_loss_tokens = batch.num_loss_tokens
    per_token = 1.0 / max(num_loss_tokens, 1)
    return StepResult(
        loss=sums.loss * per_token,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_loss_tokens=num_loss_tokens,
        num_tokens=batch.num_tokens,
        max_logprob_gap=sums.max_logprob_gap,
        mean_logprob_gap=sums.logprob_gap * per_token,
        mean_policy_logprob=sums.policy_logprob * per_token,
        mean_entropy=sums.entropy * per_token,
        skipped=bool(fault) or num_loss_tokens == 0,
        fault=fault,
    )
