"""Measure NPR Engine: native parallel against sequential decoding, and batches against HF generate.

Every figure that matters is a ratio of two measurements of one run on one machine, taken in turns,
best of ``--repeats``: the ratio survives a busy machine, the absolute numbers do not. A teacher
makes both modes write the same response, so a random model serves and both decode exactly the same
tokens.

The speed-up at batch 1 may exceed (total tokens) / (critical path): forced headers ride along with
sampled tokens and cost no step of their own; sequential decoding samples them one by one.

    python tools/bench_engine.py
    python tools/bench_engine.py --branches 5 --step-tokens 40 --rollouts 64
    python tools/bench_engine.py --device cuda --dtype bf16 --hidden 1024 --layers 28
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.engine import Engine
from npr_megatron.engine.flow import Teacher
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.schema.render import BlockTexts, render
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.topology.layout import layout_of

Run = Callable[[], tuple[int, float]]
"""Returns tokens generated and seconds taken."""

_WORDS = range(20, 64)
_VOCABULARY = Vocabulary(
    guideline_open=2,
    guideline_close=3,
    plan_open=4,
    plan_close=5,
    step_open=6,
    step_close=7,
    takeaway_open=8,
    takeaway_close=9,
    newline=10,
    eos=1,
    index_ids=tuple((index, 19) for index in range(11, 16)),
    blank_ids=frozenset({10}),
)


def main() -> None:
    """Run the measurements and print one table, or one JSON object."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    model = _model(args)
    engine = _engine(model, args)
    rng = np.random.default_rng(args.seed)
    responses = [_response(rng, args) for _ in range(args.rollouts)]
    prompt = tuple(rng.choice(_WORDS, args.prompt_tokens).tolist())

    def decode(num_responses: int, *, parallel: bool) -> Run:
        return lambda: _decode(
            engine, prompt, responses[:num_responses], parallel=parallel, device=args.device
        )

    runs = {
        "sequential, batch 1": decode(1, parallel=False),
        "native parallel, batch 1": decode(1, parallel=True),
        "sequential, batch": decode(args.rollouts, parallel=False),
        "native parallel, batch": decode(args.rollouts, parallel=True),
    }
    if not args.no_hf:
        runs["HF generate, batch"] = _hf_run(model, prompt, responses, args)
    rates = _best_rates(runs, args.repeats)
    layout = layout_of([*prompt, *responses[0]], len(prompt), _VOCABULARY)
    path = int(layout.position_ids.max()) + 1 - len(prompt)
    ideal = len(responses[0]) / path
    speedup = rates["native parallel, batch 1"] / rates["sequential, batch 1"]
    figures = {
        "speedup_batch_1": speedup,
        "total_over_critical_path": ideal,
        "speedup_frac_of_ideal": speedup / ideal,
    }
    if not args.no_hf:
        figures["batch_over_hf"] = rates["sequential, batch"] / rates["HF generate, batch"]
    _show(rates, figures, as_json=args.json)


