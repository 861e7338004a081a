"""Faults of the machine: 20 kills in one run, and a disk that is full again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess

import pytest

pytest.register_assert_rewrite("runs")
pytest_plugins = ["runs"]

from runs import Stop, assert_same_run, metrics  # noqa: E402

# Everything that writes: a reference policy, validation and its best policy, an edge buffer.
SETTINGS = (
  "algorithm=tree", "train.kl.coefficient=0.1", "eval.validation_problems=8",
  "train.iterations=80", "eval.every=10", "checkpoint.every=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(train, config, tmp_path_factory):
  """The run that nothing disturbs."""
  run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
  result = train("--config", config, "--run-dir", run_dir, "--set", *SETTINGS)
  assert (result.code, result.err) == (0, "")
  return run_dir


def go_on(train, config, run_dir, **stop):
  """Starts or resumes the run, as somebody who looks into its directory would."""
  resume = ["--resume"] if (run_dir / "config.yaml").exists() else []
  return train("--config", config, "--run-dir", run_dir, *resume, "--set", *SETTINGS, **stop)


def assert_nothing_lost(run_dir, reference):
  """What is logged is the beginning of the undisturbed run, and reaches to the checkpoint.

  Returns: how many records that are.
  """
  path, policy = run_dir / "metrics.jsonl", run_dir / "checkpoints" / "policy"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be half
  logged = [json.loads(line) for line in lines]
  expected = metrics(reference)[: len(logged)]
  assert [{k: v for k, v in r.items() if not k.startswith("time/")} for r in logged] == expected
  saved = [int(p.name) for p in policy.iterdir() if p.name.isdigit()] if policy.exists() else []
  assert max(saved, default=-1) < len(logged)
  return len(logged)


def random_stop(rng, kind, run_dir):
  """A moment of a process: by its clock, by its files, or by the clock in an iteration."""
  if kind == 0:
    return {"seconds": rng.uniform(0.2, 5)}
  if kind == 1:
    return {"stop": Stop(str(run_dir), rng.randrange(1, 120))}
  call, delay = rng.randrange(1, 5), rng.uniform(0.001, 0.3)
  return {"stop": Stop("spo_jax.train.collect", call, delay=delay)}


@pytest.mark.devices
def test_a_run_killed_at_20_random_moments_equals_one_that_was_not(
  train, config, reference, tmp_path
):
  rng = random.Random(20)
  run_dir = tmp_path / "run"
  reached = []
  while len(reached) < 20:
    stop = random_stop(rng, len(reached) % 3, run_dir)
    result = go_on(train, config, run_dir, **stop)
    if result.code == 0:  # it was faster than the kill: the next one meets another run
      assert_same_run(run_dir, reference)
      run_dir = run_dir.with_name(f"run_{len(reached)}")
      continue
    assert result.code == -signal.SIGKILL, f"{stop}: {result.err}"
    reached.append(assert_nothing_lost(run_dir, reference))
  print("records behind each kill:", reached)
  assert len(set(reached)) > 5  # they struck all over the run
  result = go_on(train, config, run_dir)
  assert (result.code, result.err) == (0, "")
  assert_same_run(run_dir, reference)


@pytest.fixture
def disk(tmp_path):
  """leave(n) -> a folder with at most that many free bytes."""
  folder = tmp_path / "disk"
  folder.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
  mount = subprocess.run(command, capture_output=True, text=True)
  if mount.returncode:
    pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.strip()}")

  def leave(free):
    (folder / "ballast").unlink(missing_ok=True)
    space = os.statvfs(folder)
    with (folder / "ballast").open("wb") as ballast:
      os.posix_fallocate(ballast.fileno(), 0, max(space.f_bavail * space.f_frsize - free, 1))
    return folder

  yield leave
  subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.devices
def test_a_run_on_a_disk_that_is_full_again_and_again_equals_one_with_space(
  train, config, reference, disk
):
  rng = random.Random(16)
  failures = []
  while len(failures) < 8:
    run_dir = disk(free=int(2 ** rng.uniform(16, 20))) / "run"  # up to four checkpoints
    result = go_on(train, config, run_dir)
    reached = assert_nothing_lost(run_dir, reference)
    if result.code == 0:
      break
    assert result.code == 1, result.err
    # Among what orbax's threads print.
    [said] = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "No space left" in said, result.err
    failures.append((reached, said))
  print("records behind each failure:", *failures, sep="\n")
  assert len({reached for reached, _ in failures}) > 2
  result = go_on(train, config, disk(free=8 << 20) / "run")
  assert (result.code, result.err) == (0, "")
  assert_same_run(run_dir, reference)
