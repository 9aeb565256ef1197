"""``npr add-tags``: give a model the eight tags as single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_tags(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL_FOLDER", help="An HF folder.")],
    new_folder: Annotated[Path, typer.Argument(metavar="NEW_FOLDER", help="Written; must not be.")],
) -> None:
    """Copy a model and place the eight tags in spare rows of its embedding.

    Each row starts as the mean of the rows that spell the tag's word. Do this once before a run.

    Example:

      npr add-tags models/Qwen3-4B-Instruct-2507 models/Qwen3-4B-tags
    """
    from npr_megatron.data.tag_rows import add_tags as write_with_tags

    write_with_tags(model_folder, new_folder)
    print(new_folder)
