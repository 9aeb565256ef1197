"""A run folder as a pipeline leaves it, with answers to a problem of the sums task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from npr_megatron.config.loader import load_run
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import Tokenizer, load_tokenizer
from npr_megatron.observability.metrics import MetricsLog
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.topology.layout import layout_of, plain_layout

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "run.toml"
QUESTION = "a:1+2+9;b:3+5+4;c:7+7+2?"
QUALITY = {
    ("seed", "sequential"): (0.18, 0.02, 0.19),
    ("seed", "parallel"): (0.15, 0.01, 0.17),
    ("zero", "sequential"): (0.98, 0.81, 0.99),
    ("beta", "parallel"): (0.97, 0.62, 0.99),
    ("npr", "sequential"): (0.97, 0.6, 0.98),
    ("npr", "parallel"): (0.99, 0.79, 1.0),
}


def sums_tokenizer(tmp_path: Path) -> Tokenizer:
    build_sums_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def trajectory_of(
    tokenizer: Tokenizer,
    response_ids: Sequence[int],
    *,
    mode: DecodeMode = DecodeMode.PARALLEL,
    finish: FinishReason = FinishReason.STOP,
    finish_detail: str = "",
) -> tuple[Trajectory, list[str]]:
    """Place ``response_ids`` behind the question, in the tree if it was decoded in parallel."""
    prompt = tokenizer.encode(f"{QUESTION}\n")
    ids = [*prompt, *response_ids]
    is_tree = mode is DecodeMode.PARALLEL and finish is FinishReason.STOP
    layout = (
        layout_of(np.array(ids, np.int32), len(prompt), tokenizer.vocabulary)
        if is_tree
        else plain_layout(len(ids), len(prompt))
    )
    trajectory = Trajectory(
        prompt_id="test/7",
        rollout=2,
        mode=mode,
        prompt_length=len(prompt),
        token_ids=np.array(ids),
        position_ids=layout.position_ids,
        block=layout.block,
        branch=layout.branch,
        forced=layout.forced,
        logprobs=np.zeros(len(ids)),
        weight_versions=np.ones(len(ids)),
        finish=finish,
        finish_detail=finish_detail,
    )
    return trajectory, tokenizer.pieces(ids)


def good(tokenizer: Tokenizer) -> tuple[Trajectory, list[str]]:
    """A valid, right answer in one block of three branches."""
    text = (
        "<guideline>\n<plan>1:a</plan>\n<plan>2:b</plan>\n<plan>3:c</plan>\n</guideline>\n"
        "<step>\n1:1+2=3+9=12</step>\n<step>\n2:3+5=8+4=12</step>\n<step>\n3:7+7=14+2=16</step>\n"
        "<takeaway>\n12,12,16</takeaway>\n\\boxed{12,12,16}"
    )
    return trajectory_of(tokenizer, [*tokenizer.encode(text), tokenizer.vocabulary.eos])


def broken(tokenizer: Tokenizer) -> tuple[Trajectory, list[str]]:
    """A sequential answer whose second step is never closed and which runs out of budget."""
    text = (
        "<guideline>\n<plan>1:1+2+9</plan>\n<plan>2:3+5+4</plan>\n</guideline>\n"
        "<step>\n1:1,3,12</step>\n<step>\n2:3,8,12\n<takeaway>\n12,12"
    )
    return trajectory_of(
        tokenizer,
        tokenizer.encode(text),
        mode=DecodeMode.SEQUENTIAL,
        finish=FinishReason.LENGTH,
        finish_detail="208 tokens",
    )


def write_run(folder: Path, tokenizer: Tokenizer) -> Path:
    """Write what a finished quickstart leaves, and return the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(load_run(QUICKSTART).model_dump_json())
    log = MetricsLog(folder / "metrics.jsonl")
    for stage, num_steps in (("seed", 200), ("zero", 40), ("beta", 100), ("npr", 60)):
        for step in range(1, num_steps + 1):
            log.write(stage, step, _metrics(stage, step / num_steps))
    with (folder / "evaluations.jsonl").open("w") as file:
        for (stage, mode), (validity, accuracy, trigger_rate) in QUALITY.items():
            line = {
                "stage": stage,
                "mode": mode,
                "validity": validity,
                "accuracy": accuracy,
                "trigger_rate": trigger_rate,
                "faithfulness": None if stage == "seed" else accuracy - 0.05,
                "total_tokens": 97.25,
                "critical_path_tokens": 97.25 if mode == "sequential" else 61.5,
            }
            if (stage, mode) == ("npr", "parallel"):
                line |= {"speedup": 1.62}
            file.write(json.dumps(line) + "\n")
    with (folder / "samples.jsonl").open("w") as file:
        for index, (trajectory, pieces) in enumerate([broken(tokenizer), good(tokenizer)]):
            line = {
                "stage": ("zero", "npr")[index],
                "step": 20,
                "text": "".join(pieces),
                "trajectory": trajectory.to_json(),
                "reward": (-1.0, 1.0)[index],
                "pieces": pieces,
            }
            file.write(json.dumps(line) + "\n")
    return folder


def _metrics(stage: str, progress: float) -> dict[str, float]:
    wobble = 0.05 * math.sin(60 * progress)
    values = {
        "train/loss": 2.5 * math.exp(-3 * progress) + 0.1 + wobble,
        "train/grad_norm": 0.8 + 4 * wobble,
        "train/learning_rate": 1e-3 * (1.01 - progress),
    }
    if stage in ("zero", "npr"):
        values |= {
            "rollout/accuracy": 0.1 + 0.7 * progress + wobble,
            "rollout/validity": min(1.0, 0.2 + progress),
            "rollout/tokens_per_s": 6100 + 4000 * wobble,
            "train/logprob_gap_max": 1e-6 * (1.5 + 20 * abs(wobble)),
            "push/s": 0.021 + wobble / 20,
        }
    return values
