"""A killed run that is resumed is, bit for bit, the run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.register_assert_rewrite("runs")
pytest_plugins = ["runs"]

from runs import (  # noqa: E402
  VARIANTS,
  Stop,
  assert_same_run,
  heeding_ctrl_c,
  locked_by_another,
  metrics,
  summary,
)

from spo_jax.config import ConfigError, load, to_yaml  # noqa: E402
from spo_jax.train import open_run_dir  # noqa: E402

SAVE = "spo_jax.checkpoint.Checkpoints.save"
COMMIT = "orbax.checkpoint.path.atomicity.AtomicRenameTemporaryPath.finalize"

# Calls count from the start of each process, so every moment is one of the run that was resumed.
MOMENTS = {
  "chain": {
    "in the warm start": Stop("spo_jax.warm_start.supervised_update", 4),
    "behind the metrics of iteration 0": Stop("spo_jax.run.Run._elapsed"),
    "in the first rollout": Stop("spo_jax.rollouts.Engine.fetch", 6),
    "in an update": Stop("spo_jax.train.policy_update", 4),
    "in the write of a checkpoint": Stop(COMMIT, 2),
    "in a later rollout": Stop("spo_jax.train.collect", 2),
    "by Ctrl-C in an update": Stop("spo_jax.train.policy_update", 2, signal.SIGINT),
    "by SIGTERM in an update": Stop("spo_jax.train.policy_update", 2, signal.SIGTERM),
  },
  "tree": {
    "by SIGTERM in the warm start": Stop(
      "spo_jax.warm_start.supervised_update", 3, signal.SIGTERM
    ),
    "behind the metrics, before the checkpoint": Stop(SAVE, 5),  # the fourth is iteration 0's
    "in the commit of a checkpoint": Stop(COMMIT, 4),
    "in a later rollout": Stop("spo_jax.train.collect"),
  },
  "grpo": {
    "between the checkpoints of reference and policy": Stop("spo_jax.run.Run.finish"),
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
    if stop.signal in (signal.SIGINT, signal.SIGTERM):
      assert result.code == 128 + stop.signal
      assert "--resume" in result.err and result.err.count("\n") == 1, result.err
    else:
      assert result.code == -stop.signal, f"{moment}: {result.err}"
    resume = True
  result = train(*command(config, tmp_path, variant, resume=True))
  assert (result.code, result.err) == (0, "")
  assert_same_run(tmp_path, reference)


def test_a_run_killed_at_any_time_equals_one_that_was_not(train, finished, config, tmp_path):
  reference, _ = finished("tree")
  for seconds in (random.uniform(0.3, 2), random.uniform(1, 4)):
    print(f"killed after {seconds} s")
    started = (tmp_path / "config.yaml").exists()
    train(*command(config, tmp_path, "tree", resume=started), seconds=seconds)
  started = (tmp_path / "config.yaml").exists()
  result = train(*command(config, tmp_path, "tree", resume=started))
  assert result.code == 0, result.err
  assert_same_run(tmp_path, reference)


def test_more_iterations_on_resume_equal_a_longer_run(train, finished, config, tmp_path):
  """From another directory, and continued as the newest run of its config."""
  reference, _ = finished("rloo")
  directory = tmp_path / "two words"
  directory.mkdir()
  options = ["--config", config, "--set", *VARIANTS["rloo"], "--set"]
  # Evaluated after iteration 3 in any case, so that the records have the same keys.
  result = train(*options, "train.iterations=3", cwd=directory)
  assert result.code == 0, result.err
  (run_dir,) = (directory / "runs").iterdir()
  assert run_dir.name.startswith("tiny-") and f"runs/{run_dir.name}" in result.out
  assert metrics(run_dir) == metrics(reference)[:4]
  assert summary(run_dir)["iterations"] == 3
  result = train(*options, "train.iterations=6", "checkpoint.keep=3", "--resume", cwd=directory)
  assert result.code == 0, result.err
  # Another train.iterations is another configuration, for which the update is compiled anew.
  assert_same_run(run_dir, reference, "compile/count")


def test_resuming_a_finished_run_prints_its_table_and_changes_nothing(
  train, finished, config, copy
):
  before = content(copy)
  result = train(*command(config, copy, resume=True))
  assert (result.code, result.err) == (0, "")
  table = result.out.partition("Held-out accuracy")[2]
  reference, whole = finished("chain")
  assert table.replace(str(copy), str(reference)) == whole.out.partition("Held-out accuracy")[2]
  assert content(copy) == before | {copy / "report.html": content(copy)[copy / "report.html"]}


@pytest.mark.parametrize("damaged", ["[]", '{"iterations": 6}', "{"])
def test_a_damaged_summary_and_a_lost_export_are_written_again(
  train, finished, config, copy, damaged
):
  (copy / "summary.json").write_text(damaged)
  shutil.rmtree(copy / "model")
  result = train(*command(config, copy, resume=True))
  assert (result.code, result.err) == (0, "")
  assert_same_run(copy, finished("chain")[0])


def test_a_finished_run_that_goes_on_has_no_summary_until_it_ends(train, config, copy):
  longer = command(config, copy, "chain", "train.iterations=8", resume=True)
  for function, has_summary in (("_restore", True), ("finish", False)):
    assert train(*longer, stop=Stop(f"spo_jax.run.Run.{function}")).code == -signal.SIGKILL
    assert (copy / "summary.json").exists() == has_summary
  assert train(*longer).code == 0
  assert summary(copy)["iterations"] == 8


def test_a_finished_run_may_be_asked_for_its_best_policy(train, config, copy):
  asked = command(config, copy, "chain", "eval.validation_problems=8", resume=True)
  assert train(*asked, stop=Stop("spo_jax.run.Run._restore")).code == -signal.SIGKILL
  result = train(*asked)
  assert result.code == 0, result.err
  assert summary(copy)["best"]["iteration"] == 6
  (counters,) = (copy / "checkpoints" / "best").glob("*/counters/metadata")
  counters.write_text(json.dumps(json.loads(counters.read_text()) | {"validation_accuracy": 2.0}))
  assert train(*asked[:-1], "train.iterations=7", "--resume").code == 0
  assert summary(copy)["best"] == {"iteration": 6, "validation_accuracy": 2.0}


@pytest.mark.parametrize("name", ["lr=[1e-3]", "what?", "a\\b"])
def test_a_run_directory_that_is_a_pattern_is_refused(refuse, config, tmp_path, name):
  """Orbax would not find what it has written there."""
  said = refuse("--config", config, "--run-dir", tmp_path / name)
  assert name in said and "pattern" in said and not (tmp_path / name).exists()


def test_the_newest_run_is_one_that_was_named_by_its_time(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  stem, older, newer = config.stem, "20261126-235959", "20261127-000000"
  for name in (f"{stem}-{older}", f"{stem}-{newer}", f"{stem}-first", f"{stem}-x-{newer}"):
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "config.yaml").write_text(to_yaml(load(config)))
  found = open_run_dir(load(config), config, None, resume=True)
  assert found.name == f"{stem}-{newer}"


@pytest.mark.parametrize(
  "setting", ["spo.interval=3", "seed=1", "optimizer.learning_rate=0.01", "train.iterations=5"]
)
def test_a_run_is_not_resumed_as_another(refuse, config, copy, setting):
  before = content(copy)
  said = refuse(*command(config, copy, "chain", setting, resume=True))
  assert setting.partition("=")[0] in said
  assert content(copy) == before


@pytest.mark.parametrize(
  ("setting", "official", "may"),
  [
    ("rollout.rows=16", "false", True), ("train.remat=layer", "false", True),
    ("train.pack_tokens=64", "false", True), ("train.micro_batch_rows=4", "false", True),
    ("train.micro_batch_rows=4", "true", False), ("rollout.questions=8", "false", False),
  ],
)  # fmt: skip
def test_a_resumed_run_may_compute_less_or_more_at_once(config, tmp_path, setting, official, may):
  own = [f"train.official={official}"]
  (tmp_path / "config.yaml").write_text(to_yaml(load(config, own)))
  changed = load(config, [*own, setting])
  if may:
    assert open_run_dir(changed, config, tmp_path, resume=True) == tmp_path
  else:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
      open_run_dir(changed, config, tmp_path, resume=True)


def test_a_best_policy_of_a_future_that_was_lost_is_not_kept(train, finished, config, tmp_path):
  """An evaluation may differ on resume: what was best behind that point counts no more."""
  run_dir = shutil.copytree(finished("grpo")[0], tmp_path / "run")
  best = run_dir / "checkpoints" / "best"
  (found,) = best.iterdir()
  found.rename(best / "6")
  shutil.rmtree(run_dir / "checkpoints" / "policy" / "6")
  (run_dir / "summary.json").unlink()  # or the run is finished
  result = train(*command(config, run_dir, "grpo", "eval.every=1", resume=True))
  assert result.code == 0, result.err
  accuracy = {
    record["iteration"]: record["eval/validation_accuracy"] for record in metrics(run_dir)
    if record["iteration"] > 4
  }
  expected = max(accuracy, key=accuracy.__getitem__)
  assert summary(run_dir)["best"]["iteration"] == expected
  assert [path.name for path in best.iterdir()] == [str(expected)]


@pytest.mark.parametrize(
  ("setting", "is_new"), [("eval.validation_problems=16", True), ("eval.texts=1", False)]
)
def test_accuracies_of_other_validation_problems_are_not_compared(
  train, finished, config, tmp_path, setting, is_new
):
  run_dir = shutil.copytree(finished("grpo")[0], tmp_path / "run")
  (counters,) = (run_dir / "checkpoints" / "best").glob("*/counters/metadata")
  stored = json.loads(counters.read_text())
  counters.write_text(json.dumps(stored | {"validation_accuracy": 2.0}))  # none is better
  longer = ["train.iterations=7", setting]
  result = train(*command(config, run_dir, "grpo", *longer, resume=True))
  assert result.code == 0, result.err
  assert (summary(run_dir)["best"]["iteration"] == 7) == is_new


def test_a_run_is_not_overwritten(refuse, config, copy):
  before = content(copy)
  said = refuse(*command(config, copy))
  assert str(copy) in said and "--resume" in said
  assert content(copy) == before


@pytest.mark.parametrize("text", ["", "seed: 0\nspo: {interv"])
def test_a_config_that_is_not_whole_is_no_run_to_resume(refuse, config, copy, text):
  (copy / "config.yaml").write_text(text)
  assert str(copy / "config.yaml") in refuse(*command(config, copy, resume=True))


def test_resume_wants_a_run(refuse, config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for options in (["--run-dir", tmp_path / "none"], []):
    assert "--run-dir" in refuse("--config", config, "--resume", *options)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_place_of_the_run_directory_is_named(refuse, config, tmp_path, name, options):
  (tmp_path / "file").write_text("mine")
  assert str(tmp_path / name) in refuse("--config", config, "--run-dir", tmp_path / name, *options)
  assert (tmp_path / "file").read_text() == "mine"


def test_a_run_killed_before_it_wrote_its_config_starts_anew(train, refuse, config, tmp_path):
  short = command(config, tmp_path, "rloo", "train.iterations=0")
  assert train(*short, stop=Stop("spo_jax.runlog.RunLog.write_config")).code == -signal.SIGKILL
  assert tmp_path.exists() and not (tmp_path / "config.yaml").exists()
  assert "holds no run" in refuse(*short, "--resume")
  result = train(*short)
  assert result.code == 0, result.err
  assert [record["iteration"] for record in metrics(tmp_path)] == [0]


def test_ctrl_c_in_a_compilation_is_answered_at_once(config, tmp_path):
  arguments = map(str, command(config, tmp_path / "run"))
  with heeding_ctrl_c():
    run = subprocess.Popen(
      [sys.executable, "-m", "spo_jax.train", *arguments], cwd=Path(__file__).parents[1],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
  while not (tmp_path / "run" / "warm_start").exists():
    assert run.poll() is None, run.stderr.read()
    time.sleep(0.01)
  time.sleep(0.5)
  run.send_signal(signal.SIGINT)
  _, err = run.communicate()
  assert run.returncode == 130
  # Where the signal falls into a callback of Python's collector, that prints in front of our line.
  *others, said = err.splitlines()
  assert "--resume" in said and (not others or others[0].startswith("Exception ignored in")), err


@pytest.mark.parametrize("damage", ["a truncated file", "a missing file"])
def test_a_damaged_checkpoint_is_passed_over(train, finished, config, copy, damage):
  reference, _ = finished("chain")
  newest = copy / "checkpoints" / "policy" / "6"
  largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  if damage == "a missing file":
    largest.unlink()
  else:
    os.truncate(largest, largest.stat().st_size // 2)
  (copy / "summary.json").unlink()
  result = train(*command(config, copy, resume=True))
  assert result.code == 0, result.err
  # Threads of orbax may print beside it, whenever Python collects them.
  [said] = [line for line in result.err.splitlines() if line.startswith("warning: ")]
  assert str(newest) in said
  assert_same_run(copy, reference)


def test_a_run_of_which_no_checkpoint_can_be_read_says_so(train, config, copy):
  for file in (copy / "checkpoints" / "policy").rglob("*"):
    if file.is_file():
      os.truncate(file, 0)
  (copy / "summary.json").unlink()
  before = (copy / "metrics.jsonl").read_bytes()
  result = train(*command(config, copy, resume=True))
  assert result.code == 1
  [said] = [line for line in result.err.splitlines() if line.startswith("error: ")]
  assert "can be read" in said
  assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("lost", ["records", "edges", "the end of the summary"])
def test_what_is_lost_is_made_again(train, finished, config, tmp_path, lost):
  """Training goes on from the newest whole checkpoint that the log reaches."""
  reference, _ = finished("tree")
  run_dir = shutil.copytree(reference, tmp_path / "run")
  if lost == "the end of the summary":
    os.truncate(run_dir / "summary.json", 20)
  else:
    (run_dir / "summary.json").unlink()
  if lost == "records":
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines[:5]))
  if lost == "edges":
    shutil.rmtree(run_dir / "checkpoints" / "policy" / "6" / "edges")
  result = train(*command(config, run_dir, "tree", resume=True))
  assert result.code == 0, result.err
  assert ("its edges are missing" in result.err) == (lost == "edges")
  assert_same_run(run_dir, reference)


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/policy", "metrics.jsonl"])
def test_a_run_that_has_lost_more_than_it_can_make_again_says_so(train, config, copy, lost):
  gone = copy / lost
  gone.unlink() if gone.is_file() else shutil.rmtree(gone)
  (copy / "summary.json").unlink()
  kept = content(copy / "samples")
  result = train(*command(config, copy, resume=True))
  assert result.code == 1
  [said] = [line for line in result.err.splitlines() if line.startswith("error: ")]
  assert "metrics.jsonl" in said if lost == "metrics.jsonl" else "no checkpoint" in said
  assert "start a new run" in said
  assert content(copy / "samples") == kept


def test_a_run_directory_has_one_writer(train, refuse, config, copy):
  """The lock is that of a process, and goes with it."""
  with locked_by_another(copy):
    said = refuse(*command(config, copy, resume=True))
  assert str(copy) in said and "another process" in said
  assert train(*command(config, copy, resume=True)).code == 0
