"""A run as one HTML page that needs no network: `python -m spo_jax.report RUN_DIR`."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from spo_jax.runlog import (
  ACCURACIES,
  format_count,
  format_figure,
  format_seconds,
  read_jsonl,
  read_metrics,
  write_atomic,
)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 46, 12, 10, 38
MAX_SAMPLES, MAX_SAMPLE_CHARS = 8, 2000


class Chart(NamedTuple):
  """One panel: series are (metric key, its name in the legend); `top` pins the y axis to 0..top."""

  title: str
  unit: str
  series: tuple[tuple[str, str], ...]
  top: float | None = None


CHARTS = (
  Chart("Held-out accuracy", "fraction right",
        (("eval/greedy_accuracy", "greedy"), ("eval/sampled_accuracy", "sampled")), top=1.0),
  Chart("Mean reward of the rollouts", "reward", (("rollout/reward_mean", "reward"),)),
  Chart("Policy loss", "loss", (("loss/policy", "loss"),)),
  Chart("KL to the reference policy", "nats", (("loss/kl", "KL"),)),
  Chart("Clip fraction", "fraction of trained tokens", (("loss/clip_fraction", "clipped"),)),
  Chart("Probability mask", "fraction of response tokens", (("mask/fraction", "trained"),),
        top=1.0),
  Chart("Tokens per iteration", "tokens",
        (("tokens/decoded", "decoded"), ("tokens/trained", "trained"),
         ("tokens/prefilled", "prefilled"))),
  Chart("Seconds per iteration", "seconds",
        (("time/rollout_s", "rollout"), ("time/update_s", "update"), ("time/grade_s", "grade"))),
)

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #16181d; --soft: #5c6370;
  --line: #e4e5e8; --s0: #2a6fd6; --s1: #d9622b; --s2: #12876f; }
@media (prefers-color-scheme: dark) { :root { --page: #131519; --card: #1b1e24; --ink: #eceef2;
  --soft: #9aa1ad; --line: #31353d; --s0: #6ea8ff; --s1: #ff9a62; --s2: #4fc9a9; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1340px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: .9rem; margin: 0 0 .3rem; }
p.soft, summary, .legend, .note { color: var(--soft); }
.note { font-size: .82rem; margin: 0 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 1.2rem; }
th, td { padding: .35rem 1.4rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); } th:first-child { text-align: left; }
td.after { font-weight: 650; }
.grid { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem 1rem; min-width: 0; }
.legend { float: right; font-size: .78rem; }
.legend i { display: inline-block; width: .9em; height: 3px; margin: 0 .35em 3px .9em;
  border-radius: 2px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--line); }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.s0 { stroke: var(--s0); fill: var(--s0); background: var(--s0); }
.s1 { stroke: var(--s1); fill: var(--s1); background: var(--s1); }
.s2 { stroke: var(--s2); fill: var(--s2); background: var(--s2); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0;
  font: 13px/1.45 ui-monospace, monospace; }
pre b { font-weight: 400; color: var(--soft); }
"""


def write_report(run_dir: str | Path) -> Path:
  """Writes run_dir/report.html from what the run has logged so far, and returns its path.

  Raises: FileNotFoundError where the directory or its metrics.jsonl is missing, ValueError where
    summary.json cannot be read.
  """
  run_dir = Path(run_dir).resolve()
  if not run_dir.is_dir():
    raise FileNotFoundError(f"there is no run directory {run_dir}")
  if not (run_dir / "metrics.jsonl").is_file():
    raise FileNotFoundError(f"{run_dir} is no run directory: it holds no metrics.jsonl")
  metrics = read_metrics(run_dir)
  charts = "".join(_chart(chart, metrics) for chart in CHARTS)
  config = run_dir / "config.yaml"
  body = [f"<h1>{escape(run_dir.name)}</h1>", _summary(run_dir, metrics),
          f'<h2>Course of the run</h2><div class="grid">{charts}</div>' if charts else "",
          _samples(run_dir)]
  if config.is_file():
    text = config.read_text(encoding="utf-8", errors="replace")
    body.append(f"<h2>Configuration</h2><details><summary>config.yaml, resolved</summary>"
                f"<pre>{escape(text)}</pre></details>")
  # The policy forbids scripts and loading, should a model's text ever escape the escaping.
  page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
          '<meta http-equiv="Content-Security-Policy" '
          'content="default-src \'none\'; style-src \'unsafe-inline\'">'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f"<title>{escape(run_dir.name)} · SPO run</title><style>{STYLE}</style></head>"
          f"<body>{''.join(body)}</body></html>\n")
  write_atomic(run_dir / "report.html", page)
  return run_dir / "report.html"


