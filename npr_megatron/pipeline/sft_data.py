"""Reading the data of ``npr sft``, and showing people what is about to be learnt."""

from __future__ import annotations

from pathlib import Path

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.sft import SftConfig
from npr_megatron.data.preparing import PreparedData, SampleLimits, prepare
from npr_megatron.data.rows import list_faults
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import Tokenizer, load_tokenizer
from npr_megatron.pipeline.sft_batches import SftBatches
from npr_megatron.pipeline.starting import require_rows
from npr_megatron.pipeline.tokenising_crew import read_together
from npr_megatron.report.live import LiveView
from npr_megatron.report.packed_row import LEGEND, draw_row, write_rows_page


def prepare_data(
    config: SftConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    folder: Path,
    view: LiveView,
) -> PreparedData:
    """Return the samples of a run, read from its files or taken from ``folder``."""
    return prepare(
        config.data,
        tokenizer,
        tokenizer_folder,
        folder,
        SampleLimits(
            max_tokens=config.trainer.row_tokens, max_positions=model.max_position_embeddings
        ),
        seed=config.run.seed,
        report=lambda num_rows: view.activity(f"reading data: {num_rows} rows"),
        read=read_together,
    )


def show_data(
    config: SftConfig, data: PreparedData, tokenizer: Tokenizer, page: Path | None, view: LiveView
) -> None:
    """Say what there is to learn, what was skipped, and draw the first rows."""
    batches, train = SftBatches(config, data), data.train
    view.note(
        f"{train.num_samples} samples, {train.num_tokens} tokens, "
        f"{train.num_learnt / train.num_tokens:.0%} of them learnt; "
        f"{batches.num_steps} steps of {config.sft.rows_per_step} rows, "
        f"{batches.fill_frac:.1%} full"
    )
    if data.validation is not None:
        view.note(f"{data.validation.num_samples} samples are held out")
    for line in list_faults(data.skipped):
        view.note(f"skipped {line}")
    rows = batches.shown_rows(config.sft.show_rows, tokenizer)
    if not rows:
        return
    view.note(f"the first rows ({LEGEND}):")
    for row in rows:
        view.show(draw_row(row))
    if page is not None:
        write_rows_page(page, rows, f"{config.run.name}: first rows")
        view.note(f"the same as a page: {page}")


def preview(config: SftConfig, model: ModelConfig, folder: Path, view: LiveView) -> None:
    """Read all data into ``folder`` and show what a run would learn; nothing else is written.

    Raises:
        ConfigError: rows that cannot be learnt from, all of them.
        InputError: the tokenizer is missing or does not fit the model.
    """
    tokenizer_folder = Path(config.model.path) if config.model.path else folder / "tokenizer"
    if config.model.path is None:
        build_sums_tokenizer(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    require_rows(model, tokenizer)
    data = prepare_data(config, model, tokenizer, tokenizer_folder, folder / "data", view)
    show_data(config, data, tokenizer, None, view)
