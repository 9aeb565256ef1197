"""A raw SGLang engine that is sent stages, and the reference they are held to."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from npr_megatron.engine.sglang.stage import CACHE_BACKEND, Draw, Stage
from tests.parity.hf_reference import LinearForm, oracle_logprobs
from tests.structures import NUM_IDS, WORDS

POISON = 19
"""A token whose embedding is not a number, and which is never said."""
SPOKEN = tuple(token for token in range(NUM_IDS) if token != POISON)
CLOSE, TAKEAWAY = 7, 8
NUM_SLOTS = 2048
GREEDY = Draw(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What SGLang answered to a stage."""

    token_ids: list[int]
    logprobs: list[float]
    scored: list[float]
    num_cached: int
    num_retractions: int
    refusal: str


class StageServer:
    """``sglang.Engine`` without any client of ours."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @classmethod
    @contextmanager
    def started(cls, folder: Path, **options: Any) -> Iterator[StageServer]:
        """Start an engine that checks its slots all the time; stop it in the end."""
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what SGLang and its libraries say of this machine
            import sglang

            patch.setenv("SGLANG_NATIVE_MOVE_KV_CACHE", "1")
            patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")
            patch.setenv("SGLANG_CHECK_KV_PAGE_INVARIANTS", "1")
            engine = sglang.Engine(model_path=str(folder), **(PLAIN | options))
        try:
            yield cls(engine)
        finally:
            engine.shutdown()

    def run(self, stages: Sequence[Stage]) -> list[Answer]:
        """Run stages together; return what became of each."""
        found = self.engine.generate(
            input_ids=[stage.token_ids for stage in stages],
            sampling_params=[sampling_params(stage) for stage in stages],
            cache_salt=[stage.namespace for stage in stages],
            return_logprob=True,
            logprob_start_len=[
                -1 if stage.score_from is None else stage.score_from for stage in stages
            ],
        )
        return [answer_of(one) for one in found]

    def occupy(self, num_tokens: int, seed: int = 0) -> None:
        """Compute so many tokens that nobody asks for again: unheld ones must go."""
        rng = random.Random(seed)
        rows = [rng.choices(WORDS, k=256) for _ in range(-(-num_tokens // 256))]
        for row in rows:
            self.engine.generate(
                input_ids=row, sampling_params={"max_new_tokens": 1}, cache_salt=f"other {seed}"
            )

    def flush(self) -> None:
        """Empty the cache; SGLang refuses while the last batch, whose answers are out, is open."""
        deadline = time.monotonic() + 30.0
        while not self.engine.flush_cache().success:
            assert time.monotonic() < deadline, "a request never ended"


PLAIN: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "page_size": 1,
    "context_length": 512,
    "max_total_tokens": NUM_SLOTS,
    "max_running_requests": 32,
    "chunked_prefill_size": 32,
    "enable_mixed_chunk": True,
    "radix_cache_backend": CACHE_BACKEND,
    "skip_tokenizer_init": True,
    "skip_server_warmup": True,
    "sleep_on_idle": True,
    "random_seed": 0,
    "log_level": "error",
}


def sampling_params(stage: Stage) -> dict[str, Any]:
    """Return a stage in SGLang's words."""
    return {
        "max_new_tokens": stage.max_new_tokens,
        "stop_token_ids": list(stage.stop_ids),
        "custom_params": stage.custom_params(),
    }


def answer_of(found: dict[str, Any]) -> Answer:
    """Read what SGLang returned for one request."""
    meta = found["meta_info"]
    scored = meta.get("input_token_logprobs") or []
    finish = meta["finish_reason"]
    return Answer(
        token_ids=list(found["output_ids"]),
        logprobs=[logprob for logprob, _, _ in meta["output_token_logprobs"]],
        scored=[logprob for logprob, _, _ in scored[1:]],
        num_cached=meta["cached_tokens"],
        num_retractions=meta["num_retractions"],
        refusal=finish["message"] if finish["type"] == "abort" else "",
    )


