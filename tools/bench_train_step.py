"""Optimizer steps of a real trainer rank against plain PyTorch, for tools/bench_train.py."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_figures import Figure, bests
from bench_train_rows import Workload
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.config.training import OptimizerConfig, ParallelConfig, TrainerConfig
from npr_megatron.runtime.process_group import RankInfo
from npr_megatron.topology.visibility import dense_mask
from npr_megatron.train.rank import TrainerRank
from npr_megatron.train.step import StepBatch
from npr_megatron.weights.checkpoints.hf import random_init, write_hf

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, decay="constant", weight_decay=0.1)


class PlainTrainer:
    """HF's model as one would train it with PyTorch alone: packed rows under an explicit mask with
    explicit positions, SDPA, cross entropy of the labels, clipping, fused AdamW.
    """

    def __init__(self, folder: Path) -> None:
        disable_progress_bar()
        self._model = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()
        matrices = [tensor for tensor in self._model.parameters() if tensor.ndim > 1]
        vectors = [tensor for tensor in self._model.parameters() if tensor.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            fused=True,
        )

    def train_step(self, batch: StepBatch) -> float:
        """Take one step and return the mean loss."""
        self._optimizer.zero_grad()
        loss = 0.0
        for microbatch in batch.microbatches:
            segment, block, branch, labels, ids, positions = (
                torch.from_numpy(stream).long()
                for stream in (
                    microbatch.segment,
                    microbatch.block,
                    microbatch.branch,
                    microbatch.labels,
                    microbatch.token_ids,
                    microbatch.position_ids,
                )
            )
            hidden = ~dense_mask(segment, block, branch)[:, None]
            logits = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf),
                use_cache=False,
            ).logits
            total = F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum"
            )
            share = total / batch.num_loss_tokens
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip_grad)
        self._optimizer.step()
        return loss


@contextmanager
def open_trainer(model: ModelConfig, folder: Path) -> Iterator[TrainerRank]:
    """Yield a rank that is the whole world, with the weights of ``folder``."""
    trainer = TrainerRank(
        RankInfo(rank=0, world_size=1, init_method=f"file://{folder}/rendezvous"),
        model=model,
        parallel=ParallelConfig(),
        trainer=TrainerConfig(),
        run_id="bench",
        arena_dir=str(folder),
    )
    try:
        trainer.load_hf(folder)
        trainer.begin_stage(OPTIMIZER, num_steps=1000)
        yield trainer
    finally:
        trainer.close()


def step_figures(model: ModelConfig, workloads: tuple[Workload, ...], repeats: int) -> list[Figure]:
    """Tokens per second, same model, same batch, same AdamW; both must find the same losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hf(folder, model, random_init(model, InitConfig(), seed=0))
        with open_trainer(model, folder) as trainer:
            plain = PlainTrainer(folder)
            return [_figure(trainer, plain, workload, model, repeats) for workload in workloads]


def _figure(
    trainer: TrainerRank, plain: PlainTrainer, workload: Workload, model: ModelConfig, repeats: int
) -> Figure:
    batch = workload.batch(model.vocab_size)
    found: list[float] = []
    expected: list[float] = []
    runs = [
        lambda: found.append(trainer.train_step(batch).loss),
        lambda: expected.append(plain.train_step(batch)),
    ]
    ours_s, plain_s = bests(runs, repeats, time.process_time)
    _check(found, expected)
    detail = f"{batch.num_tokens / ours_s:.0f} of {batch.num_tokens / plain_s:.0f} tokens/s"
    name = f"trainer / PyTorch, {workload.name}"
    return Figure(name, plain_s / ours_s, "x", 1.0, False, detail)


def _check(ours: list[float], plain: list[float]) -> None:
    for step, (found, expected) in enumerate(zip(ours, plain, strict=True)):
        if not math.isclose(found, expected, rel_tol=1e-3):
            raise SystemExit(
                f"step {step} must find one loss whoever takes it; the trainer found {found}, "
                f"plain PyTorch {expected}: the two do not train the same model"
            )
