"""One finished trajectory, scored by SGLang: the replay of its tokens with log-probs."""

from __future__ import annotations

from collections import deque

from npr_megatron.engine.sglang.client.driver import Desk
from npr_megatron.engine.sglang.client.replay import Scored, no_logprobs, scoring
from npr_megatron.engine.sglang.client.rows import Run
from npr_megatron.engine.sglang.stage import Stage, StageResult
from npr_megatron.records.trajectory import Trajectory


class Scorer:
    """Scores one trajectory in one life.

    Args:
        runs: ``rows.recorded_runs`` of the trajectory.
        name: of the leases, and of a namespace of its own: what a record says of its structure need
            not be what its text says.
    """

    def __init__(self, trajectory: Trajectory, runs: list[Run], desk: Desk, *, name: str) -> None:
        self.name = name
        self.ending = ""
        """Why this life is over although not all is scored."""
        self.logprobs = no_logprobs(trajectory)
        self._desk = desk
        template = Stage(trajectory=name, namespace=name, token_ids=[], offset=0)
        self._waves = deque(scoring(trajectory, runs, template))
        self._open: dict[int, Scored] = {}

    @property
    def is_done(self) -> bool:
        """Whether everything is scored."""
        return not (self._waves or self._open or self.ending)

    def begin(self) -> None:
        """Send the first stage."""
        self._send_wave()

    def take(self, number: int, answer: StageResult) -> None:
        """Take the answer of a stage; send the next ones behind the last of a wave."""
        scored = self._open[number]
        if answer.is_last:
            del self._open[number]
        if answer.refusal:
            self.ending = answer.refusal
            self.stop()
            return
        scored.write(answer.scored, self.logprobs)
        if not self._open and self._waves:
            self._send_wave()

    def stop(self) -> None:
        """Abort all stages; nothing more is sent."""
        for number in self._open:
            self._desk.abort(number)
        self._open.clear()
        self._waves.clear()

    def _send_wave(self) -> None:
        for scored in self._waves.popleft():
            self._open[self._desk.send(self.name, scored.stage)] = scored
