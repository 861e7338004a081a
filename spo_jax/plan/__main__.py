"""Does a run fit, and how fast can it be: python -m spo_jax.plan --config FILE --topology v5e:4x4

Compiles every program of the run for a slice of TPU chips, with the real compiler and without a
chip, or for the devices of this machine. Neither weights nor data are needed.

Exit codes: 0 it fits, 3 it does not, 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from spo_jax.config import ConfigError, config_at, load
from spo_jax.model import count_params
from spo_jax.plan import printing
from spo_jax.plan.chips import GIB, parse_topology
from spo_jax.plan.compiling import Compiler, described_devices
from spo_jax.plan.fitting import NotShared, Planner
from spo_jax.plan.shapes import SHAPES, model_shape

DOES_NOT_FIT = 3


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m spo_jax.plan",
    description="What a run takes on a slice of chips: bytes, FLOPs, time at best. "
    "Exit code 0: it fits; 3: it does not; 2: wrong usage.",
  )
  parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
  parser.add_argument(
    "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
    help="change keys of the file, e.g. --set mesh.data=1 mesh.fsdp=-1",
  )  # fmt: skip
  parser.add_argument(
    "--topology", default="local",
    help="a slice such as v5e:4x4 or v5p:4x4x4 (needs spo_jax[tpu-plan]), cpu:N for N virtual "
    "devices, or local (default)",
  )  # fmt: skip
  parser.add_argument(
    "--model-config", metavar="FILE|SHAPE",
    help=f"a config.json, or one of {', '.join(SHAPES)}, instead of model.path",
  )  # fmt: skip
  parser.add_argument(
    "--vocab-size", type=int, metavar="N",
    help="vocabulary of a new model (default: model.vocab_size, or model.tokenizer_tokens)",
  )  # fmt: skip
  parser.add_argument(
    "--hbm", type=float, metavar="GIB", help="memory of a chip (default: that of the topology)"
  )
  parser.add_argument(
    "--exact", action="store_true",
    help="compile all layers (minutes) instead of extrapolating from a few",
  )  # fmt: skip
  parser.add_argument(
    "--only", metavar="PROGRAM", nargs="+",
    help="look at these programs alone, e.g. --only update 'grow level 3'",
  )  # fmt: skip
  parser.add_argument(
    "--no-search", action="store_true", help="do not look for settings that fit"
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object and no tables")
  return parser


def plan_command(options: argparse.Namespace) -> dict[str, Any]:
  """What the command prints with --json.

  Raises: ConfigError, one line, for whatever cannot be planned.
  """
  topology = parse_topology(options.topology)
  if options.hbm is not None and not 0 < options.hbm < float("inf"):
    raise ConfigError(f"--hbm {options.hbm} is no size in GiB. Give a number above 0.")
  config = load(options.config, options.set)
  # Rows are longest at the end of the schedule.
  config = config_at(config, config.train.iterations)
  model_config, source = model_shape(config, options.model_config, options.vocab_size)
  devices = described_devices(topology)
  hbm = topology.hbm_bytes if options.hbm is None else int(options.hbm * GIB)

  def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

  planner = Planner(
    model_config, devices, topology.chip, hbm, Compiler(options.exact, say), options.only
  )
  cannot, first, found = "", None, None
  try:
    first = planner.plan(config)
  except NotShared as error:
    if options.no_search:
      raise
    cannot = str(error)
    say(cannot)
  if not (first and first.fits) and not options.no_search:
    found = planner.search(config, first, say)
  return {
    "topology": topology.name,
    "device": devices[0].device_kind,
    "chips": len(devices),
    "versions": {name: _version(name) for name in ("spo_jax", "jax", "libtpu")},
    "model": {"source": source, "layers": model_config.num_layers,
              "parameters": count_params(model_config)},
    "limit": planner.limit,
    "fits": first is not None and first.fits,
    "cannot_run": cannot or None,
    "as_configured": printing.plan_json(first) if first else None,
    "search": {
      "fits": found.plan is not None, "settings": found.settings, "steps": found.steps,
      "plan": printing.plan_json(found.plan) if found.plan else None,
    } if found else None,
  }  # fmt: skip


def _version(name: str) -> str | None:
  if name == "jax":
    return jax.__version__
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def main(arguments: Sequence[str] | None = None) -> int:
  options = _parser().parse_args(arguments)
  try:
    result = plan_command(options)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  if options.json:
    print(json.dumps(result))
  else:
    printing.show(result)
  return 0 if result["fits"] else DOES_NOT_FIT


if __name__ == "__main__":
  sys.exit(main())
