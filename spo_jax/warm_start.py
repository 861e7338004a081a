"""Supervised steps on demonstrations until a dev set's greedy accuracy is reached."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from spo_jax import runlog, sharding
from spo_jax.checkpoint import Checkpoints
from spo_jax.compiles import CompileCount
from spo_jax.distributed import Preemption, own_directory, to_host
from spo_jax.experiment import Experiment
from spo_jax.model import Params
from spo_jax.structs import TrainState
from spo_jax.update import init_state, make_optimizer, state_template, supervised_update


def warm_start(
  experiment: Experiment, run_dir: Path, compiles: CompileCount, preemption: Preemption
) -> Params:
  """Trains the first parameters; continues a killed warm start from its newest checkpoint.

  It ends by accuracy and not by a clock, because learning this kind of task is a phase
  transition. Its figures go to `run_dir/warm_start/`, one record per check.

  Raises: Preempted behind the check at which it was asked to stop.
  """
  settings = experiment.config.sft
  optimizer = make_optimizer(settings.optimizer)

  def begin() -> TrainState:
    state = init_state(experiment.init_params(), optimizer)
    return jax.device_put(state, sharding.placements(state, experiment.mesh))

  if not settings.max_steps:
    return begin().params
  checkpoints = Checkpoints(run_dir / "checkpoints" / "warm_start", keep=1)
  micro_rows = settings.micro_batch_rows or settings.batch_rows
  own = sharding.own_rows(micro_rows, experiment.mesh)
  own_of_batch = np.tile(own, settings.batch_rows // micro_rows)
  step, accuracy = 0, 0.0
  template = state_template(experiment.model_config, optimizer, experiment.mesh)
  if restored := checkpoints.restore_newest(template):
    step, state, counters, _ = restored
    accuracy = counters["accuracy"]
    compiles.programs |= set(counters["programs"])
    checkpoints.forget_after(step)
  else:
    state = begin()
  with (
    checkpoints,
    runlog.RunLog(
      own_directory(run_dir / "warm_start"), None, experiment.config.log.tensorboard
    ) as log,
    runlog.progress("warm start", total=settings.max_steps, start=step) as bar,
  ):
    log.resume_at(step)
    while step < settings.max_steps and accuracy < settings.target_accuracy:
      # The transition is fast: look more often once it has begun, to stop near the target.
      near = 4 * accuracy >= settings.target_accuracy
      every = max(settings.check_every // 5, 1) if near else settings.check_every
      steps = min(every, settings.max_steps - step)
      for _ in range(steps):
        rows = experiment.demonstrations(
          step * settings.batch_rows, settings.batch_rows, own_of_batch
        )
        rows = sharding.place_own(
          [x.reshape(-1, own.sum(), x.shape[1]) for x in rows], micro_rows, experiment.mesh
        )
        state, loss = supervised_update(
          experiment.model_config, optimizer, state, *rows, micro_rows=micro_rows,
          remat=experiment.config.train.remat,
        )  # fmt: skip
        step += 1
      accuracy = experiment.dev_accuracy(
        state.params, settings.check_problems, temperature=0.0
      )
      loss = float(to_host(loss))
      log.log(step, {"loss": loss, "dev/greedy_accuracy": accuracy})
      bar.advance(steps, loss=loss, greedy=accuracy)
      counters = {"accuracy": accuracy, "programs": sorted(compiles.programs)}
      checkpoints.save(step, state, counters)
      if preemption.is_asked():
        raise preemption.reason()
  return state.params
