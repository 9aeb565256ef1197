"""Run ``npr`` inside the test process, as the shell would."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from npr_megatron.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """How one call of ``npr`` ended."""

    code: int
    out: str
    err: str


class Npr:
    """``npr("check", "run.toml")`` returns the outcome; exceptions that are not ours come
    through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["npr", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = self._capsys.readouterr()
        code = end.value.code
        return Outcome(
            code=code if isinstance(code, int) else 0, out=captured.out, err=captured.err
        )
