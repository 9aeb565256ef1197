"""What is asked of SGLang: stages of a trajectory, each an ordinary request.

A trajectory is decoded as a sequence of stages: a piece of the trunk up to ``</guideline>``; the
branches of a block, each behind the trunk; their *seals*, which compute the keys and values of
``</step>`` and its newline; the next piece of the trunk, behind the joined branches. What makes
them more than plain text travels in a request's ``custom_params``, which SGLang carries to its
scheduler unread. The client (``client.driver``) writes stages, the plugin (``scheduler.plugin``)
obeys them; this module is all they share, and imports neither torch nor SGLang.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from npr_megatron.records.trajectory import RouteArray

CACHE_BACKEND = "npr"
"""Name of the plugin's radix cache: a server that chooses it can run stages."""
_PREFIX = "npr_"
UNTAUGHT = -1
"""In ``Draw.taught``: the sample stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How the tokens of a stage are drawn (``engine.compute.sampler``).

    The i-th token of the stage takes number ``first_index + i`` of random stream ``key``, so the
    draw depends neither on batches nor on retraction, and is that of the embedded engine.
    """

    key: int = 0
    """64-bit key of (request seed, block, branch)."""
    first_index: int = 0
    """Tokens that the stream has before this stage, forced ones included."""
    temperature: float = 1.0
    """0.0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    taught: tuple[int, ...] = ()
    """Tokens to take instead of the first samples, or ``UNTAUGHT``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Tokens that the streams of one block may still sample together.

    Counted in rounds, as everywhere: in each round every open branch takes one token, in order. A
    branch stops when the tokens that come before its next one use the budget up. It may stop late,
    never early; the client cuts at the exact token.
    """

    name: str
    """Of trajectory and block."""
    branch: int
    """1-based."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One request: known tokens, what their keys and values are, and how to go on.

    Example, the second branch of a first block whose trunk has 40 tokens::

        Stage(trajectory="p#0/1", namespace="12", token_ids=[*trunk, *header], offset=0,
              score_from=38, max_new_tokens=100, stop_ids=(STEP_CLOSE, EOS), draw=Draw(key=7))
    """

    trajectory: str
    """Names the leases; unique among all that the engine ever serves, replays included."""
    namespace: str
    """Trajectories of one namespace share keys and values of equal text. That is sound where the
    structure follows from the text alone, so it names at least the prompt's length."""
    token_ids: list[int]
    """Linear form: trunk, branch 1, branch 2, ..., trunk, or the trunk and one branch."""
    offset: int
    """Position of a token minus its index; the same for every token this stage computes."""
    num_held: int = 0
    """Leading tokens whose keys and values must be in the cache: branches were joined there, so
    computing them anew from the plain text would be wrong. Otherwise the stage is refused
    (``KV_LOST``) and computes nothing."""
    join: tuple[int, ...] = ()
    """Length of the trunk, then of each branch behind it, of the last joined block: where the
    ``num_held`` tokens are not in the cache as a whole, they are put together from these. Their sum
    is ``num_held``."""
    keeps: bool = False
    """Whether what this stage leaves in the cache is leased to the trajectory when it ends. A lease
    with a ``join`` replaces all earlier ones of the trajectory."""
    releases: tuple[str, ...] = ()
    """Trajectories whose leases end before this stage begins."""
    audits: bool = False
    """Whether the stage asks what is leased (``Audit``). It is refused with the answer."""
    score_from: int | None = None
    """Tokens behind this index are given log-probs; None gives none. At most ``num_held`` or the
    cached prefix is used up to here, since logits must be computed from here on."""
    routes_from: int | None = None
    """Tokens from this index on are answered with the experts that computed them; None asks for
    none."""
    max_new_tokens: int = 0
    """0 computes keys, values and log-probs of the known tokens only."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the stage when they are sampled; they are part of the output."""
    draw: Draw = field(default_factory=Draw)
    budget: Budget | None = None

    def custom_params(self) -> dict[str, Any]:
        """Return what the plugin must know, in values that SGLang carries: scalars and lists."""
        draw, budget = self.draw, self.budget
        fields: dict[str, Any] = {
            "trajectory": self.trajectory,
            "length": len(self.token_ids),
            "offset": self.offset,
            "num_held": self.num_held,
            "join": list(self.join),
            "keeps": self.keeps,
            "releases": list(self.releases),
            "audits": self.audits,
            "key": str(draw.key),  # beyond what a signed 64-bit integer holds
            "first_index": draw.first_index,
            "shape": [draw.temperature, float(draw.top_k), draw.top_p, draw.min_p],
            "taught": list(draw.taught),
        }
        if budget is not None:
            fields |= {
                "budget": budget.name,
                "budget_branch": budget.branch,
                "budget_tokens": budget.num_tokens,
            }
        return {_PREFIX + name: value for name, value in fields.items()}


KV_LOST = "npr_kv_lost"
"""Why a stage was refused: joined keys and values are no longer in the cache; replay."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What the cache of a data-parallel rank holds and may not give up."""

    num_leases: int
    num_locked: int
    """Tokens whose keys and values running stages or leases need."""

    @property
    def refusal(self) -> str:
        """Return what an auditing stage is refused with."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, refusal: str) -> Audit:
        """Read it back."""
        return cls(**json.loads(refusal))


@dataclass(frozen=True, slots=True)
class Orders:
    """A stage as the plugin reads it back from ``custom_params``."""

    trajectory: str
    length: int
    """Known tokens of the stage."""
    offset: int
    num_held: int
    join: tuple[int, ...]
    keeps: bool
    releases: tuple[str, ...]
    audits: bool
    key: int
    first_index: int
    shape: tuple[float, float, float, float]
    """temperature, top-k, top-p, min-p"""
    taught: tuple[int, ...]
    budget: Budget | None

    @classmethod
    def of(cls, custom_params: dict[str, Any] | None) -> Orders | None:
        """Return the orders in a request's ``custom_params``; None for a request without any."""
        if not custom_params or f"{_PREFIX}trajectory" not in custom_params:
            return None

        def read(name: str) -> Any:
            return custom_params[_PREFIX + name]

        budget = None
        if f"{_PREFIX}budget" in custom_params:
            budget = Budget(
                name=read("budget"),
                branch=read("budget_branch"),
                num_tokens=read("budget_tokens"),
            )
        return cls(
            trajectory=read("trajectory"),
            length=read("length"),
            offset=read("offset"),
            num_held=read("num_held"),
            join=tuple(read("join")),
            keeps=read("keeps"),
            releases=tuple(read("releases")),
            audits=read("audits"),
            key=int(read("key")),
            first_index=read("first_index"),
            shape=tuple(read("shape")),
            taught=tuple(read("taught")),
            budget=budget,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What SGLang answered: all of it, or what came since the last piece of a streamed answer."""

    token_ids: list[int]
    """Sampled; a stop token is the last one."""
    logprobs: list[float]
    """Of ``token_ids``, under the full distribution at temperature 1."""
    weight_versions: list[int]
    """Of ``token_ids``."""
    scored: list[float]
    """Log-probs of the known tokens behind ``score_from``, in order; empty but in the first
    piece."""
    scored_version: int
    """Of ``scored``: the weights that were live when SGLang answered."""
    num_cached: int
    """Known tokens whose keys and values were found in the cache."""
    is_last: bool
    routes: RouteArray | None = None
    """In the last piece, where they were asked for: the experts of the tokens from ``routes_from``
    to the last computed one, in all layers, in one row."""
    refusal: str = ""
    """Why the stage was refused or aborted; ``token_ids`` are valid all the same."""
