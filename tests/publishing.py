"""What a trainer publishes, without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from npr_megatron.weights.tiles import Layout


@contextmanager
def published(
    layout: Layout, tensors: Mapping[str, torch.Tensor], version: int, arena_dir: Path
) -> Iterator[Publication]:
    """Have every rank of ``layout`` publish its part of ``tensors`` in fp32; free it afterwards."""
    with ExitStack() as cleanup:
        parts = []
        for number, rank in enumerate(layout.ranks):
            publisher = Publisher(layout, number, torch.float32, run_id="run", arena_dir=arena_dir)
            cleanup.callback(publisher.close)
            storages = empty_storages(rank, torch.float32)
            load_tiles(rank, box_reader(tensors), storages)
            parts.append(publisher.publish(version, storages))
        yield Publication.assemble(parts)
