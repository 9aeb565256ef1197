"""The tensors a stage trains, under the names and shapes that ``weights.layout`` plans with."""

from __future__ import annotations

import re

from torch import Tensor

from npr_megatron.errors import LayoutError
from npr_megatron.model.gpt import BranchGPT
from npr_megatron.weights.layout import RankLayout

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FUSED_NORMS = {
    # TransformerEngine keeps a norm inside the linear layer that follows it.
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def stage_storages(stage: BranchGPT) -> dict[str, Tensor]:
    """Return the live parameters of ``stage`` by global name; writing to one changes the model.

    Megatron numbers layers within the stage; the names here carry the layer's number in the model.
    """
    numbers = [layer.layer_number - 1 for layer in stage.decoder.layers]
    storages: dict[str, Tensor] = {}
    for local_name, parameter in stage.named_parameters():
        name = local_name
        if found := _LAYER.match(local_name):
            inner = local_name[found.end() :]
            name = f"decoder.layers.{numbers[int(found[1])]}.{_FUSED_NORMS.get(inner, inner)}"
        storages[name] = parameter.detach()
    return storages


def check_storages(storages: dict[str, Tensor], layout: RankLayout, rank: int) -> None:
    """Refuse a model whose parameters are not what the weight planner believes they are.

    Raises:
        LayoutError: a storage is missing, unknown or of another shape; names the first few.
    """
    built = {name: tuple(tensor.shape) for name, tensor in storages.items()}
    planned = {storage.name: tuple(storage.shape) for storage in layout.storages}
    wrong = [
        f"{name}: planned {planned.get(name, 'nothing')}, built {built.get(name, 'nothing')}"
        for name in sorted(built.keys() | planned.keys())
        if built.get(name) != planned.get(name)
    ]
    if wrong:
        raise LayoutError(
            f"trainer rank {rank} must hold what weights.layout planned, but {len(wrong)} storages "
            f"differ ({'; '.join(wrong[:3])}); the layout or the Megatron version is not supported"
        )
