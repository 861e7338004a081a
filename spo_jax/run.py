"""What lives from one iteration to the next: state, logs, checkpoints, summary."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spo_jax import hf, runlog, sharding
from spo_jax.checkpoint import CheckpointError, Checkpoints
from spo_jax.compiles import CompileCount
from spo_jax.config import to_yaml
from spo_jax.distributed import Preemption, from_main, is_main, total
from spo_jax.experiment import Experiment
from spo_jax.model import Params
from spo_jax.packing import EdgeBuffer
from spo_jax.structs import TrainState
from spo_jax.update import init_state, make_optimizer, state_template
from spo_jax.warm_start import warm_start


class Clock:
  """Laps of one iteration, seconds."""

  def __init__(self) -> None:
    self.laps: dict[str, float] = {}
    self._last = time.perf_counter()

  def lap(self, name: str) -> None:
    now = time.perf_counter()
    self.laps[name] = now - self._last
    self._last = now


def _only(directory: Path, template: Params) -> tuple[int, Params, dict[str, Any]]:
  """Step and content of the one checkpoint of a directory; CheckpointError where it is lost."""
  with Checkpoints(directory, keep=1) as checkpoints:
    restored = checkpoints.restore_newest(template)
  if restored is None:
    raise _lost(directory)
  step, params, counters, _ = restored
  return step, params, counters


def _lost(directory: Path, before: str = "") -> CheckpointError:
  return CheckpointError(
    f"{before}{directory} holds no checkpoint. Copy it from where the run is whole, or start a new "
    "run."
  )


class Run:
  """A run at its newest checkpoint, or at iteration 0 behind its warm start.

  Attributes:
    state, reference, buffer, iteration: what training reads and changes.
  """

  def __init__(
    self,
    experiment: Experiment,
    run_dir: Path,
    log: runlog.RunLog,
    compiles: CompileCount,
    preemption: Preemption,
  ):
    config = experiment.config
    self.experiment, self.run_dir, self.log, self.compiles = experiment, run_dir, log, compiles
    self.optimizer = make_optimizer(config.optimizer)
    self.buffer = EdgeBuffer(config.spo.edges_per_question, config.spo.max_edge_age)
    self.reference: Params | None = None
    self._started = time.perf_counter()
    self._totals: dict[str, float] = {"seconds": 0.0, "tokens": 0}
    self._best_accuracy = -1.0
    policy = run_dir / "checkpoints" / "policy"
    self._checkpoints = Checkpoints(policy, config.checkpoint.keep)
    self.iteration = 0
    logged = from_main(log.last())
    if self._checkpoints.latest() is not None:
      self._restore(logged)
    elif logged <= config.checkpoint.every:
      self._begin(preemption)
    else:  # a second one is saved when the first is complete
      raise _lost(policy, f"{run_dir} has logged {logged} iterations, and ")
    if is_main():
      (run_dir / "summary.json").unlink(missing_ok=True)  # the run goes on from here
    log.write_config(to_yaml(config))  # after that: an old summary is not of this configuration

  def _begin(self, preemption: Preemption) -> None:
    self.log.resume_at(-1)
    params = warm_start(self.experiment, self.run_dir, self.compiles, preemption)
    state = init_state(params, self.optimizer)
    self.state = jax.device_put(state, sharding.placements(state, self.experiment.mesh))
    if self._needs_reference:
      self.reference = jax.tree.map(jnp.copy, params)  # the state's own buffers are donated
      with Checkpoints(self._reference_dir, keep=1) as checkpoints:
        if checkpoints.latest() is None:  # or a run killed before its first checkpoint begins anew
          checkpoints.save(0, params, {})
    self.finish(0, {}, Clock())

  def _restore(self, logged: int) -> None:
    """From the newest checkpoint that the log reaches: its records are logged before it is saved,
    and those that were lost are made again."""
    template = self._template()
    restored = self._checkpoints.restore_newest(template, logged)
    assert restored is not None
    self.iteration, self.state, counters, self.buffer.edges = restored
    self._checkpoints.forget_after(self.iteration)
    self.log.resume_at(self.iteration)
    self.compiles.programs |= set(counters["programs"])
    self._totals = counters["totals"]
    if self.experiment.config.eval.validation_problems:
      self._best_accuracy = self._restored_best()
    if self._needs_reference:
      _, self.reference, _ = _only(self._reference_dir, template.params)

  def _template(self) -> TrainState:
    experiment = self.experiment
    return state_template(experiment.model_config, self.optimizer, experiment.mesh)

  @property
  def _needs_reference(self) -> bool:
    return self.experiment.config.train.kl.coefficient > 0

  @property
  def _reference_dir(self) -> Path:
    return self.run_dir / "checkpoints" / "reference"

  def finish(self, iteration: int, figures: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Evaluates, logs and saves where it is time to; returns the record that was logged."""
    config, engine = self.experiment.config, self.experiment.engine
    self.iteration = iteration
    is_last = iteration == config.train.iterations
    record = dict(figures)
    if iteration:
      record["memory/kv_bytes"] = engine.kv_bytes
      counts, seconds = engine.take_counts()
      clock.laps |= {f"time/{name}_s": value for name, value in seconds.items()}
      record |= {f"tokens/{name}": count for name, count in counts.items()}
      graded = total(self.experiment.task.counters())
      record |= {f"grade/{name}": count for name, count in graded.items()}
      self._totals["tokens"] += counts["prefilled"] + counts["decoded"] + record["tokens/trained"]
    if iteration % config.eval.every == 0 or is_last:
      accuracies, texts = self.experiment.test_accuracies(
        self.state.params, config.eval.problems
      )
      record |= {f"eval/{name}": value for name, value in accuracies.items()}
      self.log.log_samples(iteration, texts)
      if config.eval.validation_problems:
        record["eval/validation_accuracy"] = self._keep_best(iteration)
      clock.lap("time/eval_s")
    record |= {"compile/count": len(self.compiles.programs), **clock.laps}
    self.log.log(iteration, record)
    if iteration % config.checkpoint.every == 0 or is_last:
      self.save()
    return record

  def save(self) -> None:
    """Saves the run as it is behind this iteration, unless that is saved already."""
    if self.iteration in self._checkpoints.steps():
      return
    self._totals["seconds"] += self._elapsed()
    counters = {
      "programs": sorted(self.compiles.programs),
      "totals": self._totals,
    }
    self._checkpoints.save(self.iteration, self.state, counters, self.buffer.edges)

  @property
  def _validated(self) -> list[float]:
    """What validation accuracies depend on, beside the policy: others cannot be compared."""
    held_out = self.experiment.config.eval
    return [held_out.validation_problems, held_out.temperature, held_out.top_p]

  def _restored_best(self) -> float:
    """Validation accuracy of the best policy so far; -1 where the one that is kept is of a future
    that was lost, or was measured in another way."""
    with Checkpoints(self._best_dir, keep=1) as checkpoints:
      step = checkpoints.latest()
      if step is None or step > self.iteration:
        return -1.0
      kept = checkpoints.counters(step)
    is_comparable = kept.get("validated", self._validated) == self._validated
    return kept["validation_accuracy"] if is_comparable else -1.0

  def _keep_best(self, iteration: int) -> float:
    """Validation accuracy of the policy, which is saved where none before it was better."""
    count = self.experiment.config.eval.validation_problems
    accuracy = self.experiment.dev_accuracy(
      self.state.params, count, self.experiment.config.eval.temperature
    )
    if accuracy > self._best_accuracy:
      self._best_accuracy = accuracy
      with Checkpoints(self._best_dir, keep=1) as checkpoints:
        checkpoints.forget_after(iteration - 1)  # of a run that was killed behind this point
        figures = {"validation_accuracy": accuracy, "validated": self._validated}
        checkpoints.save(iteration, self.state.params, figures)
    return accuracy

  def _best(self) -> tuple[Params, dict[str, Any]]:
    """The policy to hand out: the best by validation where it was measured, else the last."""
    if not self.experiment.config.eval.validation_problems:
      return self.state.params, {}
    template = self._template().params
    step, params, counters = _only(self._best_dir, template)
    accuracy = counters["validation_accuracy"]
    return params, {"best": {"iteration": step, "validation_accuracy": accuracy}}

  @property
  def _best_dir(self) -> Path:
    return self.run_dir / "checkpoints" / "best"

  def _elapsed(self) -> float:
    """Seconds since this was last asked, or since the start."""
    now = time.perf_counter()
    elapsed, self._started = now - self._started, now
    return elapsed

  def wait(self) -> None:
    """Waits for the last checkpoint."""
    self._checkpoints.close()

  def close(self) -> dict[str, Any]:
    """Waits for the last checkpoint, exports, writes summary.json and returns it.

    Only the main process writes and returns something.
    """
    if self.experiment.config.eval.validation_problems and self._best_accuracy < 0:
      self._keep_best(self.iteration)  # what was best on other questions is no answer
    self.wait()
    params, best = self._best()
    if self.experiment.config.checkpoint.export:
      with runlog.writing(self.run_dir / "model"):
        hf.save_pretrained(
          self.run_dir / "model", self.experiment.model_config, params, self.experiment.tokenizer,
          self.experiment.engine.sampling.end_ids,
        )  # fmt: skip
    if not is_main():
      return {}
    evaluated = [r for r in runlog.read_metrics(self.run_dir) if "eval/greedy_accuracy" in r]
    names = [name for _, name in runlog.ACCURACIES]
    summary = {
      "initial": {name: evaluated[0][f"eval/{name}"] for name in names},
      "final": {name: evaluated[-1][f"eval/{name}"] for name in names},
      "iterations": self.iteration,
      "seconds": self._totals["seconds"] + self._elapsed(),
      "tokens": int(self._totals["tokens"]),
      **best,
    }
    self.log.write_summary(summary)
    return summary
