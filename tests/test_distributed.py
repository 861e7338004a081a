"""Several processes on one machine are the run that one process with as many devices is."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from spo_jax import distributed
from spo_jax.config import ConfigError

pytest.register_assert_rewrite("runs")
pytest_plugins = ["runs"]

from runs import metrics, summary  # noqa: E402

CACHE = tempfile.TemporaryDirectory()  # of compiled programs, for all runs of this file
ROOT = Path(__file__).parents[1]
DEVICES = 4
SETTINGS = [
  "algorithm=grpo", "train.iterations=40", "sft.max_steps=2", "train.micro_batch_rows=4",
  "eval.every=20", "checkpoint.every=20", "mesh.data=2", "mesh.fsdp=2",
]  # fmt: skip


def start(processes, config, run_dir, *options, settings=SETTINGS):
  """Starts the processes of a run, each with its share of the devices."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = []
  for i in range(processes):
    names = {
      "SPO_COORDINATOR": f"localhost:{port}", "SPO_PROCESSES": str(processes),
      "SPO_PROCESS_ID": str(i),
    }  # fmt: skip
    environment = os.environ | (names if processes > 1 else {}) | {
      "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes} "
      "--xla_backend_optimization_level=0", "JAX_COMPILATION_CACHE_DIR": str(CACHE.name),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    command = [
      sys.executable, "-m", "spo_jax.train", "--config", config, "--run-dir", run_dir, *options,
      "--set", *settings,
    ]  # fmt: skip
    started.append(subprocess.Popen(
      list(map(str, command)), env=environment, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    ))  # fmt: skip
  return started


def finish(started):
  """(exit code, stdout, stderr) of each."""
  outputs = [process.communicate(timeout=240) for process in started]
  return [(process.returncode, *output) for process, output in zip(started, outputs)]


@pytest.fixture(scope="session")
def alone(config, shared):
  """The run of one process, made once for all workers of the test session."""
  run_dir = shared / "alone"
  with (shared / "alone.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (run_dir / "summary.json").exists():
      ((code, _, err),) = finish(start(1, config, run_dir))
      assert code == 0, err
  return run_dir


@pytest.mark.devices
def test_two_processes_and_then_four_are_the_run_of_one(config, alone, tmp_path):
  """Two are stopped by SIGTERM to one of them, four go on."""
  started = start(2, config, tmp_path)
  while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
    assert started[0].poll() is None, started[0].stderr.read()
    time.sleep(0.05)
  started[1].send_signal(signal.SIGTERM)
  for code, _, err in finish(started):
    assert code == 143, err[-2000:]
    assert "--resume" in err
  done = len(metrics(tmp_path))
  assert 3 <= done < len(metrics(alone))

  results = finish(start(4, config, tmp_path, "--resume"))
  for code, _, err in results:
    assert code == 0, err[-2000:]
  assert "Held-out accuracy" in results[0][1]
  for _, out, _ in results[1:]:  # one of them speaks, and the library that connects them
    assert all(line.startswith("[Gloo]") for line in out.splitlines())
  ours, theirs = metrics(tmp_path, "compile/"), metrics(alone, "compile/")
  assert len(ours) == len(theirs)
  for mine, expected in zip(ours, theirs):
    assert mine == pytest.approx(expected, abs=1e-5, rel=1e-5)
  assert summary(tmp_path)["final"] == summary(alone)["final"]
  for path in (alone / "samples").iterdir():
    assert (tmp_path / "samples" / path.name).read_text() == path.read_text()
  assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.devices
def test_a_process_that_dies_ends_the_others_within_a_minute(config, tmp_path):
  long = [*SETTINGS, "train.iterations=100000"]
  started = start(2, config, tmp_path, settings=long)
  while not (tmp_path / "metrics.jsonl").exists():
    assert started[0].poll() is None, started[0].stderr.read()
    time.sleep(0.05)
  started[1].kill()
  died = time.monotonic()
  (code, _, err), _ = finish(started)
  assert time.monotonic() - died < 60
  assert code not in (0, 2)
  assert err.strip()


@pytest.mark.parametrize(
  ("names", "said"),
  [
    ({"SPO_COORDINATOR": "localhost:1"}, "SPO_PROCESS"),
    ({"SPO_COORDINATOR": "x:1", "SPO_PROCESSES": "two", "SPO_PROCESS_ID": "0"}, "two"),
    ({"SPO_COORDINATOR": "x:1", "SPO_PROCESSES": "2", "SPO_PROCESS_ID": "2"}, "SPO_PROCESS_ID=2"),
  ],
)
def test_an_environment_that_does_not_name_a_process_is_refused(monkeypatch, names, said):
  for name, value in names.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=said):
    distributed.initialize()


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_shares_of_rows_are_whole_and_do_not_overlap(monkeypatch, processes, count):
  rows = list(range(count))
  shares = []
  monkeypatch.setattr(distributed.jax, "process_count", lambda: processes)
  for i in range(processes):
    monkeypatch.setattr(distributed.jax, "process_index", lambda i=i: i)
    shares += rows[distributed.own_share(count)]
  assert shares == rows
