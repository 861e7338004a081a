"""Plans as JSON, and as tables for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from spo_jax.plan.chips import GIB
from spo_jax.plan.fitting import Plan

_ROLLOUT = ("prefill", "grow", "continue", "score")
_HELD_OUT = ("evaluate", "validate")


def plan_json(plan: Plan) -> dict[str, Any]:
  lines = [line.to_json() for line in plan.lines]
  return {
    "mesh": plan.mesh,
    "rows": {
      "rollout.rows": plan.config.rollout.rows,
      "train.micro_batch_rows": plan.config.train.micro_batch_rows,
    },
    "remat": plan.config.train.remat,
    "programs": lines,
    "peak": plan.worst.peak,
    "largest": plan.worst.program.name,
    "fits": plan.fits,
    "close": plan.is_close,
    "iteration": _iteration(lines) if plan.whole else None,
  }


def _iteration(lines: list[dict[str, Any]]) -> dict[str, float] | None:
  """Seconds of one iteration at the chips' peaks, every row at its longest; None without peaks or
  where there is none."""
  if any(line["seconds"] is None for line in lines):
    return None
  seconds = {line["name"]: line["calls_per_iteration"] * line["seconds"]["roofline"]
             for line in lines}  # fmt: skip
  if "update" not in seconds:
    return None
  rollout = sum(s for name, s in seconds.items() if name.startswith(_ROLLOUT))
  decoded = sum(
    line["calls_per_iteration"] * line["tokens_per_call"]
    for line in lines
    if line["name"].startswith(("grow", "continue"))
  )
  return {
    "rollout_seconds": rollout,
    "update_seconds": seconds["update"],
    "evaluation_seconds": sum(s for name, s in seconds.items() if name.startswith(_HELD_OUT)),
    "decoded_tokens": decoded,
    "decoded_tokens_per_second": decoded / rollout if rollout else 0.0,
  }


def show(result: dict[str, Any]) -> None:
  """Prints what `plan_command` found."""
  console = Console(width=None if Console().is_terminal else 150)
  model = result["model"]
  print(
    f"{result['chips']} x {result['device']} ({result['topology']}), {model['parameters']:,} "
    f"parameters in {model['layers']} layers ({model['source']})"
  )
  limit, search = result["limit"], result["search"]
  if result["as_configured"]:
    _show_plan(console, "As configured", result["as_configured"])
    _say_fit(result["as_configured"], limit)
  else:
    print(f"does not fit: {result['cannot_run']}")
  if search is None:
    return
  settings = " ".join(f"{key}={value}" for key, value in search["settings"].items())
  if not search["fits"]:
    print(f"No setting was found that fits; the last one tried: {settings or 'none'}. Take more "
          "chips, or shorter rows.")  # fmt: skip
    return
  _show_plan(console, f"With --set {settings}", search["plan"])
  _say_fit(search["plan"], limit)
  print(f"To make it fit: --set {settings}")


def _say_fit(plan: dict[str, Any], limit: int | None) -> None:
  if limit is None:
    print("No memory limit is known for these devices; give --hbm.")
    return
  verdict = "fits" if plan["fits"] else "does not fit"
  print(f"{verdict}: {plan['largest']} takes {plan['peak'] / GIB:.2f} of {limit / GIB:.2f} GiB "
        "per chip")  # fmt: skip
  if plan["close"]:
    print("A program is so close to the limit that only --exact, which compiles all layers, tells.")


def _show_plan(console: Console, title: str, plan: dict[str, Any]) -> None:
  mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
  rows = " ".join(f"{key}={value}" for key, value in plan["rows"].items())
  memory = Table(title=f"{title}: GiB per chip ({mesh}; {rows})")
  columns = ("parameters", "optimiser", "reference", "kv_cache", "temporaries", "beside", "peak")
  memory.add_column("program")
  for name in (*columns, "compile s", "layers"):
    memory.add_column(name.replace("_", " "), justify="right")
  work = Table(title=f"{title}: work of one call per chip, and time at the chip's peaks")
  work.add_column("program")
  for name in ("calls", "TFLOP", "GB moved", "GB sent", "mostly", "ms", "bound", "tokens/s"):
    work.add_column(name, justify="right")
  for line in plan["programs"]:
    memory.add_row(
      line["name"], *(f"{line['bytes'][name] / GIB:.2f}" for name in columns),
      f"{line['compile_seconds']:.0f}", "+".join(map(str, line["layers_compiled"])),
    )  # fmt: skip
    sent = line["collective_bytes"]
    seconds = line["seconds"]
    work.add_row(
      line["name"], f"{line['calls_per_iteration']:g}", f"{line['flops'] / 1e12:.3g}",
      f"{line['bytes_moved'] / 1e9:.3g}", f"{sum(sent.values()) / 1e9:.3g}",
      max(sent, key=lambda kind: sent[kind]) if sum(sent.values()) else "-",
      f"{seconds['roofline'] * 1e3:.4g}" if seconds else "-", line["bound"] or "-",
      f"{line['tokens_per_second']:,.0f}" if seconds else "-",
    )  # fmt: skip
  console.print(memory)
  console.print(work)
  if plan["iteration"]:
    it = plan["iteration"]
    print(
      f"One iteration at best, rows at their longest: rollout {it['rollout_seconds']:.1f} s "
      f"({it['decoded_tokens_per_second']:,.0f} decoded tokens/s), update "
      f"{it['update_seconds']:.1f} s, evaluation {it['evaluation_seconds']:.1f} s"
    )
