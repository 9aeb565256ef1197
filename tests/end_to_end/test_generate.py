"""The real ``npr generate``: in a terminal, and stopped by Ctrl-C and started again."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import DEADLINE_S, NPR
from tests.unit.cli.test_generate import write_model

pytestmark = pytest.mark.slow
NUM_PROMPTS = 80
ENVIRONMENT = {**os.environ, "COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "hf")


def seen_in_a_terminal(*command: object) -> tuple[int, str]:
    """Run a command in a terminal; return its exit code and all it drew, without colours."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [NPR, *map(str, command)], stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT
    )
    os.close(theirs)
    drawn = bytearray()
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not part:
            break
        drawn += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    return process.wait(DEADLINE_S), text


def test_in_a_terminal_the_answer_grows_and_stays(model):
    code, text = seen_in_a_terminal("generate", model, "a:1+2?", "--mode", "sequential")
    assert code == 0, text
    assert f"reading {model}" in text.replace("\r\n", "")
    assert "0 of 1 answered, 1 growing" in text
    lengths = [int(length) for length in re.findall(r"a:1\+2\?  (\d+) tokens", text)]
    assert lengths == sorted(lengths) != []  # how many frames fit depends on the machine
    assert "prompt 1 #0  sequential | 32 tokens" in text
    assert text.rstrip().splitlines()[-1].startswith("1 of 1 answered in")


def finished(output: Path) -> list[dict]:
    if not output.exists():
        return []
    return [json.loads(line) for line in output.read_text().split("\n")[:-1]]


def texts(output: Path) -> dict[str, str]:
    found = {line["id"]: line["text"] for line in finished(output)}
    assert len(found) == len(finished(output))
    return found


def command(model: Path, output: Path) -> list[str]:
    """Return the command that answers many prompts, and write these."""
    prompts = output.with_name("p.txt")
    prompts.write_text("".join(f"a:{i}+{i + 1}?\n" for i in range(NUM_PROMPTS)))
    sampling = ["--temperature", "1", "--mode", "sequential", "--max-new-tokens", "8"]
    where = ["--file", str(prompts), "--output", str(output), "--max-running", "4"]
    return [NPR, "generate", str(model), *where, *sampling]


def run(*arguments: str) -> str:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=DEADLINE_S, env=ENVIRONMENT, check=True
    ).stdout


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "answers.jsonl"
    run(*command(model, output))
    return texts(output)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_keeps_its_answers_and_goes_on(
    model, undisturbed, tmp_path, number, code
):
    output = tmp_path / "answers.jsonl"
    stopped = subprocess.Popen(
        command(model, output),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + DEADLINE_S
    while len(finished(output)) < 5:
        assert time.monotonic() < deadline and stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    stopped.send_signal(number)
    _, error = stopped.communicate(timeout=DEADLINE_S)
    assert stopped.returncode == code
    assert error == (
        f"stopped by {signal.Signals(number).name}; finished answers are in {output}; "
        "the same command goes on\n"
    )
    num_kept = len(finished(output))
    assert 5 <= num_kept < NUM_PROMPTS

    again = run(*command(model, output))
    assert f"{num_kept} answered before, {NUM_PROMPTS - num_kept} to go" in again
    assert texts(output) == undisturbed
    assert len(undisturbed) == NUM_PROMPTS
