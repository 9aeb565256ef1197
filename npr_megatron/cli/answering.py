"""What ``npr generate`` does: refuse what cannot be answered, show and keep what can."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from npr_megatron.cli.answer_file import AnswerFile, answer_line, key_of
from npr_megatron.cli.interrupt import interruptible
from npr_megatron.pipeline.answer_order import AnswerOrder
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FinishReason, Trajectory

if TYPE_CHECKING:
    from npr_megatron.pipeline.generate import Task
    from npr_megatron.report.answer_view import AnswerView

_TITLE_CHARACTERS = 60


def carry_out(order: AnswerOrder, *, output: Path | None, as_json: bool) -> None:
    """Answer, show, print, write; end with 2 if a prompt was refused or an answer failed.

    Args:
        output: file to append answers to; those that are there already are left out.
        as_json: print answers as JSON lines and nothing else on stdout.

    Raises:
        InputError: no usable model or tokenizer, or ``output`` cannot be used.
        EnvironmentFault: this machine does not have the device.
    """
    kept = "finished answers are above"
    if output is not None:
        kept = f"finished answers are in {output}; the same command goes on"
    with interruptible(kept):
        from npr_megatron.pipeline.generate import prepare
        from npr_megatron.pipeline.local_engine import speaks

        file = None if output is None else AnswerFile(output)
        task = prepare(order)
        for refusal in task.refusals if speaks() else ():
            print(f"error: {refusal}", file=sys.stderr)
        if task.num_refused and speaks():
            print(_refused(task.num_refused, len(order.questions)), file=sys.stderr)
        num_failed = _answer(order, task, file, as_json) if task.requests else 0
    if task.num_refused or num_failed:
        raise typer.Exit(2)


def _answer(order: AnswerOrder, task: Task, file: AnswerFile | None, as_json: bool) -> int:
    """Decode what is not there yet; return how many answers failed."""
    from npr_megatron.engine.events import FinishEvent
    from npr_megatron.pipeline.generate import answer

    keys = {request.request_id: key_of(order.model_folder, request) for request in task.requests}
    requests = [r for r in task.requests if file is None or keys[r.request_id] not in file]
    num_failed = 0
    with _view(order, requests, task, file, as_json) as view:
        if not requests:
            return 0
        view.activity(f"reading {order.model_folder}")
        for event, text in answer(task, requests):
            view.take(event, text)
            if not isinstance(event, FinishEvent):
                continue
            trajectory = event.trajectory
            pieces = task.tokenizer.pieces(trajectory.token_ids)
            question = order.questions[trajectory.prompt_id]
            line = answer_line(keys[event.request_id], question, event, pieces)
            if file is not None:
                file.write(line)
            if as_json:
                print(json.dumps(line), flush=True)
            view.show(trajectory, pieces)
            if trajectory.finish is FinishReason.FAILED:
                num_failed += 1
                print(_failed(trajectory), file=sys.stderr)
    return num_failed


def _view(
    order: AnswerOrder,
    requests: Sequence[GenerationRequest],
    task: Task,
    file: AnswerFile | None,
    as_json: bool,
) -> AnswerView:
    from rich.console import Console

    from npr_megatron.pipeline.local_engine import speaks
    from npr_megatron.report.answer_view import AnswerView

    titles = {r.request_id: _title(r, order.questions[r.prompt_id]) for r in requests}
    num_there = len(task.requests) - len(requests)
    return AnswerView(
        Console(quiet=as_json or not speaks(), force_terminal=False if as_json else None),
        len(requests),
        keeps_trees=file is None,
        num_there=num_there,
        name_of=lambda request_id: titles[request_id],
    )


def _title(request: GenerationRequest, question: str) -> str:
    line = " ".join(question.split())
    if len(line) > _TITLE_CHARACTERS:
        line = f"{line[:_TITLE_CHARACTERS]}..."
    return f"{request.prompt_id} #{request.rollout}  {line}"


def _refused(num_refused: int, num_prompts: int) -> str:
    was = "was" if num_refused == 1 else "were"
    return f"{num_refused} of {num_prompts} prompts {was} refused"


def _failed(trajectory: Trajectory) -> str:
    return (
        f"error: {trajectory.prompt_id} #{trajectory.rollout}: {trajectory.finish_detail}; "
        "check the weights of the model"
    )
