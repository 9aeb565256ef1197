"""Lets torchvision be imported beside a torch without CUDA; tools/setup_sglang installs it.

SGLang imports torchvision. The wheel that package indexes carry is built against CUDA: without it
its operators are not loaded, and the import fails at the first that it describes. Here the two in
question are declared, unusable, just before torchvision is imported. A ``.pth`` file imports this
module in every process of that environment, so it costs nothing; torch is imported only if
torchvision is.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Declare:
    """Finds no module; acts once, on the way to torchvision."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from torch import library

            for operator in ("nms", "qnms"):
                library.define(f"torchvision::{operator}", _SCHEMA)
        return None


sys.meta_path.insert(0, _Declare())
