"""An engine of this process on an exported model: for ``npr generate`` and speed measurements.

Under ``torchrun --nproc-per-node N`` the N processes are one embedded engine: each reads its shard
of the model, rank 0 decodes and the others compute for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.backends import create_engine, storages_of
from npr_megatron.engine.compute.model import storage_layout
from npr_megatron.engine.compute.quantised import quantising_reader
from npr_megatron.engine.compute.ranks import Ranks
from npr_megatron.engine.compute.runner import LocalRunner
from npr_megatron.engine.compute.tensor_parallel import Follower, LeaderRunner
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import InputError
from npr_megatron.runtime.device import current_device, device_type
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.checkpoints.hf import read_hf
from npr_megatron.weights.layouts.served import Quantisation
from npr_megatron.weights.storages import load_tiles
from npr_megatron.weights.tiles import RankLayout

_VERSION = 1
"""Of the weights in the folder."""


def open_engine(
    folder: Path,
    config: EngineConfig,
    vocabulary: Vocabulary,
    *,
    device: torch.device | None = None,
) -> Engine:
    """Return an engine that holds the weights of an HF folder; close it when it is done.

    Args:
        device: None takes a GPU if there is one.

    Raises:
        InputError: the folder holds no model of a supported architecture.
        LayoutError: its matrices cannot be kept as ``config.weights`` says.
        ConfigError: the backend cannot do what ``config`` asks of it.
        EnvironmentFault: the backend is not installed or does not come up.
    """
    model = read_trainable_architecture(folder)
    engine = create_engine(model, config, vocabulary, device or current_device())
    try:
        layout = storages_of(model, config).ranks[0]
        _read_shard(folder, model, layout, config, engine.staging())
        engine.commit(_VERSION)
    except BaseException:
        engine.close()
        raise
    return engine


def speaks() -> bool:
    """Return whether this process is the one that talks to the user: not so for what torchrun
    started beside it."""
    return _place()[0] == 0


@contextmanager
def local_engine(
    folder: Path,
    config: EngineConfig,
    vocabulary: Vocabulary,
    *,
    device: torch.device | None = None,
) -> Iterator[Engine | None]:
    """Yield what :func:`open_engine` returns; under torchrun the engine of all its processes.

    Rank 0 is given the engine. The others compute for it as long as it is in use, and are given
    None then.

    Raises:
        InputError: the folder holds no model of a supported architecture, or torchrun was used
            with a backend that it does not cut.
        LayoutError: the model cannot be cut into so many shards, or not kept as asked.
        EnvironmentFault: a process is gone or silent.
    """
    rank, size = _place()
    if size == 1:
        with closing(open_engine(folder, config, vocabulary, device=device)) as engine:
            yield engine
        return
    if config.backend != "embedded":
        raise InputError(
            f"torchrun started {size} processes and the {config.backend} backend starts its own; "
            f"run it without torchrun, with --tp-size {size}"
        )
    device = _device_of_rank(device)
    model = read_trainable_architecture(folder)
    layout = storage_layout(model, size, config.weights).ranks[rank]
    ranks = Ranks.join(rank, size, "env://", device=device)
    try:
        runner = LocalRunner(model, config, device, ranks)
        if ranks.rank:
            follower = Follower(runner, ranks)
            _read_shard(folder, model, layout, config, follower.staging())
            follower.seal(_VERSION)
            follower.follow()
            yield None
            return
        leader = LeaderRunner(runner, ranks)
        engine = EmbeddedEngine(model, config, vocabulary, runner=leader)
        _read_shard(folder, model, layout, config, engine.staging())
        engine.commit(_VERSION)
        try:
            yield engine
        finally:
            leader.close()
    finally:
        ranks.leave()


def _read_shard(
    folder: Path,
    model: ModelConfig,
    layout: RankLayout,
    config: EngineConfig,
    storages: dict[str, torch.Tensor],
) -> None:
    read = read_hf(folder, model).read
    if config.weights == "fp8":
        read = quantising_reader(read, Quantisation.of(model))
    load_tiles(layout, read, storages)


def _place() -> tuple[int, int]:
    """Return this process's rank among those that torchrun started, and their number."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _device_of_rank(device: torch.device | None) -> torch.device:
    """Return the CPU, or the GPU that is this process's share of the machine."""
    if (device_type() if device is None else device.type) == "cpu":
        return torch.device("cpu")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own