def _now(device: str) -> float:
    """Seconds: of this process on a CPU (whoever else is busy), elapsed ones elsewhere."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure NPR Engine: native parallel against sequential, batches against HF."
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64, help="hidden size; heads are 16 wide")
    parser.add_argument("--vocab", type=int, default=100)
    parser.add_argument("--rollouts", type=int, default=256, help="trajectories of the batch runs")
    parser.add_argument("--max-running", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--branches", type=int, default=4, choices=range(1, 6))
    parser.add_argument("--step-tokens", type=int, default=16, help="text tokens per branch")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per figure; best kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-hf", action="store_true", help="leave HF generate out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def _model(args: argparse.Namespace) -> ModelConfig:
    heads = max(2, args.hidden // 16)
    return ModelConfig(
        num_hidden_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=16,
        intermediate_size=3 * args.hidden,
        vocab_size=args.vocab,
    )


def _engine(model: ModelConfig, args: argparse.Namespace) -> Engine:
    config = EngineConfig(dtype=args.dtype, max_running=args.max_running)
    engine = Engine(model, config, _VOCABULARY, device=args.device)
    torch.manual_seed(args.seed)
    engine.load({name: 0.1 * torch.randn(x.shape) for name, x in engine.weights.items()})
    return engine


def _response(rng: np.random.Generator, args: argparse.Namespace) -> list[int]:
    """One block: ``--branches`` steps of about ``--step-tokens``, short plans and takeaway."""

    def text(num_tokens: int) -> tuple[int, ...]:
        return tuple(rng.choice(_WORDS, num_tokens).tolist())

    spread = max(1, args.step_tokens // 8)
    plans = tuple(text(3) for _ in range(args.branches))
    lengths = rng.integers(args.step_tokens - spread, args.step_tokens + spread + 1, args.branches)
    steps = tuple(text(max(1, int(length))) for length in lengths)
    return render([BlockTexts(plans, steps, text(4))], text(6), _VOCABULARY)


def _teacher(prompt: tuple[int, ...], response: list[int], *, parallel: bool) -> Teacher:
    if not parallel:
        return lambda block, branch, index: response[index]
    layout = layout_of([*prompt, *response], len(prompt), _VOCABULARY)
    streams: dict[tuple[int, int], list[int]] = {}
    labels = zip(layout.block[len(prompt) :], layout.branch[len(prompt) :], strict=True)
    for token_id, (block, branch) in zip(response, labels, strict=True):
        streams.setdefault((int(block), int(branch)), []).append(token_id)
    return lambda block, branch, index: streams[block, branch][index]


def _decode(
    engine: Engine,
    prompt: tuple[int, ...],
    responses: list[list[int]],
    *,
    parallel: bool,
    device: str,
) -> tuple[int, float]:
    """Return tokens generated and seconds taken."""
    for rollout, response in enumerate(responses):
        request = GenerationRequest(
            prompt_id="bench",
            rollout=rollout,
            prompt_ids=prompt,
            mode=DecodeMode.PARALLEL if parallel else DecodeMode.SEQUENTIAL,
            max_new_tokens=len(response),
            max_critical_path=len(response),
            seed=rollout,
        )
        engine.add(request, _teacher(prompt, response, parallel=parallel))
    start_s, num_tokens = _now(device), 0
    while engine.num_unfinished:
        num_tokens += sum(trajectory.num_tokens for trajectory in engine.step())
    return num_tokens, _now(device) - start_s


def _hf_run(
    model: ModelConfig,
    prompt: tuple[int, ...],
    responses: list[list[int]],
    args: argparse.Namespace,
) -> Run:
    """Plain sampling of as many tokens by transformers, batches of ``--max-running``."""
    config = Qwen3Config(**model.model_dump())
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    hf: Any = Qwen3ForCausalLM(config)
    hf = hf.to(device=args.device, dtype=dtype).eval()
    num_new = max(len(response) for response in responses)

    def run() -> tuple[int, float]:
        start_s, num_tokens = _now(args.device), 0
        for first in range(0, len(responses), args.max_running):
            num_rows = len(responses[first : first + args.max_running])
            ids = torch.tensor([prompt] * num_rows, device=args.device)
            hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                do_sample=True,
                eos_token_id=None,
                pad_token_id=0,
            )
            num_tokens += num_rows * num_new
        return num_tokens, _now(args.device) - start_s

    return run


def _best_rates(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Return tokens/s per run, best of ``repeats``, the runs taken in turns."""
    best = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for name, run in runs.items():
            num_tokens, seconds = run()
            best[name] = max(best[name], num_tokens / seconds)
    return best


def _show(rates: dict[str, float], figures: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"tokens_per_s": rates, **figures}))
        return
    for name, rate in rates.items():
        print(f"{name:<28} {rate:10.0f} tokens/s")
    for name, value in figures.items():
        print(f"{name:<28} {value:10.2f}")


if __name__ == "__main__":
    main()
