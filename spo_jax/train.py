"""SPO training: python -m spo_jax.train --config configs/laptop_chain.yaml

One iteration (Segment Policy Optimization, arXiv:2505.23564, Algorithm 1):
  1. sample responses, cut them into segments, estimate the value of every boundary by
     fresh rollouts (chain) or as the mean of its children (tree);
  2. give each segment the change in value as its advantage;
  3. take masked, clipped policy steps on the rows that have a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spo_jax import __version__, distributed, hf, packing, runlog, sharding
from spo_jax.algorithms import collect
from spo_jax.checkpoint import CheckpointError
from spo_jax.compiles import CompileCount
from spo_jax.config import Config, ConfigError, changed_keys, get, load, to_yaml
from spo_jax.experiment import Experiment, Purpose, build
from spo_jax.model import count_params
from spo_jax.packs import most_packs
from spo_jax.report import write_report
from spo_jax.run import Clock, Run
from spo_jax.structs import TrainRows
from spo_jax.update import policy_update, summarise


def train(experiment: Experiment, run_dir: Path, log: runlog.RunLog) -> dict[str, Any]:
  """Runs, or continues, the run of `run_dir`; returns its summary.

  Raises: distributed.Preempted where SIGTERM asked it to stop; `--resume` goes on exactly.
  """
  config = experiment.config
  with (
    CompileCount() as compiles,
    jax.set_mesh(experiment.mesh),
    distributed.Preemption() as preemption,
  ):
    run = Run(experiment, run_dir, log, compiles, preemption)
    try:
      with runlog.progress(config.algorithm, config.train.iterations, run.iteration) as bar:
        for iteration in range(run.iteration + 1, config.train.iterations + 1):
          clock = Clock()
          stage, count = experiment.at(iteration), config.rollout.questions
          prompts = stage.questions(cursor=(iteration - 1) * count, count=count)
          rows, figures = collect(stage, run.state.params, prompts, iteration, run.buffer)
          clock.lap("time/rollout_s")
          losses = learn(run, rows, iteration)
          clock.lap("time/update_s")
          record = run.finish(iteration, {**figures, **losses}, clock)
          bar.advance(**{name: record[key] for key, name in _LIVE.items() if key in record})
          if preemption.is_asked():
            run.save()
            raise preemption.reason()
    except BaseException:
      run.wait()  # its newest checkpoint is what --resume continues
      raise
    return run.close()


_LIVE = {
  "rollout/reward_mean": "reward",
  "eval/greedy_accuracy": "greedy",
  "eval/sampled_accuracy": "sampled",
  "mask/fraction": "mask",
}


def learn(run: Run, rows: TrainRows, iteration: int) -> dict[str, float]:
  """The policy updates of one iteration; nothing crosses to the host inside one."""
  config, mesh = run.experiment.config, run.experiment.mesh
  micro_batch = packing.micro_batch_size(
    config.train, rows.tokens.shape[1], sharding.row_shards(mesh)
  )
  temperature = sharding.place(np.float32(config.rollout.temperature), "scalar", mesh)
  measured = []
  for batch, used in packing.optimiser_batches(
    rows, config.train.batch_rows, micro_batch, config.train.epochs,
    run.experiment.rng(Purpose.SHUFFLE, iteration), config.train.pack_tokens,
    sharding.own_rows(micro_batch, mesh), config.train.official,
  ):  # fmt: skip
    on_device = (
      sharding.place_own(batch, micro_batch, mesh), sharding.place(np.int32(used), "scalar", mesh)
    )  # fmt: skip
    with jax.transfer_guard("disallow"):
      run.state, metrics = policy_update(
        run.experiment.model_config, config.train, run.optimizer, run.state, run.reference,
        *on_device, temperature,
      )  # fmt: skip
    measured.append(metrics)
  return summarise(measured)


# A resumed run may change these; anything else would make it another run.
_RESUME_MAY_CHANGE = (
  "train.iterations", "eval.", "checkpoint.", "log.", "mesh.", "rollout.mesh.",
  # How much is computed at once, which changes results by rounding alone.
  "rollout.rows", "train.micro_batch_rows", "train.pack_tokens", "train.remat",
)  # fmt: skip


def open_run_dir(config: Config, config_path: Path, run_dir: Path | None, resume: bool) -> Path:
  """The directory to run in.

  Raises:
    ConfigError: it holds another run, or `resume` finds none.
  """
  if run_dir is None and not distributed.is_alone():
    raise ConfigError("--run-dir is missing: several processes have to agree on it. Name one.")
  if run_dir is None:
    name = re.compile(re.escape(config_path.stem) + r"-\d{8}-\d{6}")  # others were named by hand
    runs = sorted(p for p in Path("runs").glob("*/config.yaml") if name.fullmatch(p.parent.name))
    if resume and not runs:
      raise ConfigError(f"--resume: runs/ holds no run of {config_path.stem}; give --run-dir.")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = runs[-1].parent if resume else Path("runs") / f"{config_path.stem}-{stamp}"
  if patterns := set("*?[]\\").intersection(str(run_dir.absolute())):
    raise ConfigError(
      f"--run-dir {run_dir.absolute()}: orbax, which writes checkpoints, takes {min(patterns)} for "
      "a pattern. Name one without it."
    )
  stored = run_dir / "config.yaml"
  if stored.exists() and not resume:
    raise ConfigError(f"{run_dir} holds a run already; add --resume or name another --run-dir.")
  if resume and not stored.exists():
    raise ConfigError(f"--resume: {run_dir} holds no run; check --run-dir.")
  if resume:
    changed = changed_keys(load(stored), config)
    blocking = [
      key for key in changed if not key.startswith(_RESUME_MAY_CHANGE)
      or (config.train.official and key == "train.micro_batch_rows")
    ]  # fmt: skip
    if blocking:
      raise ConfigError(
        f"--resume: {blocking[0]} differs from {stored}; set it back or start a new run."
      )
    done = max((record["iteration"] for record in runlog.read_metrics(run_dir)), default=0)
    if done > config.train.iterations:
      raise ConfigError(
        f"--resume: {run_dir} has done {done} iterations; train.iterations="
        f"{config.train.iterations} is less. Raise it."
      )
  try:
    run_dir.mkdir(parents=True, exist_ok=True)
    runlog.assert_renames(run_dir)
  except OSError as error:
    raise ConfigError(f"--run-dir {run_dir}: {error.strerror}; name another.") from error
  return run_dir


def finished(run_dir: Path, config: Config) -> dict[str, Any] | None:
  """The summary of a run that has nothing left to do under this configuration."""
  try:
    stored = load(run_dir / "config.yaml")
    summary = json.loads((run_dir / "summary.json").read_text())
    is_whole = summary.keys() >= {"initial", "final"}
    has_ended = summary.get("iterations") == config.train.iterations
  except (FileNotFoundError, ValueError, AttributeError):  # or damaged: it is written again
    return None
  is_same = all(key.startswith("log.") for key in changed_keys(stored, config))
  is_exported = (run_dir / "model").exists() or not config.checkpoint.export
  return summary if is_whole and has_ended and is_same and is_exported else None


def plan(experiment: Experiment) -> str:
  """What an iteration will do, in a few lines for a person."""
  config, rollout, spo = experiment.config, experiment.config.rollout, experiment.config.spo
  shape = {
    "chain": f"{rollout.samples} responses each, cut at every {spo.interval} cutpoints, "
    f"{spo.continuations} continuations per boundary",
    "tree": f"one tree each, branch factors {list(spo.branch_factors)}, {spo.segment_tokens} "
    f"tokens per level, {config.leaves} leaves",
  }.get(config.algorithm, f"{rollout.samples} responses each")
  shards = sharding.row_shards(experiment.mesh)
  at_once = packing.micro_batch_size(config.train, config.row_tokens, shards)
  of_update = f"{config.train.batch_rows} rows"
  if width := config.train.pack_tokens:
    most = most_packs(config.train.batch_rows, config.row_tokens, width)
    of_update += f" in at most {most} packs of {width} tokens"
  devices = jax.devices()
  skipped = {f"bad rows of {file}": count for file, count in experiment.task.skipped.items()}
  left_out = {**skipped, **experiment.left_out}
  return "\n".join((
    f"spo_jax {__version__}, jax {jax.__version__}, device {devices[0].device_kind} "
    f"({experiment.mesh.size} of {len(devices)} used, mesh {dict(experiment.mesh.shape)})",
    f"model: {config.model.path or 'new'}, {count_params(experiment.model_config):,} parameters, "
    f"vocabulary {experiment.model_config.vocab_size}",
    f"task: {config.task.name}; warm start: at most {config.sft.max_steps} steps",
    *(f"left out: {count} {what}" for what, count in left_out.items() if count),
    *(f"  {row}" for row in experiment.task.skipped_rows),
    f"{config.train.iterations} iterations of {rollout.questions} questions: {shape}",
    f"rollouts: {rollout.rows} rows at once, {config.row_tokens} tokens each",
    f"updates: {of_update}, {at_once} in a micro-batch, {config.train.epochs} epochs",
  ))  # fmt: skip


def main(
  arguments: Sequence[str] | None = None,
  program: str = "train",
  description: str = "Train a policy with SPO-chain, SPO-tree, GRPO or RLOO.",
  overrides: Sequence[str] = (),
  positive: Sequence[str] = (),
) -> int:
  """The command line; `overrides` are settings that the program itself stands for, `positive`
  keys without which it has nothing to do."""
  parser = argparse.ArgumentParser(prog=f"python -m spo_jax.{program}", description=description)
  parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
  parser.add_argument(
    "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
    help="change keys of the file, e.g. --set seed=1 train.iterations=5",
  )  # fmt: skip
  parser.add_argument("--run-dir", type=Path, help="default: runs/CONFIG-TIME")
  parser.add_argument(
    "--resume", action="store_true", help="continue the run of --run-dir, or this config's newest"
  )
  parser.add_argument(
    "--dry-run", action="store_true", help="print the resolved config and the plan, then stop"
  )
  options = parser.parse_args(arguments)
  try:
    distributed.initialize()
    config = load(options.config, [*options.set, *overrides])
    for key in positive:
      if get(config, key) == 0:
        raise ConfigError(f"{key}=0: there is nothing to do for spo_jax.{program}. Raise it.")
    experiment = build(config)
    if options.dry_run:
      print(to_yaml(config) + "\n" + plan(experiment))
      return 0
    run_dir = open_run_dir(config, options.config, options.run_dir, options.resume)
    summary = finished(run_dir, config)
    is_finished = bool(distributed.from_main(summary is not None))  # not all may see it yet
    if not is_finished and config.checkpoint.export:
      hf.is_replaceable(run_dir / "model")  # raises now what would be raised after training
    project = "spo_jax" if config.log.wandb and distributed.is_main() else None
    distributed.wait_for_all("the run directory is checked")
    own_dir = distributed.own_directory(run_dir)
    log = runlog.RunLog(own_dir, project, config.log.tensorboard)
    if is_finished or not options.resume:  # or `Run` does so, when it goes on
      log.write_config(to_yaml(config))
  except (ConfigError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  with log, contextlib.closing(experiment.task), distributed.quiet_unless_main():
    try:
      print(to_yaml(config) + "\n" + plan(experiment), flush=True)
      if not is_finished:
        summary = train(experiment, run_dir, log)
      if summary and distributed.is_main():
        runlog.final_table(summary, run_dir)
        print(f"Report: {write_report(run_dir)}")
    except (KeyboardInterrupt, distributed.Preempted) as stop:
      print(f"Stopped; --resume --run-dir {run_dir} continues.", file=sys.stderr)
      is_ctrl_c = isinstance(stop, KeyboardInterrupt)
      return distributed.INTERRUPTED if is_ctrl_c else distributed.PREEMPTED
    except (CheckpointError, ConfigError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 1
    except OSError as error:  # a full disk, a mount that went away
      print(f"error: {error}. What is saved is whole: mend that, and --resume --run-dir {run_dir} "
            "continues.", file=sys.stderr)  # fmt: skip
      return 1
  return 0


if __name__ == "__main__":
  distributed.leave(main)
