"""Push volumes made by hand: every source rank holds an equal share."""

from __future__ import annotations

from npr_megatron.planning.push_volume import NodeKind, PushVolume


def even_volume(
    model_gb: float,
    num_sources: int,
    num_nodes: int,
    *,
    num_kinds: int = 1,
    gpu_gb: float | None = None,
    gpus_per_node: int = 8,
) -> PushVolume:
    """``num_kinds`` nodes together hold a model; each GPU an equal share unless ``gpu_gb`` says
    otherwise."""
    node_bytes = model_gb * 1e9 / num_kinds
    gpu_bytes = node_bytes / gpus_per_node if gpu_gb is None else gpu_gb * 1e9
    kinds = tuple(
        NodeKind(
            nodes=tuple(range(kind, num_nodes, num_kinds)),
            content=kind,
            bytes_from=(round(node_bytes / num_sources),) * num_sources,
            gpu_bytes=(round(gpu_bytes),) * gpus_per_node,
        )
        for kind in range(num_kinds)
    )
    return PushVolume(model_bytes=round(model_gb * 1e9), kinds=kinds)
