"""The border between declarations and live tensors: allocate, address, fill.

The only rule here is that a dict of tensors follows a ``RankLayout``: same names, same shapes.
Nothing in this module knows which model or which rank it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box
from npr_megatron.weights.tiles import RankLayout, Tile

ReadBox = Callable[[str, Box], Tensor]
"""Returns the elements of a box of a canonical parameter, by name."""


def empty_storages(
    rank_layout: RankLayout, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Return uninitialised storages of one rank."""
    return {
        storage.name: torch.empty(storage.shape, dtype=dtype, device=device)
        for storage in rank_layout.storages
    }


def check_storages(rank_layout: RankLayout, storages: Mapping[str, Tensor]) -> None:
    """Require ``storages`` to be exactly those of ``rank_layout``, of one dtype.

    Raises:
        LayoutError: names, shapes or dtypes differ; the message lists every difference.
    """
    declared = {storage.name: storage.shape for storage in rank_layout.storages}
    problems = [
        f"storage {name} is not declared by the layout" for name in storages.keys() - declared
    ]
    for name, shape in declared.items():
        if name not in storages:
            problems.append(f"storage {name} {list(shape)} is missing")
        elif tuple(storages[name].shape) != shape:
            found = list(storages[name].shape)
            problems.append(f"storage {name} has shape {found}, the layout says {list(shape)}")
    dtypes = sorted({str(tensor.dtype) for tensor in storages.values()})
    if len(dtypes) > 1:
        problems.append(f"storages have several dtypes: {', '.join(dtypes)}")
    if problems:
        raise LayoutError("\n".join(sorted(problems)))


def tile_view(tile: Tile, storages: Mapping[str, Tensor]) -> Tensor:
    """Return the part of a storage that ``tile`` describes, without a copy."""
    return storages[tile.storage][tile.storage_box.slices]


def load_tiles(rank_layout: RankLayout, read: ReadBox, storages: Mapping[str, Tensor]) -> None:
    """Fill ``storages`` in place from canonical parameters, casting to their dtype.

    Import from an HF checkpoint, from random tensors or from another layout differ by ``read``
    only. Elements outside every tile are left alone.
    """
    check_storages(rank_layout, storages)
    with torch.no_grad():
        for tile in rank_layout.tiles:
            tile_view(tile, storages).copy_(read(tile.parameter, tile.box))


def box_reader(tensors: Mapping[str, Tensor]) -> ReadBox:
    """Return a reader over whole canonical tensors held in memory."""

    def read(parameter: str, box: Box) -> Tensor:
        return tensors[parameter][box.slices]

    return read
