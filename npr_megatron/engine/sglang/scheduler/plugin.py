"""NPR Engine's plugin for SGLang, by its official seams.

SGLang calls :func:`register` (entry point ``sglang.srt.plugins``) in every process it starts, of
any server in the same environment. So it registers a name only, that of a radix cache, and a hook
that leaves other servers alone (``cpu_sizes``; SGLang builds the model before the cache). A server
that chooses it (``radix_cache_backend="npr"``) builds one in each of its schedulers, and there
everything else happens: what SGLang must have and must not do is checked, the hooks are applied,
and it is proved that they are in place. SGLang logs what goes wrong in a plugin and serves on; here
it is raised, and the scheduler, and so the server, does not start.

No hook is needed where a request ends. The token that ends a stage has no keys and values yet, nor
has the newline behind it; the client sends both with its next stage, which only computes them (its
*seal*), and learns the newline's log-prob from it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from npr_megatron.engine.sglang.scheduler import cpu_sizes, support
from npr_megatron.engine.sglang.stage import CACHE_BACKEND
from npr_megatron.errors import EnvironmentFault

_LOGGER = logging.getLogger(__name__)


def register() -> None:
    """Make the name of our radix cache known to this process, and keep models as they are."""
    from sglang.srt.mem_cache import registry  # pyright: ignore[reportMissingImports]
    from sglang.srt.plugins.hook_registry import (  # pyright: ignore[reportMissingImports]
        HookRegistry,
        HookType,
    )

    HookRegistry.register(cpu_sizes.TARGET, cpu_sizes.keep_sizes, HookType.AROUND)
    registry.register_radix_cache_backend(CACHE_BACKEND, _build_cache)


def _build_cache(context: Any) -> Any:
    """Build the radix cache of a scheduler (``TreeCacheBuildContext``), and all that goes with it.

    Raises:
        EnvironmentFault: this server cannot run stages; says all that is in the way.
    """
    _refuse(
        [
            *support.version_problems(version("sglang")),
            *support.attribute_problems(support.ATTRIBUTES, support.attributes_of),
        ]
    )
    _refuse(_problems_of_server(context))
    from sglang.srt.mem_cache.registry import (  # pyright: ignore[reportMissingImports]
        create_unified_radix_cache,
    )

    from npr_megatron.engine.sglang.scheduler.radix_cache import NprRadixCache

    cache: Any = create_unified_radix_cache(context, cache_class=NprRadixCache)
    cache.forward_stream = context.tp_worker.model_runner.forward_stream
    cache.has_routes = getattr(context.server_args, "enable_return_routed_experts", False)
    _apply_hooks(cache.orders)
    _LOGGER.info("NPR stages: radix cache and hooks are in place")
    return cache


def _problems_of_server(context: Any) -> list[str]:
    from sglang.srt.environ import envs  # pyright: ignore[reportMissingImports]

    facts = {
        "sliding-window layers": context.is_hybrid_swa,
        "state-space layers": context.is_hybrid_ssm,
        "sparse attention": context.is_dsa,
        "positions of several axes": context.model_config.model_is_mrope,
    }
    options = support.options_of(context.server_args)
    problems = support.option_problems(options) + support.model_problems(facts)
    pool = context.params.token_to_kv_pool_allocator.get_kvcache()
    if not getattr(pool, "use_native_move_kv_cache", False):
        problems.append(
            f"{type(pool).__name__} cannot copy rows; set SGLANG_NATIVE_MOVE_KV_CACHE=1 in the "
            "environment of the server"
        )
    if envs.SGLANG_RADIX_FORCE_MISS.get():
        problems.append("SGLANG_RADIX_FORCE_MISS hides joined rows; unset it")
    return problems


def _apply_hooks(orders: Any) -> None:
    """Hook the calls of this scheduler; prove that it was done.

    Raises:
        EnvironmentFault: another plugin hooked them before.
    """
    from sglang.srt.plugins.hook_registry import (  # pyright: ignore[reportMissingImports]
        HookRegistry,
        HookType,
    )

    from npr_megatron.engine.sglang.scheduler import input_logprobs
    from npr_megatron.engine.sglang.scheduler.hooks import BatchHook, BudgetHook
    from npr_megatron.engine.sglang.scheduler.sampler import sample

    hooks: dict[str, tuple[Callable[..., Any], HookType]] = {
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": (
            BatchHook(orders),
            HookType.AFTER,
        ),
        "sglang.srt.managers.schedule_batch.Req.update_finish_state": (
            BudgetHook(orders),
            HookType.AFTER,
        ),
        "sglang.srt.layers.sampler.Sampler.forward": (sample, HookType.AROUND),
        **{
            target: (input_logprobs.with_own_cursor, HookType.AROUND)
            for target in input_logprobs.TARGETS
        },
    }
    before = {target: support.found(target) for target in hooks}
    for target, (hook, kind) in hooks.items():
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    _refuse(
        [
            f"{target} could not be hooked: another plugin did before; leave that one out by "
            "SGLANG_PLUGINS=npr"
            for target in hooks
            if support.found(target) == before[target]
        ]
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise EnvironmentFault(f"SGLang cannot run NPR stages here:{listed}")
