"""``npr generate`` under torchrun: several processes answer as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.data.sums_tokenizer import SUMS_TOKENS, build_sums_tokenizer
from npr_megatron.weights.checkpoints.hf import random_init, write_hf

MODEL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    intermediate_size=256,
    vocab_size=len(SUMS_TOKENS),
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python")
ASK = ("a:1+2?", "b:3+4?", "NOT SPELT", "--temperature", "1", "--max-new-tokens", "30")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    build_sums_tokenizer(folder / "tokenizer")
    tensors = random_init(MODEL, InitConfig(embedding_std=0.3), seed=1)
    write_hf(folder / "model", MODEL, tensors, source_folder=folder / "tokenizer")
    return folder / "model"


def npr(launcher, *arguments):
    command = [*launcher, BIN / "npr", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_two_processes_print_the_answers_and_refusals_of_one_once(model):
    asked = (model, *ASK, "--weights", "fp8", "--json")
    alone, together = (npr(launcher, *asked) for launcher in ((), TORCHRUN))
    assert alone.returncode == 2 and together.returncode != 0
    for ended in (alone, together):
        assert ended.stderr.count("1 of 3 prompts was refused") == 1
    lines = [
        sorted(map(json.loads, ended.stdout.splitlines()), key=lambda x: x["id"])
        for ended in (alone, together)
    ]
    for expected, mine in zip(*lines, strict=True):
        assert mine["text"] == expected["text"]
        logprobs = [line["trajectory"]["logprobs"] for line in (mine, expected)]
        np.testing.assert_allclose(*logprobs, atol=1e-5, rtol=0)
    assert len({line["text"] for line in lines[0]}) == 2
