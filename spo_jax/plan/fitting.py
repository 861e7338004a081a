"""Whether a run fits into its chips, how long it takes at best, and what to change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from spo_jax import sharding
from spo_jax.config import Config, ConfigError, ModelConfig
from spo_jax.experiment import check_rows
from spo_jax.packing import micro_batch_size
from spo_jax.plan.chips import Chip
from spo_jax.plan.compiling import Compiler, Measured
from spo_jax.plan.programs import Program, Programs

REMAT = ("none", "dots", "layer")  # of train.remat, from what computes least again
Settings = dict[str, int | str]  # "section.name" -> value, or "rollout.mesh.name"

FEW = 8  # chips that share out parameters, where those fit: more send more
CLOSE = 0.15  # of the limit: extrapolated peaks may be off by that much
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
      "temporaries_compiled": list(measured.points),
    }  # fmt: skip


@dataclass(frozen=True)
class Plan:
  config: Config
  lines: list[Line]
  mesh: dict[str, int]
  limit: int | None  # bytes of a chip that a run may use
  whole: bool = True  # whether all programs of the run are here

  @property
  def worst(self) -> Line:
    return max(self.lines, key=lambda line: line.peak)

  @property
  def fits(self) -> bool:
    return self.limit is None or self.worst.peak <= self.limit

  @property
  def is_close(self) -> bool:
    """Whether an extrapolated peak is so near the limit that only all layers can tell."""
    return self.limit is not None and any(
      len(line.measured.compiled) > 1 and abs(line.peak / self.limit - 1) < CLOSE
      for line in self.lines
    )


@dataclass(frozen=True)
class Found:
  """What a search ended with."""

  plan: Plan | None  # that fits
  settings: Settings  # changed on the way
  steps: list[dict[str, Any]]


class NotShared(ConfigError):
  """Rows do not make an equal share for every chip."""


class Planner:
  """Plans configurations for one set of devices."""

  def __init__(
    self,
    model_config: ModelConfig,
    devices: list[jax.Device],
    chip: Chip | None,
    hbm_bytes: int | None,
    compiler: Compiler,
    only: Sequence[str] | None = None,
  ):
    self.model_config, self.devices, self.chip = model_config, devices, chip
    self.limit = None if hbm_bytes is None else hbm_bytes - (RESERVED if chip else 0)
    self.compiler, self.only = compiler, only

  def plan(self, config: Config, *, first: str = "", stop: bool = False) -> Plan:
    """What every program takes.

    Args:
      first: name of the program to look at first; stop: at the first that does not fit.
    Raises: NotShared where chips cannot share out the rows; ConfigError where they do not make
      the mesh, or `only` names no program.
    """
    mesh = sharding.make_mesh(config.mesh, self.devices)
    rollout_mesh = sharding.make_rollout_mesh(config.rollout.mesh, mesh)
    try:
      check_rows(config, mesh, rollout_mesh, training=True)
    except ConfigError as error:
      raise NotShared(str(error)) from error
    programs = Programs(config, self.model_config, mesh, rollout_mesh).listed()
    count, programs = len(programs), self._chosen(programs)
    measured: dict[str, Line] = {}
    for program in sorted(programs, key=lambda program: program.name != first):
      taken = self.compiler.measure(program, self.model_config.num_layers)
      line = measured[program.name] = Line(program, taken, self.chip)
      if stop and not Plan(config, [line], {}, self.limit).fits:
        break
    lines = [measured[program.name] for program in programs if program.name in measured]
    return Plan(config, lines, dict(mesh.shape), self.limit, len(lines) == count)

  def _chosen(self, programs: list[Program]) -> list[Program]:
    names = [program.name for program in programs]
    if unknown := set(self.only or ()) - set(names):
      raise ConfigError(f"--only {unknown.pop()} is none of {', '.join(names)}.")
    return [program for program in programs if self.only is None or program.name in self.only]

  def search(self, config: Config, plan: Plan | None, say: Callable[[str], None]) -> Found:
    """Changes one setting at a time until the run fits.

    Args:
      plan: that of `config`, None where its rows cannot be shared out.
    """
    changed: Settings = {}
    steps: list[dict[str, Any]] = []
    while plan is None or not plan.fits:
      if plan is None:
        change, worst = share_out(config, len(self.devices)), ""
      else:
        change, worst = next_change(plan), plan.worst.program.name
      if change is None:
        return Found(None, changed, steps)
      changed |= change
      say("trying " + " ".join(f"{key}={value}" for key, value in change.items()))
      config = with_settings(config, change)
      try:
        plan = self.plan(config, first=worst, stop=True)
      except ConfigError as error:  # of what was asked for, and does not go with the change
        say(str(error))
        return Found(None, changed, steps)
      steps.append({
        "change": change, "largest": plan.worst.program.name, "peak": plan.worst.peak,
        "fits": plan.fits,
      })  # fmt: skip
    return Found(plan, changed, steps)


def with_settings(config: Config, settings: Settings) -> Config:
  for key, value in settings.items():
    config = _replaced(config, key.split("."), value)
  return config


def _replaced(part: Any, path: list[str], value: int | str) -> Any:
  name, *inner = path
  if inner:
    value = _replaced(getattr(part, name), inner, value)
  return dataclasses.replace(part, **{name: value})


def next_change(plan: Plan) -> Settings | None:
  """The setting to change so that the largest program becomes smaller, cheapest first.

  Parameters and moments are shared out over all chips (mesh.fsdp). The rows of that program are
  halved: train.micro_batch_rows of an update, rollout.rows of what samples, or how many held-out
  questions there are. An update computes
  its layers again instead of keeping them (train.remat), rollouts gather their parameters at
  every step instead of holding them (rollout.mesh). Last, chips are moved from rows to heads and
  channels (mesh.tensor), which lets rows be halved again.
  """
  config, mesh = plan.config, plan.mesh
  if mesh["data"] > 1:
    return {"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]}
  key = plan.worst.program.setting
  fewer = _halved(config, key, mesh)
  if fewer:
    return fewer
  if key in _OF_UPDATES and (remat := config.train.remat) != REMAT[-1]:
    return {"train.remat": REMAT[REMAT.index(remat) + 1]}
  if key not in _OF_UPDATES and config.rollout.mesh.fsdp == 1 < mesh["fsdp"]:
    return {"rollout.mesh.data": 0, "rollout.mesh.fsdp": 0, "rollout.mesh.tensor": 0}
  for more in range(2, mesh["fsdp"] + 1):
    if mesh["fsdp"] % more == 0:
      moved = mesh | {"fsdp": mesh["fsdp"] // more, "tensor": mesh["tensor"] * more}
      return {
        "mesh.fsdp": moved["fsdp"], "mesh.tensor": moved["tensor"], **_halved(config, key, moved)
      }
  return None


def share_out(config: Config, chips: int) -> Settings | None:
  """The nearest settings whose rows make an equal share for every chip, with the fewest chips
  on the tensor axis; parameters are shared out over a few."""
  for tensor in range(1, chips + 1):
    if chips % tensor:
      continue
    fsdp = math.gcd(chips // tensor, FEW)
    mesh = {"data": chips // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
    change: Settings = {f"mesh.{axis}": size for axis, size in mesh.items()}
    for key in _row_keys(config):
      allowed, now = _allowed_rows(config, key, mesh), _rows(config, key)
      if not allowed:
        break
      nearest = min((rows for rows in allowed if rows >= now), default=max(allowed))
      change |= {key: nearest} if nearest != now else {}
    else:
      return change
  return None


_OF_UPDATES = ("train.micro_batch_rows", "sft.micro_batch_rows")


def _row_keys(config: Config) -> list[str]:
  warm_start = ["sft.micro_batch_rows"] if config.sft.max_steps else []
  return ["rollout.rows", "train.micro_batch_rows", *warm_start]


def _rows(config: Config, key: str) -> int:
  section, name = key.split(".")
  return getattr(getattr(config, section), name) or config.sft.batch_rows


def _halved(config: Config, key: str, mesh: dict[str, int]) -> Settings:
  """The largest allowed number of rows that is at most half of it, or nothing."""
  now = _rows(config, key)
  fewer = [x for x in _allowed_rows(config, key, mesh) if x <= now // 2]
  if key.startswith("train."):  # packs have the slots of so many rows, and a chip one at least
    at_once = lambda rows: micro_batch_size(
      dataclasses.replace(config.train, micro_batch_rows=rows), config.row_tokens,
      _row_parts(config, key, mesh),
    )  # fmt: skip
    fewer = [x for x in fewer if at_once(x) < at_once(now)]
  return {key: max(fewer)} if fewer else {}


def _allowed_rows(config: Config, key: str, mesh: dict[str, int]) -> list[int]:
  """Row counts that make an equal share for every part of the rows on this mesh.

  Micro-batches divide their batch; rollouts hold whole questions; held-out questions are filled up.
  """
  parts = _row_parts(config, key, mesh)
  if key not in (*_OF_UPDATES, "rollout.rows"):
    return list(range(parts, _rows(config, key) + 1, parts))
  if key in _OF_UPDATES:
    batch = config.train.batch_rows if key.startswith("train.") else config.sft.batch_rows
    return [rows for rows in range(parts, batch + 1, parts) if batch % rows == 0]
  of_one = config.leaves if config.algorithm == "tree" else config.rollout.samples
  held = [count * of_one for count in range(1, config.rollout.questions + 1)]
  return sorted({-(-rows // parts) * parts for rows in held})


def _row_parts(config: Config, key: str, mesh: dict[str, int]) -> int:
  of_training = mesh["data"] * mesh["fsdp"]
  if key in _OF_UPDATES:
    return of_training
  own = {axis: getattr(config.rollout.mesh, axis) or size for axis, size in mesh.items()}
  fixed = math.prod(size for size in own.values() if size != -1)
  left = math.prod(mesh.values()) // fixed
  parts = math.prod(left if own[axis] == -1 else own[axis] for axis in sharding.ROWS)
  is_scored = key == "rollout.rows" and config.rollout.recompute_logprobs
  return math.lcm(parts, of_training) if is_scored else parts
