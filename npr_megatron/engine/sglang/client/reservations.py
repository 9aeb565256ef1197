"""Who may use SGLang's pool: worst cases, reserved before a trajectory begins. Pure bookkeeping.

Between its stages a trajectory holds keys and values by leases, which SGLang cannot evict, so
trajectories that wait for each other's memory would wait for ever. Nothing is admitted that does
not fit with all it may come to need, beside those that run; then each of them can always go on.
First come, first served: nobody overtakes the first that waits.

Under data parallelism every rank has a pool of its own and a trajectory stays on one rank: among
those with room, the one with the least reserved. A prompt that a rank has not served counts as
reserved there, since it would have to be computed.

A reservation is for one *life*: the stages from admission to the end, or to the loss of what was
computed; its name is that of the leases. Room is free again when SGLang has been told to end them,
not when the trajectory ends.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from npr_megatron.config.engine import EngineConfig
from npr_megatron.errors import InputError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode, Trajectory

_POOL_SLACK = 8
"""Slots that SGLang keeps to itself: the one for padding, and the end of the longest row."""
_TOKENS_PER_BRANCH = 8
"""What a branch may hold twice for a moment: the tokens in front of its header and behind its text,
which are computed anew for their log-probs, and tokens decoded beyond the budget."""
_NUM_PROMPTS = 64
"""Prompts remembered per rank."""


def usable_slots(config: EngineConfig) -> int:
    """Return how many slots of one rank's pool trajectories may reserve."""
    return config.num_kv_slots - _POOL_SLACK


def worst_case(prompt_length: int, num_tokens: int, mode: DecodeMode, max_plans: int) -> int:
    """Return the slots that a trajectory may come to hold at once.

    A join copies branches into a row before those they came from are given up, so what branches can
    hold counts twice.
    """
    slack = _TOKENS_PER_BRANCH * (max_plans + 1)
    if mode is DecodeMode.SEQUENTIAL:
        return prompt_length + num_tokens + slack
    return prompt_length + 2 * num_tokens + slack


def slots_of(request: GenerationRequest, config: EngineConfig) -> int:
    """Return the slots to reserve for ``request``."""
    length = len(request.prompt_ids)
    return worst_case(length, request.max_new_tokens, request.mode, config.max_plans)


def pool_for(request: GenerationRequest, config: EngineConfig) -> int:
    """Return the smallest ``num_kv_slots`` with which ``request`` is served."""
    return slots_of(request, config) + _POOL_SLACK


def room_problems(request: GenerationRequest, config: EngineConfig) -> list[str]:
    """Return one sentence if ``request`` does not fit a pool that it has for itself."""
    needed, usable = slots_of(request, config), usable_slots(config)
    if needed <= usable:
        return []
    return [
        f"request {request.request_id}: prompt of {len(request.prompt_ids)} and max_new_tokens "
        f"{request.max_new_tokens} may take {needed} KV slots of SGLang's pool (a join holds "
        f"branches twice), it has {usable}; raise engine.num_kv_slots or lower max_new_tokens"
    ]


def scoring_slots(trajectory: Trajectory, config: EngineConfig) -> int:
    """Return the slots to reserve for scoring ``trajectory``.

    Raises:
        InputError: the pool has not that many.
    """
    mode = DecodeMode.PARALLEL if trajectory.num_blocks else DecodeMode.SEQUENTIAL
    num_plans = int(trajectory.branch.max(initial=0))
    needed = worst_case(trajectory.prompt_length, trajectory.num_tokens, mode, num_plans)
    if needed > usable_slots(config):
        raise InputError(
            f"trajectory {trajectory.prompt_id}#{trajectory.rollout} of "
            f"{len(trajectory.token_ids)} tokens was to be scored and may take {needed} KV slots "
            f"of SGLang's pool, it has {usable_slots(config)}; raise engine.num_kv_slots"
        )
    return needed


@dataclass(slots=True, eq=False)
class _Life:
    name: str
    num_slots: int
    prompt: tuple[int, ...]
    age: int
    rank: int = -1
    num_open: int = 0
    """Stages under way."""
    is_over: bool = False


@dataclass(slots=True)
class _Rank:
    room: int
    prompts: deque[tuple[int, ...]] = field(default_factory=lambda: deque(maxlen=_NUM_PROMPTS))
    """Those whose keys and values it probably has, most recent last."""
    to_release: list[str] = field(default_factory=list)
    num_open: int = 0
    """Stages under way."""


