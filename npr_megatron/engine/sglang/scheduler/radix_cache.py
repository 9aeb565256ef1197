"""SGLang's radix cache, with joins and leases.

A join makes the keys and values of branches that were computed side by side the prefix of what
follows. Their rows are copied (``move_kv_cache``: memory moves, nothing is computed) into slots of
their own and entered into the tree under the linear form; the first branch lies there already. So
every slot has one owner, and SGLang's accounting, eviction and leak checks hold as they are. Where
a trajectory of equal text was joined before, the tree finds it and nothing is copied; where both
copied, the tree frees the second copy.

Keys and values of a linear form are right only if they were joined: computed from the text, later
branches would see earlier ones. So a stage says how many of its leading tokens must be found, and
is refused otherwise: SGLang computes its batch and throws the result away, and nothing of it enters
the tree. The refusal is decided anew at each match, since a join that lacks room now may find some
when its turn comes.

Leases keep what a stage left in the tree until the trajectory's next join has it, or until it ends
(``leases``). All ranks of a tensor-parallel engine see the same matches in the same order and
decide alike; the clock of the time-out is agreed on.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT  # pyright: ignore[reportMissingImports]
from sglang.srt.mem_cache.base_prefix_cache import (  # pyright: ignore[reportMissingImports]
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey  # pyright: ignore[reportMissingImports]
from sglang.srt.mem_cache.unified_radix_cache import (  # pyright: ignore[reportMissingImports]
    UnifiedRadixCache,
)
from torch import Tensor

from npr_megatron.engine.sglang.scheduler.joins import branch_paths
from npr_megatron.engine.sglang.scheduler.leases import Leases
from npr_megatron.engine.sglang.scheduler.orders import OrderBook
from npr_megatron.engine.sglang.scheduler.routes import copy_routes
from npr_megatron.engine.sglang.stage import KV_LOST, Audit, Orders

_MATCHES_PER_LOOK = 1024
"""Matches between two looks at the clock, on which all ranks must agree."""


class NprRadixCache(UnifiedRadixCache):
    """What an ordinary request sees is ``UnifiedRadixCache``."""

    def __init__(self, params: Any) -> None:
        self.orders = OrderBook()
        self.forward_stream: Any = None
        """Stream on which the model writes keys and values; None without a GPU."""
        self.has_routes = False
        """Whether the experts of tokens are recorded."""
        self._leases: Leases[Any] = Leases()
        self._num_matches = 0
        super().__init__(params)

    # What SGLang calls

    def match_prefix(self, params: Any) -> Any:
        """Find the longest known prefix; put joined branches together first."""
        req: Any = params.req
        orders = self.orders.of(req)
        if orders is None:
            return super().match_prefix(params)
        self._unlock_all(self._leases.end(orders.releases))
        self._leases.stir(orders.trajectory)
        self._expire_leases()
        if orders.join:
            self._join(req, params.key.token_ids, orders)
        result = super().match_prefix(params)
        refusal = None
        if orders.audits:
            refusal = Audit(len(self._leases), self.protected_size()).refusal
        elif result.device_prefix_len < orders.num_held:
            refusal = _refusal(orders, len(params.key))
        req.skip_radix_cache_insert = refusal is not None
        req.discard_output_reason = None if refusal is None else FINISH_ABORT(refusal)
        return result

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """Enter what a request has computed into the tree; lease it if the stage says so.

        A joined row is leased as soon as it is in the tree: the branches it was made of may go.
        """
        super().checkpoint(req, up_to=up_to, **kwargs)
        orders = self.orders.of(req)
        if orders is None or not orders.keeps:
            return
        has_ended = req.finished() and not isinstance(req.finished_reason, FINISH_ABORT)
        if has_ended or (orders.join and not req.finished()):
            lock = self.lock(req.last_node)
            self._unlock_all(self._leases.hold(orders.trajectory, lock, alone=bool(orders.join)))

    def reset(self) -> None:
        """Forget everything: SGLang empties its pool."""
        self._leases.clear()
        super().reset()

    # Joins

    def _join(self, req: Any, token_ids: array[int], orders: Orders) -> None:
        """Put the linear form together from its branches, if it is not in the tree yet.

        Does nothing where a branch is not in the tree as a whole, or where there is no room.
        """
        linear = token_ids[: orders.num_held]
        if self._find(req, linear).device_prefix_len >= orders.num_held:
            return
        locks: list[Any] = []
        parts: list[Tensor] = []
        for path in branch_paths(linear, orders.join):
            match = self._find(req, path)
            if match.device_prefix_len < len(path):
                break
            locks.append(self.lock(match.last_device_node))
            parts.append(self.path_device_indices(match.last_device_node)[: len(path)].clone())
        if len(parts) == len(orders.join) - 1:
            self._enter(req, linear, parts, orders.join[0])
        self._unlock_all(locks)

    def _enter(self, req: Any, linear: array[int], parts: list[Tensor], trunk: int) -> None:
        """Copy the rows of all branches but the first into new slots; enter the linear form.

        Args:
            parts: slots of the trunk and each branch.
            trunk: tokens of the trunk.
        """
        first, source = parts[0], torch.cat([part[trunk:] for part in parts[1:]])
        allocator = self.token_to_kv_pool_allocator
        shortage = len(source) - allocator.available_size()
        if shortage > 0:
            self.evict(EvictParams(num_tokens=shortage))
        target = allocator.alloc(len(source))
        if target is None:
            return
        self._copy_rows(target, source)
        self.insert(
            InsertParams(
                key=self._key(req, linear),
                value=torch.cat([first, target]).to(torch.int64),
                prev_prefix_len=len(first),  # owned by the tree already
            )
        )

    def _copy_rows(self, target: Tensor, source: Tensor) -> None:
        """Copy keys and values of all layers, in the order of the forward passes, and routes.

        The pass that runs now may still write to a slot that was freed meanwhile, so on a GPU the
        copy takes its place behind it.
        """
        if self.has_routes:
            copy_routes(target, source)
        pool: Any = self.token_to_kv_pool_allocator.get_kvcache()
        if not source.is_cuda:
            pool.move_kv_cache(target, source)
            return
        current = torch.cuda.current_stream()
        self.forward_stream.wait_stream(current)
        with torch.cuda.stream(self.forward_stream):
            pool.move_kv_cache(target, source)
        current.wait_stream(self.forward_stream)

    def _find(self, req: Any, token_ids: array[int]) -> Any:
        return super().match_prefix(MatchPrefixParams(key=self._key(req, token_ids)))

    @staticmethod
    def _key(req: Any, token_ids: array[int]) -> Any:
        return RadixKey(token_ids, req.extra_key, cache_salt=req.cache_salt)

    # Leases

    def _expire_leases(self) -> None:
        self._num_matches += 1
        if self._num_matches % _MATCHES_PER_LOOK:
            return
        now = torch.tensor(time.monotonic(), dtype=torch.float64)
        if self.tp_world_size > 1:
            torch.distributed.all_reduce(
                now, op=torch.distributed.ReduceOp.MIN, group=self.tp_group
            )
        self._unlock_all(self._leases.expire(now.item()))

    def _unlock_all(self, locks: Iterable[Any]) -> None:
        for lock in locks:
            self.unlock(lock)


def _refusal(orders: Orders, num_usable: int) -> str:
    """Return why a stage is refused.

    Args:
        num_usable: leading tokens that SGLang may take from its cache. It computes the last one in
            any case, and those that are scored.
    """
    if num_usable >= orders.num_held:
        return KV_LOST
    return (
        f"a stage of {orders.trajectory} holds {orders.num_held} tokens and at most {num_usable} "
        "can be taken from the cache; score from there on, and send a token behind them"
    )
