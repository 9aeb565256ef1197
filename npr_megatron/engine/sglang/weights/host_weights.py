"""The weights of an SGLang engine in host memory: those that are served, and their shadow.

Both lie in one piece of shared memory, in the layout of a single rank; SGLang's ranks map it and
cut their own parts out (``loader``), so nothing is copied but what a rank needs. A push fills the
shadow while the engine decodes, hands it to the ranks between two stages, and swaps the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.intake import unfit_numbers, weight_problems
from npr_megatron.engine.sglang.options import NO_VERSION
from npr_megatron.engine.sglang.weights.shared_bytes import SharedBytes
from npr_megatron.errors import DivergenceError, LayoutError, StaleWeightsError
from npr_megatron.weights.digest import Census, census_of, digest_box, digests
from npr_megatron.weights.executors.slots import SlotHeader, Slots, slot_bytes
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import tile_view

Shares = tuple[tuple[int, ...], ...]
"""Per rank: its part in the digest of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Weights that SGLang's ranks may take from the shadow."""

    publication: Publication
    shares: Shares
    """What each rank must hold afterwards."""


class HostWeights:
    """Served weights, their version, and their shadow.

    Args:
        dtype: of all weights.
        tp_size: ranks that will take their parts.

    Raises:
        EnvironmentFault: not enough memory for two copies of the model.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype, tp_size: int) -> None:
        self.layout = engine_layout(model, engine="sglang")
        self._ranks = engine_layout(model, tp_size, engine="sglang")
        self._census = Census(self._ranks)
        self.dtype = dtype
        [rank] = self.layout.ranks
        self._bytes = SharedBytes("weights", 2 * slot_bytes(rank, dtype))
        self._slots = Slots(self._bytes.memory, rank, dtype)
        self._served = 0
        self._digests: tuple[tuple[int, ...], Shares] | None = None
        """Of the tiles of the shadow and of the parts of the ranks, once it is sealed."""
        self._is_staged = False
        self.version = NO_VERSION
        """Of the served weights."""

    @property
    def served(self) -> Mapping[str, Tensor]:
        """Served storages by name; read only."""
        return self._slots.storages(self._served)

    @property
    def path(self) -> str:
        """Where other processes map the memory."""
        return self._bytes.path

    @property
    def shadow(self) -> int:
        """Which half of the memory is the shadow."""
        return 1 - self._served

    def staging(self) -> dict[str, Tensor]:
        """Return the storages of the shadow, to be filled anew."""
        self._digests, self._is_staged = None, True
        self._slots.begin(self.shadow)
        return dict(self._slots.storages(self.shadow))

    def stage(self, weights: Mapping[str, Tensor]) -> None:
        """Fill the shadow with ``weights`` and seal it.

        Raises:
            LayoutError: a storage is missing, unknown or of another shape.
            DivergenceError: a storage holds NaN or infinity.
        """
        if problems := weight_problems(weights, self.served):
            raise LayoutError("\n".join(problems))
        with torch.no_grad():
            for name, storage in self.staging().items():
                storage.copy_(weights[name])
        self.seal()

    def seal(self) -> None:
        """Check the filled shadow and digest it, so that a push need not.

        Raises:
            DivergenceError: a storage holds NaN or infinity.
        """
        storages = self._slots.storages(self.shadow)
        if problems := unfit_numbers(storages):
            raise DivergenceError(
                "weights were staged, every number must be finite; the served weights are as "
                "before, check the trainer:\n" + "\n".join(problems)
            )
        tiles = census_of(self.layout).tile_digests(0, storages)
        self._digests = tiles, self._shares(tiles, storages)

    def require_sealed(self, version: int) -> tuple[tuple[int, ...], Shares]:
        """Return the digests of the shadow's tiles and of the parts of the ranks.

        Raises:
            StaleWeightsError: nothing was staged.
            DivergenceError: a storage holds NaN or infinity.
        """
        if not self._is_staged:
            raise StaleWeightsError(
                f"version {version} was to be committed, but nothing is staged; fill staging()"
            )
        if self._digests is None:
            self.seal()
        assert self._digests is not None
        return self._digests

    def offer(self, version: int) -> Offer:
        """Declare the shadow to be ``version``, for the ranks to take.

        Raises:
            StaleWeightsError: nothing was staged.
            DivergenceError: a storage holds NaN or infinity.
        """
        tiles, shares = self.require_sealed(version)
        [digest] = digests(shares)
        header = SlotHeader(version, self.layout.layout_id, str(self.dtype), digest)
        self._slots.begin(self._served)  # one version at a time is offered
        self._slots.finish(self.shadow, header, tiles)
        publication = Publication(
            version=version,
            source_layout_id=header.layout_id,
            dtype=header.dtype,
            arena_paths=(self.path,),
            digest=digest,
        )
        return Offer(publication=publication, shares=shares)

    def swap(self, version: int) -> None:
        """Serve the shadow: every rank holds it."""
        self._served = self.shadow
        self._is_staged, self._digests = False, None
        self.version = version

    def _shares(self, tiles: tuple[int, ...], storages: Mapping[str, Tensor]) -> Shares:
        """Return what each rank contributes to the digest.

        The host holds every parameter whole, so the box of a rank is a slice of it.
        """
        [host] = self.layout.ranks
        if len(self._ranks.ranks) == 1:
            return (self._census.sum_tiles(0, tiles),)
        whole = {tile.parameter: tile_view(tile, storages) for tile in host.tiles}
        return tuple(
            self._census.sum_tiles(
                number,
                [
                    digest_box(tile.parameter, tile.box, whole[tile.parameter][tile.box.slices])
                    for tile in rank.tiles
                ],
            )
            for number, rank in enumerate(self._ranks.ranks)
        )

    def close(self) -> None:
        """Let go of the memory; storages in use stay valid. Safe to call twice."""
        self._bytes.close()
