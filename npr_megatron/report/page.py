"""Write the page of a run: one HTML file with everything inside, which opens without a network.

Stage table first, then curves per stage, then a few trajectories as boxes with branches side by
side. It can be written while a run goes on and shows what is there so far.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from npr_megatron.config.stages import STAGES
from npr_megatron.errors import InputError
from npr_megatron.observability.metrics import MetricsLine, read_json_lines, read_metrics
from npr_megatron.records.trajectory import FinishReason, Trajectory
from npr_megatron.report.charts import OTHER_COLOR, STAGE_COLORS, Curve, draw_curve, draw_progress
from npr_megatron.report.live import show_duration
from npr_megatron.report.outline import outline
from npr_megatron.report.table import COLUMNS, Evaluation, stage_rows
from npr_megatron.report.tree import headline

MAX_SAMPLES_PER_STAGE = 3
"""First, middle and last: how answers changed."""
_FIRST_METRICS = (
    "rollout/accuracy",
    "rollout/validity",
    "rollout/keep_frac",
    "train/loss",
    "train/grad_norm",
    "train/logprob_gap_max",
)
STAGE_TITLES = {
    "seed": "Seed: the stand-in for an instruct model",
    "zero": "ZERO: learn the format by reinforcement",
    "sample": "Sampling: keep what is valid and right",
    "beta": "BETA: learn branches from accepted answers",
    "npr": "NPR: reinforcement inside the parallel engine",
}


def write_page(run_dir: str | Path) -> Path:
    """Write ``report.html`` of the run in ``run_dir`` and return its path; an older page is
    replaced.

    Raises:
        InputError: ``run_dir`` holds no run.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    evaluations = read_optional_lines(run_dir / "evaluations.jsonl")
    metrics_path = run_dir / "metrics.jsonl"
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    samples = read_optional_lines(run_dir / "samples.jsonl")
    page = _render(config, evaluations, metrics, samples)
    path = run_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the resolved run description of ``run_dir``; InputError when there is none."""
    try:
        return json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{run_dir} holds no run (no config.json); give the folder that `npr pipeline` printed"
        ) from None


def read_optional_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; none when the run has not written it yet."""
    return read_json_lines(path) if path.exists() else []


def _render(
    config: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    metrics: Sequence[MetricsLine],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    environment = Environment(
        loader=PackageLoader("npr_megatron.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = stage_rows(evaluations)
    measures = [(f"{row['stage']}\n{row['mode']}", row["stage"], _fractions(row)) for row in rows]
    return environment.get_template("page.html.j2").render(
        name=config["run"]["name"],
        seed=config["run"]["seed"],
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        config=json.dumps(config, indent=2),
        columns=COLUMNS,
        rows=rows,
        colors=STAGE_COLORS,
        other_color=OTHER_COLOR,
        progress=draw_progress(measures) if rows else None,
        stages=_stages(metrics),
        samples=[_sample(record) for record in _choose(samples)],
    )


def _fractions(row: Evaluation) -> dict[str, float]:
    return {n: row[n] for n in ("validity", "accuracy") if row.get(n) is not None}


def _stages(metrics: Sequence[MetricsLine]) -> list[dict[str, Any]]:
    """Return title, length and charts of every stage that wrote metrics."""
    names = list(dict.fromkeys(line.stage for line in metrics))
    names.sort(key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    stages: list[dict[str, Any]] = []
    for name in names:
        lines = [line for line in metrics if line.stage == name]
        stages.append(
            {
                "title": STAGE_TITLES.get(name, name),
                "num_steps": len(lines),
                "took": show_duration(lines[-1].time_s - lines[0].time_s),
                "charts": [draw_curve(curve) for curve in _curves(name, lines)],
            }
        )
    return stages


def _curves(stage: str, lines: Sequence[MetricsLine]) -> list[Curve]:
    """Return one curve per metric that was finite at least once, the telling ones first."""
    names = {name for line in lines for name in line.values}
    first = [name for name in _FIRST_METRICS if name in names]
    curves: list[Curve] = []
    for name in [*first, *sorted(names.difference(first))]:
        points = [(line.step, line.values[name]) for line in lines if name in line.values]
        if any(value == value for _, value in points):
            steps, values = zip(*points, strict=True)
            color = STAGE_COLORS.get(stage, OTHER_COLOR)
            curves.append(Curve(title=name, steps=steps, values=values, color=color))
    return curves


def _choose(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return first, middle and last sample of each stage, in the order of the stages."""
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_stage.setdefault(sample["stage"], []).append(sample)
    chosen: list[Mapping[str, Any]] = []
    for stage in sorted(by_stage, key=lambda n: STAGES.index(n) if n in STAGES else len(STAGES)):
        group = by_stage[stage]
        last = len(group) - 1
        count = min(MAX_SAMPLES_PER_STAGE, len(group))
        indices = {round(i * last / max(count - 1, 1)) for i in range(count)}
        chosen.extend(group[index] for index in sorted(indices))
    return chosen


def _sample(record: Mapping[str, Any]) -> dict[str, Any]:
    trajectory = Trajectory.from_json(dict(record["trajectory"]))
    is_whole = trajectory.finish is FinishReason.STOP
    return {
        "stage": record["stage"],
        "step": record["step"],
        "reward": record["reward"],
        "headline": headline(trajectory),
        "ending": None if is_whole else f"{trajectory.finish} {trajectory.finish_detail}".strip(),
        "boxes": outline(trajectory, record["pieces"]),
    }
