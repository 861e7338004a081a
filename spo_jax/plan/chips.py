"""Public peaks of TPU chips, and how a topology is named on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spo_jax.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """Figures of one chip as Google's pages of Cloud TPU state them."""

  name: str
  flops: float  # "peak compute per chip (bf16)", FLOP/s
  hbm_bandwidth: float  # "HBM bandwidth per chip", bytes/s
  hbm_gib: float  # "HBM capacity per chip", which the pages call GB
  ici_bandwidth: float  # "interchip interconnect BW", all links in one direction, bytes/s


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 1228e9, 32, 2400e9 / 8),
    Chip("v5e", 197e12, 819e9, 16, 1600e9 / 8),
    Chip("v5p", 459e12, 2765e9, 95, 4800e9 / 8),
    Chip("v6e", 918e12, 1640e9, 32, 3584e9 / 8),
  )
}


@dataclass(frozen=True)
class Topology:
  """A slice of TPU chips, virtual CPU devices, or the devices of this machine."""

  name: str  # as it was given
  kind: str  # tpu | cpu | local
  devices: int  # 0: as many as there are
  chip: Chip | None

  @property
  def hbm_bytes(self) -> int | None:
    """Bytes of one chip, None where no figure is known."""
    return int(self.chip.hbm_gib * GIB) if self.chip else None


def parse_topology(text: str) -> Topology:
  """`v5e:4x4`, `v5p:4x4x4`, `cpu:8` or `local`.

  Raises: ConfigError for anything else.
  """
  if text == "local":
    return Topology(text, "local", 0, None)
  if match := re.fullmatch(r"cpu:([1-9]\d{0,3})", text):
    return Topology(text, "cpu", int(match[1]), None)
  name, _, shape = text.partition(":")
  if name in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
    devices = 1
    for side in shape.split("x"):
      devices *= int(side)
    return Topology(text, "tpu", devices, CHIPS[name])
  raise ConfigError(
    f"--topology {text} is not a slice of {', '.join(CHIPS)} such as v5e:4x4, nor cpu:N for N "
    "virtual devices, nor local."
  )
