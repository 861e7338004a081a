"""What `spo_jax.plan` says of the published runs, as tables (plan_whole.py: those of the docs).

  python benchmarks/plan.py [--out runs/plan] [--only TEXT] [--limit SECONDS] [--exact]

Each program of a row is one `python -m spo_jax.plan --json`, kept as a file in --out: what is
there already is not compiled again, so an interrupted table goes on where it stopped. Needs
spo_jax[tpu-plan], and minutes per row on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30

class Row(NamedTuple):
  config: str
  shape: str | None = None  # in the place of the config's model
  fsdp: int = 8  # chips that share out the parameters, at most
  tensor: int = 1  # chips of the tensor axis
  trees: float = 1 / 4  # of which leaves grow at once: 54 of 216
  more: tuple[str, ...] = ()  # settings
  programs: tuple[str, ...] = ("grow level 3", "update")


TREE = "configs/qwen1.5b_math_tree.yaml"
FSDP = ("mesh.data=1", "mesh.fsdp=-1")  # parameters shared out over all chips
MODELS = {
  "Qwen-1.5B 2K": Row(TREE),
  "Qwen-1.5B 2K, fsdp": Row(TREE, more=FSDP, programs=("update",)),
  "Qwen-1.5B 2K, packed": Row(TREE, more=("train.pack_tokens=4096",), programs=("update",)),
  "Qwen-1.5B 4K": Row("configs/r1qwen1.5b_math_tree.yaml", trees=1 / 8),
  "Rho-1.1B 2K": Row("configs/rho1b_gsm8k_tree.yaml"),
  "Qwen-7B 2K": Row(TREE, "qwen2.5-7b", tensor=4),
  "Qwen-32B 2K": Row(TREE, "qwen2.5-32b", fsdp=32, tensor=8, trees=1 / 8),
}
WEAK = ("v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16")
LARGE = ("v5p:4x4x4", "v6e:16x16", "v5e:16x16")
LEAVES = 216


def settings(row: Row, chips: int) -> list[str]:
  """The same work for every part of the rows: one tree, of which some leaves grow at once, and
  8 training rows a batch, one at a time."""
  parts = chips // row.tensor
  even = math.lcm(LEAVES, parts)
  rows = even * max(1, round(row.trees * parts * LEAVES / even))
  return [
    "mesh.data=-1", f"mesh.fsdp={min(parts, row.fsdp)}", f"mesh.tensor={row.tensor}",
    "train.remat=layer",
    f"train.micro_batch_rows={parts}", f"train.batch_rows={8 * parts}",
    f"spo.edges_per_iteration={32 * parts}", f"rollout.rows={rows}",
    f"rollout.questions={parts}", *row.more,
  ]  # fmt: skip


def rows_of_tables() -> list[tuple[str, str, str]]:
  """(table, model, topology), the most wanted first."""
  one, *other, large, largest = MODELS
  return [
    *(("models", model, "v5e:4x4") for model in (one, *other)),
    *(("weak", one, topology) for topology in WEAK),
    ("models", large, "v5e:4x4"),  # which is too small for the largest
    *(("models", model, topology) for model in (large, largest) for topology in LARGE),
    ("models", largest, "v5p:8x8x16"),
    *(("models", model, topology) for topology in LARGE for model in (one, *other)),
  ]


def chips_of(topology: str) -> int:
  return math.prod(map(int, topology.split(":")[1].split("x")))


def command(model: str, topology: str, program: str, exact: bool) -> list[str]:
  row = MODELS[model]
  return [
    sys.executable, "-m", "spo_jax.plan", "--config", row.config, "--topology", topology,
    "--json", "--no-search", *(["--model-config", row.shape] if row.shape else []),
    *["--exact"] * exact, "--only", program, "--set", *settings(row, chips_of(topology)),
  ]  # fmt: skip


def measure(
  model: str, topology: str, program: str, options: argparse.Namespace
) -> dict[str, Any] | None:
  """The plan of one program, from its file or the compiler; None where that failed."""
  name = f"{model} {topology} {program}{' exact' * options.exact}"
  file = options.out / f"{name.translate(str.maketrans(' :,', '_-_'))}.json"
  if not file.exists():
    print(name, file=sys.stderr, flush=True)
    run = command(model, topology, program, options.exact)
    with file.with_suffix(".err").open("w") as errors:
      try:
        done = subprocess.run(
          run, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=options.limit
        )
      except subprocess.TimeoutExpired:
        print(f"{name}: not within {options.limit:.0f} s", file=sys.stderr, flush=True)
        return None
    if done.returncode not in (0, 3):
      return None
    file.write_text(done.stdout)
  return dict(json.loads(file.read_text()))


def cells(result: dict[str, Any] | None, size: str) -> list[str]:
  """Peak, `size`, bytes sent, seconds and tokens a second of the only program of a plan."""
  if result is None:
    return ["-"] * 5
  (program,) = result["as_configured"]["programs"]
  sent, seconds = program["collective_bytes"], program["seconds"]
  most = max(sent, key=lambda kind: sent[kind]) if any(sent.values()) else "nothing"
  peak = program["bytes"]["peak"] / GIB
  return [
    f"{'>' if program['refused_by_compiler'] else ''}{peak:.1f}{'' if result['fits'] else ' !'}",
    f"{program['bytes'][size] / GIB:.1f}", f"{sum(sent.values()) / 1e9:.1f} ({most})",
    f"{seconds['roofline']:.2f} ({program['bound']})", f"{program['tokens_per_second']:,.0f}",
  ]  # fmt: skip


def line(model: str, topology: str, options: argparse.Namespace) -> str:
  wanted = MODELS[model].programs
  grow, update = (
    measure(model, topology, program, options) if program in wanted else None
    for program in Row("").programs
  )
  state = "-"
  if update:
    held = update["as_configured"]["programs"][0]["bytes"]
    state = f"{sum(held[name] for name in ('parameters', 'optimiser', 'reference')) / GIB:.2f}"
  columns = [model, topology, state, *cells(grow, "kv_cache"), *cells(update, "temporaries")]
  return f"| {' | '.join(columns)} |"


HEADING = (
  "| model, tokens of a row | slice | state | grow: peak | cache | GB sent | s | tokens/s "
  "| update: peak | temporaries | GB sent | s | tokens/s |\n" + "|---" * 13 + "|"
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=Path, default=Path("runs/plan"))
  parser.add_argument("--only", default="", help="rows whose table, model or slice has this text")
  parser.add_argument("--limit", type=float, metavar="SECONDS", help="of a program; none beyond")
  parser.add_argument("--exact", action="store_true", help="compile all layers")
  options = parser.parse_args()
  options.out.mkdir(parents=True, exist_ok=True)
  tables: dict[str, list[str]] = {}
  for table, model, topology in rows_of_tables():
    if options.only in f"{table} {model} {topology}":
      text = line(model, topology, options)
      tables.setdefault(table, []).append(text)
      print(text, file=sys.stderr, flush=True)
  for name, lines in tables.items():
    print(f"\n{name}\n\n{HEADING}", *lines, sep="\n")


if __name__ == "__main__":
  main()
