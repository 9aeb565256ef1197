"""Every example parses, is free of problems and dry-runs; its launcher is valid shell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from npr_megatron.cli.options import load_checked
from npr_megatron.cli.pipeline import describe
from npr_megatron.cli.sft import load_checked_sft
from npr_megatron.config.check import check_all
from npr_megatron.config.loader import load_run, read_toml
from npr_megatron.config.run import RunConfig
from npr_megatron.config.sft import SftConfig
from npr_megatron.data.conversations import check_rows
from npr_megatron.launch.placement import place
from tests.unit.config.test_check import write_qwen3

EXAMPLES = Path(__file__).parents[2] / "examples"
PIPELINES = sorted(
    path.parent for path in EXAMPLES.glob("*/run.toml") if "[zero]" in path.read_text()
)
SFT = EXAMPLES / "sft"


def prepared(folder: Path, tmp_path: Path) -> list[str]:
    """Return overrides that put a model folder and data files where the example wants them."""
    if folder.name != "qwen3-4b":
        return []
    data = tmp_path / "data.jsonl"
    data.write_text('{"id": "1", "question": "What is 1 + 1?", "answer": "2"}\n')
    model = write_qwen3(tmp_path / "model")
    return [f"model.path={model}", f"task.train_path={data}", f"task.test_path={data}"]


def test_every_example_is_a_pipeline_or_the_one_of_sft():
    assert {path for path in EXAMPLES.iterdir() if path.is_dir()} == {*PIPELINES, SFT}


def test_the_sft_example_is_right_to_the_last_row_and_shows_each_section(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    assert (SFT / "README.md").stat().st_size > 0
    config, _ = load_checked_sft(SFT / "run.toml", [])
    assert check_rows(config.data.train) == []
    described = set(read_toml(SFT / "run.toml"))
    assert described == set(SftConfig.model_fields)


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda folder: folder.name)
def test_every_example_has_a_run_file_a_readme_and_no_problem(folder, tmp_path):
    assert (folder / "README.md").stat().st_size > 0
    config = load_checked(folder / "run.toml", prepared(folder, tmp_path))
    table = describe(config, None)
    assert table.row_count >= 7


def test_qwen3_4b_fills_eight_gpus_and_says_what_to_prepare():
    config = load_run(EXAMPLES / "qwen3-4b" / "run.toml")
    total = place(config.parallel, config.fleet, config.cluster).total
    assert total.num_gpus == 8
    sbatch = (EXAMPLES / "qwen3-4b" / "launch.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=8" in sbatch
    cpus = re.search(r"--cpus-per-task=(\d+)", sbatch)
    assert cpus is not None
    assert total.num_cpus <= int(cpus[1])
    readme = (EXAMPLES / "qwen3-4b" / "README.md").read_text()
    for path in (config.model.path, config.task.train_path, config.task.test_path):
        assert str(path) in readme
    assert len(check_all(config)) == 3, "a login node without model and data is told so"


def test_quickstart_fits_two_cores():
    config = load_run(EXAMPLES / "quickstart" / "run.toml")
    total = place(config.parallel, config.fleet, config.cluster).total
    assert total.num_gpus == 0
    assert total.num_cpus <= 2


def test_quickstart_documents_only_real_fields_and_shows_each_section():
    shown = set(read_toml(EXAMPLES / "quickstart" / "run.toml"))
    assert shown == set(RunConfig.model_fields)


def test_launchers_are_valid_shell_and_ask_to_be_requeued():
    for script in EXAMPLES.glob("*/*.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        text = script.read_text()
        assert "#SBATCH --requeue" in text
        assert "--signal=B:USR1" in text


SLURM = {
    # Stand-ins for SLURM's commands: srun runs the command here, scontrol notes that it was asked.
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/bin/bash\necho "$@" >>"$NOTES"\n',
    "npr": "#!/bin/bash\n"
    'if [[ $1 == check ]]; then exit "${CHECK_CODE:-0}"; fi\n'
    'trap "echo cleaned; exit 143" TERM\n'
    'echo "pipeline $*" >>"$NOTES"\n'
    '[[ -n ${NEAR_LIMIT:-} ]] && kill -USR1 "$PPID"\n'
    "for _ in 1 2 3 4 5 6 7 8; do sleep 0.05; done\n",
}


def launch(tmp_path: Path, **environment: str) -> tuple[int, str]:
    """Run the launcher under the stand-ins; return its exit code and what was noted."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()
    result = subprocess.run(
        ["bash", str(EXAMPLES / "qwen3-4b" / "launch.sbatch"), "--until", "zero"],
        env={
            "PATH": f"{commands}:/usr/bin:/bin",
            "NPR": "npr",
            "NOTES": str(notes),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return result.returncode, notes.read_text()


RUN = "pipeline pipeline examples/qwen3-4b/run.toml --until zero\n"


def test_the_launcher_runs_the_pipeline_with_its_options(tmp_path):
    assert launch(tmp_path) == (0, RUN)


def test_the_launcher_stops_cleanly_and_requeues_near_the_time_limit(tmp_path):
    assert launch(tmp_path, NEAR_LIMIT="1") == (143, f"{RUN}requeue 42\n")


def test_the_launcher_uses_no_gpu_time_on_a_bad_run_file(tmp_path):
    assert launch(tmp_path, CHECK_CODE="2") == (2, "")
