"""Memory and traffic of whole programs, as the TPU compiler settles them before it writes code.

  python benchmarks/plan_whole.py [--program update] [--only TEXT] [--out runs/plan_whole]

Rows are those of plan.py, all layers. Most of a compilation is the writing of machine code, and
buffers are assigned before: what libtpu notes down of them, and the program that it then has, is
read, and the compiler is stopped. A minute or three, and 3 GiB, per row. The machine code is not
counted; what lies beside the program is. LIBTPU_INIT_ARGS of the environment are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import plan as rows

from spo_jax import sharding
from spo_jax.config import config_at, load
from spo_jax.plan.chips import GIB, parse_topology
from spo_jax.plan.collectives import collective_bytes
from spo_jax.plan.compiling import assigned_bytes, described_devices
from spo_jax.plan.programs import Program, Programs
from spo_jax.plan.shapes import model_shape

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def program_of(model: str, topology: str, name: str) -> tuple[Program, int]:
  """The program, and how many layers it has."""
  row, slice_ = rows.MODELS[model], parse_topology(topology)
  config = load(Path(row.config), rows.settings(row, slice_.devices))
  config = config_at(config, config.train.iterations)
  shape, _ = model_shape(config, row.shape, None)
  mesh = sharding.make_mesh(config.mesh, described_devices(slice_))
  programs = Programs(config, shape, mesh, sharding.make_rollout_mesh(config.rollout.mesh, mesh))
  return next(p for p in programs.listed() if p.name == name), shape.num_layers


def compile_program(model: str, topology: str, name: str, notes: Path) -> None:
  """What the other process does until it is stopped."""
  program, layers = program_of(model, topology, name)
  known = {
    "flops": program.cost.flops, "bytes": program.cost.bytes, "tokens": program.tokens,
    "turns": program.turns, "beside": program.beside,
  }  # fmt: skip
  (notes / "known.json").write_text(json.dumps(known))
  program.lower(layers).compile()


def measure(model: str, topology: str, name: str, out: Path) -> dict[str, Any]:
  """Bytes of a chip, bytes sent by kind, and seconds at the chip's peaks."""
  notes = out / f"{model} {topology} {name}".translate(str.maketrans(" :,", "_-_"))
  file = notes.parent / f"{notes.name}.json"
  if file.exists():
    return dict(json.loads(file.read_text()))
  shutil.rmtree(notes, ignore_errors=True)
  notes.mkdir(parents=True)
  kept = os.environ.get("LIBTPU_INIT_ARGS", "")
  environment = os.environ | {
    "TPU_LOG_DIR": str(notes),  # `described_devices` makes libtpu talk of its buffers
    "LIBTPU_INIT_ARGS": f"{kept} --xla_jf_dump_to={notes} --xla_jf_dump_hlo_text=true",
  }  # fmt: skip
  run = [sys.executable, __file__, "--compile", model, topology, name, str(notes)]
  with (notes / "err").open("w") as errors:
    compiling = subprocess.Popen(run, env=environment, stderr=errors)
    log, hlo = _wait(compiling, notes)
  known = json.loads((notes / "known.json").read_text())
  sent = collective_bytes(hlo, known["turns"])
  chip = parse_topology(topology).chip
  assert chip is not None
  allocated = {
    name: float(number) * _UNITS[unit]
    for name, number, unit in re.findall(r"(\w+) allocation: +([\d.]+)(\w+)\n", log)
  }
  temporaries = assigned_bytes(log)
  found = {
    "peak": allocated["parameter"] + temporaries + known["beside"],
    "temporaries": temporaries, "collective_bytes": sent, "tokens": known["tokens"],
    "LIBTPU_INIT_ARGS": kept,
    "seconds": {
      "compute": known["flops"] / chip.flops, "memory": known["bytes"] / chip.hbm_bandwidth,
      "network": sum(sent.values()) / chip.ici_bandwidth,
    },
  }  # fmt: skip
  file.write_text(json.dumps(found))
  shutil.rmtree(notes)
  return found


def _wait(compiling: subprocess.Popen[bytes], notes: Path) -> tuple[str, str]:
  """The log and the scheduled program; stops the compiler once it has written both.

  Raises: RuntimeError where it ended before that.
  """
  while compiling.poll() is None:
    time.sleep(2)
    log, dumped = notes / "tpu_driver.INFO", [*notes.glob("*-TLP-hlo.txt")]
    if not log.exists() or not dumped or "Buffer assignment done" not in log.read_text():
      continue
    hlo = dumped[0].read_text()
    if hlo.rstrip().endswith("}"):
      compiling.kill()
      compiling.wait()
      return log.read_text(), hlo
  raise RuntimeError(f"the compiler ended with {compiling.returncode}: see {notes / 'err'}.")


def line(model: str, topology: str, found: dict[str, Any]) -> str:
  sent, seconds = found["collective_bytes"], found["seconds"]
  kinds = ", ".join(f"{sent[kind] / 1e9:.1f} {kind}" for kind in sorted(sent, key=sent.get)[::-1])
  bound = max(seconds, key=lambda part: seconds[part])
  return (
    f"| {model} | {topology} | {found['peak'] / GIB:.1f} | {found['temporaries'] / GIB:.1f} "
    f"| {sum(sent.values()) / 1e9:.1f} ({kinds}) | {seconds[bound]:.2f} ({bound}) "
    f"| {seconds['network']:.2f} | {found['tokens'] / seconds[bound]:,.0f} |"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=Path, default=Path("runs/plan_whole"))
  parser.add_argument("--only", default="", help="rows whose table, model or slice has this text")
  parser.add_argument("--program", default="update", help="update, or grow level 3")
  parser.add_argument("--compile", nargs=4, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.compile:
    model, topology, name, notes = options.compile
    return compile_program(model, topology, name, Path(notes))
  seen = set()
  for table, model, topology in rows.rows_of_tables():
    wanted = options.program in rows.MODELS[model].programs and (model, topology) not in seen
    if wanted and options.only in f"{table} {model} {topology}":
      seen.add((model, topology))
      found = measure(model, topology, options.program, options.out.resolve())
      print(line(model, topology, found), flush=True)


if __name__ == "__main__":
  main()
