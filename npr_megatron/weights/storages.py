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
from npr_megatron.weights.tiles import RankLayout, Storage, Tile

ReadBox = Callable[[str, Box], Tensor]
"""Returns the elements of a box of a canonical parameter, by name."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What weights may be, by the names that configurations and commands use."""

_PINNED = {"fp32": torch.float32, "fp8_e4m3": torch.float8_e4m3fn}


def empty_storages(
    rank_layout: RankLayout, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Return zeroed storages of one rank; padding stays zero, no tile reaches it."""
    return {
        storage.name: torch.zeros(storage.shape, dtype=dtype_of(storage, dtype), device=device)
        for storage in rank_layout.storages
    }


def dtype_of(storage: Storage, weights: torch.dtype) -> torch.dtype:
    """Return the dtype of ``storage`` where weights have dtype ``weights``."""
    return weights if storage.dtype is None else _PINNED[storage.dtype]


def weights_dtype(rank_layout: RankLayout, storages: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the dtype of the storages that have none pinned; None if all have."""
    free = (storage.name for storage in rank_layout.storages if storage.dtype is None)
    return next((storages[name].dtype for name in free), None)


def check_storages(rank_layout: RankLayout, storages: Mapping[str, Tensor]) -> None:
    """Require ``storages`` to be exactly those of ``rank_layout``, of one dtype where not pinned.

    Raises:
        LayoutError: names, shapes or dtypes differ; the message lists every difference.
    """
    declared = {storage.name: storage for storage in rank_layout.storages}
    problems = [
        f"storage {name} is not declared by the layout"
        for name in storages.keys() - declared.keys()
    ]
    dtypes: set[str] = set()
    for name, storage in declared.items():
        if name not in storages:
            problems.append(f"storage {name} {list(storage.shape)} is missing")
            continue
        tensor = storages[name]
        if tuple(tensor.shape) != storage.shape:
            problems.append(
                f"storage {name} has shape {list(tensor.shape)}, the layout says "
                f"{list(storage.shape)}"
            )
        if storage.dtype is None:
            dtypes.add(str(tensor.dtype))
        elif tensor.dtype != _PINNED[storage.dtype]:
            problems.append(
                f"storage {name} is {tensor.dtype}, the layout says {_PINNED[storage.dtype]}"
            )
    if len(dtypes) > 1:
        problems.append(f"storages have several dtypes: {', '.join(sorted(dtypes))}")
    if problems:
        raise LayoutError("\n".join(sorted(problems)))


def tile_view(tile: Tile, storages: Mapping[str, Tensor]) -> Tensor:
    """Return the part of a storage that ``tile`` describes, shaped as its box, without a copy."""
    return storages[tile.storage][tile.storage_box.slices].view(tile.box.shape)


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
