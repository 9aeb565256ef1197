"""Experts recorded in the rollout, forced upon the routers of the trainer.

Engine and trainer compute one router's logits in different orders, so where two experts are nearly
as likely they may choose differently, and the log-probs of such a token differ by far more than
rounding. With the engine's choice the trainer computes what the engine computed. Its own router
still says how much each of the chosen experts counts, and learns that.

Megatron asks ``TopKRouter.router_replay`` for the top-k of every pass; here each router has one
that knows the routes of its layer. Which microbatch a pass belongs to, it knows by this rule:

* a chunk's forward pass begins with :meth:`RouteReplay.begin`, so its routers are at the
  microbatch begun last. The chunks of an interleaved schedule have routers of their own;
* a router inside a checkpoint runs first without gradients, then again with them, in the backward
  pass, when other microbatches have begun. Microbatches come back in the order in which they went,
  so it keeps a queue. No setting tells it: whether gradients are on does.

The router of a token with routes of -1 is free: padding, the last token of a path, and whatever was
recorded without routes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

TopK = Callable[..., tuple[Tensor, Tensor]]
"""Scores [T, E], k, and Megatron's group limits -> the largest scores [T, K] and their experts."""


class RouterRoutes:
    """What one router is to choose; Megatron's ``RouterReplay`` to the router that calls it."""

    def __init__(self) -> None:
        self._routes: Tensor | None = None
        self._learns = False
        self._checkpointed: deque[Tensor | None] = deque()
        """Of microbatches that went forward without gradients and will come back with them."""

    def begin(self, routes: Tensor | None) -> None:
        """Take over the routes [T, K] of the next microbatch; None leaves the router free."""
        self._routes = routes
        self._learns = torch.is_grad_enabled()
        if not self._learns:  # then nothing is under way, unless a step broke off
            self._checkpointed.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[Tensor, Tensor]:
        """Return the scores [T, K] of the experts [T, K] of this pass.

        Args:
            scores: [T, E] of the trainer's own router.
            default_compute_topk: what the router would do if it were free.
        """
        largest, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        routes = self._routes_of_this_pass()
        if routes is None:
            return largest, own
        chosen = torch.where(routes >= 0, routes.long(), own)
        return scores.gather(1, chosen), chosen

    def _routes_of_this_pass(self) -> Tensor | None:
        if torch.is_grad_enabled():
            return self._checkpointed.popleft() if self._checkpointed else self._routes
        if self._learns:
            self._checkpointed.append(self._routes)
        return self._routes


class RouteReplay:
    """The routers of one chunk of the model.

    Args:
        chunk: its layers are built; their routers ask this object from now on.
        num_dense_layers: leading layers of the model without experts.
        sequence_share: this rank's place and number among those that cut a row of tokens between
            attention layers; (0, 1) where nobody does.
    """

    def __init__(
        self, chunk: nn.Module, num_dense_layers: int, sequence_share: tuple[int, int]
    ) -> None:
        self._rank, self._size = sequence_share
        self._routers: list[tuple[int, RouterRoutes]] = []
        for layer in chunk.modules():
            if isinstance(layer, MoELayer):
                routes = RouterRoutes()
                router: Any = layer.router
                router.router_replay = routes
                number: Any = layer.layer_number  # from 1, over all stages and chunks
                self._routers.append((number - 1 - num_dense_layers, routes))

    def begin(self, routed_experts: Tensor | None) -> None:
        """Let the forward pass that follows use [S, B, M, K] experts of its tokens; None none."""
        own = None
        if routed_experts is not None:
            own = routed_experts.chunk(self._size)[self._rank].flatten(0, 1)  # as routers see them
        for layer, routes in self._routers:
            routes.begin(None if own is None else own[:, layer])