@dataclass
class Trail:
    """A trajectory as a client knows it: its linear form, and what it must be."""

    name: str
    namespace: str
    token_ids: list[int]
    positions: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    next_position: int = 0
    num_blocks: int = 0
    num_held: int = 0
    join: tuple[int, ...] = ()
    told: list[tuple[int, int, float]] = field(default_factory=list)
    """(index of the predictor, token, log-prob) that SGLang told."""
    greedy: list[tuple[int, int]] = field(default_factory=list)
    """(index of the predictor, token) that SGLang chose as the likeliest."""

    def __post_init__(self) -> None:
        tokens, self.token_ids = self.token_ids, []
        self.extend(tokens)

    @property
    def offset(self) -> int:
        """Of what comes next."""
        return self.next_position - len(self.token_ids)

    def extend(self, tokens: Sequence[int], branch: int = 0, start: int | None = None) -> None:
        """Append tokens of the trunk, or of a branch that began at position ``start``."""
        position = self.next_position if start is None else start
        self.token_ids += tokens
        self.positions += range(position, position + len(tokens))
        self.blocks += [self.num_blocks if branch else 0] * len(tokens)
        self.branches += [branch] * len(tokens)
        self.next_position = max(self.next_position, position + len(tokens))

    def stage(self, extra: Sequence[int] = (), **fields: Any) -> Stage:
        """Return a stage behind the trunk."""
        defaults = {
            "trajectory": self.name,
            "namespace": self.namespace,
            "token_ids": [*self.token_ids, *extra],
            "offset": self.offset,
            "num_held": self.num_held,
            "join": self.join,
            "draw": GREEDY,
        }
        return Stage(**(defaults | fields))

    def note(self, answer: Answer, predictors: Sequence[int]) -> None:
        """Note sampled tokens."""
        assert answer.refusal == ""
        rows = list(zip(predictors, answer.token_ids, answer.logprobs, strict=True))
        self.told += rows
        self.greedy += [(index, token) for index, token, _ in rows]

    def form(self) -> LinearForm:
        """Return what the reference computes."""
        return LinearForm(
            token_ids=np.array(self.token_ids, np.int32),
            position_ids=np.array(self.positions, np.int32),
            block=np.array(self.blocks, np.int32),
            branch=np.array(self.branches, np.int32),
            predecessor=np.zeros(len(self.token_ids), np.int32),
            is_forced=np.zeros(len(self.token_ids), np.bool_),
        )


def go_on(server: StageServer, trails: Sequence[Trail], rng: random.Random) -> None:
    """Decode a piece of each trunk; what was joined is held from then on."""
    starts = [len(trail.token_ids) for trail in trails]
    stages = [
        trail.stage(max_new_tokens=rng.randint(3, 8), keeps=True, score_from=trail.num_held)
        for trail in trails
    ]
    for trail, start, answer in zip(trails, starts, server.run(stages), strict=True):
        first = start - 1
        trail.note(answer, range(first, first + len(answer.token_ids)))
        trail.told += [
            (index, trail.token_ids[index + 1], logprob)
            for index, logprob in zip(range(trail.num_held, first), answer.scored, strict=True)
        ]
        trail.extend(answer.token_ids)


def open_block(
    server: StageServer, trails: Sequence[Trail], rng: random.Random, *, keeps: bool = True
) -> None:
    """Decode 2 to 5 branches of each trail side by side, seal them, and lay them out; open the
    trunk behind them.
    """
    plans: list[tuple[int, list[int]]] = []
    stages: list[Stage] = []
    for number, trail in enumerate(trails):
        trunk = len(trail.token_ids)
        for branch in range(1, rng.randint(2, 5) + 1):
            header = [6, 10 + branch]
            plans.append((number, header))
            stages.append(
                trail.stage(
                    header, join=(), score_from=trunk - 1, max_new_tokens=rng.randint(2, 30)
                )
            )
    answers = server.run(stages)
    texts = [[*h, *a.token_ids, CLOSE] for (_, h), a in zip(plans, answers, strict=True)]
    seals = server.run(
        [
            trails[number].stage(
                text, join=(), keeps=keeps, score_from=len(trails[number].token_ids) + len(text) - 2
            )
            for (number, _), text in zip(plans, texts, strict=True)
        ]
    )
    for number, trail in enumerate(trails):
        own = [index for index, (owner, _) in enumerate(plans) if owner == number]
        trunk, start = len(trail.token_ids), trail.next_position
        trail.num_blocks += 1
        for branch, index in enumerate(own, start=1):
            first, text, answer = len(trail.token_ids), texts[index], answers[index]
            trail.told.append((trunk - 1, text[0], answer.scored[0]))
            trail.told.append((first, text[1], answer.scored[1]))
            trail.note(answer, range(first + 1, first + 1 + len(answer.token_ids)))
            trail.told.append((first + len(text) - 2, CLOSE, *seals[index].scored))
            trail.extend(text, branch, start)
        trail.join = (trunk, *(len(texts[index]) for index in own))
        trail.num_held = len(trail.token_ids)
        trail.extend([TAKEAWAY])


def new_trails(count: int, rng: random.Random, namespace: str) -> list[Trail]:
    """Return trails that begin with random prompts."""
    return [
        Trail(
            name=f"{namespace}/{number}",
            namespace=namespace,
            token_ids=rng.choices(WORDS, k=rng.randint(10, 50)),
        )
        for number in range(count)
    ]


def tell_apart(reference: Qwen3ForCausalLM, trails: Sequence[Trail]) -> tuple[int, float]:
    """Return how many greedy choices the reference does not share, and the largest difference of a
    log-prob.
    """
    num_wrong, worst = 0, 0.0
    rows = oracle_logprobs(reference, [trail.form() for trail in trails])
    for trail, scores in zip(trails, rows, strict=True):
        num_wrong += sum(int(scores[at].argmax()) != token for at, token in trail.greedy)
        found = torch.tensor([logprob for _, _, logprob in trail.told])
        wanted = torch.stack([scores[at, token] for at, token, _ in trail.told])
        worst = max(worst, float((found - wanted).abs().max()))
    assert all(token < NUM_IDS for trail in trails for token in trail.token_ids)
    return num_wrong, worst
