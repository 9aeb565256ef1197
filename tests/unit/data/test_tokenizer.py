"""The tokenizer is held against transformers and against the text it should spell."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from npr_megatron.data.sums_tokenizer import SUMS_TOKENS
from npr_megatron.data.tokenizer import TextStream, load_tokenizer
from npr_megatron.errors import InputError
from npr_megatron.schema.tags import Tag

TEXT = "a=3+5;b=2?\n<guideline>\n<plan>1:a</plan>\n</guideline>\n\\boxed{8,2}<eos>"


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_loads_the_sums_tokenizer_and_agrees(sums, sums_folder, loader):
    theirs = loader.from_pretrained(sums_folder)
    assert theirs.encode(TEXT, add_special_tokens=False) == sums.encode(TEXT)
    assert theirs.decode(sums.encode(TEXT)) == TEXT
    assert {str(tag) for tag in Tag} <= set(theirs.all_special_tokens) | set(
        theirs.get_added_vocab()
    )


def test_the_sums_vocabulary_is_the_order_of_its_tokens(sums):
    assert [sums.encode(token) for token in SUMS_TOKENS] == [[i] for i in range(len(SUMS_TOKENS))]
    assert sums.num_tokens == len(SUMS_TOKENS)
    assert sums.num_tokens % 8 == 0


def test_every_id_of_the_vocabulary_spells_its_role(sums):
    vocabulary = sums.vocabulary
    assert [sums.decode([token_id]) for token_id in vocabulary.tags] == list(Tag)
    assert sums.decode([vocabulary.newline]) == "\n"
    assert sums.decode([vocabulary.eos]) == "<eos>"
    assert [sums.decode(ids) for ids in vocabulary.index_ids] == ["1:", "2:", "3:", "4:", "5:"]
    assert {sums.decode([token_id]) for token_id in vocabulary.blank_ids} == {"\n", " "}


def test_decode_keeps_special_tokens_and_pieces_join_to_the_text(sums):
    ids = sums.encode(TEXT)
    assert sums.decode(ids) == TEXT
    assert "".join(sums.pieces(ids)) == TEXT
    assert sums.decode([sums.num_tokens + 3]) == ""


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    """A tokenizer in which every byte is an id: each character beyond ASCII takes several."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in Tag])
    rust.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    rust.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def test_a_character_of_several_ids_appears_with_its_last_id(of_bytes):
    text = "<step>\n1: \u2200x \u2208 \U0001d53d\u2082</step>"
    ids = of_bytes.encode(text)
    pieces = of_bytes.pieces(ids)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece][-3:] == ["\U0001d53d", "\u2082", "</step>"]
    stream = TextStream(of_bytes)
    assert [stream.add(token_id) for token_id in ids] == pieces


def test_bytes_that_are_no_character_hide_no_tag(of_bytes):
    broken = of_bytes.encode("\u2200")[:2]
    ids = [*broken, of_bytes.vocabulary.step_close, *broken * 8]
    assert of_bytes.pieces(ids)[2] == "</step>"
    stream = TextStream(of_bytes)
    texts = [stream.add(token_id) for token_id in ids]
    assert texts[2] == "</step>"
    assert "\ufffd" in "".join(texts[3:])  # shown in the end, not kept back for ever


def test_max_plans_decides_how_many_headers_are_spelt(sums_folder):
    assert load_tokenizer(sums_folder, max_plans=9).vocabulary.max_plans == 9


def test_a_character_without_token_is_refused(sums):
    with pytest.raises(InputError, match="no token for one of its characters"):
        sums.encode("a=3*5")


def test_a_tokenizer_without_tags_is_refused_naming_every_offender(chat_folder):
    with pytest.raises(InputError) as refusal:
        load_tokenizer(chat_folder)
    message = str(refusal.value)
    assert all(f"{tag} is [" in message for tag in Tag)
    assert "newline" in message.split("found")[0]
    assert "a newline is" not in message, "the newline of this tokenizer is fine"
    assert "add-tags" in message


def test_a_tag_that_swallows_the_newline_behind_it_is_refused(sums_folder, tmp_path):
    description = json.loads((sums_folder / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        if token["content"] == "<plan>":
            token["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(
        (sums_folder / "tokenizer_config.json").read_text()
    )
    swallowing = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(swallowing.encode("<plan>\n").ids) == 1, "the control does not swallow"
    with pytest.raises(InputError, match="found: <plan> is"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_end_token_is_refused(sums_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((sums_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(InputError, match="end token is None"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
