"""What ranks of one engine do in these tests: weights by version, requests, groups."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.compute.model import storage_layout
from npr_megatron.engine.compute.quantised import quantising_reader
from npr_megatron.engine.compute.ranks import Ranks
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.weights.layouts.served import Quantisation
from npr_megatron.weights.storages import box_reader, load_tiles, tile_view
from tests.engines import UNTIED, random_weights, request_for, skeleton_of, steered_weights
from tests.structures import SMALL, WORDS
from tests.unit.engine.test_decoding import PROMPT, RESPONSE

FP8 = UNTIED.model_copy(
    update={"hidden_size": 128, "head_dim": 128, "intermediate_size": 256, "vocab_size": 48}
)
SKELETON = skeleton_of([*PROMPT, *RESPONSE], len(PROMPT), SMALL)
CPU = torch.device("cpu")


def canonical(model, version):
    """What a checkpoint holds; a head of its own speaks words only, so that trees grow to their
    end."""
    if model.tie_word_embeddings:
        storages = random_weights(model, version)
    else:
        storages = steered_weights(model, version, WORDS)
    parameters = {}
    for tile in storage_layout(model).ranks[0].tiles:
        parameters[tile.parameter] = tile_view(tile, storages)
    return parameters


def fill(storages, model, config, version, rank=0, size=1):
    """Load a rank's shard of version ``version``, as from a checkpoint."""
    read = box_reader(canonical(model, version))
    if config.weights == "fp8":
        read = quantising_reader(read, Quantisation.of(model))
    load_tiles(storage_layout(model, size, config.weights).ranks[rank], read, storages)


def config_of(weights="as_trained"):
    return EngineConfig(
        num_kv_slots=2048,
        debug_checks=True,
        kv_after_push="recompute",
        weights=weights,
        record_routes=True,
    )


def add_requests(engine):
    """Trees of two forks whose words are sampled, and texts of plain sequential decoding."""
    for seed in range(2):
        engine.add(request_for(PROMPT, rollout=seed, seed=seed, max_new_tokens=120), SKELETON)
        engine.add(
            request_for(
                PROMPT[seed:],
                prompt_id="s",
                rollout=seed,
                seed=seed,
                mode=DecodeMode.SEQUENTIAL,
                max_new_tokens=20,
            )
        )


@contextmanager
def ranks_of(rank, size, init_method, timeout_s=60.0, kind=Ranks):
    torch.set_num_threads(1)
    ranks = kind.join(rank, size, init_method, device=CPU, timeout_s=timeout_s)
    yield ranks
    ranks.leave()
