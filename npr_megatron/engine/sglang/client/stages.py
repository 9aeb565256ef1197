"""What SGLang is asked for a line, given what its flow has placed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from npr_megatron.engine.flow.flow import Flow, Teacher
from npr_megatron.engine.sglang.client.lines import Line
from npr_megatron.engine.sglang.client.rows import Row, runs_of
from npr_megatron.engine.sglang.client.stops import Stops
from npr_megatron.engine.sglang.stage import UNTAUGHT, Budget, Draw, Stage
from npr_megatron.records.randomness import branch_key
from npr_megatron.records.request import GenerationRequest
from npr_megatron.schema.tags import Vocabulary


def draw_problems(request: GenerationRequest) -> list[str]:
    """Return one sentence for each wish about the draw that no stage can carry out."""
    return [
        f"request {request.request_id}: {name} is {getattr(request, name)} and the SGLang backend "
        "samples without penalties; leave it at 1.0 or use the embedded backend"
        for name in ("repetition_penalty", "step_repetition_penalty")
        if getattr(request, name) != 1.0
    ]


def trunk_row(flow: Flow) -> Row:
    """Return the row of everything joined: up to the end of the trunk, or to the open branches."""
    branches = {id(stream.segment) for stream in flow.branches}
    return Row.of(runs_of([x for x in flow.segments if id(x) not in branches]))


def fork_row(flow: Flow) -> Row:
    """Return the row behind which a fork that is due opens its branches."""
    row = trunk_row(flow)
    row.token_ids.append(flow.grammar.vocabulary.newline)
    return row


def block_row(flow: Flow) -> Row:
    """Return the row of a join that is due: with every branch, newlines that are due included."""
    newline = flow.grammar.vocabulary.newline
    row, branches = trunk_row(flow), [stream.segment for stream in flow.branches]
    runs = [
        replace(run, token_ids=[*run.token_ids, newline]) if stream in flow.due else run
        for run, stream in zip(runs_of(branches), flow.branches, strict=True)
    ]
    row.close(runs)
    return row


def decode_stage(flow: Flow, line: Line, row: Row, template: Stage, stops: Stops) -> Stage:
    """Return the stage that samples the next tokens of ``line``; with ``max_new_tokens`` of 0 or
    less where the budget has none left.

    A line without a stream is a fork or join that is sent before the flow places it: its header is
    scored, and the separator in front of a branch.
    """
    own = line.own_ids
    is_ahead = line.stream is None
    if line.branch:
        stage = row.branch(template, own)
        score_from = len(row.token_ids) - 2
        wanted = stops.branch
    else:
        stage = row.trunk(template, own if is_ahead else ())
        score_from = row.num_held
        wanted = stops.plain if flow.is_plain else stops.trunk
    num_left = flow.request.max_new_tokens - _num_placed(flow, line)
    num_tokens = min(num_left - len(line.received), _path_left(flow, stage))
    return replace(
        stage,
        keeps=True,
        score_from=score_from if is_ahead else None,
        max_new_tokens=num_tokens,
        stop_ids=wanted,
        draw=_draw(flow, line, num_tokens),
        budget=_budget(flow, line, template.trajectory, num_left),
    )


def seal_stage(line: Line, row: Row, template: Stage, vocabulary: Vocabulary) -> Stage:
    """Return the stage that computes the end of a closed branch.

    It scores the newline, and a ``</step>`` in front of it that was not sampled.
    """
    own = line.own_ids
    if line.is_forced:
        own[-1] = vocabulary.step_close
    if own[-1] != vocabulary.newline or line.received:
        own.append(vocabulary.newline)
    stage = row.branch(template, own)
    num_scored = 2 if line.is_forced else 1
    return replace(stage, keeps=True, score_from=len(stage.token_ids) - 1 - num_scored)


def _num_placed(flow: Flow, line: Line) -> int:
    """Return the tokens of the flow once the header of ``line`` is placed."""
    vocabulary = flow.grammar.vocabulary
    if line.stream is not None:
        return flow.ledger.total
    if line.branch:
        headers = range(1, flow.trunk.state.num_plans + 1)
        return flow.ledger.total + 1 + sum(len(vocabulary.step_header(x)) for x in headers)
    return flow.ledger.total + len(flow.due) + len(line.header)


def _path_left(flow: Flow, stage: Stage) -> int:
    """Return how many positions are left behind a stage's tokens."""
    end = len(flow.request.prompt_ids) + flow.request.max_critical_path
    return end - (len(stage.token_ids) + stage.offset)


def _draw(flow: Flow, line: Line, num_tokens: int) -> Draw:
    request, trunk = flow.request, flow.trunk
    block = flow.cursor.block + (line.branch > 0 and line.stream is None)
    if line.stream is not None:
        key, index = line.stream.key, line.stream.index
    elif line.branch:
        key, index = branch_key(request.seed, block, line.branch), len(line.header)
    else:
        key, index = trunk.key, trunk.index + len(line.header)
    index += len(line.received)
    place = (block, line.branch) if line.branch else (0, 0)
    return Draw(
        key=key,
        first_index=index,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        taught=_taught(flow.teacher, place, range(index, index + num_tokens)),
    )


def _taught(
    teacher: Teacher | None, place: tuple[int, int], indices: Sequence[int]
) -> tuple[int, ...]:
    """Return what a teacher has to say about these tokens of a stream."""
    if teacher is None:
        return ()
    answers = [teacher(*place, index) for index in indices]
    while answers and answers[-1] is None:
        answers.pop()
    return tuple(UNTAUGHT if answer is None else answer for answer in answers)


def _budget(flow: Flow, line: Line, trajectory: str, num_tokens: int) -> Budget | None:
    """Return the budget that the branches of a block share; it counts from what was accepted, so it
    ends no branch too early that is ahead of its siblings.
    """
    if not line.branch:
        return None
    block = flow.cursor.block + (line.stream is None)
    return Budget(name=f"{trajectory}/{block}", branch=line.branch, num_tokens=num_tokens)
