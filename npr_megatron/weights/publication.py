"""What control messages say about published weights: where they are, which they are. No payload."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from npr_megatron.errors import DivergenceError, StaleWeightsError
from npr_megatron.weights.digest import digests


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPublication:
    """One source rank's part of a published version."""

    version: int
    source_layout_id: str
    rank: int
    dtype: str
    """As torch prints it, ``torch.float32`` or ``torch.bfloat16``."""
    arena_path: str
    digest_shares: tuple[int, ...]
    """Part of this rank in each cover of the source layout (``weights.digest``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A version of the weights, readable by every process of the node.

    Valid until the source publishes the second version after it or closes its arenas.
    """

    version: int
    source_layout_id: str
    dtype: str
    arena_paths: tuple[str, ...]
    """One per source rank, in rank order."""
    digest: int
    """Layout-independent digest of all weights (``weights.digest``)."""

    @classmethod
    def assemble(cls, parts: Sequence[RankPublication]) -> Publication:
        """Join the parts of all source ranks, in any order.

        Raises:
            StaleWeightsError: ranks are missing or doubled, or disagree on version, layout, dtype.
            DivergenceError: replicas of one weight differ between source ranks.
        """
        ordered = sorted(parts, key=lambda part: part.rank)
        ranks = [part.rank for part in ordered]
        kinds = {(part.version, part.source_layout_id, part.dtype) for part in ordered}
        if ranks != list(range(len(ranks))) or len(kinds) != 1:
            raise StaleWeightsError(
                "a publication needs one part of every source rank, all alike; found ranks "
                f"{ranks} with (version, layout, dtype) {sorted(kinds)}; publish on all ranks again"
            )
        found = digests(part.digest_shares for part in ordered)
        if len(found) > 1:
            raise DivergenceError(
                f"version {ordered[0].version} cannot be published: replicas of the weights differ "
                f"between trainer ranks ({len(found)} digests, expected 1); training is broken, "
                "restart from the last checkpoint"
            )
        return cls(
            version=ordered[0].version,
            source_layout_id=ordered[0].source_layout_id,
            dtype=ordered[0].dtype,
            arena_paths=tuple(part.arena_path for part in ordered),
            digest=found.pop(),
        )

    def matches(self, digest_shares: Iterable[tuple[int, ...]]) -> bool:
        """Return whether the shares of all ranks of a receiver add up to the published digest."""
        return digests(digest_shares) == {self.digest}

    def check(self, digest_shares: Iterable[tuple[int, ...]]) -> None:
        """Require the shares of all ranks of a receiver to add up to the published digest.

        Replicas inside the receiver are covered: every cover must have this digest.

        Raises:
            StaleWeightsError: what was received is not what was published; do not serve it.
        """
        found = digests(digest_shares)
        if found != {self.digest}:
            received = ", ".join(f"{digest:#018x}" for digest in sorted(found))
            raise StaleWeightsError(
                f"weights of version {self.version} were received with digest {received}, "
                f"published was {self.digest:#018x}; drop the copy and pull again"
            )
