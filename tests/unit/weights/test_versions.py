"""What a writer of versions vouches for."""

from __future__ import annotations

import pytest
import torch

from npr_megatron.errors import StaleWeightsError
from npr_megatron.weights.executors.slots import Slots, slot_bytes
from npr_megatron.weights.executors.versions import VersionReader, VersionWriter
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import empty_storages
from tests.unit.weights.oracles import tiny_model

LAYOUT = engine_layout(tiny_model())
RANK = LAYOUT.ranks[0]


def test_memory_that_is_damaged_while_it_is_written_is_not_vouched_for():
    memory = torch.zeros(2 * slot_bytes(RANK, torch.float32), dtype=torch.uint8)
    slots, writer = Slots(memory, RANK, torch.float32), VersionWriter(LAYOUT, 0, torch.float32)
    weights = empty_storages(RANK, torch.float32)
    copy = writer.copy_of(weights)

    def copy_and_damage(views) -> None:
        copy(views)
        views["norm.weight"][0] = 1.0

    whole = Publication.assemble([writer.write(0, copy, slots, "here", weights)])
    damaged = Publication.assemble([writer.write(1, copy_and_damage, slots, "here", weights)])
    reader, into = VersionReader(LAYOUT, LAYOUT, 0), empty_storages(RANK, torch.float32)
    reader.read(whole, {0: slots}, into)
    with pytest.raises(StaleWeightsError, match=r"model\.norm\.weight changed on source rank 0"):
        reader.read(damaged, {0: slots}, into)
