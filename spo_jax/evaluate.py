"""Held-out evaluation: python -m spo_jax.evaluate --model DIR --task gsm8k --samples 16

DIR is a Hugging Face folder, a hub name or the directory of a training run. The output folder
holds every response in samples.jsonl and all figures in summary.json. Questions are answered in
chunks whose samples depend on the seed and the chunk alone, so the same command continues a
killed evaluation and ends with the same files. Several processes (see distributed.py) sample
together, each grades its share, and the main one writes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from spo_jax import __version__, distributed, metrics, rollouts, runlog, validation
from spo_jax.checkpoint import CheckpointError
from spo_jax.config import Config, changed_keys, config_at, load
from spo_jax.experiment import Experiment, Purpose, build
from spo_jax.layout import select
from spo_jax.model import Params, count_params
from spo_jax.sources import Source, digest, find_source, load_params
from spo_jax.structs import Prompts, Trajectories


class Preset(NamedTuple):
  """How a paper evaluated; the last three are for models without a run, which has its own."""

  task: str
  samples: int
  temperature: float
  top_p: float
  max_prompt_tokens: int
  max_response_tokens: int
  stop: tuple[str, ...] = ()


PRESETS = {  # the protocols of Segment Policy Optimization, arXiv:2505.23564
  "gsm8k": Preset("gsm8k", 16, 0.35, 0.9, 511, 1536, ("\n\n\nProblem:",)),
  "math500": Preset("math", 1, 0.0, 1.0, 512, 1536),
  "math500-sampled": Preset("math", 16, 0.6, 0.95, 512, 1536),
}
OPTIONS = {  # option: key of the configuration that it sets, help
  "task": ("task.name", "default: that of the preset or the run"),
  "task_path": ("task.path", "local data file or folder, or hub name"),
  "prompt": ("task.prompt", "a template's name, or text with {question} in it"),
  "samples": ("rollout.samples", "responses per question (default 1)"),
  "temperature": ("eval.temperature", "0: greedy, as one sample is by default"),
  "top_p": ("eval.top_p", "nucleus of the samples; 1: off"),
  "limit": ("eval.problems", "first questions only; default all, of endless splits eval.problems"),
  "rows": ("rollout.rows", "responses sampled at once"),
  "max_prompt_tokens": ("rollout.max_prompt_tokens", "longer questions are left out"),
  "max_response_tokens": ("rollout.max_response_tokens", "longer responses are cut"),
  "stop": ("rollout.stop", "strings that end a response, as end-of-text does"),
  "dtype": ("model.compute_dtype", "float32 or bfloat16"),
}  # fmt: skip
SAMPLES, SUMMARY, SETTINGS = "samples.jsonl", "summary.json", "settings.json"
_WHOLE_SPLIT = 1_000_000  # a larger one is generated without end
# What the tokenizer of a new model was made of, see `experiment.build`.
_TOKENIZER_KEYS = {"seed", "task.name", "task.path", "task.numbers", "task.largest",
                   "model.tokenizer_tokens"}  # fmt: skip


def configure(options: argparse.Namespace, source: Source) -> Config:
  """The configuration of an evaluation: that of the run or the default, preset, then options.

  `rollout.samples` is K, `eval.temperature` and `eval.top_p` are those of the samples.

  Raises: ValueError, one line, for options that do not fit together.
  """
  if not 0 <= options.seed < 2**31:
    raise ValueError(f"--seed {options.seed} must be from 0 to {2**31 - 1}.")
  if options.preset not in (None, *PRESETS):
    raise ValueError(f"--preset {options.preset} is none of {', '.join(PRESETS)}.")
  chosen = PRESETS[options.preset]._asdict() if options.preset else {}
  for name in Preset._fields[4:] if source.run is not None else ():
    chosen.pop(name, None)
  chosen |= {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
  # What only training looks at is neither checked nor in the way: penalties shape its rewards.
  changes = ["algorithm=chain", "schedule=[]", "sft.max_steps=0", "eval.validation_problems=0",
             "train.pack_tokens=0", "task.unfinished_penalty=0", "task.repeat_penalty=0",
             "rollout.samples=1"]  # fmt: skip
  run = source.run
  if run is None:
    changes.append(f"model.path={json.dumps(source.model, ensure_ascii=False)}")
  else:
    longest = config_at(run, run.train.iterations).rollout.max_response_tokens
    changes.append(f"rollout.max_response_tokens={longest}")
    if chosen.get("task", run.task.name) != run.task.name:
      changes += ["task.path=null", "task.prompt=default"]  # those of the run's own task
  # JSON is YAML, and keeps a text with colons or braces a text.
  changes += [f"{OPTIONS[name][0]}={json.dumps(value, ensure_ascii=False)}"
              for name, value in chosen.items()] + options.set  # fmt: skip
  named = {change.partition("=")[0] for change in changes}
  if run is None and "task.name" not in named:
    raise ValueError("--task is missing: which questions are to be answered? E.g. --task gsm8k.")
  config = load(None if run is None else Path(source.model) / "config.yaml", changes)
  if run is not None and not run.model.path:
    if other := _TOKENIZER_KEYS.intersection(changed_keys(run, config)):
      raise ValueError(f"{min(other)} is another than that of the run, whose tokenizer was made "
                       f"for its own task. Evaluate --model {source.model}/model.")  # fmt: skip
  samples = config.rollout.samples
  if samples == 1 and "eval.temperature" not in named:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, temperature=0.0))
  if samples > 1 and config.eval.temperature == 0:
    raise ValueError(f"--samples {samples} at --temperature 0 would all be the same. Set --samples "
                     "1, or a temperature.")  # fmt: skip
  return config


@dataclass(frozen=True)
class Evaluation:
  """What is asked, how, and where the answers go."""

  source: Source
  experiment: Experiment
  prompts: Prompts
  settings: dict[str, Any]  # whatever the samples depend on
  output: Path


def prepare(options: argparse.Namespace) -> Evaluation:
  """Everything but parameters and samples; writes nothing.

  Raises: ValueError, one line, for whatever cannot be evaluated.
  """
  source = find_source(options.model, options.checkpoint)
  config = configure(options, source)
  experiment = build(config, training=False)
  size = len(experiment.split(options.split))
  is_limited = options.limit or size > _WHOLE_SPLIT
  prompts = experiment.held_out(options.split, config.eval.problems if is_limited else size)
  names = ("rows", "samples", "max_prompt_tokens", "max_response_tokens", "stop")
  settings = {
    "model": source.model,
    "checkpoint": source.step,
    "weights": source.weights(),
    "task": dataclasses.asdict(config.task),
    "split": options.split,
    "questions": len(prompts.lengths),
    "prompts": digest(prompts.tokens.tobytes(), repr(prompts.problems).encode()),
    "temperature": config.eval.temperature,
    "top_p": config.eval.top_p,
    "seed": options.seed,
    "dtype": config.model.compute_dtype,
    **{name: getattr(config.rollout, name) for name in names},
  }
  name = f"evaluate-{Path(source.model).name}-{config.task.name}"
  if options.output is None and not distributed.is_alone():
    raise ValueError("--output is missing: several processes have to agree on it. Name one.")
  output = options.output or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
  evaluation = Evaluation(source, experiment, prompts, runlog.plain(settings), output)
  _check_output(evaluation)
  return evaluation


def _check_output(evaluation: Evaluation) -> None:
  """Raises ValueError where the output folder holds another evaluation than this one."""
  output = evaluation.output
  if not (output / SETTINGS).exists():
    if any((output / name).exists() for name in (SAMPLES, SUMMARY)):
      raise ValueError(f"--output {output} holds results of something else. Name another folder.")
    return
  stored = json.loads((output / SETTINGS).read_text())
  for key, value in evaluation.settings.items():
    if stored.get(key) != value:
      raise ValueError(f"--output {output} holds an evaluation with {key}={stored.get(key)}, not "
                       f"{value}. Name another folder.")  # fmt: skip


def _open_output(evaluation: Evaluation) -> IO[str] | None:
  """Makes the output folder, once all have looked at it, and locks it until the file is closed.

  Raises: ValueError where it cannot, or where another evaluation is writing there.
  """
  output = evaluation.output
  distributed.wait_for_all("the output folder is checked")
  if not distributed.is_main():
    return None
  try:
    output.mkdir(parents=True, exist_ok=True)
    lock = runlog.locked(output / "lock")
    _check_output(evaluation)  # again: another evaluation may have come and gone
    runlog.write_atomic(output / SETTINGS, json.dumps(evaluation.settings, indent=2) + "\n")
  except OSError as error:
    raise ValueError(f"--output {output}: {error.strerror}. Name another folder.") from error
  return lock


def complete_samples(path: Path, total: int, chunk: int) -> list[dict[str, Any]]:
  """The samples of complete chunks; what a kill left behind them is cut off the file.

  Args:
    total: lines of a complete file; chunk: lines that are written at once.
  """
  path.touch()
  lines = path.read_bytes().split(b"\n")[:-1]
  records = []
  for line in lines[:total]:
    try:
      records.append(json.loads(line))
    except ValueError:  # a disk that was full
      break
  kept = len(records) if len(records) == total else len(records) // chunk * chunk
  os.truncate(path, sum(len(line) + 1 for line in lines[:kept]))
  return records[:kept]


def answer(evaluation: Evaluation, params: Params) -> int:
  """Appends to samples.jsonl whatever it lacks, chunk by chunk.

  Returns: how many questions it held the answers to.
  """
  experiment, prompts = evaluation.experiment, evaluation.prompts
  config, path = experiment.config, evaluation.output / SAMPLES
  samples, total = config.rollout.samples, len(prompts.lengths)
  at_once = config.rollout.rows // samples
  # Graded here and not by the engine: a vote needs the answers, not only their rewards.
  engine = dataclasses.replace(
    validation.at(experiment.engine, config.eval.temperature, config.eval.top_p),
    grade_fn=lambda problems, *_: np.zeros(len(problems), np.float32),
  )
  key = jax.random.fold_in(jax.random.key(evaluation.settings["seed"]), int(Purpose.EVALUATE))
  is_main = distributed.is_main()
  found = complete_samples(path, total * samples, at_once * samples) if is_main else []
  done = distributed.from_main(len(found)) // samples
  right = sum(record["reward"] == 1 for record in found)
  with (
    runlog.progress("evaluate", total, done) as bar,
    path.open("ab") if is_main else io.BytesIO() as file,
  ):
    for first in range(done, total, at_once):
      rows = slice(first, first + at_once)
      chunk = select(prompts, rows).replace(problems=prompts.problems[rows])
      chunk_key = jax.random.fold_in(key, first // at_once)
      drawn = rollouts.flat(engine, params, chunk, samples, chunk_key)
      own = judge(experiment, chunk, select(drawn, distributed.own_share(len(drawn.prompt))))
      lines = "".join(json.dumps(record) + "\n" for record in own).encode()
      lines = distributed.gather_bytes(lines)
      if is_main:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
        right += sum(json.loads(line)["reward"] == 1 for line in lines.splitlines())
      asked = first + len(chunk.lengths)
      bar.advance(len(chunk.lengths), accuracy=right / (asked * samples))
  return done


def judge(experiment: Experiment, prompts: Prompts, drawn: Trajectories) -> list[dict[str, Any]]:
  """One record per response, in the order drawn."""
  texts = experiment.decode(drawn.samples)
  finished = drawn.samples.finished.tolist()
  problems = [prompts.problems[i] for i in drawn.prompt]
  grades = experiment.task.grade_many(problems, texts, finished)
  rows = zip(problems, texts, grades, finished, drawn.samples.lengths.tolist(), strict=True)
  return [
    {
      "question": problem.uid,
      "prompt": problem.prompt,
      "answer": problem.answer,
      "response": text,
      "extracted": grade.extracted,
      "reward": float(grade.reward),
      "finished": ended,
      "tokens": tokens,
    }
    for problem, text, grade, ended, tokens in rows
  ]


def summarise(evaluation: Evaluation, seconds: float, continued_from: int) -> dict[str, Any]:
  """Writes summary.json from samples.jsonl and returns it; only the main process does.

  Args:
    seconds: of this process, which found `continued_from` questions answered.
  """
  experiment, settings = evaluation.experiment, evaluation.settings
  grading = distributed.total(experiment.task.counters())
  if not distributed.is_main():
    return {}
  records = runlog.read_jsonl(evaluation.output / SAMPLES)
  summary = {
    **metrics.summarise(records, settings["samples"], settings["seed"]),
    "left_out": {**experiment.task.skipped, **experiment.left_out},
    "grading": grading,
    "seconds": seconds,
    "continued_from": continued_from,
    "settings": settings,
  }
  text = json.dumps(runlog.plain(summary), indent=2) + "\n"
  runlog.write_atomic(evaluation.output / SUMMARY, text)
  return summary


def show(summary: dict[str, Any], output: Path) -> None:
  """Prints what an evaluation ends with: figures, cost, where the files are."""
  settings = summary["settings"]
  table = Table(
    "", *(Column(name, justify="right") for name in ("value", "95 % interval")),
    title=f"{settings['task']['name']}, {settings['split']} split", title_justify="left",
  )  # fmt: skip
  for name, interval in summary["intervals"].items():
    if not name.endswith("@1"):  # that is the accuracy again
      low, high = map(runlog.format_figure, interval)
      table.add_row(name, runlog.format_figure(summary[name]), f"{low} to {high}")
  table.add_row("unfinished", runlog.format_figure(summary["unfinished_rate"]), "")
  table.add_row("mean length", f"{summary['mean_length']:.1f} tokens", "")
  Console(file=sys.stdout).print(table)
  print(f"{summary['questions']} questions x {summary['samples']} samples, temperature "
        f"{settings['temperature']:g}, top-p {settings['top_p']:g}, "
        f"{runlog.format_seconds(summary['seconds'])}, "
        f"{runlog.format_count(summary['tokens'])} tokens")  # fmt: skip
  for what, count in {**summary["left_out"], **summary["grading"]}.items():
    if count:
      print(f"{what}: {count}")
  print(f"Samples: {output / SAMPLES}\nSummary: {output / SUMMARY}")


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    """One line, like every other error."""
    self.exit(2, f"error: {message}; --help lists the options.\n")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="python -m spo_jax.evaluate",
    description="Measure a model on held-out questions. The same command continues a killed one.",
  )
  add = parser.add_argument
  add("--model", required=True, help="Hugging Face folder, hub name or training run directory")
  add("--checkpoint", help="of a training run: latest (default), best or a step")
  add("--preset", help=f"a protocol of the paper: {', '.join(PRESETS)}")
  add("--split", default="test", help="train, validation or test (default)")
  add("--seed", type=int, default=0, help="of samples and intervals (default 0)")
  for name, (_, text) in OPTIONS.items():
    nargs = "+" if name == "stop" else None
    add(f"--{name.replace('_', '-')}", nargs=nargs, help=text)
  add("--output", type=Path, help="default: runs/evaluate-MODEL-TASK-TIME")
  add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
      help="change other keys of the configuration: --set task.operations=8")  # fmt: skip
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  started, lock = time.perf_counter(), None
  options = _parser().parse_args(arguments)
  try:
    distributed.initialize()
    evaluation = prepare(options)
    output = evaluation.output
    is_done = bool(distributed.from_main((output / SUMMARY).exists()))  # not all may see it yet
    if not is_done:
      experiment = evaluation.experiment
      params = experiment.engine.place(load_params(evaluation.source, experiment))
      lock = _open_output(evaluation)
  except (ValueError, CheckpointError) as error:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2
  experiment, settings = evaluation.experiment, evaluation.settings
  with (
    lock or contextlib.nullcontext(), contextlib.closing(experiment.task),
    jax.set_mesh(experiment.mesh), distributed.quiet_unless_main(),
  ):  # fmt: skip
    if is_done:
      if distributed.is_main():
        show(json.loads((output / SUMMARY).read_text()), output)
      return 0
    print(f"spo_jax {__version__}, jax {jax.__version__}, device {jax.devices()[0].device_kind}\n"
          f"model: {settings['model']}, {count_params(experiment.model_config):,} parameters\n"
          f"task: {experiment.config.task.name}, {settings['questions']} questions of the "
          f"{settings['split']} split, {settings['samples']} samples each", flush=True)  # fmt: skip
    try:
      done = answer(evaluation, params)
      if summary := summarise(evaluation, time.perf_counter() - started, done):
        show(summary, output)
    except KeyboardInterrupt:
      print(f"Stopped; the same command with --output {output} continues.", file=sys.stderr)
      return distributed.INTERRUPTED
    except OSError as error:  # a full disk, a mount that went away
      print(f"error: {error}. Mend that; the same command with --output {output} continues.",
            file=sys.stderr)  # fmt: skip
      return 1
  return 0


if __name__ == "__main__":
  distributed.leave(main)
