"""``npr sft``: supervised training on files of one's own, on every rank that a launcher started.

    runs/<name>-seed<seed>/
      config.json          the resolved run
      data/                samples as ids, and skipped.json
      first-rows.html      what is learnt, for eyes
      metrics.jsonl        one line per optimizer step, validation among them
      checkpoints/         while it runs
      hf/                  the model, when it is done

Every rank makes the same calls; rank 0 alone reads data, writes logs and speaks. Ray is not used.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.sft import SftConfig
from npr_megatron.data.preparing import open_prepared
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.errors import ConfigError, InputError
from npr_megatron.launch.environment import LaunchedRank
from npr_megatron.observability.metrics import MetricsLog
from npr_megatron.pipeline.folder import RunFolder
from npr_megatron.pipeline.sft import step_metrics, supervised_steps
from npr_megatron.pipeline.sft_batches import SftBatches
from npr_megatron.pipeline.sft_data import prepare_data, show_data
from npr_megatron.pipeline.starting import random_model, require_rows
from npr_megatron.planning.flops import peak_tflops
from npr_megatron.report.live import LiveView
from npr_megatron.runtime.device import device_type
from npr_megatron.runtime.first_rank import FirstRank
from npr_megatron.runtime.fused_kernels import fused_kernels
from npr_megatron.runtime.process_group import RankInfo
from npr_megatron.train.checkpoint_folder import find_checkpoint
from npr_megatron.train.checkpoint_manifest import model_differences
from npr_megatron.train.rank import TrainerRank
from npr_megatron.train.step import StepResult

STAGE = "sft"


class SftRun:
    """One run on one rank. All ranks call the same methods in the same order."""

    def __init__(
        self, config: SftConfig, model: ModelConfig, place: LaunchedRank, view: LiveView
    ) -> None:
        self._config, self._model, self._place, self._view = config, model, place, view
        self._folder = RunFolder.of(config)
        self._checkpoints = self._folder.path / "checkpoints"
        self._random = self._folder.path / "random"
        self._peak: float | None = None

    @property
    def exported(self) -> Path:
        """Where the trained model is, when the run is done."""
        return self._folder.path / "hf"

    def run(self, *, fresh: bool) -> Path:
        """Train to the end, or on from the last checkpoint; return the model's folder.

        Raises:
            ConfigError: rows that cannot be learnt from, all of them; or no device for the dtype.
            InputError: model, tokenizer, checkpoint or an earlier run are not what was asked for.
            DivergenceError: a loss or gradient is not finite; the rows are named.
        """
        if self._config.trainer.dtype == "bf16" and device_type() == "cpu":
            raise ConfigError(
                'trainer.dtype "bf16" needs a GPU and this process sees none; use "fp32"'
            )
        trainer = TrainerRank(
            RankInfo(
                rank=self._place.rank,
                world_size=self._place.world_size,
                init_method=self._place.address,
                # srun may show each task its own GPU only, as number 0.
                local_rank=self._place.local_rank % max(torch.cuda.device_count(), 1),
                num_threads=self._place.num_threads,
            ),
            model=self._model,
            parallel=self._config.parallel,
            trainer=self._config.trainer,
            run_id=self._folder.path.name,
            arena_dir="",  # nothing is published
            keeping=self._config.checkpoint,
        )
        try:
            self._train(trainer, fresh=fresh)
        finally:
            trainer.close()
        return self.exported

    def _train(self, trainer: TrainerRank, *, fresh: bool) -> None:
        first_rank = FirstRank()
        initial = first_rank.call(lambda: self._prepare(fresh=fresh))
        if initial is None:
            return
        batches = SftBatches(
            self._config, open_prepared(self._folder.path / "data", self._config.data)
        )
        self._peak = self._config.sft.peak_tflops or _known_peak()
        if device_type() == "cuda":
            self._view.note(fused_kernels().describe())
        done = self._start(trainer, first_rank, batches, initial)
        self._view.begin_stage(STAGE, batches.num_steps)
        if done:
            self._view.resume(done)
        else:
            self._measure_first(trainer, batches)
        self._steps(trainer, batches, done)
        self._view.end_stage()
        trainer.export_hf(self.exported, self._tokenizer_folder)
        if self._place.rank == 0:
            for passing in (self._checkpoints, self._random):
                shutil.rmtree(passing, ignore_errors=True)
        self._view.note(f"curves: npr report {self._folder.path}")
        self._view.note(f"try it: npr generate {self.exported} PROMPT")

    @property
    def _tokenizer_folder(self) -> Path:
        given = self._config.model.path
        return Path(given) if given else self._folder.path / "tokenizer"

    def _prepare(self, *, fresh: bool) -> Path | None:
        """Check and prepare everything on rank 0; return the first weights, None if all is done."""
        config, folder = self._config, self._folder
        if config.model.path is not None:  # refused before anything is written
            require_rows(self._model, load_tokenizer(self._tokenizer_folder))
        folder.open(config, fresh=fresh)
        if self.exported.exists():
            self._view.note(f"{self.exported} is there already; --fresh trains it again")
            return None
        if config.model.path is None and not self._tokenizer_folder.exists():
            build_sums_tokenizer(self._tokenizer_folder)
        tokenizer = load_tokenizer(self._tokenizer_folder)
        require_rows(self._model, tokenizer)
        data = prepare_data(
            config, self._model, tokenizer, self._tokenizer_folder, folder.path / "data", self._view
        )
        if find_checkpoint(self._checkpoints) is None:
            show_data(config, data, tokenizer, folder.path / "first-rows.html", self._view)
        if config.model.path is not None:
            return Path(config.model.path)
        return random_model(self._random, config.model, config.run.seed, self._tokenizer_folder)

    def _start(
        self, trainer: TrainerRank, first_rank: FirstRank, batches: SftBatches, initial: Path
    ) -> int:
        """Load the first weights or the last checkpoint; return the last step done."""
        optimizer, num_steps = self._config.sft.optimizer, batches.num_steps
        is_resumed = first_rank.call(lambda: self._is_own_checkpoint(batches))
        if is_resumed:
            trainer.begin_stage(optimizer, num_steps)
            done = int(trainer.load(self._checkpoints)["step"])
        else:
            trainer.load_hf(initial)
            trainer.begin_stage(optimizer, num_steps)
            done = 0
        if self._place.rank == 0:
            self._folder.rewind(STAGE, done)
        return done

    def _progress(self, batches: SftBatches) -> dict[str, Any]:
        """What a checkpoint belongs to; it must not go on with anything else."""
        validation = batches.data.validation
        return {
            "data": batches.data.train.digest,
            "validation": validation.digest if validation else None,
        }

    def _is_own_checkpoint(self, batches: SftBatches) -> bool:
        """Return whether there is a checkpoint to go on from.

        Raises:
            InputError: there is one of another model or of other data.
        """
        found = find_checkpoint(self._checkpoints)
        if found is None:
            return False
        recorded, expected = found.manifest.progress, self._progress(batches)
        differing = [
            *model_differences(found.manifest.origin["model"], self._model),
            *(
                f"{name} is of other rows or another tokenizer"
                for name in expected
                if recorded.get(name) != expected[name]
            ),
        ]
        if differing:
            raise InputError(
                f"{found.path} was to be continued and is not of this run: {'; '.join(differing)} "
                "(the checkpoint of another run, or files that were changed); bring them back, or "
                "start over with --fresh"
            )
        return True

    def _measure_first(self, trainer: TrainerRank, batches: SftBatches) -> None:
        """Measure the untrained model: what it is compared with, and whether it gives numbers."""
        if batches.data.validation is None:
            return
        loss = batches.validation_loss(trainer)
        if self._place.rank == 0:
            MetricsLog(self._folder.metrics).write(STAGE, 0, {"validation/loss": loss})
        self._view.note(f"validation loss before training: {loss:.4f}")

    def _steps(self, trainer: TrainerRank, batches: SftBatches, done: int) -> None:
        supervised_steps(
            trainer,
            first_step=done,
            last_step=batches.num_steps,
            checkpoint_every=self._config.sft.checkpoint_every_steps,
            checkpoints=self._checkpoints,
            progress=self._progress(batches),
            batches_for=batches.microbatches,
            record=lambda *measured: self._record(trainer, batches, *measured),
            note=self._view.note,
            suspects=lambda step: batches.suspects(step, trainer),
        )

    def _record(
        self,
        trainer: TrainerRank,
        batches: SftBatches,
        step: int,
        result: StepResult,
        seconds: float,
    ) -> None:
        sft = self._config.sft
        values = step_metrics(result, seconds) | {"data/epoch": batches.epochs_done(step)}
        if self._peak is not None:
            per_device = batches.flops(step, self._model) / seconds / self._place.world_size
            values["train/mfu_frac"] = per_device / (self._peak * 1e12)
        is_due = step % sft.validate_every_steps == 0 or step == batches.num_steps
        if batches.data.validation is not None and is_due:
            values["validation/loss"] = batches.validation_loss(trainer)
        if self._place.rank == 0:
            MetricsLog(self._folder.metrics).write(STAGE, step, values)
        self._view.advance(step, values)


def _known_peak() -> float | None:
    if device_type() == "cpu":
        return None
    return peak_tflops(torch.cuda.get_device_name())
