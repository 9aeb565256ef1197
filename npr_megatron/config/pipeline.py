"""Which decoder layers each pipeline stage holds: Megatron's rules, by their effect.

A stage holds ``vpp`` chunks. Chunks are filled in the order of the forward pass: chunk 0 of every
stage, then chunk 1 of every stage. The embedding is always in the first chunk, the head in the
last. Layers of multi-token prediction are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError

Chunks = tuple[range, ...]
"""The layers of each chunk of one stage."""


def split_layers(num_layers: int, parallel: ParallelConfig) -> tuple[Chunks, ...]:
    """Return the layers (from 0) of every chunk of every stage.

    Raises:
        LayoutError: the layers cannot be split as asked; the message lists every problem.

    Example:
        12 layers, pp 2, vpp 3: stage 0 holds 0-1, 4-5, 8-9 and stage 1 holds 2-3, 6-7, 10-11.
    """
    if problems := pipeline_problems(num_layers, parallel):
        raise LayoutError("\n".join(problems))
    chunks: list[range] = []
    start = 0
    for count in _chunk_sizes(num_layers, parallel):
        chunks.append(range(start, start + count))
        start += count
    return tuple(tuple(chunks[stage :: parallel.pp_size]) for stage in range(parallel.pp_size))


def pipeline_problems(num_layers: int, parallel: ParallelConfig) -> list[str]:
    """Return one sentence for everything that keeps ``num_layers`` from being split as asked."""
    problems = list(_conflicts(parallel))
    if parallel.pipeline_layout is not None:
        return [*problems, *_string_problems(parallel.pipeline_layout, num_layers, parallel)]
    if _is_uneven(parallel):
        return [*problems, *_uneven_problems(num_layers, parallel)]
    return [*problems, *_even_problems(num_layers, parallel)]


def _chunk_sizes(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Return the number of layers of all chunks, in the order of the forward pass."""
    if parallel.pipeline_layout is not None:
        return [chunk.count("t") for chunk in _unrolled(parallel.pipeline_layout).split("|")]
    if _is_uneven(parallel):
        stages = _stage_sizes(num_layers, parallel)
        return [size // parallel.vpp_size for _ in range(parallel.vpp_size) for size in stages]
    num_chunks = parallel.pp_size * parallel.vpp_size
    sizes = [_num_slots(num_layers, parallel) // num_chunks] * num_chunks
    sizes[0] -= parallel.account_for_embedding_in_pipeline_split
    sizes[-1] -= parallel.account_for_loss_in_pipeline_split
    return sizes


def _is_uneven(parallel: ParallelConfig) -> bool:
    given = (parallel.num_layers_in_first_stage, parallel.num_layers_in_last_stage)
    return given != (None, None)


def _num_slots(num_layers: int, parallel: ParallelConfig) -> int:
    """Layers to be shared out evenly, embedding and loss among them where they count as one."""
    return (
        num_layers
        + parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )


def _stage_sizes(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each stage, those of the first and the last as given; the rest shares evenly."""
    first, last = parallel.num_layers_in_first_stage, parallel.num_layers_in_last_stage
    middle = parallel.pp_size - (first is not None) - (last is not None)
    share = (num_layers - (first or 0) - (last or 0)) // max(1, middle)
    sizes = [share] * parallel.pp_size
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    return sizes


def _unrolled(layout: str) -> str:
    """Return Megatron's layout string without commas and repetitions, brackets first."""
    layout = layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(repeated, lambda found: found[1] * int(found[2]), layout)
    return layout


def _conflicts(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.vpp_size > 1 and parallel.pp_size == 1:
        yield (
            f"parallel.vpp_size {parallel.vpp_size} interleaves chunks over stages and there is "
            "one stage; set vpp_size = 1"
        )
    accounting = (
        parallel.account_for_embedding_in_pipeline_split
        or parallel.account_for_loss_in_pipeline_split
    )
    if accounting and _is_uneven(parallel):
        yield (
            "parallel.num_layers_in_first_stage or num_layers_in_last_stage and an "
            "account_for_... flag both shift layers between stages; keep one of them"
        )
    if parallel.pipeline_layout is not None and (accounting or _is_uneven(parallel)):
        yield (
            "parallel.pipeline_layout replaces num_layers_in_first_stage, num_layers_in_last_stage "
            "and the account_for_... flags; remove them"
        )


def _string_problems(layout: str, num_layers: int, parallel: ParallelConfig) -> Iterator[str]:
    named = f"parallel.pipeline_layout {layout!r}"
    unrolled = _unrolled(layout)
    chunks, letters = unrolled.split("|"), unrolled.replace("|", "")
    if "m" in letters:
        yield f"{named} places layers of multi-token prediction (m), which have no layout; drop m"
    if unknown := sorted(set(letters) - set("EtLm")):
        yield f"{named} holds {', '.join(map(repr, unknown))}; use E, t, L, |, ',' and (...)*n"
    num_chunks = parallel.pp_size * parallel.vpp_size
    if len(chunks) != num_chunks:
        yield (
            f"{named} has {len(chunks)} chunks, parallel.pp_size {parallel.pp_size} * vpp_size "
            f"{parallel.vpp_size} are {num_chunks}; change one of them"
        )
    if letters.count("E") != 1 or not chunks[0].startswith("E"):
        yield f"{named} must begin with its one E, the embedding; move it there"
    if letters.count("L") != 1 or not chunks[-1].endswith("L"):
        yield f"{named} must end with its one L, the loss; move it there"
    if letters.count("t") != num_layers:
        yield (
            f"{named} places {letters.count('t')} layers, num_hidden_layers is {num_layers}; "
            "write one t for each layer"
        )


def _uneven_problems(num_layers: int, parallel: ParallelConfig) -> Iterator[str]:
    pp, vpp = parallel.pp_size, parallel.vpp_size
    if pp == 1:
        yield (
            "parallel.num_layers_in_first_stage or num_layers_in_last_stage is set and there is "
            "one stage; remove it"
        )
        return
    sizes = _stage_sizes(num_layers, parallel)
    if min(sizes) < 1:
        yield (
            f"num_hidden_layers {num_layers} over parallel.pp_size {pp} makes stages of {sizes} "
            "layers; leave at least one for each, or use pipeline_layout"
        )
    if sum(sizes) != num_layers:
        yield (
            f"num_hidden_layers {num_layers} over parallel.pp_size {pp} makes stages of {sizes} "
            f"layers, {sum(sizes)} together; change num_layers_in_first_stage or "
            "num_layers_in_last_stage"
        )
    if uneven := [size for size in sizes if size % vpp]:
        yield (
            f"a stage of {uneven[0]} layers is not a multiple of parallel.vpp_size {vpp}; change "
            "vpp_size or the number of layers of the stage"
        )


def _even_problems(num_layers: int, parallel: ParallelConfig) -> Iterator[str]:
    slots, pp, vpp = _num_slots(num_layers, parallel), parallel.pp_size, parallel.vpp_size
    counted = "" if slots == num_layers else f" and {slots - num_layers} counted as layers"
    if slots % pp:
        yield (
            f"num_hidden_layers {num_layers}{counted} is not a multiple of parallel.pp_size {pp}; "
            "choose a divisor of the number of layers"
        )
    elif slots % (pp * vpp):
        yield (
            f"num_hidden_layers {num_layers}{counted} is not a multiple of parallel.pp_size {pp} * "
            f"vpp_size {vpp}; change vpp_size"
        )
