"""Devices that are only described, compilation for them, and what the compiler says of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from spo_jax.config import ConfigError
from spo_jax.errors import said
from spo_jax.plan.chips import Topology
from spo_jax.plan.collectives import collective_bytes
from spo_jax.plan.programs import Program

SMALL = (2, 4)  # layers of the versions from which the whole model is extrapolated

# What libtpu says of the buffers that it assigns, on stderr; only read when it is first loaded.
_TALK = {
  "TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0", "TPU_VMODULE": "buffer_assignment=1",
}  # fmt: skip

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def described_devices(topology: Topology) -> list[jax.Device]:
  """Devices to compile for. Nothing of jax may have run in this process before.

  Raises: ConfigError where there are none, or the compiler is missing or does not know the slice.
  """
  if topology.kind == "local":
    return _local_devices()
  jax.config.update("jax_platforms", "cpu")
  if topology.kind == "cpu":
    jax.config.update("jax_num_cpu_devices", topology.devices)
    return jax.devices()
  return _slice_devices(topology)


def _local_devices() -> list[jax.Device]:
  try:
    return jax.devices()
  except Exception as error:  # jax asserts, too, that there is a platform
    asked = os.environ.get("JAX_PLATFORMS", "")
    raise ConfigError(
      f"--topology local finds no devices with JAX_PLATFORMS={asked}. Unset it, or plan for cpu:N. "
      f"{said(error)}"
    ) from error


def _slice_devices(topology: Topology) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"--topology {topology.name} needs the TPU compiler libtpu, which is not installed. Install "
      "'spo_jax[tpu-plan]', or plan for cpu:N."
    )
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no cloud which machine this is
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock: no chip is opened
  for name, value in _TALK.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options: dict[str, Any] = {}
  if topology.devices == 1:  # libtpu assumes hosts of 2x2 chips
    options["chips_per_host_bounds"] = (1, 1, 1)
  if topology.name.startswith("v4:"):  # both cores of a chip are one device
    options["chip_config_name"] = "megacore"
  try:
    with _stderr():
      described = topologies.get_topology_desc(topology.name, "tpu", **options)
    return list(described.devices)
  except Exception as error:  # of libtpu, which names no type
    raise ConfigError(
      f"--topology {topology.name} is not known to libtpu: {said(error)}"
    ) from error


@dataclass(frozen=True)
class Measured:
  """What the compiler says of one program, bytes per chip."""

  peak: float  # arguments, results and temporaries together
  temporaries: float = 0
  collectives: dict[str, float] = field(default_factory=dict)
  seconds: float = 0  # of compilation
  compiled: tuple[int, ...] = ()  # versions compiled, by their number of layers
  points: tuple[float, ...] = ()  # temporaries of each
  refused: bool = False  # the compiler itself ran out of the chip's memory

  @property
  def sent(self) -> float:
    return sum(self.collectives.values())


class Compiler:
  """Compiles what it has not compiled yet; settings that change nothing cost nothing."""

  def __init__(self, exact: bool, say: Callable[[str], None] = lambda text: None):
    self.exact, self.say = exact, say
    self._known: dict[str, Measured] = {}

  def measure(self, program: Program, layers: int) -> Measured:
    """One program of `layers` layers, extrapolated from small versions unless `exact`."""
    counts = (layers,) if self.exact or layers <= SMALL[-1] else SMALL
    found = []
    for count in counts:
      found.append(self._compile(program, count))
      if found[-1].refused:
        return found[-1]
    return found[0] if len(found) == 1 else extrapolate(found, layers, program.per_layer)

  def _compile(self, program: Program, layers: int) -> Measured:
    lowered = program.lower(layers)
    text = f"{program.turns} {lowered.as_text()}"
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in self._known:
      self.say(f"compiling {program.name}, {layers} layers")
      self._known[key] = _compiled(lowered, layers, program.turns)
    return self._known[key]


def _compiled(lowered: Any, layers: int, turns: Mapping[str, int]) -> Measured:
  started = time.perf_counter()
  try:
    with _stderr() as written:
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    return _refused(error, time.perf_counter() - started, layers)
  seconds = time.perf_counter() - started
  memory = compiled.memory_analysis()
  temporaries = assigned_bytes("".join(written)) or memory.temp_size_in_bytes
  return Measured(
    peak=memory.argument_size_in_bytes + temporaries
    + memory.output_size_in_bytes - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes,
    temporaries=temporaries,
    collectives=collective_bytes(compiled.as_text(), turns),
    seconds=seconds,
    compiled=(layers,),
    points=(temporaries,),
  )  # fmt: skip


def assigned_bytes(written: str) -> int:
  """Of a TPU's temporaries, from what libtpu wrote; 0 where it wrote nothing.

  `memory_analysis()` of a TPU counts what is lost between buffers twice, which can be gigabytes.
  """
  last = written.rpartition("Assigning buffers to module")[2]
  found = re.search(r"Result size from heap simulator: (\d+)", last)  # the first heap is HBM's
  return int(found[1]) if found else 0


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
  """What is written to stderr meanwhile, by native code too."""
  written: list[str] = []
  shown = os.dup(2)
  with tempfile.TemporaryFile("w+", errors="replace") as file:
    os.dup2(file.fileno(), 2)
    try:
      yield written
    finally:
      os.dup2(shown, 2)
      os.close(shown)
      file.seek(0)
      written.append(file.read())


def extrapolate(found: list[Measured], layers: int, per_layer: float = 0) -> Measured:
  """More layers than two small versions have: a straight line, but for temporaries.

  Those of an update are the largest of several phases, and with few layers the phases around the
  layers decide: they may even fall from 2 layers to 4. So they go on from the larger of both, and
  rise with every layer as measured, and by `per_layer` bytes at least.
  """
  small, large = found
  (low,), (high,) = small.compiled, large.compiled

  def line(a: float, b: float) -> float:
    return a + (b - a) * (layers - low) / (high - low)

  rise = max((large.temporaries - small.temporaries) / (high - low), per_layer)
  temporaries = max(small.temporaries, large.temporaries) + rise * (layers - high)
  kinds = small.collectives.keys() | large.collectives.keys()
  return dataclasses.replace(
    large,
    peak=line(small.peak - small.temporaries, large.peak - large.temporaries) + temporaries,
    temporaries=temporaries,
    collectives={
      kind: max(0.0, line(small.collectives.get(kind, 0), large.collectives.get(kind, 0)))
      for kind in sorted(kinds)
    },
    seconds=small.seconds + large.seconds,
    compiled=(low, high),
    points=small.points + large.points,
  )


def _refused(error: Exception, seconds: float, layers: int) -> Measured:
  """The TPU compiler refuses what its chip cannot hold, and says how much it would take."""
  match = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
    raise error
  needed = float(match[1]) * _UNITS[match[2]]
  return Measured(needed, needed, seconds=seconds, compiled=(layers,), refused=True)
