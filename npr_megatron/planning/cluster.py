"""Description of a cluster: the rates that bound a push. Defaults are H100 nodes with InfiniBand.

One NIC per GPU is assumed, and that GPUs of one node share what their NICs receive over NVLink.
Rates are per direction and per GPU. Deliberately no topology of switches: rails do not block.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveFloat, PositiveInt, ValidationError

from npr_megatron.config.base import Section
from npr_megatron.config.explain import explain
from npr_megatron.config.loader import parse_value, read_toml
from npr_megatron.errors import ConfigError


class HardwareConfig(Section):
    """Nodes of equal GPUs, each with its own NIC."""

    num_nodes: PositiveInt | None = None
    """Nodes for trainer and engines together; None: as many as they need."""
    gpus_per_node: PositiveInt = 8
    gpu_memory_gb: PositiveFloat = 80.0
    """HBM of one GPU [GB]."""
    nic_gb_per_s: PositiveFloat = 45.0
    """Measured rate of one NIC [GB/s]; predictions use it."""
    nic_line_gb_per_s: PositiveFloat = 50.0
    """Line rate of one NIC [GB/s]; floors use it. 400 Gb/s are 50."""
    nvlink_gb_per_s: PositiveFloat = 450.0
    """NVLink of one GPU [GB/s]."""
    pcie_gb_per_s: PositiveFloat = 55.0
    """Host to device [GB/s]."""
    device_copy_gb_per_s: PositiveFloat = 1300.0
    """Payload of a copy inside HBM [GB/s]."""
    hop_cost_us: PositiveFloat = 50.0
    """What forwarding one chunk costs beside its bytes [us]."""


def read_cluster(
    path: Path | None = None, overrides: dict[str, str] | None = None
) -> HardwareConfig:
    """Return the cluster described by a TOML file (None: the defaults) after ``overrides``.

    Raises:
        ConfigError: the file is missing or broken, a key is unknown or a value is out of range;
            lists every problem.

    Example:
        ``read_cluster(overrides={"nic_gb_per_s": "22.5", "gpus_per_node": "4"})``
    """
    table = read_toml(path, "cluster file") if path is not None else {}
    for key, text in (overrides or {}).items():
        table[key] = parse_value(text)
    try:
        return HardwareConfig.model_validate(table, strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, HardwareConfig, "the cluster")) from None
