"""A killed run that is resumed is, bit for bit, the run that nobody killed."""

from __future__ import annotations

import shutil
import signal

import pytest

pytest.register_assert_rewrite("runs")
pytest_plugins = ["runs"]

from runs import VARIANTS, Stop, assert_same_run, metrics, summary  # noqa: E402

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
  "tree": {
    "behind the metrics, before the checkpoint": Stop(SAVE, 5),  # the fourth is iteration 0's
    "in the commit of a checkpoint": Stop(COMMIT, 4),
    "in a later rollout": Stop("spo_jax.train.collect", 4),
  },
  "grpo": {
    "in an update": Stop("spo_jax.train.policy_update", 2),
    "behind the metrics, before the checkpoint": Stop(SAVE, 2),
  },
}


def command(config, run_dir, variant="chain", *settings, resume=False):
  options = ["--config", config, "--run-dir", run_dir, "--set", *VARIANTS[variant], *settings]
  return [*options, "--resume"] if resume else options


@pytest.fixture
def copy(finished, tmp_path):
  """A finished run that a test may change."""
  return shutil.copytree(finished("chain")[0], tmp_path / "run")


def content(directory):
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", MOMENTS)
def test_a_run_killed_again_and_again_equals_one_that_was_not(
  train, finished, config, tmp_path, variant
):
  reference, _ = finished(variant)
  resume = False
  for moment, stop in MOMENTS[variant].items():
    result = train(*command(config, tmp_path, variant, resume=resume), stop=stop)
    assert result.code == -signal.SIGKILL, f"{moment}: {result.err}"
    resume = True
  result = train(*command(config, tmp_path, variant, resume=True))
  assert result.code == 0, result.err
  assert_same_run(tmp_path, reference)


def test_a_run_killed_at_any_time_equals_one_that_was_not(train, finished, config, tmp_path):
  reference, _ = finished("tree")
  for seconds in (1.7, 2.3):  # what it is doing by then depends on the machine
    started = (tmp_path / "config.yaml").exists()
    train(*command(config, tmp_path, "tree", resume=started), seconds=seconds)
  assert train(*command(config, tmp_path, "tree", resume=True)).code == 0
  assert_same_run(tmp_path, reference)


def test_more_iterations_on_resume_equal_a_longer_run(train, finished, config, tmp_path):
  reference, _ = finished("chain")
  # Evaluated after iteration 3 in any case, so that the records have the same keys.
  assert train(*command(config, tmp_path, "chain", "train.iterations=3")).code == 0
  assert metrics(tmp_path) == metrics(reference)[:4]
  assert summary(tmp_path)["iterations"] == 3
  result = train(*command(config, tmp_path, "chain", resume=True))
  assert result.code == 0, result.err
  # Another train.iterations is another configuration, for which the update is compiled anew.
  assert_same_run(tmp_path, reference, "compile/count")


def test_resuming_a_finished_run_changes_nothing(train, finished, config, copy):
  result = train(*command(config, copy, resume=True))
  assert result.code == 0, result.err
  assert_same_run(copy, finished("chain")[0])


@pytest.mark.parametrize("setting", ["spo.interval=3", "seed=1", "optimizer.learning_rate=0.01"])
def test_a_run_is_not_resumed_as_another(train, config, copy, setting):
  before = content(copy)
  result = train(*command(config, copy, "chain", setting, resume=True))
  assert (result.code, result.out) == (2, "")
  assert setting.partition("=")[0] in result.err
  assert result.err.count("\n") == 1
  assert content(copy) == before


def test_a_run_is_not_overwritten(train, config, copy):
  before = content(copy)
  result = train(*command(config, copy))
  assert (result.code, result.out) == (2, "")
  assert str(copy) in result.err and "--resume" in result.err
  assert result.err.count("\n") == 1
  assert content(copy) == before


def test_resume_wants_a_run(train, config, tmp_path):
  for options in (["--run-dir", tmp_path / "none"], []):
    result = train("--config", config, "--resume", *options, cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "--run-dir" in result.err
    assert result.err.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_place_of_the_run_directory_is_named(train, config, tmp_path, name, options):
  (tmp_path / "file").write_text("mine")
  result = train("--config", config, "--run-dir", tmp_path / name, *options)
  assert (result.code, result.out) == (2, "")
  assert str(tmp_path / name) in result.err
  assert result.err.count("\n") == 1
  assert (tmp_path / "file").read_text() == "mine"


def test_a_run_killed_before_it_wrote_its_config_starts_anew(train, config, tmp_path):
  short = command(config, tmp_path, "rloo", "train.iterations=0")
  assert train(*short, stop=Stop("spo_jax.runlog.RunLog.write_config")).code == -signal.SIGKILL
  assert tmp_path.exists() and not (tmp_path / "config.yaml").exists()
  result = train(*short, "--resume")
  assert result.code == 2
  assert "holds no run" in result.err
  result = train(*short)
  assert result.code == 0, result.err
  assert [record["iteration"] for record in metrics(tmp_path)] == [0]


def test_ctrl_c_says_how_to_go_on(train, finished, config, tmp_path):
  result = train(
    *command(config, tmp_path), stop=Stop("spo_jax.train.policy_update", 7, signal.SIGINT)
  )
  assert result.code == 130
  assert "--resume" in result.err
  assert result.err.count("\n") == 1
  result = train(*command(config, tmp_path, resume=True))
  assert result.code == 0, result.err
  assert_same_run(tmp_path, finished("chain")[0])
