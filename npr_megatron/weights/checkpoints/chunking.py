"""How a ``torch_dist`` checkpoint is cut into chunks and files: as the ranks that will read it.

Pure. A chunk is one layer's (and one expert's) part of one tensor-parallel rank, so that such a
rank reads whole chunks; gate and up are separate chunks, as Megatron writes them. Chunks above a
size limit are cut further along their rows. A file holds chunks of one pipeline stage and of one
tensor-parallel or expert-parallel rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box
from npr_megatron.weights.layouts.megatron_checkpoint import EMBEDDING_KEY, HEAD_KEY, layer_of
from npr_megatron.weights.tiles import RankLayout, Storage


@dataclass(frozen=True, slots=True)
class ReaderShape:
    """The parallelism of the ranks that will read a checkpoint."""

    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1


@dataclass(frozen=True, slots=True)
class ChunkBox:
    """A box of a storage that is stored in one piece."""

    storage: str
    box: Box


def chunk_groups(
    model: ModelConfig, rank_layout: RankLayout, shape: ReaderShape, max_elements: int
) -> list[list[ChunkBox]]:
    """Return the chunks of all storages, grouped by who reads them first.

    Raises:
        LayoutError: a size is not divisible; the message lists every problem.
    """
    if problems := _problems(model, shape):
        raise LayoutError("\n".join(problems))
    groups: defaultdict[tuple[int, bool, int], list[ChunkBox]] = defaultdict(list)
    for storage in rank_layout.storages:
        for lead in product(*map(range, storage.shape[: _num_leading(storage)])):
            stage = _stage(model, storage.name, lead, shape.pp_size)
            is_expert = ".experts.experts." in storage.name
            for part, box in _parts(storage, lead, shape.tp_size):
                owner = part
                if is_expert and model.moe is not None:
                    owner = lead[-1] * shape.ep_size // model.moe.num_experts
                chunks = [ChunkBox(storage.name, b) for b in row_bands(box, max_elements)]
                groups[(stage, is_expert, owner)] += chunks
    return [groups[key] for key in sorted(groups)]


def _problems(model: ModelConfig, shape: ReaderShape) -> list[str]:
    tp = shape.tp_size
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    qkv_rows = (heads + 2 * kv_heads) * model.head_dim
    sizes = [
        ("num_attention_heads", heads, "--tp", tp),
        ("rows of the fused qkv matrix", qkv_rows, "--tp", tp),
        ("intermediate_size", model.intermediate_size, "--tp", tp),
        ("num_hidden_layers", model.num_hidden_layers, "--pp", shape.pp_size),
    ]
    if (moe := model.moe) is not None:
        sizes += [
            ("moe_intermediate_size", moe.moe_intermediate_size, "--tp", tp),
            ("shared_intermediate_size", moe.shared_intermediate_size, "--tp", tp),
        ]
    sizes.append(("num_experts", moe.num_experts if moe else 1, "--ep", shape.ep_size))
    problems = [
        f"{name} {value} is not a multiple of {option} {size}; choose a divisor"
        for name, value, option, size in sizes
        if value % size
    ]
    if kv_heads % tp and tp % kv_heads:
        problems.append(
            f"num_key_value_heads {kv_heads} and --tp {tp} do not divide each other; choose a "
            "divisor or a multiple of the number of kv heads"
        )
    return problems


def _num_leading(storage: Storage) -> int:
    """Return how many axes of ``storage`` number layers and experts."""
    return len(storage.shape) - (2 if _is_matrix(storage.name) else 1)


def _is_matrix(key: str) -> bool:
    return not key.endswith(("norm.weight", "norm_weight", "expert_bias"))


def _stage(model: ModelConfig, key: str, lead: tuple[int, ...], pp_size: int) -> int:
    if key == EMBEDDING_KEY:
        return 0
    layer = layer_of(key, lead)
    return pp_size - 1 if layer is None else layer * pp_size // model.num_hidden_layers


def _parts(storage: Storage, lead: tuple[int, ...], tp_size: int) -> Iterator[tuple[int, Box]]:
    """Yield the box of each tensor-parallel rank, with its rank, at ``lead``."""
    size = storage.shape[len(lead) :]
    inner = Box((0,) * len(size), size)
    cuts: list[tuple[int, Box]] = [(0, inner)]
    if storage.name.endswith(("linear_qkv.weight", EMBEDDING_KEY, HEAD_KEY)):
        cuts = list(enumerate(_cut(inner, 0, tp_size)))
    elif storage.name.endswith("linear_fc1.weight"):
        cuts = [(i % tp_size, box) for i, box in enumerate(_cut(inner, 0, 2 * tp_size))]
    elif storage.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        cuts = list(enumerate(_cut(inner, 1, tp_size)))
    for rank, box in cuts:
        yield rank, Box(lead + box.start, tuple(i + 1 for i in lead) + box.stop)


def _cut(box: Box, axis: int, num_parts: int) -> Iterator[Box]:
    """Yield about equal parts of ``box`` along ``axis``, as Megatron cuts a padded vocabulary."""
    size = box.stop[axis]
    step = -(-size // num_parts)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield Box(
            (*box.start[:axis], start, *box.start[axis + 1 :]),
            (*box.stop[:axis], stop, *box.stop[axis + 1 :]),
        )


def row_bands(box: Box, max_elements: int) -> Iterator[Box]:
    """Yield bands of the rows of ``box`` (its last axis but one) of at most ``max_elements``."""
    axis = max(len(box.start) - 2, 0)
    per_row = math.prod(box.shape[:axis] + box.shape[axis + 1 :])
    step = max(1, max_elements // per_row)
    for start in range(box.start[axis], box.stop[axis], step):
        stop = min(start + step, box.stop[axis])
        yield Box(
            (*box.start[:axis], start, *box.start[axis + 1 :]),
            (*box.stop[:axis], stop, *box.stop[axis + 1 :]),
        )
