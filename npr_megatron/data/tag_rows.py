"""Give a real model the eight tags, in spare embedding rows made from the words of the tags.

The embedding table keeps its size, so tensor-parallel padding and checkpoint conversion stay as
they were (spec: npr.md 1.3). Weights other than the embedding (and an untied LM head) are copied as
they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AddedToken, PreTrainedTokenizerFast

from npr_megatron.data.tokenizer import load_hf, load_tokenizer
from npr_megatron.errors import InputError
from npr_megatron.schema.tags import Tag

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def add_tags(folder_in: str | Path, folder_out: str | Path) -> None:
    """Write a copy of an HF model whose tokenizer has each tag as one special token.

    The tags take the ids after the tokenizer's last, i.e. spare rows of the embedding, which are
    initialised by :func:`init_tag_rows`. ``folder_out`` appears complete or not at all.

    Raises:
        InputError: ``folder_out`` exists, ``folder_in`` is no model, or it has fewer spare rows
            than missing tags.
    """
    source, target = Path(folder_in), Path(folder_out)
    if target.exists():
        raise InputError(
            f"the model with tags was to be written to {target}; it exists; name a new folder"
        )
    hf = load_hf(source)
    words = {tag: _ids(hf, tag.strip("<>")) for tag in Tag if len(_ids(hf, tag)) != 1}
    hf.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in words])
    rows = [_ids(hf, tag)[0] for tag in words]
    _require_spare_rows(source, rows)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(
        source, partial, ignore=shutil.ignore_patterns("*.safetensors", *_TOKENIZER_FILES)
    )
    hf.save_pretrained(partial)
    for shard in sorted(source.glob("*.safetensors")):
        _copy_shard(shard, partial / shard.name, rows, list(words.values()))
    load_tokenizer(partial)
    partial.rename(target)


def init_tag_rows(
    table: npt.NDArray[np.floating], word_ids: Sequence[Sequence[int]]
) -> npt.NDArray[np.float32]:
    """Return one row per tag: the mean of the rows of the tokens that spell the tag's word.

    Args:
        table: embedding or LM head, [V, H].
        word_ids: ids of ``guideline``, ``/guideline``, ... in the tokenizer without tags.

    Returns:
        [len(word_ids), H] float32.
    """
    return np.stack([table[list(ids)].astype(np.float32).mean(axis=0) for ids in word_ids])


def _require_spare_rows(folder: Path, rows: Sequence[int]) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(
            f"a model was asked for in {folder}; found no config.json; name a Hugging Face folder"
        )
    num_rows = int(json.loads(config.read_text())["vocab_size"])
    if rows and max(rows) >= num_rows:
        raise InputError(
            f"{len(rows)} tags need the embedding rows {min(rows)} to {max(rows)}; {folder} has "
            f"{num_rows} rows; enlarge its embedding (vocab_size) first"
        )


def _copy_shard(
    source: Path, target: Path, rows: Sequence[int], word_ids: Sequence[Sequence[int]]
) -> None:
    """Copy a safetensors file, with new rows where it holds the embedding or the LM head."""
    with safe_open(source, framework="pt") as file:
        tables = [name for name in _TABLES if name in file.keys()]  # noqa: SIM118
        metadata = file.metadata()
    if not tables or not word_ids:
        shutil.copyfile(source, target)
        return
    tensors = load_file(source)
    for name in tables:
        needed = sorted({token_id for ids in word_ids for token_id in ids})
        local = [[needed.index(token_id) for token_id in ids] for ids in word_ids]
        new_rows = init_tag_rows(tensors[name][needed].float().numpy(), local)
        tensors[name][rows] = torch.from_numpy(new_rows).to(tensors[name].dtype)
    save_file(tensors, target, metadata=metadata)


def _ids(hf: PreTrainedTokenizerFast, text: str) -> list[int]:
    return hf.encode(text, add_special_tokens=False)
