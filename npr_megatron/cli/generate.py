"""``npr generate``: answer prompts with a trained model and draw how it reasoned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from npr_megatron.cli.interrupt import interruptible
from npr_megatron.cli.options import Json
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import Trajectory


class Mode(StrEnum):
    """How to decode."""

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"


def generate(
    model_folder: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="HF folder, such as RUN_DIR/stages/npr/hf.")
    ],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='Read prompts from here too: one per line, or JSONL with "question".'),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="Decode branches at once, or plain text.")
    ] = Mode.PARALLEL,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Budget over all branches; default: half the model's positions."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Key of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Answer prompts with a trained model.

    Examples:

      npr generate runs/quickstart-seed0/stages/npr/hf "a:1+2+9;b:3+5+4;c:7+7+2?"

      npr generate MODEL_DIR --file problems.jsonl --temperature 1 --json
    """
    texts = [*(prompts or []), *(read_prompts(file) if file is not None else [])]
    if not texts:
        raise InputError("no prompt was given; add one in quotes, or --file")
    budget = max_new_tokens or default_budget(model_folder)
    with interruptible("nothing was kept"):
        results = _answer(model_folder, texts, mode.value, temperature, budget, seed)
    for trajectory, pieces in results:
        if as_json:
            answer = "".join(pieces[trajectory.prompt_length :])
            print(json.dumps({"text": answer, "trajectory": trajectory.to_json()}))
        else:
            _draw(trajectory, pieces)


def default_budget(model_folder: Path) -> int:
    """Return half of the positions the model knows, the rest being for the prompt; at most
    8,192."""
    return min(read_trainable_architecture(model_folder).max_position_embeddings // 2, 8192)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in ``path``: lines of text, or the ``question`` of JSON objects
    (``.jsonl``).

    Raises:
        InputError: the file is missing, or a line of a ``.jsonl`` has no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"prompt file {path} does not exist; give a text or .jsonl file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {path} cannot be read: {error}; give UTF-8 text") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in filled]
    return [_question(path, number, line) for number, line in filled]


def _question(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{number} is not JSON ({error}); write one object a line"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise InputError(f'{path}:{number} has no "question" text; write {{"question": "..."}}')
    return record["question"]


def _answer(
    model_folder: Path,
    texts: Sequence[str],
    mode: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> Sequence[tuple[Trajectory, Sequence[str]]]:
    from npr_megatron.config.engine import EngineConfig
    from npr_megatron.pipeline.generate import generate as answer
    from npr_megatron.records.trajectory import DecodeMode

    return answer(
        model_folder,
        texts,
        mode=DecodeMode(mode),
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        engine=EngineConfig(),
    )


def _draw(trajectory: Trajectory, pieces: Sequence[str]) -> None:
    from rich.console import Console

    from npr_megatron.report.tree import trajectory_tree

    Console().print(trajectory_tree(trajectory, pieces))
