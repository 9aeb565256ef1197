"""``npr serve`` as a command: it comes up, answers, drains, ends with the right code."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.live import DEADLINE_S, QUESTION, raw_post

NPR = str(Path(sys.executable).with_name("npr"))
ENVIRONMENT = {**os.environ, "COLUMNS": "120"}


BREAKING = """
import sys
from npr_megatron.cli.main import main
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.errors import DivergenceError

step = EmbeddedEngine.step

def break_down(engine):
    match engine.num_unfinished:
        case 2: raise ZeroDivisionError("planted")
        case 3: raise DivergenceError("planted")
    return step(engine)

EmbeddedEngine.step = break_down
main()
"""
"""``npr`` with an engine that dies of two or three answers at once."""


class Command:
    """A running ``npr serve``."""

    def __init__(self, *arguments: object, program: tuple[str, ...] = (NPR,)) -> None:
        self.process = subprocess.Popen(
            [*program, "serve", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read what it says until a line matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern} was never said: {''.join(self.lines)}")

    def ended(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what was said behind the last match."""
        _, error = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, error


@pytest.fixture
def command(speaker):
    started: list[Command] = []

    def start(*arguments: object, **options: Any) -> Command:
        started.append(Command("--model", speaker, "--port", "0", *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def health(port: int) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as connection:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status, json.loads(response.read())["status"]


def read_all(connection: socket.socket) -> str:
    parts = []
    with connection:
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


def test_the_command_serves_from_the_first_moment_and_drains_on_sigterm(command, speaker):
    server = command("--max-running", "4", "--drain-seconds", "60")
    port = int(server.wait_for(rf"^reading {speaker}; http://127\.0\.0\.1:(\d+)/health").group(1))
    status, state = health(port)
    assert (status, state) in ((503, "starting"), (200, "serving"))
    server.wait_for(r"^serving http://127\.0\.0\.1:\d+/v1$")
    assert health(port) == (200, "serving")

    prompt = f"{QUESTION}\n"
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
        whole = client.completions.create(model=str(speaker), prompt=prompt, seed=1)
        assert whole.choices[0].text.startswith("<guideline>")

        # More than can be decoded at once, so that some of them wait when the signal comes.
        body = {"prompt": prompt, "n": 48, "seed": 1, "stream": True}
        stream = raw_post(port, "/v1/completions", body)
        stream.recv(1)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + DEADLINE_S
        while health(port) == (200, "serving"):
            assert time.monotonic() < until
        with pytest.raises(openai.InternalServerError, match="stopping"):
            client.completions.create(model=str(speaker), prompt=prompt)
    text = read_all(stream)
    assert "[DONE]" in text and '"error"' not in text
    assert text.count('"finish_reason": "stop"') == 48
    assert server.ended() == (143, "stopped by SIGTERM; nothing is served any more\n")


def test_answers_that_take_longer_than_the_drain_are_ended_with_an_error(command):
    server = command("--drain-seconds", "0")
    port = int(server.wait_for(r"^serving http://127\.0\.0\.1:(\d+)/v1$").group(1))
    body = {"prompt": f"{QUESTION}\n", "temperature": 0, "max_tokens": 1000, "n": 8, "stream": True}
    stream = raw_post(port, "/v1/completions", body)
    stream.recv(1)
    server.process.send_signal(signal.SIGINT)
    text = read_all(stream)
    assert '"code": "shutting_down"' in text and "[DONE]" not in text
    assert server.ended() == (130, "stopped by SIGINT; nothing is served any more\n")


@pytest.mark.parametrize(
    ("num_choices", "code", "last_line"),
    [(2, 1, "ZeroDivisionError: planted"), (3, 2, "error: planted")],
)
def test_a_dead_engine_ends_the_command(command, speaker, num_choices, code, last_line):
    server = command(program=(sys.executable, "-c", BREAKING))
    port = int(server.wait_for(r"^serving http://127\.0\.0\.1:(\d+)/v1$").group(1))
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
        asked: dict[str, Any] = {"model": str(speaker), "prompt": f"{QUESTION}\n"}
        assert client.completions.create(**asked).choices
        with pytest.raises(openai.InternalServerError, match="the engine has failed: planted"):
            client.completions.create(**asked, n=num_choices)
    ended, error = server.ended()
    assert (ended, error.splitlines()[-1]) == (code, last_line)


def test_a_taken_port_is_one_line(npr, speaker):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = npr("serve", "--model", str(speaker), "--port", str(port))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: the server was to listen on 127.0.0.1:{port}: ")
    assert result.err.count("\n") == 1


def test_a_folder_without_a_model_is_one_line(npr, tmp_path):
    result = npr("serve", "--model", str(tmp_path / "none"))
    assert result.code == 2
    assert result.err.startswith(f"error: model folder {tmp_path / 'none'} has no config.json")


def test_without_a_model_the_command_says_what_is_missing(npr):
    result = npr("serve")
    assert result.code == 2
    assert "--model" in result.err


def test_help_shows_commands_to_copy(npr):
    result = npr("serve", "--help")
    assert result.code == 0
    assert "npr serve --model runs/quickstart-seed0/stages/npr/hf" in result.out
    assert "curl localhost:8000/v1/completions" in result.out
