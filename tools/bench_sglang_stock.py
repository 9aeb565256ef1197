"""Branches by a client of SGLang as it is: requests side by side, joined as plain text.

What is possible without a plugin. The branches of a block are requests that share the trunk; when
all have ended, their texts are put one behind the other and SGLang computes the keys and values of
branches 2 and up again, at other positions and seeing their siblings: another policy than the one
that is trained, so what this costs is compared here, never what it writes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

import sglang  # pyright: ignore[reportMissingImports]
from bench_engine_models import VOCABULARY
from bench_sglang_rollouts import Piece, Report, Rollout, Script, script_of

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.sglang.options import (
    DeviceType,
    server_environment,
    usable_cores,
)

_ON = {
    "cpu": {"attention_backend": "torch_native", "sampling_backend": "pytorch"},
    "cuda": {},  # graphs, attention, sampling and sizes of chunks as SGLang chooses them
}


class StockSide:
    """A client of an ``sglang.Engine`` in this process.

    Args:
        folder: HF folder of the model.
    """

    def __init__(
        self, model: ModelConfig, config: EngineConfig, device: DeviceType, folder: Path
    ) -> None:
        os.environ |= server_environment(config, device, usable_cores(), os.environ)
        self._has_logprobs = False
        self._engine = sglang.Engine(
            model_path=str(folder),
            device=device,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[config.dtype],
            max_total_tokens=config.num_kv_slots,
            max_running_requests=config.max_streams,
            disable_overlap_schedule=not config.sglang.overlap,
            skip_tokenizer_init=True,
            skip_server_warmup=True,
            random_seed=0,
            log_level="error",
            **_ON[device],
        )

    def decode(
        self, rollouts: Sequence[Rollout], in_flight: int, is_watched: bool, has_logprobs: bool
    ) -> Report:
        """Decode ``rollouts``, at most ``in_flight`` at once; see :class:`Report`.

        Args:
            has_logprobs: ask for the log-prob of every sampled token, as reinforcement learning
                does.
        """
        self._engine.flush_cache()  # or the prompts were known from the other kind of run
        self._has_logprobs = has_logprobs
        return self._engine.loop.run_until_complete(self._decode(rollouts, in_flight, is_watched))

    async def _decode(
        self, rollouts: Sequence[Rollout], in_flight: int, is_watched: bool
    ) -> Report:
        report, free = Report(), asyncio.Semaphore(in_flight)

        async def one(script: Script) -> None:
            async with free:
                started = time.perf_counter()
                await self._write(script, report, is_watched)
                report.latencies_s.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(one(script_of(rollout)) for rollout in rollouts))
        report.seconds = time.perf_counter() - started
        return report

    async def _write(self, script: Script, report: Report, is_watched: bool) -> None:
        text = [*script.prompt]
        for number, piece in enumerate(script.trunk):
            is_join = number > 0
            text += await self._sample(text, piece, report, is_watched and is_join)
            if number == len(script.blocks):
                return
            text.append(VOCABULARY.newline)
            branches = await asyncio.gather(
                *(self._sample(text, branch, report) for branch in script.blocks[number])
            )
            for branch in branches:
                text += [*branch, VOCABULARY.newline]

    async def _sample(
        self, text: list[int], piece: Piece, report: Report, is_watched_join: bool = False
    ) -> list[int]:
        """Return what was given and sampled behind ``text``."""
        known = [*text, *piece.given]
        started = time.perf_counter()
        answer = await self._engine.async_generate(
            input_ids=known,
            sampling_params={
                "temperature": 1.0,
                "max_new_tokens": piece.num_sampled,
                "ignore_eos": True,
            },
            return_logprob=self._has_logprobs,
            stream=is_watched_join,
        )
        if is_watched_join:
            parts = [(time.perf_counter() - started, part) async for part in answer]
            report.joins_s.append(parts[0][0])
            answer = parts[-1][1]  # each has all that came before it
        sampled, facts = answer["output_ids"], answer["meta_info"]
        if facts["completion_tokens"] != piece.num_sampled:
            raise SystemExit(f"SGLang sampled {facts['completion_tokens']} tokens for {piece}")
        report.num_known += len(known)
        report.num_cached += facts["cached_tokens"]
        report.num_computed += len(known) - facts["cached_tokens"] + piece.num_sampled
        return [*piece.given, *sampled]
