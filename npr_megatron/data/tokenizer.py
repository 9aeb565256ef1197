"""A Hugging Face tokenizer of which it is proven that every tag is one token.

Invariants: ``decode`` keeps special tokens, ``encode`` adds none, and ids are never re-tokenised by
anything that uses this class. It does not change a tokenizer; adding the tags to one is
``data.tag_rows.add_tags``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from npr_megatron.errors import InputError
from npr_megatron.schema.tags import Tag, Vocabulary

_HOW_TO_ADD_TAGS = (
    "give the model a tokenizer in which each of them is one token: "
    "`npr add-tags MODEL_FOLDER NEW_FOLDER` places the tags in spare rows"
)

_BROKEN = "\ufffd"
"""What part of a character decodes to."""
_LONGEST_CHARACTER = 8
"""Ids after which what is no character yet will be none."""


class Tokenizer:
    """Text to ids and back, and the vocabulary the grammar needs."""

    def __init__(self, backend: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
        self._hf = backend
        self._rust = backend.backend_tokenizer
        self.vocabulary = vocabulary

    @property
    def num_tokens(self) -> int:
        """Entries of the tokenizer; a model may have more embedding rows."""
        return len(self._hf)

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are turns of a conversation."""
        return self._hf.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, nothing added.

        Raises:
            InputError: the tokenizer has no token for a character of ``text``.
        """
        return _encode(self._hf, text)

    def encode_user_turn(self, text: str) -> list[int]:
        """Return the ids of one user turn and the opening of the answer, thinking disabled.

        Special tokens that ``text`` spells, the tags among them, become their ids. Needs a chat
        template.
        """
        return self.encode_turns([("user", text)])

    def encode_turns(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of turns (role, text) and the opening of the answer, as a single user turn
        is encoded.

        Raises:
            InputError: the chat template refuses the turns, or a character has no token.
        """
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            conversation = self._hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError as error:
            roles = ", ".join(role for role, _ in turns)
            raise InputError(
                f"turns of {roles} were to be encoded; the model's chat template refuses them "
                f"({error}); send turns it knows"
            ) from error
        return self.encode(str(conversation))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, special tokens included; ids without an entry are empty."""
        return self._rust.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the text of each id, for views that show tokens one by one.

        The text of a character that is spread over several ids is given to the last of them.
        """
        known = [int(i) for i in ids]
        texts: list[str] = self._rust.decode_batch([[i] for i in known], skip_special_tokens=False)
        if not any(_BROKEN in text for text in texts):
            return texts
        run: list[int] = []
        for index, text in enumerate(texts):
            if _BROKEN not in text:
                run.clear()  # what stands there was no character
                continue
            if len(run) == _LONGEST_CHARACTER:
                run.clear()
            run.append(index)
            whole = self.decode(known[i] for i in run)
            if not whole.endswith(_BROKEN):
                for earlier in run:
                    texts[earlier] = ""
                texts[index] = whole
                run.clear()
        return texts


class TextStream:
    """Text of one stream of ids as they come.

    Example, in a byte-level tokenizer that spells the sign for "for all" with two ids::

        stream.add(5) == ""; stream.add(6) == "\\u2200"
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes: nothing in the middle of a character."""
        text = self._tokenizer.decode([token_id])
        if _BROKEN in text:
            self._pending.append(token_id)
            text = self._tokenizer.decode(self._pending)
            if text.endswith(_BROKEN) and len(self._pending) < _LONGEST_CHARACTER:
                return ""
        self._pending.clear()
        return text


def load_tokenizer(folder: str | Path, *, max_plans: int = 5) -> Tokenizer:
    """Load the tokenizer of an HF folder and prove that it can speak the tag language.

    Args:
        folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.
        max_plans: largest number of branches per fork; that many headers ``i:`` are spelt.

    Raises:
        InputError: no tokenizer in ``folder``, or it lacks a tag, the newline or the end token (all
            are listed).
    """
    hf = load_hf(folder)
    return Tokenizer(hf, vocabulary_of(hf, max_plans=max_plans, name=str(folder)))


def load_hf(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of ``folder`` as it is, from local files only.

    Raises:
        InputError: there is none, or it is not backed by a ``tokenizer.json``.
    """
    path = Path(folder)
    if not (path / "tokenizer.json").is_file():
        raise InputError(
            f"a tokenizer was asked for in {path}; found no file tokenizer.json there; "
            "name a Hugging Face folder that holds tokenizer.json and tokenizer_config.json"
        )
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def vocabulary_of(hf: PreTrainedTokenizerFast, *, max_plans: int, name: str) -> Vocabulary:
    """Prove that tags, newline and end are single tokens and return their ids.

    A tag must be one token wherever it stands, so each is encoded alone and between letters and
    newlines.

    Raises:
        InputError: naming the tokenizer ``name`` and every offender with the ids it was split into.
    """
    newline_ids = _encode(hf, "\n")
    offenders = [f"{tag} is {_encode(hf, tag)}" for tag in Tag if not _is_one_token(hf, tag)]
    if len(newline_ids) != 1:
        offenders.append(f"a newline is {newline_ids}")
    eos = hf.eos_token_id
    if not isinstance(eos, int):
        offenders.append(f"the end token is {eos}")
    if offenders:
        raise InputError(
            f"each of the eight tags, the newline and the end must be one token of {name}; "
            f"found: {'; '.join(offenders)}; {_HOW_TO_ADD_TAGS}"
        )
    assert isinstance(eos, int)
    tag_ids = [_encode(hf, tag)[0] for tag in Tag]
    return Vocabulary(
        **dict(zip((tag.name.lower() for tag in Tag), tag_ids, strict=True)),
        newline=newline_ids[0],
        eos=eos,
        index_ids=tuple(tuple(_encode(hf, f"{i}:")) for i in range(1, max_plans + 1)),
        blank_ids=_blank_ids(hf),
    )


def _is_one_token(hf: PreTrainedTokenizerFast, tag: str) -> bool:
    alone = _encode(hf, tag)
    return len(alone) == 1 and all(
        _encode(hf, before + tag + after) == [*_encode(hf, before), *alone, *_encode(hf, after)]
        for before, after in (("a", "a"), ("\n", "\n"), ("a", "\n"))
    )


def _blank_ids(hf: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids that decode to white space or to nothing."""
    texts = hf.backend_tokenizer.decode_batch(
        [[i] for i in range(len(hf))], skip_special_tokens=False
    )
    return frozenset(i for i, text in enumerate(texts) if not text.strip())


def _encode(hf: PreTrainedTokenizerFast, text: str) -> list[int]:
    try:
        return hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the Rust library raises bare Exception
        raise InputError(
            f"text was to be encoded: {text[:80]!r}; the tokenizer has no token for one of its "
            f"characters ({error}); use characters of its vocabulary"
        ) from error
