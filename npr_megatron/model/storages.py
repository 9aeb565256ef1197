"""The tensors a stage trains, under the names and shapes that ``weights.layout`` plans with."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from npr_megatron.model.gpt import BranchGPT

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FUSED_NORMS = {
    # TransformerEngine keeps a norm inside the linear layer that follows it.
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def stage_parameters(stage: BranchGPT) -> dict[str, Parameter]:
    """Return the live parameters of ``stage`` by global name.

    Megatron numbers layers within the stage; the names here carry the layer's number in the model.
    """
    layers: Any = stage.decoder.layers
    numbers = [layer.layer_number - 1 for layer in layers]
    parameters: dict[str, Parameter] = {}
    for local_name, parameter in stage.named_parameters():
        name = local_name
        if found := _LAYER.match(local_name):
            inner = local_name[found.end() :]
            name = f"decoder.layers.{numbers[int(found[1])]}.{_FUSED_NORMS.get(inner, inner)}"
        parameters[name] = parameter
    return parameters


def stage_storages(stage: BranchGPT) -> dict[str, Tensor]:
    """Return what :func:`stage_parameters` hold, outside autograd: writing here changes the model.

    Call it after the stage was wrapped for training, which moves parameters into one buffer.
    """
    return {name: parameter.detach() for name, parameter in stage_parameters(stage).items()}
