"""Conversations of a model with a chat template, and characters that take several tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.data.prompts import INSTRUCTION
from npr_megatron.schema.tags import Tag
from npr_megatron.weights.checkpoints.hf import random_init, write_hf
from tests.serving.live import serving
from tests.unit.data.conftest import CHAT_TEMPLATE

SPECIAL = [*Tag, "<|im_start|>", "<|im_end|>"]
ONLY_TALK = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """A random model over single bytes: most of what it says is no text."""
    folder = tmp_path_factory.mktemp("babbler") / "hf"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = ModelConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        vocab_size=len(alphabet) + len(SPECIAL),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    write_hf(folder, model, random_init(model, InitConfig(embedding_std=0.5), seed=0))
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE.replace("{% for", ONLY_TALK + "{% for", 1),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with serving(folder) as live:
        yield live


TURNS: list[Any] = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "\u2200 2"},
    {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "2?"}]},
]


def test_a_conversation_is_asked_in_the_words_of_its_training(babbler):
    answer = babbler.client.chat.completions.create(model="speaker", messages=TURNS, max_tokens=2)
    asked = (
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n\u2200 2<|im_end|>\n"
        f"<|im_start|>user\nand 2?\n\n{INSTRUCTION}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    ids = babbler.served.tokenizer.encode(asked)
    assert answer.usage.prompt_tokens == len(ids)
    text = answer.choices[0].message.content
    raw = babbler.client.completions.create(model="speaker", prompt=ids, max_tokens=2, seed=1)
    same = babbler.client.completions.create(model="speaker", prompt=asked, max_tokens=2, seed=1)
    chat = babbler.client.chat.completions.create(
        model="speaker", messages=TURNS, max_tokens=2, seed=1
    )
    assert text is not None
    assert raw.choices[0].text == same.choices[0].text == chat.choices[0].message.content


def test_turns_that_the_template_refuses_are_a_clear_no(babbler):
    turns = [{"role": "developer", "content": "be brief"}, *TURNS]
    status, _, told = babbler.ask("POST", "/v1/chat/completions", {"messages": turns})
    assert status == 400
    assert "chat template refuses them (no system turns)" in told["error"]["message"]


def test_streams_of_broken_and_whole_characters_join_to_the_answer(babbler):
    seen = set()
    for seed in range(12):
        asked: dict[str, Any] = {
            "model": "speaker",
            "prompt": "\u2200x \U0001d53d\n",
            "seed": seed,
            "max_tokens": 200,
            "temperature": 2.0,
            "extra_body": {"npr": {"mode": "sequential"}},
        }
        whole = babbler.client.completions.create(**asked)
        chunks = list(babbler.client.completions.create(**asked, stream=True))
        text = whole.choices[0].text
        assert "".join(c.choices[0].text for c in chunks) == text
        assert all(c.choices[0].text for c in chunks[:-1])  # no chunk that says nothing
        seen |= set(text)
    assert "\ufffd" in seen
    assert any(ord(sign) > 0x7F for sign in seen - {"\ufffd"})
