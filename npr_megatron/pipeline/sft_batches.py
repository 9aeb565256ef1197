"""What each step of ``npr sft`` learns, what it is measured on, and whose fault a NaN is.

Everything derives from the stores, the run file and the number of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npr_megatron.config.alignment import row_multiple
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.sft import SftConfig
from npr_megatron.data.packing import pack_rows
from npr_megatron.data.preparing import PreparedData
from npr_megatron.data.row_plan import Row, RowStream, plan_epoch
from npr_megatron.data.rows import MAX_LISTED
from npr_megatron.data.sample_store import SampleStore
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.errors import DivergenceError
from npr_megatron.pipeline.ports import Learner
from npr_megatron.pipeline.sft import SFT_LOSS
from npr_megatron.planning.flops import training_flops
from npr_megatron.records.sample import PackedBatch
from npr_megatron.report.packed_row import ShownSample, shown_row
from npr_megatron.train.step import StepBatch


class SftBatches:
    """Steps are counted from 1. Needs ``config.sft`` to say how long (``config.check_sft``)."""

    def __init__(self, config: SftConfig, data: PreparedData) -> None:
        self._config, self.data = config, data
        self._stream = RowStream(data.train.lengths, config.trainer.row_tokens, config.run.seed)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        sft = self._config.sft
        if sft.num_steps is not None:
            return sft.num_steps
        assert sft.num_epochs is not None, "the checker demands one of the two"
        return -(-self._stream.num_rows(sft.num_epochs) // sft.rows_per_step)

    @property
    def fill_frac(self) -> float:
        """Share of the cells of an epoch's rows that hold a token."""
        cells = self._stream.num_rows(1) * self._config.trainer.row_tokens
        return self.data.train.num_tokens / cells

    def epochs_done(self, step: int) -> float:
        """Return how many passes over the data end with ``step``, in parts of one."""
        num_rows = self._num_rows_after(step)
        epoch = self._stream.epoch_of(num_rows - 1)
        before, behind = self._stream.num_rows(epoch), self._stream.num_rows(epoch + 1)
        return epoch + (num_rows - before) / (behind - before)

    def microbatches(self, step: int) -> tuple[PackedBatch, ...]:
        """Return what ``step`` learns."""
        return self._packed(self.data.train, self._rows(step))

    def flops(self, step: int, model: ModelConfig) -> int:
        """Return the operations that ``step`` must compute at least."""
        train = self.data.train
        numbers = [number for row in self._rows(step) for number in row]
        num_tokens, num_pairs = (
            int(values[numbers].sum()) for values in (train.lengths, train.pairs)
        )
        return training_flops(model, num_tokens, num_pairs)

    def validation_loss(self, trainer: Learner) -> float:
        """Return the mean negative log-likelihood of the held-out responses. Collective.

        Raises:
            DivergenceError: it is not finite; the rows it comes from are named.
        """
        store = self.data.validation
        assert store is not None, "nothing is held out"
        row_tokens, count = self._config.trainer.row_tokens, self._config.sft.rows_per_step
        rows = plan_epoch(store.lengths, row_tokens, seed=0, epoch=0)
        total, num_learnt = 0.0, 0
        for first in range(0, len(rows), count):
            chunk = rows[first : first + count]
            batch = StepBatch(microbatches=self._packed(store, chunk), loss=SFT_LOSS)
            logprobs = trainer.score(batch)
            if not all(np.isfinite(values).all() for values in logprobs):
                raise DivergenceError(
                    f"the validation loss must be finite; {self._blame(store, chunk, trainer)}"
                )
            total -= float(sum(values.sum(dtype=np.float64) for values in logprobs))
            num_learnt += batch.num_loss_tokens
        return total / num_learnt

    def suspects(self, step: int, trainer: Learner) -> str:
        """Say which samples of ``step`` the model gives no finite log-prob for. Collective."""
        return self._blame(self.data.train, self._rows(step), trainer)

    def shown_rows(self, count: int, tokenizer: Tokenizer) -> list[list[ShownSample]]:
        """Return the first rows of step 1 as the trainer gets them, each packed by itself."""
        shown = []
        for row in self._rows(1)[:count]:
            (batch,) = self._packed(self.data.train, [row], alone=True)
            pieces = tokenizer.pieces(batch.token_ids[0].tolist())
            places = [self.data.train.places[number] for number in row]
            shown.append(shown_row(batch, 0, places, pieces))
        return shown

    def _rows(self, step: int) -> list[Row]:
        first = self._num_rows_after(step - 1)
        return self._stream.take(first, self._num_rows_after(step) - first)

    def _num_rows_after(self, step: int) -> int:
        sft = self._config.sft
        num_rows = step * sft.rows_per_step
        if sft.num_epochs is None:
            return num_rows
        return min(num_rows, self._stream.num_rows(sft.num_epochs))

    def _packed(
        self, store: SampleStore, rows: Sequence[Row], *, alone: bool = False
    ) -> tuple[PackedBatch, ...]:
        trainer, parallel = self._config.trainer, self._config.parallel
        return pack_rows(
            [[store.sample(number) for number in row] for row in rows],
            trainer.rows_per_microbatch,
            1 if alone else parallel.microbatch_multiple,
            row_multiple(parallel, trainer),
        )

    def _blame(self, store: SampleStore, rows: Sequence[Row], trainer: Learner) -> str:
        """Score every sample of ``rows`` in a row of its own, where no other can spoil it."""
        numbers, count = sorted({n for row in rows for n in row}), self._config.sft.rows_per_step
        bad: set[bytes] = set()
        for first in range(0, len(numbers), count):
            alone = [(number,) for number in numbers[first : first + count]]
            batch = StepBatch(microbatches=self._packed(store, alone), loss=SFT_LOSS)
            bad |= _not_finite(batch.microbatches, trainer.score(batch))
        is_bad = [store.sample(number).token_ids.tobytes() in bad for number in numbers]
        return blame(
            [store.places[n] for n, b in zip(numbers, is_bad, strict=True) if b], len(is_bad)
        )


def _not_finite(microbatches: Sequence[PackedBatch], logprobs: Sequence[np.ndarray]) -> set[bytes]:
    """Return the ids of the samples, one in each row, whose log-probs are not all finite."""
    return {
        batch.token_ids[row][batch.segment[row] == 0].tobytes()
        for batch, values in zip(microbatches, logprobs, strict=True)
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
    }


def blame(places: Sequence[str], num_samples: int) -> str:
    """Say whose fault it is that a batch of ``num_samples`` samples gives no finite number.

    Args:
        places: the samples whose log-probs are not finite when each is scored by itself.
    """
    if not places:
        return (
            f"the log-probs of all {num_samples} samples of the batch are finite, so the gradient "
            "overflowed; lower the learning rate"
        )
    if len(places) == num_samples:
        return (
            f"none of the {num_samples} samples of the batch has finite log-probs, so the weights "
            "are to blame and no row; start from another model or an earlier checkpoint"
        )
    more = len(places) - MAX_LISTED
    listed = [*places[:MAX_LISTED], *([f"and {more} more"] if more > 0 else [])]
    return (
        f"{len(places)} of the {num_samples} samples of the batch have log-probs that are not "
        f"finite: {', '.join(listed)}; look at these rows and at the embeddings of their tokens"
    )
