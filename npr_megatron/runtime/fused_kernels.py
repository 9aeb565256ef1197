"""NVIDIA's fused kernels: which of them are really here, and what is computed without them.

Megatron takes TransformerEngine and apex for granted wherever their names can be imported. Both are
optional here, and neither name is proof: a TransformerEngine may lack its torch extension, an apex
its CUDA extension, and the ``apex`` of PyPI is another project, a toolkit for the web framework
Pyramid. What cannot be used is hidden from this process before Megatron looks for it
(:func:`hide_unusable`), so that Megatron's choice is ours:

* linear layers and norms: TransformerEngine's, else torch's; FP8 needs TransformerEngine;
* Adam: TransformerEngine's, else apex's, else ``runtime.adam``, all with one state and checkpoint.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packaging.version import InvalidVersion, Version

from npr_megatron.errors import EnvironmentFault

NOT_INSTALLED = "TransformerEngine is not installed"
_log = logging.getLogger(__name__)
_LEAST_TRANSFORMER_ENGINE = Version("2.9")
_NVIDIA_APEX = ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py")
"""Files of NVIDIA's apex that Megatron uses."""
_APEX_EXTENSION = "amp_C"
_NOT_NVIDIA = "is not NVIDIA's but another project of that name on PyPI"
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The least compute capability whose matrix units multiply as a recipe scales."""


@dataclass(frozen=True, slots=True)
class FusedKernels:
    """What a process found, and why it does without the rest."""

    without_transformer_engine: str
    """Why TransformerEngine is not used; empty where it is."""
    without_apex: str
    """Why apex is not used; empty where it could be."""
    has_foreign_apex: bool = False
    """A package of that name is installed that is not NVIDIA's."""

    @property
    def has_transformer_engine(self) -> bool:
        """Whether layers are TransformerEngine's."""
        return not self.without_transformer_engine

    @property
    def has_fused_adam(self) -> bool:
        """Whether Megatron finds an Adam of NVIDIA's."""
        return self.has_transformer_engine or not self.without_apex

    def describe(self) -> str:
        """Return what is used, in one line for the log of a start."""
        if self.has_transformer_engine:
            return "kernels: TransformerEngine (linear layers, norms, Adam)"
        adam = "torch's fused" if self.without_apex else "apex's fused"
        apex = f"; {self.without_apex}" if self.without_apex else ""
        return (
            f"kernels: linear layers and norms of torch, {adam} Adam "
            f"({self.without_transformer_engine}{apex})"
        )


def hide_unusable() -> None:
    """Make ``import apex`` and ``import transformer_engine`` fail where they cannot be used.

    For this process; call it before Megatron is imported. Costs nothing where neither is installed.
    """
    found = fused_kernels()
    if not found.has_transformer_engine:
        sys.modules["transformer_engine"] = None  # pyright: ignore[reportArgumentType]
    if found.without_apex:
        sys.modules["apex"] = None  # pyright: ignore[reportArgumentType]


@cache
def fused_kernels() -> FusedKernels:
    """Return what this process can use. The first answer stands."""
    without_apex = _without_apex()
    return FusedKernels(
        without_transformer_engine=_without_transformer_engine(),
        without_apex=without_apex,
        has_foreign_apex=_NOT_NVIDIA in without_apex,
    )


def report_kernels() -> None:
    """Log what is used, and warn of an apex that is not NVIDIA's; for one rank of a trainer."""
    found = fused_kernels()
    _log.info(found.describe())
    if found.has_foreign_apex:
        _log.warning(found.without_apex)


def require_fp8(recipe: str | None) -> None:
    """Raise EnvironmentFault where this process cannot train in FP8 by ``recipe``; None: it need
    not."""
    if recipe is None:
        return
    import torch

    capability = torch.cuda.get_device_capability() if _has_cuda() else None
    problem = fp8_problem(recipe, capability, fused_kernels().without_transformer_engine)
    if problem:
        raise EnvironmentFault(problem)


def fp8_problem(
    recipe: str, capability: tuple[int, int] | None, without_transformer_engine: str
) -> str:
    """Return why ``recipe`` cannot run, in one sentence; empty where it can.

    Args:
        capability: of the GPU; None without one.
        without_transformer_engine: why TransformerEngine cannot be used, empty where it can.
    """
    asked = f'trainer.fp8 = "{recipe}" was asked for'
    otherwise = "or remove trainer.fp8 to train in bf16"
    if capability is None:
        return f"{asked} and this process sees no NVIDIA GPU; run it on one, {otherwise}"
    least = _CAPABILITY[recipe]
    if capability < least:
        found, needed = (".".join(map(str, version)) for version in (capability, least))
        other = ', take another recipe such as "tensorwise",' if capability >= (8, 9) else ""
        return (
            f"{asked}, which needs a GPU of compute capability {needed}, and this one has {found}; "
            f"use a newer GPU{other} {otherwise}"
        )
    if without_transformer_engine:
        return (
            f"{asked} and {without_transformer_engine}; install it (bash tools/setup_te), "
            f"{otherwise}"
        )
    return ""


def _without_transformer_engine() -> str:
    if importlib.util.find_spec("transformer_engine") is None:
        return NOT_INSTALLED
    if not _has_cuda():
        return "TransformerEngine is installed and there is no CUDA device"
    try:
        version = Version(importlib.metadata.version("transformer-engine"))
        importlib.import_module("transformer_engine.pytorch")
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return "TransformerEngine is there without its package transformer-engine"
    except Exception as error:  # noqa: BLE001 - a broken build fails in ways of its own
        return f"TransformerEngine cannot be imported ({type(error).__name__}: {error})"
    if version < _LEAST_TRANSFORMER_ENGINE:
        return (
            f"TransformerEngine is {version} and {_LEAST_TRANSFORMER_ENGINE} or newer is understood"
        )
    return ""


def _without_apex() -> str:
    """Look at the files only: importing a stranger would run its code."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "apex is not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(all((folder / file).is_file() for file in _NVIDIA_APEX) for folder in folders):
        where = folders[0] if folders else spec.origin
        return (
            f"the apex in {where} {_NOT_NVIDIA}, and is left alone: pip uninstall apex, and build "
            "NVIDIA's from github.com/NVIDIA/apex if you want it"
        )
    if not _has_cuda():
        return "NVIDIA's apex is installed and there is no CUDA device"
    if importlib.util.find_spec(_APEX_EXTENSION) is None:
        return (
            f"NVIDIA's apex in {folders[0]} was built without its CUDA extensions "
            f"({_APEX_EXTENSION} is missing): build it with --cpp_ext --cuda_ext"
        )
    return ""


def _has_cuda() -> bool:
    # Imported where it is needed: most processes have neither library, and some have no torch.
    from npr_megatron.runtime.device import device_type

    return device_type() == "cuda"