class Reservations:
    """Lives that wait and lives that hold room.

    Args:
        num_slots: of each data-parallel rank.
        max_running: lives that may hold room at once, over all ranks.
    """

    def __init__(self, num_slots: int, num_ranks: int, max_running: int) -> None:
        self._num_slots = num_slots
        self._max_running = max_running
        self._ranks = [_Rank(num_slots) for _ in range(num_ranks)]
        self._waiting: list[_Life] = []
        """By age."""
        self._lives: dict[str, _Life] = {}
        """Those that hold room."""

    @property
    def num_waiting(self) -> int:
        """Lives without room."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Lives with room that are not over."""
        return sum(not life.is_over for life in self._lives.values())

    @property
    def num_reserved(self) -> int:
        """Slots reserved on all ranks."""
        return sum(self._num_slots - rank.room for rank in self._ranks)

    def rank_of(self, name: str) -> int:
        """Return the rank of a life that holds room."""
        return self._lives[name].rank

    def wait(self, name: str, num_slots: int, prompt: tuple[int, ...], age: int) -> None:
        """Queue a life; the lowest age is admitted first."""
        insort(self._waiting, _Life(name, num_slots, prompt, age), key=lambda life: life.age)

    def withdraw(self, name: str) -> None:
        """Forget a life that waits."""
        self._waiting = [life for life in self._waiting if life.name != name]

    def admit(self) -> list[str]:
        """Reserve room for as many of the first that wait as fit; return their names, in order."""
        admitted: list[str] = []
        num_running = self.num_running
        while self._waiting and num_running < self._max_running:
            life = self._waiting[0]
            rank = self._rank_for(life)
            if rank is None:
                break
            del self._waiting[0]
            life.rank = rank
            self._ranks[rank].room -= life.num_slots
            if life.prompt not in self._ranks[rank].prompts:
                self._ranks[rank].prompts.append(life.prompt)
            self._lives[life.name] = life
            admitted.append(life.name)
            num_running += 1
        return admitted

    def _rank_for(self, life: _Life) -> int | None:
        fitting = [i for i, rank in enumerate(self._ranks) if rank.room >= life.num_slots]
        return min(fitting, key=lambda i: self._burden(self._ranks[i], life.prompt), default=None)

    def _burden(self, rank: _Rank, prompt: tuple[int, ...]) -> int:
        """Return how much a rank has to do already, and for ``prompt`` before anything else."""
        num_anew = 0 if prompt in rank.prompts else len(prompt)
        return self._num_slots - rank.room + num_anew

    # Stages and leases

    def stage_begun(self, name: str) -> None:
        """A stage of a life was sent."""
        life = self._lives[name]
        life.num_open += 1
        self._ranks[life.rank].num_open += 1

    def stage_ended(self, name: str) -> None:
        """SGLang has answered a stage for the last time, aborted ones included."""
        life = self._lives.get(name)
        if life is None:
            return  # the cache was flushed meanwhile
        life.num_open -= 1
        self._ranks[life.rank].num_open -= 1
        if life.is_over and not life.num_open:
            self._ranks[life.rank].to_release.append(name)

    def leave(self, name: str) -> None:
        """A life is over: its leases are to be ended once its stages have."""
        life = self._lives[name]
        life.is_over = True
        if not life.num_open:
            self._ranks[life.rank].to_release.append(name)

    def take_releases(self, rank: int) -> tuple[str, ...]:
        """Return the lives whose leases the next stage of ``rank`` is to end."""
        names, self._ranks[rank].to_release = tuple(self._ranks[rank].to_release), []
        return names

    def put_back(self, rank: int, names: Sequence[str]) -> None:
        """SGLang was not told after all: a later stage is to do it."""
        self._ranks[rank].to_release += [name for name in names if name in self._lives]

    def released(self, names: Sequence[str]) -> None:
        """SGLang has ended these leases: their room is free."""
        for name in names:
            life = self._lives.pop(name, None)
            if life is not None:
                self._ranks[life.rank].room += life.num_slots

    @property
    def ranks_to_release(self) -> list[int]:
        """Ranks that should be told now to end leases: somebody waits for room, or no stage is
        under way that another could follow.
        """
        return [
            index
            for index, rank in enumerate(self._ranks)
            if rank.to_release and (self._waiting or not rank.num_open)
        ]

    def flushed(self) -> None:
        """SGLang's cache was emptied while no stage was under way: every lease is gone."""
        self._lives.clear()
        for rank in self._ranks:
            rank.room, rank.num_open = self._num_slots, 0
            rank.to_release.clear()
            rank.prompts.clear()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless the room of every rank is that of its lives."""
        for index, rank in enumerate(self._ranks):
            lives = [life for life in self._lives.values() if life.rank == index]
            held = sum(life.num_slots for life in lives)
            if rank.room < 0 or rank.room + held != self._num_slots:
                raise AssertionError(
                    f"rank {index} has room for {rank.room} of {self._num_slots} slots, "
                    f"{len(lives)} lives hold {held}"
                )
            if rank.num_open != sum(life.num_open for life in lives):
                raise AssertionError(
                    f"rank {index} counts {rank.num_open} stages, its lives differ"
                )
