"""Adding the tags to a model that does not know them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.tag_rows import add_tags, init_tag_rows
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.errors import InputError
from npr_megatron.schema.tags import Tag

NUM_ROWS = 320


@pytest.fixture
def model_folder(chat_folder, tmp_path):
    """An untied bf16 model of two shards with spare embedding rows."""
    folder = tmp_path / "model"
    shutil.copytree(chat_folder, folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": NUM_ROWS}))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(NUM_ROWS, 4, generator=generator).bfloat16()
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    }
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    save_file(tensors, folder / "model-1.safetensors", metadata={"format": "pt"})
    save_file(head, folder / "model-2.safetensors", metadata={"format": "pt"})
    return folder


def test_each_tag_becomes_one_token_and_old_text_keeps_its_ids(model_folder, tmp_path):
    before = AutoTokenizer.from_pretrained(model_folder)
    add_tags(model_folder, tmp_path / "out")
    after = load_tokenizer(tmp_path / "out")
    assert list(after.vocabulary.tags) == list(range(len(before), len(before) + 8))
    text = "a plan for each step"
    assert after.encode(text) == before.encode(text, add_special_tokens=False)
    assert after.decode(after.encode(f"<plan>1:{text}</plan>\n")) == f"<plan>1:{text}</plan>\n"


def test_new_rows_are_the_mean_of_their_word_and_nothing_else_changes(model_folder, tmp_path):
    before = AutoTokenizer.from_pretrained(model_folder)
    add_tags(model_folder, tmp_path / "out")
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        old, new = load_file(model_folder / shard), load_file(tmp_path / "out" / shard)
        assert old.keys() == new.keys()
        for name, table in old.items():
            wanted = table.float().clone()
            if name != "model.norm.weight":
                for row, tag in enumerate(Tag, start=len(before)):
                    word = before.encode(tag.strip("<>"), add_special_tokens=False)
                    wanted[row] = sum(table[i].float() for i in word) / len(word)
            assert torch.equal(new[name], wanted.bfloat16()), name


def test_a_closer_is_made_from_the_word_with_its_slash(chat_folder):
    hf = AutoTokenizer.from_pretrained(chat_folder)
    assert Tag.PLAN_CLOSE.strip("<>") == "/plan"
    opener, closer = (hf.encode(w, add_special_tokens=False) for w in ("plan", "/plan"))
    table = np.random.default_rng(0).normal(size=(NUM_ROWS, 3))
    rows = init_tag_rows(table, [opener, closer])
    np.testing.assert_allclose(rows[0], table[opener].mean(0), rtol=1e-6)
    assert not np.allclose(rows[0], rows[1])


def test_too_few_spare_rows_are_counted(model_folder, tmp_path):
    num_tokens = len(AutoTokenizer.from_pretrained(model_folder))
    (model_folder / "config.json").write_text(json.dumps({"vocab_size": num_tokens + 7}))
    with pytest.raises(InputError, match=f"8 tags .* {num_tokens} to {num_tokens + 7}"):
        add_tags(model_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_never_overwritten(model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        add_tags(model_folder, tmp_path / "out")


def test_a_chat_model_is_asked_in_one_user_turn_without_thinking(model_folder, tmp_path):
    add_tags(model_folder, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    problem = Problem(id="1", question="How much is 3 + 5?", answer="8")
    ids = PromptBuilder(tokenizer).prompt_ids(problem)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>user\nHow much is 3 + 5?\n\nSolve the problem")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text.count("<|im_start|>") == 2, "there is a system turn"
    assert tokenizer.vocabulary.guideline_open in ids, "the instruction spells tags as tags"
