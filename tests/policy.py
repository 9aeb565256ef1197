"""A tiny policy that has learnt the tag language, so that forks are sampled and not dictated.

About three of four trajectories it samples end properly, with 1..4 branches per block; the others
break every kind of rule. Learning takes a few seconds, once per process.
"""

from __future__ import annotations

import functools
import random

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from npr_megatron.config.model import ModelConfig
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.topology.layout import layout_of
from npr_megatron.topology.visibility import dense_mask
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from tests.structures import SMALL, WORDS, Structure, random_structure

NUM_STEPS, NUM_ROWS, LEARNING_RATE = 200, 8, 2e-2


def prompt_of(rng: random.Random) -> tuple[int, ...]:
    """A prompt like those it has learnt from."""
    return tuple(rng.choices(WORDS, k=rng.randint(2, 4)))


@functools.cache
def learnt_tensors(model: ModelConfig, vocabulary: Vocabulary = SMALL) -> dict[str, torch.Tensor]:
    """Return canonical tensors after imitation of random structures, branches isolated."""
    torch.manual_seed(0)
    rng = random.Random(0)
    config = Qwen3Config(
        **model.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        attn_implementation="sdpa",
    )
    learner = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, NUM_STEPS)
    for _ in range(NUM_STEPS):
        lessons = [
            random_structure(
                rng, prompt_of(rng), vocabulary, num_blocks=(1, 2), max_branches=4, max_tokens=3
            )
            for _ in range(NUM_ROWS)
        ]
        optimizer.zero_grad()
        _imitation_loss(learner, lessons).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    tensors = {name: tensor.detach() for name, tensor in learner.state_dict().items()}
    if model.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def learnt_weights(model: ModelConfig, vocabulary: Vocabulary = SMALL) -> dict[str, torch.Tensor]:
    """Return the engine's storages of :func:`learnt_tensors`."""
    (layout,) = engine_layout(model).ranks
    storages = empty_storages(layout, torch.float32)
    load_tiles(layout, box_reader(learnt_tensors(model, vocabulary)), storages)
    return storages


def _imitation_loss(learner: Qwen3ForCausalLM, lessons: list[Structure]) -> torch.Tensor:
    """Mean loss of the tokens that an engine would sample, each given its predecessor."""
    length = max(len(lesson.token_ids) for lesson in lessons)
    ids, positions, block, branch = np.zeros((4, len(lessons), length), np.int64)
    segment = np.full_like(ids, -1)
    labels = np.full_like(ids, -1)
    for row, lesson in enumerate(lessons):
        layout = layout_of(lesson.token_ids, lesson.prompt_length, lesson.vocabulary)
        size = len(lesson.token_ids)
        ids[row, :size] = lesson.token_ids
        positions[row, :size] = layout.position_ids
        block[row, :size], branch[row, :size] = layout.block, layout.branch
        segment[row, :size] = 0
        (learnt,) = np.nonzero(~layout.forced)
        labels[row, layout.predecessor[learnt]] = ids[row, learnt]
    logits = learner(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=torch.from_numpy(dense_mask(segment, block, branch))[:, None],
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(labels).flatten(), ignore_index=-1
    )
