"""What every stage works with, and the moves all stages share: start or resume, push, log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npr_megatron.config.run import RunConfig
from npr_megatron.config.stages import StageName
from npr_megatron.config.training import OptimizerConfig
from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.errors import DivergenceError, InputError
from npr_megatron.evaluation.metrics import FaithfulCheck
from npr_megatron.observability.metrics import MetricsLog
from npr_megatron.pipeline.folder import RunFolder
from npr_megatron.pipeline.ports import SampleSource, Trainer
from npr_megatron.pipeline.versions import weight_version
from npr_megatron.records.randomness import derive_seed
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.report.live import LiveView
from npr_megatron.report.tree import trajectory_tree
from npr_megatron.rewards.reading import Reader
from npr_megatron.train.checkpoint_folder import find_checkpoint


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One run at work. Owned by the driver process."""

    config: RunConfig
    folder: RunFolder
    trainer: Trainer
    fleet: SampleSource
    tokenizer: Tokenizer
    tokenizer_folder: Path
    prompts: PromptBuilder
    reader: Reader
    is_faithful: FaithfulCheck | None
    """Judges every step and takeaway where the task can tell."""
    metrics: MetricsLog
    view: LiveView

    def start(
        self,
        stage: StageName,
        *,
        optimizer: OptimizerConfig,
        first_step: int,
        last_step: int,
        initial: Path,
        checkpoints: Path,
    ) -> int:
        """Make the trainer ready for the next of steps ``first_step`` + 1 .. ``last_step``.

        Loads the last checkpoint where an earlier start left one, else ``initial`` weights.

        Returns:
            The last step already done.
        """
        num_steps = last_step - first_step
        if find_checkpoint(checkpoints) is None:
            self.trainer.load_hf(initial)
            self.trainer.begin_stage(optimizer, num_steps)
            done = first_step
        else:
            self.trainer.begin_stage(optimizer, num_steps)
            done = int(self.trainer.load(checkpoints)["step"])
            self.view.resume(done)
        self.folder.rewind(stage, done)
        return done

    def push(self, stage: StageName, step: int) -> float:
        """Move the trainer's weights into every engine; return the seconds it took."""
        started = time.perf_counter()
        self.fleet.push(self.trainer.publish(weight_version(self.config, stage, step)))
        return time.perf_counter() - started

    def record(self, stage: StageName, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one optimizer step and show them."""
        self.metrics.write(stage, step, values)
        self.view.advance(step, values)

    def requests(
        self,
        purpose: str,
        problems: Sequence[Problem],
        mode: DecodeMode,
        rollouts: Sequence[int] = (0,),
    ) -> list[GenerationRequest]:
        """Return the requests for ``rollouts`` of each problem, problem by problem.

        ``purpose`` (stage and step) keys their randomness. Prompt and answer together fit a packed
        row of the trainer.

        Raises:
            InputError: a prompt alone fills a row.
        """
        sampling = self.config.sampling
        found = []
        for problem in problems:
            prompt_ids = self.prompts.prompt_ids(problem)
            room = self._room_behind(problem, prompt_ids)
            found += [
                GenerationRequest(
                    prompt_id=problem.id,
                    rollout=rollout,
                    prompt_ids=prompt_ids,
                    mode=mode,
                    max_new_tokens=min(sampling.max_new_tokens, room),
                    max_critical_path=min(sampling.max_critical_path, room),
                    seed=derive_seed(self.config.run.seed, purpose, problem.id, rollout),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                )
                for rollout in rollouts
            ]
        return found

    def decode(self, requests: Sequence[GenerationRequest]) -> list[Trajectory]:
        """Return what the fleet decodes for ``requests``, fit to learn from and to measure.

        Raises:
            DivergenceError: the weights gave no distribution for some request. An engine goes on
                serving then, a run must not: training on the rest would hide it.
        """
        trajectories = self.fleet.generate(requests)
        failed = [t for t in trajectories if t.finish is FinishReason.FAILED]
        if failed:
            first = failed[0]
            raise DivergenceError(
                f"{len(failed)} of {len(trajectories)} rollouts got no distribution from the model "
                f"({first.prompt_id} #{first.rollout}: {first.finish_detail}); go back to an "
                "earlier checkpoint and lower the learning rate"
            )
        return trajectories

    def _room_behind(self, problem: Problem, prompt_ids: Sequence[int]) -> int:
        room = self.config.trainer.row_tokens - len(prompt_ids)
        if room < 1:
            raise InputError(
                f"problem {problem.id} has a prompt of {len(prompt_ids)} tokens, a packed row "
                f"{self.config.trainer.row_tokens}; raise trainer.row_tokens or drop the problem"
            )
        return room

    def keep_sample(
        self, stage: StageName, step: int, trajectory: Trajectory, reward: float
    ) -> None:
        """Keep one trajectory for eyes: in the folder and on the terminal."""
        pieces = self.tokenizer.pieces(trajectory.token_ids)
        self.folder.append(
            self.folder.samples,
            {
                "stage": stage,
                "step": step,
                "text": self.tokenizer.decode(trajectory.token_ids),
                "trajectory": trajectory.to_json(),
                "reward": reward,
                "pieces": pieces,
            },
        )
        self.view.show_sample(trajectory_tree(trajectory, pieces))
