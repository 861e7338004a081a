"""Public peaks of TPU chips, and how a topology is named on the command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from spo_jax.config import ConfigError

GIB = 2**30

# Slices that libtpu is asked for, by the number of their sides; not looked up, see Google's pages.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBOIDS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_LARGEST = 6144  # chips of the largest cuboid, 16x16x24

_MOST_CPUS = 1024  # virtual devices; jax computes nothing on 9999


@dataclass(frozen=True)
class Chip:
  """Figures of one chip as Google's pages of Cloud TPU state them."""

  name: str
  flops: float  # "peak compute per chip (bf16)", FLOP/s
  hbm_bandwidth: float  # "HBM bandwidth per chip", bytes/s
  hbm_gib: float  # "HBM capacity per chip", which the pages call GB
  ici_bandwidth: float  # "interchip interconnect BW", all links in one direction, bytes/s
  sides: int  # of a slice: 2 or 3


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 1228e9, 32, 2400e9 / 8, 3),
    Chip("v5e", 197e12, 819e9, 16, 1600e9 / 8, 2),
    Chip("v5p", 459e12, 2765e9, 95, 4800e9 / 8, 3),
    Chip("v6e", 918e12, 1640e9, 32, 3584e9 / 8, 2),
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
  match = re.fullmatch(r"cpu:([1-9]\d{0,3})", text)
  if match and int(match[1]) <= _MOST_CPUS:
    return Topology(text, "cpu", int(match[1]), None)
  name, _, shape = text.partition(":")
  if name in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
    _check_slice(CHIPS[name], shape)
    return Topology(text, "tpu", math.prod(map(int, shape.split("x"))), CHIPS[name])
  raise ConfigError(
    f"--topology {text} is not a slice of {', '.join(CHIPS)} such as v5e:4x4, nor cpu:N for N "
    f"virtual devices, {_MOST_CPUS} at most, nor local."
  )


def _check_slice(chip: Chip, shape: str) -> None:
  """Raises: ConfigError where chips are not sold so; libtpu may end the process over others."""
  if chip.sides == 2:
    exists, possible = shape in _FLAT, ", ".join(_FLAT)
  else:
    exists = shape in _SMALL_CUBOIDS or _is_large_cuboid(shape)
    possible = (
      f"{', '.join(_SMALL_CUBOIDS)}, or three multiples of 4 in ascending order such as 4x4x8, of "
      f"{_LARGEST} chips at most"
    )
  if not exists:
    raise ConfigError(
      f"--topology {chip.name}:{shape} is no slice of {chip.name}. Give one of {possible}."
    )


def _is_large_cuboid(shape: str) -> bool:
  if not re.fullmatch(r"\d{1,3}(x\d{1,3}){2}", shape):
    return False
  sides = [int(side) for side in shape.split("x")]
  in_fours = all(side % 4 == 0 for side in sides)
  return in_fours and sides == sorted(sides) and math.prod(sides) <= _LARGEST
