"""Several processes on one machine are the run that one process with as many devices is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
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


# Compiles faster than it would run.
FLAGS = "--xla_backend_optimization_level=0"
ENVIRONMENT = os.environ | {
  "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE.name,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}  # fmt: skip


def popen(command, environment):
  return subprocess.Popen(
    list(map(str, command)), env=ENVIRONMENT | environment, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )  # fmt: skip


def start(processes, config, run_dir, *options, settings=SETTINGS, programs=None):
  """Starts the processes of a run, each with its share of the devices."""
  run = ["train", "--config", config, "--run-dir", run_dir]
  return start_command(processes, *run, *options, "--set", *settings, programs=programs)


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start_command(processes, *command, programs=None):
  """Starts the processes of one command of spo_jax; `programs` of some stand for the module."""
  port, started = free_port(), []
  for i in range(processes):
    names = {
      "SPO_COORDINATOR": f"localhost:{port}", "SPO_PROCESSES": str(processes),
      "SPO_PROCESS_ID": str(i),
    }  # fmt: skip
    share = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    module = (programs or {}).get(i, ["-m", f"spo_jax.{command[0]}"])
    program = [sys.executable, *module, *command[1:]]
    started.append(
      popen(program, {**(names if processes > 1 else {}), "XLA_FLAGS": f"{share} {FLAGS}"})
    )
  return started


def launch_local(config, run_dir, *options, settings=SETTINGS):
  """Starts launch/local.sh, which starts two processes."""
  script = ROOT / "launch" / "local.sh"
  command = [
    script, "--devices", DEVICES, "--config", config, "--run-dir", run_dir, *options,
    "--set", *settings,
  ]  # fmt: skip
  return popen(command, {"PYTHON": sys.executable, "XLA_FLAGS": FLAGS})


def wait_for_records(count, run_dir, process):
  while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < count:
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.05)


def children_of(pid):
  """Process ids by SPO_PROCESS_ID."""
  found = {}
  for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
    with contextlib.suppress(OSError):  # a `sleep` has ended since
      environment = Path(f"/proc/{child}/environ").read_text()
      if number := re.search(r"\0SPO_PROCESS_ID=(\d+)\0", environment):
        found[int(number[1])] = int(child)
  return found


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
  """Two are stopped by SIGTERM to one of them, four go on, on another mesh."""
  started = start(2, config, tmp_path)
  wait_for_records(3, tmp_path, started[0])
  started[1].send_signal(signal.SIGTERM)
  for code, _, err in finish(started):
    assert code == 143, err[-2000:]
    assert "--resume" in err
  done = len(metrics(tmp_path))
  assert 3 <= done < len(metrics(alone))

  other_mesh = [*SETTINGS, "mesh.data=1", "mesh.fsdp=4"]
  results = finish(start(4, config, tmp_path, "--resume", settings=other_mesh))
  for code, _, err in results:
    assert code == 0, err[-2000:]
  assert "Held-out accuracy" in results[0][1]
  for _, out, _ in results[1:]:
    assert_says_nothing(out)
  assert_close_runs(tmp_path, alone)


def assert_says_nothing(out):
  """Only the main process does, and the library that connects them, from several threads."""
  pieces = (r"\[Gloo\] Rank ", " is connected to ", r" peer ranks\. ",
            "Expected number of connected peer ranks is : ", r"\d+")  # fmt: skip
  left = re.sub("|".join(pieces), "", out).strip()  # threads mix their pieces, not only lines
  assert not left, out


def assert_close_runs(run_dir, reference, *ignored):
  """Metrics up to the order in which devices sum; texts and accuracies exactly."""
  ours, theirs = (metrics(run, "compile/", *ignored) for run in (run_dir, reference))
  assert len(ours) == len(theirs)
  for mine, expected in zip(ours, theirs):
    assert mine == pytest.approx(expected, abs=1e-5, rel=1e-5)
  assert summary(run_dir)["final"] == summary(reference)["final"]
  for path in (reference / "samples").iterdir():
    assert (run_dir / "samples" / path.name).read_text() == path.read_text()
  assert (run_dir / "model" / "model.safetensors").exists()


@pytest.mark.devices
def test_local_launch_stopped_by_sigterm_and_resumed_is_the_run_of_one(config, alone, tmp_path):
  script = launch_local(config, tmp_path)
  wait_for_records(3, tmp_path, script)
  script.send_signal(signal.SIGTERM)
  ((code, out, err),) = finish([script])
  assert code == 143, err[-2000:]
  assert "[0] Stopped; --resume" in out and "[1] Stopped; --resume" in out
  assert 3 <= len(metrics(tmp_path)) < len(metrics(alone))

  ((code, out, err),) = finish([launch_local(config, tmp_path, "--resume")])
  assert (code, err) == (0, ""), out[-2000:]
  assert "[0] Report: " in out and "[1] Report: " not in out
  assert_close_runs(tmp_path, alone)


@pytest.mark.devices
def test_local_launch_ends_with_the_code_of_the_process_that_died(config, tmp_path):
  script = launch_local(config, tmp_path, settings=[*SETTINGS, "train.iterations=100000"])
  wait_for_records(1, tmp_path, script)
  children = children_of(script.pid)
  os.kill(children[1], signal.SIGKILL)
  died = time.monotonic()
  ((code, _, err),) = finish([script])
  assert time.monotonic() - died < 30
  assert code == 128 + signal.SIGKILL
  assert "process 1 ended with exit code 137" in err
  assert not Path(f"/proc/{children[0]}").exists()


@pytest.mark.devices
def test_an_evaluation_by_two_processes_is_that_of_one(alone, tmp_path):
  """Its files are equal bit by bit, also where it goes on from what a kill has left."""
  asked = ["evaluate", "--model", alone, "--samples", 2, "--limit", 18, "--temperature", 1]
  one, two = tmp_path / "one", tmp_path / "two"
  ((code, _, err),) = finish(start_command(1, *asked, "--output", one))
  assert code == 0, err[-2000:]
  for continued in (0, 8):
    if continued:  # two of five chunks of 8 rows, and half a line
      lines = (two / "samples.jsonl").read_bytes().splitlines(keepends=True)
      (two / "samples.jsonl").write_bytes(b"".join(lines[:17]) + lines[17][:9])
      (two / "summary.json").unlink()
    (code, out, err), (other_code, other_out, other_err) = finish(
      start_command(2, *asked, "--output", two)
    )
    assert code == other_code == 0, err[-2000:] + other_err[-2000:]
    assert_says_nothing(other_out)
    assert "18 questions x 2 samples" in out
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())
    for name in ("samples.jsonl", "settings.json"):
      assert (two / name).read_bytes() == (one / name).read_bytes()
    told = {"seconds": 0, "continued_from": continued}
    assert summary(two) | {"seconds": 0} == summary(one) | told
  refused = finish(start_command(2, *asked, "--seed", 1, "--output", two))
  for code, _, err in refused:
    assert code == 2 and "seed=0, not 1" in err


@pytest.mark.devices
def test_trees_with_a_reference_and_the_best_policy_move_to_another_mesh(config, tmp_path):
  """State, reference, best parameters and edges of two processes, read by four and by one."""
  asked = ["algorithm=tree", "train.kl.coefficient=0.1", "eval.validation_problems=8",
           "sft.max_steps=2", "train.micro_batch_rows=4", "eval.every=2"]  # fmt: skip
  square, other = ["mesh.data=2", "mesh.fsdp=2"], ["mesh.fsdp=2", "mesh.tensor=2"]
  for processes, directory, iterations, mesh in (
    (1, "one", 8, square), (2, "moved", 4, square), (4, "moved", 6, other), (1, "moved", 8, other),
  ):  # fmt: skip
    settings = [*asked, *mesh, f"train.iterations={iterations}"]
    resume = ["--resume"] if iterations > 4 and directory == "moved" else []
    for code, _, err in finish(
      start(processes, config, tmp_path / directory, *resume, settings=settings)
    ):
      assert code == 0, err[-2000:]
  one, moved = tmp_path / "one", tmp_path / "moved"
  assert_close_runs(moved, one, "tokens/slot_steps")  # rows are shared out in another way
  assert summary(moved)["best"] == summary(one)["best"]
  assert any(record.get("loss/kl") for record in metrics(one))


def counts_of(processes, command, *options):
  """What each process did of a command, see tests/counted.py."""
  counting = {i: ["-m", "tests.counted", command] for i in range(processes)}
  ended = finish(start_command(processes, command, *options, programs=counting))
  for code, _, err in ended:
    assert code == 0, err[-2000:]
  return [json.loads(re.search(r"^did (.*)$", err, re.M)[1]) for _, _, err in ended]


@pytest.mark.devices
def test_every_process_prepares_and_grades_only_its_rows(config, alone, tmp_path):
  """Questions, demonstrations and packs; rollouts and held-out responses in and after training."""
  run = ["--config", config, "--set", *SETTINGS, "train.iterations=2", "train.pack_tokens=28",
         "eval.validation_problems=8"]  # fmt: skip
  asked = ["--model", alone, "--samples", 2, "--limit", 8, "--temperature", 1]
  for command, options, name in (
    ("train", run, "--run-dir"), ("evaluate", asked, "--output"),
  ):  # fmt: skip
    (whole,) = counts_of(1, command, *options, name, tmp_path / f"{command}-1")
    shares = counts_of(2, command, *options, name, tmp_path / f"{command}-2")
    for what in whole:
      own = [share[what] for share in shares]
      assert sum(own) == whole[what], what
      assert min(own) > 0.3 * whole[what], what
    assert whole.keys() == {"graded", "encoded"} | ({"packed"} if command == "train" else set())


@pytest.mark.devices
def test_a_process_that_dies_ends_the_others_within_a_minute(config, tmp_path):
  long = [*SETTINGS, "train.iterations=100000"]
  started = start(2, config, tmp_path, settings=long)
  wait_for_records(1, tmp_path, started[0])
  started[1].kill()
  died = time.monotonic()
  (code, _, err), _ = finish(started)
  assert time.monotonic() - died < 60
  assert code not in (0, 2)
  assert err.strip()


BROKEN = """
import sys
from spo_jax import distributed, rollouts, train

