"""Every error this package raises on purpose.

    NprError
    ├── ConfigError (ValueError)         the description of a run is wrong; lists every problem
    ├── InputError (ValueError)          a file, tokenizer or token stream is not what was asked for
    ├── EnvironmentFault (RuntimeError)  the machine cannot do it: port taken, shared memory full
    │   └── EngineLost                   processes that computed for an engine are gone
    ├── LayoutError (ValueError)         weights or branches cannot be laid out as asked
    ├── StaleWeightsError (RuntimeError) a version, digest or plan differs; nothing was served
    └── DivergenceError (RuntimeError)   numbers went wrong: NaN, log-prob gap above its limit

A message has three parts: what was asked, expected against found, what to do. Errors cross process
borders, so each takes plain strings and stays picklable. The command line prints the message, no
stack trace, and exits with 2.
"""

from __future__ import annotations

from collections.abc import Sequence


class NprError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(NprError, ValueError):
    """A run description is wrong. ``problems`` holds one sentence each, all of them."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return (type(self), (self.problems,))


class InputError(NprError, ValueError):
    """A file, tokenizer, prompt or token stream is not what was asked for."""


class EnvironmentFault(NprError, RuntimeError):
    """The machine cannot do it: a port is taken, shared memory is full, no worker is left."""


class EngineLost(EnvironmentFault):
    """The processes that computed for an engine have ended; another engine may do."""


class LayoutError(NprError, ValueError):
    """Weights or branches cannot be laid out as asked."""


class StaleWeightsError(NprError, RuntimeError):
    """A weight version, digest or plan does not match; nothing was served from it."""


class DivergenceError(NprError, RuntimeError):
    """Numbers went wrong: a NaN, or a log-probability gap above its limit."""
