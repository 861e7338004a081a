"""A killed run that is resumed is, bit for bit, the run that nobody killed."""

from __future__ import annotations

import signal


import pytest

pytest.register_assert_rewrite("runs")
pytest_plugins = ["runs"]

from runs import VARIANTS, Stop, assert_same_run, metrics  # noqa: E402

SAVE = "spo_jax.checkpoint.Checkpoints.save"
COMMIT = "orbax.checkpoint.path.atomicity.AtomicRenameTemporaryPath.finalize"

# Calls count from the start of each process, so every moment is one of the run that was resumed.
MOMENTS = {
  "chain": {
    "in the warm start": Stop("spo_jax.sft.supervised_update", 4),
    "behind the metrics of iteration 0": Stop("spo_jax.run.Run._elapsed"),
    "in the first rollout": Stop("spo_jax.rollouts.Engine.fetch", 6),
    "in an update": Stop("spo_jax.train.policy_update", 4),
    "in the write of a checkpoint": Stop(COMMIT, 2),
    "in a later rollout": Stop("spo_jax.train.collect", 2),
  },
}


@pytest.mark.parametrize("variant", MOMENTS)
def test_a_run_killed_again_and_again_equals_one_that_was_not(
  train, finished, config, tmp_path, variant
):
  command = ["--config", config, "--run-dir", tmp_path, "--set", *VARIANTS[variant]]
  for moment, stop in MOMENTS[variant].items():
    result = train(*command, stop=stop)
    assert result.code == -signal.SIGKILL, f"{moment}: {result.err}"
    command = [*command[:4], "--resume", *command[-len(VARIANTS[variant]) - 1 :]]
  result = train(*command)
  assert result.code == 0, result.err
  assert_same_run(tmp_path, finished(variant)[0])
