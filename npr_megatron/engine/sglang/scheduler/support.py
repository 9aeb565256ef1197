"""What the plugin asks of SGLang: a version, the attributes it uses, and what must be switched off.

Everything is checked before an engine serves, and all that is wrong is said at once. Importable
without SGLang: the parts that look at it are handed in.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

FIRST_VERSION = (0, 5, 22)
BEYOND_VERSION = (0, 5, 24)
"""The first one that was not tried."""

_SRT = "sglang.srt."
ATTRIBUTES: Mapping[str, Collection[str]] = {
    _SRT + "environ.envs": ["SGLANG_RADIX_FORCE_MISS"],
    _SRT + "layers.sampler.Sampler": ["forward", "_sync_token_ids_across_tp"],
    _SRT + "managers.schedule_batch": ["FINISH_ABORT", "FINISH_LENGTH"],
    _SRT + "managers.schedule_batch.Req": [
        "cache_salt", "discard_output_reason", "extra_key", "finished", "finished_len",
        "finished_reason", "last_node", "output_ids", "sampling_params", "skip_radix_cache_insert",
        "update_finish_state",
    ],
    _SRT + "managers.schedule_batch.ScheduleBatch": ["reqs", "seq_lens_cpu"],
    _SRT + "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor": [
        "_apply_chunked_prefill_logprobs", "_apply_prefill_logprobs",
    ],
    _SRT + "mem_cache.base_prefix_cache.EvictParams": ["num_tokens"],
    _SRT + "mem_cache.base_prefix_cache.InsertParams": ["key", "prev_prefix_len", "value"],
    _SRT + "mem_cache.base_prefix_cache.MatchPrefixParams": ["key", "req"],
    _SRT + "mem_cache.base_prefix_cache.MatchResult": ["device_prefix_len", "last_device_node"],
    _SRT + "mem_cache.radix_cache.RadixKey": ["cache_salt", "extra_key", "token_ids"],
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache": [
        "checkpoint", "evict", "insert", "lock", "match_prefix", "path_device_indices", "reset",
        "protected_size", "token_to_kv_pool_allocator", "tp_group", "tp_world_size", "unlock",
    ],
    _SRT + "model_executor.forward_batch_info.ForwardBatch": [
        "extend_seq_lens", "forward_mode", "init_new", "positions", "sampling_info",
    ],
    _SRT + "model_executor.forward_batch_info.ForwardMode": ["is_decode"],
    _SRT + "model_executor.model_runner.ModelRunner": ["forward_stream"],
    _SRT + "plugins.hook_registry.HookRegistry": ["apply_hooks", "register"],
    _SRT + "runtime_context": ["get_model", "get_parallel"],
    _SRT + "sampling.sampling_params.SamplingParams": ["custom_params"],
    _SRT + "server_args.ServerArgs": [
        "disable_radix_cache", "disaggregation_mode", "enable_hierarchical_cache", "enable_lora",
        "page_size", "pp_size", "speculative_algorithm",
    ],
}  # fmt: skip
"""By qualified name of their owner."""

_REQUIRED: Mapping[str, tuple[Any, str]] = {
    "page_size": (1, "branches end anywhere, and what is left of a page would be recomputed"),
    "disable_radix_cache": (False, "joined branches are found in the radix cache"),
    "speculative_algorithm": (None, "drafts set positions of their own"),
    "disaggregation_mode": ("null", "joined rows are not sent between engines"),
    "enable_hierarchical_cache": (False, "leases do not reach what lies in host memory"),
    "enable_unified_cache_external_linker": (False, "leases do not reach an outer store"),
    "enable_lmcache": (False, "it brings a radix cache of its own"),
    "enable_hisparse": (False, "it keeps part of the keys and values elsewhere"),
    "enable_unified_memory": (False, "its slots are virtual"),
    "enable_kv_cache_sharding": (False, "a slot lies on one rank only"),
    "enable_streaming_session": (False, "a session's row is not in the radix cache"),
    "enable_session_radix_cache": (False, "leases take the part of sessions"),
    "enable_lora": (None, "an adapter's keys and values are not told apart"),
    "enable_dp_attention": (False, "its ranks pad each other's batches"),
    "pp_size": (1, "only the ranks of one stage agree on leases"),
    "attn_cp_size": (1, "positions are cut there"),
    "dcp_size": (1, "positions are cut there"),
    "dllm_algorithm": (None, "it decodes in blocks"),
    "enable_pdmux": (False, "batches are split there"),
    "enable_two_batch_overlap": (False, "batches are split there"),
    "enable_watermark": (False, "it chooses tokens itself"),
    "strip_thinking_cache": (False, "what was decoded must stay in the cache"),
}
_SAME = {None: {None, False}, False: {None, False}}
"""Values of options that are switched off."""


def version_problems(version: str) -> list[str]:
    """Return what is wrong with a version of SGLang."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if FIRST_VERSION <= numbers < BEYOND_VERSION:
        return []
    first, beyond = (".".join(map(str, edge)) for edge in (FIRST_VERSION, BEYOND_VERSION))
    return [
        f"SGLang is {version} and the plugin knows >= {first}, < {beyond}; install one of these"
    ]


def attribute_problems(
    wanted: Mapping[str, Collection[str]], offered_by: Callable[[str], Collection[str] | None]
) -> list[str]:
    """Return what SGLang does not have.

    Args:
        wanted: attributes by qualified name of their owner.
        offered_by: names the attributes of an owner; None where there is no such owner.
    """
    problems: list[str] = []
    for owner, names in wanted.items():
        offered = offered_by(owner)
        if offered is None:
            problems.append(f"SGLang has no {owner}")
        else:
            problems += [f"SGLang's {owner} has no {n}" for n in names if n not in offered]
    return problems


def option_problems(options: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the options of a server; those that it does not have are off."""
    return [
        f"{name} is {options[name]!r} and must be {needed!r}: {why}"
        for name, (needed, why) in _REQUIRED.items()
        if name in options and options[name] not in _SAME.get(needed, {needed})
    ]


def options_of(server_args: Any) -> dict[str, Any]:
    """Return the options of a ``ServerArgs`` that matter here; a version may lack some."""
    return {name: getattr(server_args, name) for name in _REQUIRED if hasattr(server_args, name)}


def model_problems(facts: Mapping[str, bool]) -> list[str]:
    """Return what is wrong with a model, given what it has."""
    return [f"the model has {what}, which joins cannot copy" for what, has in facts.items() if has]


def attributes_of(owner: str) -> set[str] | None:
    """Return the names of what a module, a class or its instances have; None if there is none."""
    try:
        thing = found(owner)
    except (ImportError, AttributeError):
        return None
    names = set(dir(thing))
    if dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}
    if isinstance(thing, type):
        names |= {name for base in thing.__mro__ for name in vars(base)}  # an Enum's dir is short
        if isinstance(thing.__init__, types.FunctionType):
            names |= set(thing.__init__.__code__.co_names)  # what it sets on its instances
    return names


def found(name: str) -> Any:
    """Return what a qualified name stands for now.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such thing.
    """
    return pkgutil.resolve_name(name)