def _summary(run_dir: Path, metrics: Sequence[dict[str, Any]]) -> str:
  path = run_dir / "summary.json"
  if not path.is_file():
    last = metrics[-1]["iteration"] if metrics else "none"
    return f'<p class="soft">Not finished: the last iteration logged is {last}.</p>'
  try:
    summary = json.loads(path.read_bytes())
    cost = (f"{summary['iterations']} iterations · {format_seconds(summary['seconds'])} · "
            f"{format_count(summary['tokens'])} tokens")
    pairs = [(label, summary["initial"].get(key), summary["final"].get(key))
             for label, key in ACCURACIES]
    rows = "".join(
      f"<tr><th>{label}</th><td>{_text(before)}</td><td class=\"after\">{_text(after)}</td>"
      f"<td>{'–' if before is None or after is None else f'{after - before:+.3f}'}</td></tr>"
      for label, before, after in pairs)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is not the summary of a run ({error!r})") from error
  return (f'<p class="soft">{escape(cost)}</p><table><tr><th>held-out problems</th><th>before</th>'
          f"<th>after</th><th>change</th></tr>{rows}</table>")


def _text(value: Any) -> str:
  return escape(format_figure(value))


def _samples(run_dir: Path) -> str:
  files = sorted((run_dir / "samples").glob("iteration_*.jsonl"))
  samples = read_jsonl(files[-1]) if files else []
  if not samples:
    return ""
  cards = []
  for sample in samples[:MAX_SAMPLES]:
    prompt, response = (str(sample.get(key, ""))[:MAX_SAMPLE_CHARS]
                        for key in ("prompt", "response"))
    state = "finished" if sample.get("finished") else "cut off"
    cards.append(f'<div class="card"><p class="note">reward {_text(sample.get("reward"))} · '
                 f"{state}</p><pre><b>{escape(prompt)}</b>{escape(response)}</pre></div>")
  when = int(files[-1].stem.removeprefix("iteration_"))
  return f'<h2>Samples of iteration {when}</h2><div class="grid">{"".join(cards)}</div>'


def _chart(chart: Chart, metrics: Sequence[dict[str, Any]]) -> str:
  """One card with an inline SVG, empty where the run has no such metric."""
  curves = []
  for number, (key, name) in enumerate(chart.series):
    points = [(record["iteration"], float(record[key])) for record in metrics
              if isinstance(record.get(key), int | float) and math.isfinite(record[key])]
    if points:
      curves.append((number, name, points))
  if not curves:
    return ""
  values = [y for _, _, points in curves for _, y in points]
  low, high = (0.0, chart.top) if chart.top else (min(0.0, *values), max(0.0, *values))
  y_ticks = ticks(low, high)
  low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
  x_ticks = [x for x in ticks(0, max(1, metrics[-1]["iteration"])) if x % 1 == 0]
  last = max(x_ticks[-1], *(x for _, _, points in curves for x, _ in points))

  def x_at(x: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * x / last

  def y_at(y: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

  svg = [f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" '
         f'y2="{y_at(y):.1f}"/><text x="{LEFT - 7}" y="{y_at(y) + 4:.1f}" text-anchor="end">'
         f"{format_count(y) if abs(y) >= 1000 else f'{y:g}'}</text>" for y in y_ticks]
  svg += [f'<text x="{x_at(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>'
          for x in x_ticks]
  svg.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" '
             'text-anchor="middle">iteration</text>')
  for number, _, points in curves:
    path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
    svg.append(f'<polyline class="curve s{number}" points="{path}"/>')
    if len(points) <= 20:  # Few evaluations: show where they were made.
      svg += [f'<circle class="s{number}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.4"/>'
              for x, y in points]
  legend = "".join(f'<i class="s{number}"></i>{name}' for number, name, _ in curves)
  legend = f'<span class="legend">{legend}</span>' if len(chart.series) > 1 else ""
  return (f'<div class="card"><h3>{chart.title}</h3><p class="note">{chart.unit}{legend}</p>'
          f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{chart.title} by iteration">'
          f"{''.join(svg)}</svg></div>")


def ticks(low: float, high: float) -> list[float]:
  """Three to seven round numbers (1, 2 or 5 times a power of ten) that cover low..high."""
  span = high - low if high - low > 1e-300 else 1.0
  power = 10.0 ** math.floor(math.log10(span / 4))
  step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= span)
  first = math.floor(low / step)
  # Printed and read back: 3 * 0.2 is then 0.6 at every magnitude.
  return [float(f"{i * step:.9g}") for i in range(first, math.ceil((low + span) / step) + 1)]


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line. Returns the exit code: 0, 2 where there is no run to report on, or 1 where
  the page cannot be written."""
  parser = argparse.ArgumentParser(prog="python -m spo_jax.report", description=__doc__)
  parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, finished or not")
  try:
    print(write_report(parser.parse_args(arguments).run_dir))
  except (FileNotFoundError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:  # a full disk, a folder that is read only
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
