"""Rules that join the sections of an SFT run file: pure, and every problem at once."""

from __future__ import annotations

from collections.abc import Iterator

from npr_megatron.config.check import name_problems, schedule_problems
from npr_megatron.config.families import model_problems
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.sft import SftConfig
from npr_megatron.errors import InputError


def check_sft(config: SftConfig, architecture: ModelConfig | None = None) -> list[str]:
    """Return every problem between the sections of ``config``; empty when it can run.

    Args:
        config: a run whose single fields are valid.
        architecture: the model behind ``model.path``; without it the rules about its shape are
            skipped.
    """
    model = config.model.architecture or architecture
    problems = [*name_problems(config.run.name), *_model(config), *_length(config), *_data(config)]
    if model is not None:
        problems += model_problems(model)
    problems += parallel_problems(config.parallel, config.trainer, model)
    return [*problems, *_rows(config)]


def check_sft_model(config: SftConfig) -> tuple[ModelConfig | None, list[str]]:
    """Return the architecture behind ``model.path`` and what is wrong with that folder."""
    if config.model.path is None:
        return None, []
    try:
        return read_trainable_architecture(config.model.path), []
    except InputError as error:
        return None, [f"model.path: {error}"]


def _model(config: SftConfig) -> Iterator[str]:
    if (config.model.path is None) == (config.model.architecture is None):
        yield (
            "[model] must name one model; set model.path to an HF folder, or describe a new one "
            "in [model.architecture], which then speaks the sums alphabet"
        )


def _length(config: SftConfig) -> Iterator[str]:
    sft = config.sft
    if (sft.num_epochs is None) == (sft.num_steps is None):
        yield "sft.num_epochs and sft.num_steps: one of them says how long to train; set just one"
    if sft.num_steps is not None:
        yield from schedule_problems("sft", sft.num_steps, sft.optimizer)


def _data(config: SftConfig) -> Iterator[str]:
    data = config.data
    if data.validation and data.validation_frac:
        yield (
            f"data.validation names files and data.validation_frac {data.validation_frac:g} holds "
            "training rows out; keep one of them"
        )


def _rows(config: SftConfig) -> Iterator[str]:
    parallel, rows = config.parallel, config.trainer.rows_per_microbatch
    multiple = parallel.microbatch_multiple
    if config.sft.rows_per_step % (multiple * rows):
        turns = f" * parallel.pp_size {parallel.pp_size}" if multiple != parallel.dp_size else ""
        yield (
            f"sft.rows_per_step {config.sft.rows_per_step} is not a multiple of parallel.dp_size "
            f"{parallel.dp_size}{turns} * trainer.rows_per_microbatch {rows}; change one of them, "
            "or steps are filled up with padding"
        )
