"""One side of tools/bench_sglang.py, in a process of its own.

    python bench_sglang_worker.py '{"side": "npr", "model": {...}, ...}' <descriptor>

Each line that comes in is a JSON object of arguments to ``decode``; each line that goes out is its
report, the first one null when the side is ready.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from bench_sglang_rollouts import Report, Rollout

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.weights.checkpoints.hf import read_hf


class Side(Protocol):
    """Who decodes rollouts."""

    def decode(
        self, rollouts: list[Rollout], in_flight: int, is_watched: bool, **options: Any
    ) -> Report:
        """Decode ``rollouts``, at most ``in_flight`` at once."""
        ...


def main() -> None:
    """Decode until the input ends."""
    torch.set_num_threads(1)
    side = side_of(**json.loads(sys.argv[1]))
    answers = os.fdopen(int(sys.argv[2]), "w")
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        rollouts = [Rollout(tuple(prompt), response) for prompt, response in asked.pop("rollouts")]
        report = side.decode(rollouts, **asked)
        print(json.dumps(asdict(report)), file=answers, flush=True)


def side_of(side: str, model: Any, config: Any, device: Any, folder: str) -> Side:
    """Return the side of this name, with the weights in ``folder``."""
    model, config = ModelConfig.model_validate(model), EngineConfig.model_validate(config)
    if side == "stock":
        from bench_sglang_stock import StockSide  # only this side needs SGLang in its process

        return StockSide(model, config, device, Path(folder))
    from bench_sglang_sides import EmbeddedSide, SglangSide

    ours = {"npr": SglangSide, "embedded": EmbeddedSide}[side]
    return ours(model, config, device, read_hf(folder, model).read)


if __name__ == "__main__":
    main()
