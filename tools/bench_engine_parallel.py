"""Native parallel against sequential decoding of the same tokens, for tools/bench_engine.py.

A teacher makes both modes write the same response, so a random model serves. Its ideal speed-up is
(all tokens) / (critical path), the tokens of the longest path through the branches. More than that
is possible: forced headers ride along with sampled tokens and cost no step of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
from bench_engine_models import VOCABULARY, WORDS, Subject
from bench_engine_workload import Workload, require_equal
from bench_figures import Figure, bests

from npr_megatron.engine.events import Event
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.interface import Engine
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.schema.render import BlockTexts, render
from npr_megatron.topology.layout import layout_of

_PROMPT = tuple(WORDS)[:64]
_ROLLOUT_PROMPT = 256
"""Tokens of a prompt: the instruction that explains the tags, and a problem."""


def parallel_figures(
    subject: Subject, branches: Sequence[int], step_tokens: int, repeats: int
) -> list[Figure]:
    """Return the share of the ideal speed-up at batch 1, per number of branches."""
    engine = subject.engine(1)
    figures: list[Figure] = []
    for num_branches in branches:
        response = response_of(num_branches, step_tokens, spread=step_tokens // 8)
        sequential_s, parallel_s = _seconds(engine, response, subject, repeats)
        speedup, ideal = sequential_s / parallel_s, ideal_speedup(response)
        detail = f"speed-up {speedup:.2f}, total / critical path {ideal:.2f}"
        name = f"parallel / sequential / ideal, {num_branches} branches"
        figures.append(Figure(name, speedup / ideal, bar=0.85, detail=detail))
    return figures


def five_branch_figure(subject: Subject, step_tokens: int, repeats: int) -> Figure:
    """Return the speed-up at batch 1 where five steps of equal length make up nearly all of the
    response; others end with their longest step and cannot come near five.
    """
    response = response_of(5, step_tokens, spread=0)
    sequential_s, parallel_s = _seconds(subject.engine(1), response, subject, repeats)
    detail = f"total / critical path {ideal_speedup(response):.2f}, {len(response)} tokens"
    return Figure(
        "parallel / sequential, 5 branches", sequential_s / parallel_s, "x", 4.6, False, detail
    )


def response_of(num_branches: int, step_tokens: int, spread: int, seed: int = 0) -> list[int]:
    """Return a response of two blocks, whose steps have ``step_tokens`` tokens of text give or take
    ``spread``.
    """
    rng = np.random.default_rng([num_branches, seed])

    def text(num_tokens: int) -> tuple[int, ...]:
        return tuple(rng.choice(WORDS, num_tokens).tolist())

    def block() -> BlockTexts:
        lengths = rng.integers(step_tokens - spread, step_tokens + spread + 1, num_branches)
        plans = [text(3) for _ in lengths]
        return BlockTexts(plans, [text(int(length)) for length in lengths], text(8))

    return render([block(), block()], text(8), VOCABULARY)


def ideal_speedup(response: Sequence[int]) -> float:
    """Return (all tokens) / (critical path)."""
    layout = layout_of([*_PROMPT, *response], len(_PROMPT), VOCABULARY)
    return len(response) / (int(layout.position_ids.max()) + 1 - len(_PROMPT))


def _seconds(
    engine: Engine, response: list[int], subject: Subject, repeats: int
) -> tuple[float, float]:
    """Return the seconds that decoding takes one token after another, and branch-parallel."""
    sequential_s, parallel_s = bests(
        [
            partial(decode_taught, engine, response, mode)
            for mode in (DecodeMode.SEQUENTIAL, DecodeMode.PARALLEL)
        ],
        repeats,
        subject.now,
    )
    return sequential_s, parallel_s


def decode_taught(engine: Engine, response: list[int], mode: DecodeMode) -> None:
    """Decode exactly ``response``."""
    add_taught(engine, _PROMPT, response, mode)
    require_equal(drained(engine), len(response))


def serve_taught(engine: Engine, responses: Workload) -> None:
    """Decode exactly the responses that :func:`structured` drew, branch-parallel."""
    for number, (prompt, length) in enumerate(
        zip(responses.prompts, responses.lengths, strict=True)
    ):
        response = _structured_response(number)
        require_equal(len(response), length)
        add_taught(engine, prompt, response, DecodeMode.PARALLEL, number)
    require_equal(drained(engine), responses.num_tokens)


def structured(num_requests: int) -> Workload:
    """Return rollouts as a trainer asks for them: groups of eight share a prompt, and responses are
    two blocks of two to five branches.
    """
    lengths = [len(_structured_response(number)) for number in range(num_requests)]
    return Workload.of([_ROLLOUT_PROMPT] * num_requests, lengths, group=8)


@cache
def _structured_response(number: int) -> list[int]:
    return response_of(2 + number % 4, 12 + number % 9, spread=4)


def add_taught(
    engine: Engine,
    prompt: tuple[int, ...],
    response: list[int],
    mode: DecodeMode,
    number: int = 0,
    listener: Callable[[Event], None] | None = None,
) -> str:
    """Queue a request whose answer is ``response``; return the name of its prompt."""
    request = GenerationRequest(
        prompt_id=f"taught/{number}",
        rollout=0,
        prompt_ids=prompt,
        mode=mode,
        max_new_tokens=len(response),
        max_critical_path=len(response),
        seed=number,
    )
    engine.add(request, _teacher(prompt, response, mode), listener)
    return request.prompt_id


def drained(engine: Engine) -> int:
    """Step until nothing is left; return the tokens generated."""
    num_tokens = 0
    while engine.num_unfinished:
        num_tokens += sum(trajectory.num_tokens for trajectory in engine.step())
    return num_tokens


def _teacher(prompt: tuple[int, ...], response: list[int], mode: DecodeMode) -> Teacher:
    """Dictate ``response``; asked for tokens behind a stream's end, as SGLang's stages are ahead of
    time, say nothing.
    """
    streams: dict[tuple[int, int], list[int]] = {}
    if mode is DecodeMode.SEQUENTIAL:
        streams[0, 0] = response
    else:
        layout = layout_of([*prompt, *response], len(prompt), VOCABULARY)
        labels = zip(layout.block[len(prompt) :], layout.branch[len(prompt) :], strict=True)
        for token_id, (block, branch) in zip(response, labels, strict=True):
            streams.setdefault((int(block), int(branch)), []).append(token_id)

    def teach(block: int, branch: int, index: int) -> int | None:
        stream = streams.get((block, branch), [])
        return stream[index] if index < len(stream) else None

    return teach
