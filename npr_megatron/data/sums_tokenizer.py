"""The character-level tokenizer of the built-in sums task, as files every HF library loads.

One id per character plus the eight tags, ``\\boxed{``, the end and padding. Nothing merges, so a
text has exactly one spelling in ids.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from npr_megatron.schema.tags import Tag

PAD = "<pad>"
EOS = "<eos>"
BOXED = "\\boxed{"
_SPECIAL = (PAD, EOS, *(tag.value for tag in Tag))
SUMS_TOKENS: tuple[str, ...] = (
    *_SPECIAL,
    BOXED,
    "}",
    "\n",
    *string.digits,
    *string.ascii_lowercase,
    *"=+;:,? ",
)
"""Every token in the order of its id; 56, a multiple of 8, so tensor parallelism divides it."""


def build_sums_tokenizer(folder: str | Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SUMS_TOKENS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(BOXED, normalized=False)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
