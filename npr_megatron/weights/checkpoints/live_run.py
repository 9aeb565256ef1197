"""The weights that a living run serves, read from the arenas of its trainer ranks.

Found through the run folder: ``config.json`` says how the trainer is laid out and where its arenas
are, ``serving.json`` which version its engines serve and with which digest. Reads only; what was
overwritten by a newer version in the meantime is noticed afterwards (:meth:`LiveRun.check`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from npr_megatron.config.hf_architecture import read_architecture
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.run import RunConfig
from npr_megatron.errors import InputError, StaleWeightsError
from npr_megatron.weights.box import Box
from npr_megatron.weights.executors.arena import Arena, arena_path
from npr_megatron.weights.executors.slots import SlotHeader
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.storages import DTYPES
from npr_megatron.weights.tiles import Layout

SERVING_FILE = "serving.json"
"""In a run folder: version and digest of what the fleet serves; written atomically."""


def is_run_folder(folder: Path) -> bool:
    """Return whether ``folder`` is that of a run."""
    return (folder / SERVING_FILE).exists() or (
        (folder / "config.json").exists() and "run" in _read_json(folder / "config.json")
    )


@dataclass(frozen=True, slots=True)
class _Held:
    """One version in the arena of one rank."""

    arena: Arena
    slot: int
    header: SlotHeader


class LiveRun:
    """What a run serves at the moment of opening."""

    def __init__(self, folder: Path) -> None:
        """Map the arenas.

        Raises:
            InputError: the folder is not that of a run that serves anything.
            StaleWeightsError: its arenas are gone, of another layout, or already newer.
        """
        self.path = folder
        config = _read_config(folder)
        serving = _read_json(folder / SERVING_FILE)
        try:
            self.version, self._digest = int(serving["version"]), int(str(serving["digest"]), 16)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / SERVING_FILE} names no version ({error!r}); the run serves nothing yet"
            ) from error
        self.model: ModelConfig = _architecture(config)
        self.layout: Layout = trainer_layout(self.model, config.parallel)
        paths = [
            arena_path(config.cluster.arena_dir, folder.resolve().name, rank)
            for rank in range(len(self.layout.ranks))
        ]
        self._dtype = DTYPES[config.engine.dtype]
        self._held = tuple(self._open(path, rank) for rank, path in enumerate(paths))

    def _open(self, path: Path, rank: int) -> _Held:
        arena = Arena(path, self.layout.ranks[rank], self._dtype)
        headers = [arena.slots.header(slot) for slot in range(arena.slots.num_slots)]
        for slot, header in enumerate(headers):
            if header.version == self.version and header.layout_id == self.layout.layout_id:
                return _Held(arena, slot, header)
        raise StaleWeightsError(
            f"{self.path} serves version {self.version}, arena {path} holds versions "
            f"{sorted(header.version for header in headers)}; try again"
        )

    def dtype_of(self, storage: str) -> torch.dtype:
        """Return the dtype of a storage."""
        held = self._held[0]
        view = held.arena.slots.storages(held.slot).get(storage)
        return self._dtype if view is None else view.dtype

    def read(self, rank: int, storage: str, box: Box, into: Tensor) -> None:
        """Fill ``into``, shaped as ``box``, from the arena of ``rank``."""
        held = self._held[rank]
        into.copy_(held.arena.slots.storages(held.slot)[storage][box.slices])

    def check(self, digest: int | None) -> None:
        """Require that what was read is what the fleet serves.

        Args:
            digest: of all that was read; None: not everything was.

        Raises:
            StaleWeightsError: the run pushed a newer version meanwhile, or bytes changed.
        """
        for held in self._held:
            if held.arena.slots.header(held.slot) != held.header:
                raise StaleWeightsError(
                    f"{self.path}: version {self.version} was overwritten while it was read; try "
                    "again"
                )
        if digest is not None and digest != self._digest:
            raise StaleWeightsError(
                f"{self.path} serves version {self.version} with digest {self._digest:#018x}, its "
                f"arenas hold {digest:#018x}; the weights changed after they were published"
            )


def _architecture(config: RunConfig) -> ModelConfig:
    if config.model.architecture is not None:
        return config.model.architecture
    return read_architecture(str(config.model.path))


def _read_config(folder: Path) -> RunConfig:
    try:
        return RunConfig.model_validate(_read_json(folder / "config.json"))
    except ValidationError as error:
        raise InputError(
            f"{folder / 'config.json'} is no run of this version ({error.error_count()} problems); "
            "compare with the version that started it"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; the run serves nothing yet, or not any more"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object")
    return found
