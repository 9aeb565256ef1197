"""What to push from where to where, as people write it: ``tp4,pp2,dp8`` to 512 times ``tp8,ep8``.

Only the shape of the words is judged here; whether a model can be cut so is for the layouts to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from npr_megatron.config.loader import load_run
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import ConfigError
from npr_megatron.weights.layouts.engine import EngineKind

ServedDtype = Literal["bf16", "fp8", "fp32"]
WEIGHT_BYTES: dict[ServedDtype, int] = {"bf16": 2, "fp8": 2, "fp32": 4}
"""Bytes of an element that is not quantised; FP8 leaves embedding, head, norms, routers in bf16."""

_TRAINER_SIZES = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
_ENGINE_SIZES = ("tp", "ep")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """A trainer, and the fleet that it pushes to. Trainer and fleet have no GPU in common."""

    model: ModelConfig
    parallel: ParallelConfig
    engine_tp: int = 1
    engine_ep: int = 1
    num_engines: int = 1
    engine: EngineKind = "embedded"
    dtype: ServedDtype = "bf16"

    @property
    def num_fleet_gpus(self) -> int:
        """GPUs of all engines."""
        return self.num_engines * self.engine_tp


def read_trainer(text: str) -> ParallelConfig:
    """Return the trainer written as ``tp4,pp2,dp8,ep8,etp1`` or as the path of a run file.

    Raises:
        ConfigError: neither; lists every problem.
    """
    if text.endswith(".toml"):
        return load_run(Path(text)).parallel
    sizes = _sizes(text, "--trainer", _TRAINER_SIZES)
    return ParallelConfig.model_validate({f"{name}_size": sizes[name] for name in sizes})


def read_engine(text: str) -> tuple[int, int]:
    """Return (tp, ep) of an engine written as ``tp8`` or ``tp8,ep8``.

    Raises:
        ConfigError: it is written otherwise; lists every problem.
    """
    sizes = _sizes(text, "--engine", _ENGINE_SIZES)
    return sizes.get("tp", 1), sizes.get("ep", 1)


def _sizes(text: str, option: str, names: tuple[str, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([a-z]+)=?([1-9]\d*)\s*", part)
        if found is None or found[1] not in names:
            problems.append(
                f"{option} {text!r}: {part.strip()!r} is no size; write sizes of "
                f"{', '.join(names)} such as {names[0]}4, with commas between them"
            )
        elif found[1] in sizes:
            problems.append(f"{option} {text!r}: {found[1]} is given twice; keep one")
        else:
            sizes[found[1]] = int(found[2])
    if problems:
        raise ConfigError(problems)
    return sizes
