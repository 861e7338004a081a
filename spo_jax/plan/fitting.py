"""Whether a run fits into its chips, how long it takes at best, and what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from spo_jax import sharding
from spo_jax.config import Config, ConfigError, ModelConfig, validate
from spo_jax.experiment import check_rows
from spo_jax.plan.chips import Chip
from spo_jax.plan.compiling import Compiler, Measured
from spo_jax.plan.programs import Program, Programs

RESERVED = 2**28  # bytes of a TPU's HBM that its runtime keeps: libtpu offers 15.75 GiB of 16


@dataclass(frozen=True)
class Line:
  """One program as it is printed."""

  program: Program
  measured: Measured
  chip: Chip | None

  @property
  def peak(self) -> float:
    return self.measured.peak + self.program.beside

  @property
  def seconds(self) -> dict[str, float]:
    """Of one call at the chip's peaks; the largest is the roofline. Empty without peaks."""
    if self.chip is None:
      return {}
    cost = self.program.cost
    return {
      "compute": cost.flops / self.chip.flops,
      "memory": cost.bytes / self.chip.hbm_bandwidth,
      "network": self.measured.sent / self.chip.ici_bandwidth,
    }

  def to_json(self) -> dict[str, Any]:
    seconds = self.seconds
    bound = max(seconds, key=lambda part: seconds[part]) if seconds else None
    best = seconds[bound] if bound else None
    program, measured = self.program, self.measured
    return {
      "name": program.name,
      "calls_per_iteration": program.calls,
      "bytes": {
        **program.held, "temporaries": measured.temporaries, "beside": program.beside,
        "peak": self.peak,
      },
      "refused_by_compiler": measured.refused,
      "flops": program.cost.flops,
      "bytes_moved": program.cost.bytes,
      "collective_bytes": measured.collectives,
      "seconds": {**seconds, "roofline": best} if bound else None,
      "bound": bound,
      "tokens_per_call": program.tokens,
      "tokens_per_second": program.tokens / best if best else None,
      "compile_seconds": measured.seconds,
      "layers_compiled": list(measured.compiled),
    }  # fmt: skip


@dataclass(frozen=True)
class Plan:
  config: Config
  lines: list[Line]
  mesh: dict[str, int]
  limit: int | None  # bytes of a chip that a run may use

  @property
  def worst(self) -> Line:
    return max(self.lines, key=lambda line: line.peak)

  @property
  def fits(self) -> bool:
    return self.limit is None or self.worst.peak <= self.limit


class Planner:
  """Plans configurations for one set of devices."""

  def __init__(
    self,
    model_config: ModelConfig,
    devices: list[jax.Device],
    chip: Chip | None,
    hbm_bytes: int | None,
    compiler: Compiler,
  ):
    self.model_config, self.devices, self.chip = model_config, devices, chip
    self.limit = None if hbm_bytes is None else hbm_bytes - (RESERVED if chip else 0)
    self.compiler = compiler

  def plan(self, config: Config) -> Plan:
    """Raises: ConfigError where the devices do not make the mesh or share out the rows."""
    mesh = sharding.make_mesh(config.mesh, self.devices)
    check_rows(config, mesh, training=True)
    with jax.set_mesh(mesh):
      lines = [
        Line(
          program,
          self.compiler.measure(
            program.name, program.lower, self.model_config.num_layers, program.turns
          ),
          self.chip,
        )
        for program in Programs(config, self.model_config, mesh).listed()
      ]
    return Plan(config, lines, dict(mesh.shape), self.limit)

  def search(
    self, plan: Plan, say: Callable[[str], None]
  ) -> tuple[Plan | None, dict[str, int], list[dict[str, Any]]]:
    """Changes one setting at a time until the run fits.

    Returns: the plan that fits or None, the settings changed on the way, and every step.
    """
    changed: dict[str, int] = {}
    steps: list[dict[str, Any]] = []
    while not plan.fits:
      change = next_change(plan)
      if change is None:
        return None, changed, steps
      changed |= change
      say("does not fit; trying " + " ".join(f"{key}={value}" for key, value in change.items()))
      plan = self.plan(with_settings(plan.config, change))
      steps.append({"change": change, "peak": plan.worst.peak, "fits": plan.fits})
    return plan, changed, steps


def with_settings(config: Config, settings: dict[str, int]) -> Config:
  for key, value in settings.items():
    section, name = key.split(".")
    inner = dataclasses.replace(getattr(config, section), **{name: value})
    config = dataclasses.replace(config, **{section: inner})
  return config


def next_change(plan: Plan) -> dict[str, int] | None:
  """The setting to change so that the largest program becomes smaller.

  First parameters and moments are shared out over all chips (mesh.fsdp), which costs no rows.
  Then the rows of that program are halved: train.micro_batch_rows of an update, rollout.rows
  of what samples, where a tree and an equal share for every chip still fit in. Last, chips are
  moved from rows to heads and channels (mesh.tensor), which lets rows be halved again.
  """
  config, mesh = plan.config, plan.mesh
  chips = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
  if mesh["data"] > 1:
    return {"mesh.data": 1, "mesh.fsdp": chips // mesh["tensor"]}
  key = plan.worst.program.setting
  fewer = _fewer_rows(config, key, mesh["fsdp"])
  if fewer is not None:
    return {key: fewer}
  if mesh["fsdp"] % 2 == 0:
    change = {"mesh.fsdp": mesh["fsdp"] // 2, "mesh.tensor": mesh["tensor"] * 2}
    return {**change, **_halved(config, key, mesh["fsdp"] // 2)}
  return None


def _halved(config: Config, key: str, shards: int) -> dict[str, int]:
  fewer = _fewer_rows(config, key, shards)
  return {} if fewer is None else {key: fewer}


def _fewer_rows(config: Config, key: str, shards: int) -> int | None:
  """The largest allowed number of rows that is at most half of it."""
  section, name = key.split(".")
  now = getattr(getattr(config, section), name) or config.sft.batch_rows
  for rows in range(now // 2 // shards * shards, 0, -shards):
    try:
      validate(with_settings(config, {key: rows}))
    except ConfigError:
      continue
    return rows
  return None
