"""Rollouts made from text, as an engine would have recorded them."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache

import numpy as np

from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import Tokenizer, load_tokenizer
from npr_megatron.errors import LayoutError
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.rewards.reading import Reader
from npr_megatron.topology.layout import layout_of, plain_layout

QUESTION = "a:1+2;b:3+4?"
ANSWER = "3,7"
HEAD = "<guideline>\n<plan>1:a</plan>\n<plan>2:b</plan>\n</guideline>\n"
STEPS = "<step>\n1:a:1+2=3;a=3</step>\n<step>\n2:b:3+4=7;b=7</step>\n"
TAIL = "<takeaway>\n3,7</takeaway>\n\\boxed{3,7}<eos>"
GOOD = HEAD + STEPS + TAIL
PLAIN = "a:1+2=3;a=3\nb:3+4=7;b=7\n\\boxed{3,7}<eos>"


@cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        build_sums_tokenizer(folder)
        return load_tokenizer(folder)


def reader() -> Reader:
    return Reader(tokenizer().decode, tokenizer().vocabulary)


def rollout(
    response: str,
    mode: DecodeMode = DecodeMode.PARALLEL,
    *,
    prompt_id: str = "p",
    **changes: object,
) -> Trajectory:
    """A rollout that says ``response``; its finish is what an engine would say unless changed."""
    prompt = tokenizer().encode(f"{QUESTION}\n")
    ids = prompt + tokenizer().encode(response)
    finish = FinishReason.STOP if response.endswith("<eos>") else FinishReason.LENGTH
    layout = plain_layout(len(ids), len(prompt))
    if mode is DecodeMode.PARALLEL:
        try:
            layout = layout_of(ids, len(prompt), tokenizer().vocabulary)
        except LayoutError:
            finish = FinishReason.MALFORMED
    trajectory = Trajectory(
        prompt_id=prompt_id,
        rollout=0,
        mode=mode,
        prompt_length=len(prompt),
        token_ids=ids,
        position_ids=layout.position_ids,
        block=layout.block,
        branch=layout.branch,
        forced=layout.forced,
        logprobs=np.zeros(len(ids)),
        weight_versions=np.zeros(len(ids)),
        finish=finish,
    )
    return dataclasses.replace(trajectory, **changes)
