"""Tokenizers the data tests share."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import load_hf, load_tokenizer
from npr_megatron.schema.tags import Tag

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def sums_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums-tokenizer")
    build_sums_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def sums(sums_folder):
    return load_tokenizer(sums_folder)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A byte-level BPE tokenizer with a chat template and no tags, like that of a real model."""
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a guideline and a plan for each step of the takeaway"], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def chat(chat_folder, tmp_path_factory):
    """The same tokenizer with the eight tags."""
    folder = tmp_path_factory.mktemp("tagged-chat-tokenizer")
    hf = load_hf(chat_folder)
    hf.add_tokens([AddedToken(tag.value, special=True, normalized=False) for tag in Tag])
    hf.save_pretrained(folder)
    return load_tokenizer(folder)