grade, calls = rollouts.Engine.grade, []

def broken(*arguments):
  calls.append(1)
  if len(calls) == 4:
    raise {error}
  return grade(*arguments)

rollouts.Engine.grade = broken
distributed.leave(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.devices
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", ["RuntimeError('boom')", "OSError(28, 'boom')"])
def test_a_process_that_fails_ends_the_others_within_a_minute(config, tmp_path, failing, error):
  """Not only one that is killed: an orderly exit would wait for the others."""
  program = tmp_path / "broken.py"
  program.write_text(BROKEN.format(error=error))
  started = start(2, config, tmp_path / "run", programs={failing: [program]})
  begun = time.monotonic()
  while started[failing].poll() is None:
    assert time.monotonic() - begun < 200
    time.sleep(0.2)
  died = time.monotonic()
  results = finish(started)
  assert time.monotonic() - died < 60
  assert results[failing][0] == 1 and "boom" in results[failing][2], results[failing][2]
  assert "--resume" in results[failing][2]
  assert results[1 - failing][0] not in (0, 2, 143)
  assert results[1 - failing][2].strip()


@pytest.mark.devices
def test_a_checkpoint_that_one_process_cannot_read_is_named(config, alone, tmp_path):
  run_dir = tmp_path / "run"
  sharded = [*SETTINGS, "mesh.data=1", "mesh.fsdp=4"]
  for code, _, err in finish(start(2, config, run_dir, settings=sharded)):
    assert code == 0, err[-2000:]
  newest = run_dir / "checkpoints" / "policy" / "40"
  files = (newest / "state" / "ocdbt.process_1" / "d").iterdir()
  largest = max(files, key=lambda file: file.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  (run_dir / "summary.json").unlink()
  longer = [*sharded, "train.iterations=42"]  # so that neither ends without the other
  first, second = finish(start(2, config, run_dir, "--resume", settings=longer))
  assert first[0] not in (0, 2) and second[0] == 1
  assert f"cannot read {newest}" in second[2] and "Move it away" in second[2]
  shutil.rmtree(newest)
  for code, _, err in finish(start(2, config, run_dir, "--resume", settings=sharded)):
    assert code == 0, err[-2000:]
  assert_close_runs(run_dir, alone)


@pytest.mark.parametrize(
  ("names", "said"),
  [
    ({"SPO_COORDINATOR": "localhost:1"}, "SPO_PROCESS"),
    ({"SPO_COORDINATOR": "here", "SPO_PROCESSES": "1", "SPO_PROCESS_ID": "0"}, "host:port"),
    ({"SPO_DISTRIBUTED": "yes"}, "SPO_DISTRIBUTED=yes"),
    ({"SPO_COORDINATOR": "x:1", "SPO_PROCESSES": "two", "SPO_PROCESS_ID": "0"}, "two"),
    ({"SPO_COORDINATOR": "x:1", "SPO_PROCESSES": "2", "SPO_PROCESS_ID": "2"}, "SPO_PROCESS_ID=2"),
  ],
)
def test_an_environment_that_does_not_name_a_process_is_refused(monkeypatch, names, said):
  for name, value in names.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=said):
    distributed.initialize()


def test_auto_without_a_cluster_is_refused(monkeypatch):
  def find_nothing(**_):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setenv("SPO_DISTRIBUTED", "auto")
  monkeypatch.setattr(jax.distributed, "initialize", find_nothing)
  with pytest.raises(ConfigError, match=r"SPO_DISTRIBUTED=auto .* SPO_COORDINATOR"):
    distributed.initialize()


def test_a_process_of_a_slurm_job_has_all_gpus_of_its_node_and_heeds_sigterm():
  program = (
    "import os; from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES; "
    "from spo_jax import distributed; distributed.initialize(); "
    "print(CUDA_VISIBLE_DEVICES.value, flush=True); os.kill(os.getpid(), 15)"
  )
  slurm = {"JOB_ID": "1", "STEP_NODELIST": "here", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
  environment = {f"SLURM_{name}": value for name, value in slurm.items()} | {
    "SPO_COORDINATOR": f"localhost:{free_port()}", "SPO_PROCESSES": "1", "SPO_PROCESS_ID": "0",
  }  # fmt: skip
  ((code, out, err),) = finish([popen([sys.executable, "-c", program], environment)])
  assert (code, out) == (-signal.SIGTERM, "all\n"), err


def test_a_process_that_does_not_log_leaves_no_files(tmp_path):
  program = (
    "from spo_jax import distributed as d; d.is_main = lambda: False; "
    "own = d.own_directory('run'); (own / 'metrics.jsonl').write_text('1'); print(own)"
  )
  process = popen([sys.executable, "-c", program], {"TMPDIR": str(tmp_path)})
  ((code, out, err),) = finish([process])
  assert (code, Path(out.strip()).parent) == (0, tmp_path), err
  assert not list(tmp_path.iterdir())


def test_counts_of_all_processes_add_up(monkeypatch):
  monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    distributed.multihost_utils, "process_allgather", lambda own: np.stack([own, 3 * own])
  )
  assert distributed.total({"timeouts": 2, "crashes": 0}) == {"timeouts": 8, "crashes": 0}
  assert distributed.total({}) == {}


def test_what_one_process_refuses_all_refuse(monkeypatch):
  def refuse(share):
    raise ValueError(f"rows {share.start} to {share.stop - 1} are wrong")

  monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
  monkeypatch.setattr(distributed.jax, "process_index", lambda: 1)
  monkeypatch.setattr(
    distributed.multihost_utils, "process_allgather", lambda own: np.stack([own, ~own])
  )
  with pytest.raises(ValueError, match="rows 2 to 3 are wrong"):
    distributed.in_shares(4, refuse)
  with pytest.raises(ValueError, match="another process"):
    distributed.in_shares(4, lambda share: np.zeros(2))


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
