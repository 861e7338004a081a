"""Tiny training runs in processes of their own, which a test may stop at a chosen moment.

Importing everything takes longer than such a run, so a server process imports it once and
forks a child for each, before JAX has started a thread. Compiled programs are shared on the
disk. Tests say `pytest_plugins = ["runs"]` and take the fixtures `train`, `finished` and `refuse`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import spo_jax.train

# A fresh model solves nothing, but whether it comes to an end is a signal from the start.
CONFIG = """
algorithm: chain
model: {hidden_size: 32, intermediate_size: 64, num_layers: 1, num_heads: 2, num_kv_heads: 1}
task: {operations: 2, unfinished_penalty: 1.0}
spo:
  {threshold: 0.06, interval: 2, continuations: 2, branch_factors: [2, 2], segment_tokens: 8,
  edges_per_question: 4, max_edge_age: 3, edges_per_iteration: 8}
rollout:
  {questions: 4, samples: 2, rows: 8, max_prompt_tokens: 7, max_response_tokens: 21,
  temperature: 1.0}
train: {iterations: 6, batch_rows: 4, micro_batch_rows: 2}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 2}
sft: {max_steps: 6, batch_rows: 4, check_every: 2, check_problems: 8}
eval: {problems: 8, every: 3, texts: 2}
checkpoint: {every: 2}
"""
VARIANTS = {
  "chain": ("seed=0",),
  "tree": ("algorithm=tree", "train.pack_tokens=64"),
  "grpo": (
    "algorithm=grpo", "train.kl.coefficient=0.1", "rollout.recompute_logprobs=true",
    "eval.validation_problems=8",
  ),
  "rloo": ("algorithm=rloo", "train.official=true", "sft.max_steps=0"),
}  # fmt: skip


@contextlib.contextmanager
def heeding_ctrl_c():
  """Child processes that start in here heed SIGINT, which a shell's `&` has all of them ignore."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def locked_by_another(folder: Path):
  """Another process has the lock of a folder until the end, when it is killed."""
  hold = (
    "import sys; from pathlib import Path; from spo_jax.runlog import locked; "
    "lock = locked(Path(sys.argv[1])); print('held', flush=True); input()"
  )
  holder = subprocess.Popen(
    [sys.executable, "-c", hold, folder / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  try:
    assert holder.stdout.readline() == b"held\n"
    yield
  finally:
    holder.kill()
    holder.wait()


@dataclasses.dataclass(frozen=True)
class Stop:
  """A signal that a run sends itself in front of the n-th call of a function, by its full name.

  The absolute path of a directory stands for what Python does to the files in it. `delay` is
  in seconds: the signal then comes from a clock, wherever the run is by then.
  """

  function: str
  call: int = 1
  signal: int = signal.SIGKILL
  delay: float = 0.0

  def install(self) -> None:
    count = itertools.count(1)

    def step():
      if next(count) == self.call:
        if self.delay:
          threading.Timer(self.delay, self._send).start()
        else:
          self._send()

    if self.function.startswith("/"):
      sys.addaudithook(lambda event, args: step() if self._is_ours(event, args) else None)
      return
    owner, _, name = self.function.rpartition(".")
    holder = pkgutil.resolve_name(owner)
    original = getattr(holder, name)

    def stopping(*args, **kwargs):
      step()
      return original(*args, **kwargs)

    setattr(holder, name, stopping)

  def _send(self) -> None:
    os.kill(os.getpid(), self.signal)

  def _is_ours(self, event: str, args: tuple) -> bool:
    is_file = event == "open" or event.startswith(("os.", "shutil."))
    path = args[0] if is_file and args else None
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.function)


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended; `compiled`: [iteration, compilations of any kind until its end]."""

  code: int
  out: str
  err: str
  compiled: list[list[int]]


class Train:
  """`train("--config", ...)` is the command line in a process of its own, cut short at will."""

  def __init__(self, shared: Path):
    command = [sys.executable, __file__, shared]
    environment = os.environ | {
      "PYTHONPATH": str(Path(__file__).parents[1]),
      "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    self._server = subprocess.Popen(
      command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

  def __call__(self, *arguments, stop=None, seconds=None, cwd=".") -> Result:
    """
    Args:
      stop: a Stop; seconds: kill it then, if it still runs.
    """
    request = {
      "arguments": [str(a) for a in arguments], "cwd": str(cwd), "seconds": seconds,
      "stop": dataclasses.astuple(stop) if stop else None,
    }  # fmt: skip
    self._server.stdin.write(json.dumps(request) + "\n")
    self._server.stdin.flush()
    return Result(**json.loads(self._server.stdout.readline()))

  def close(self) -> None:
    self._server.stdin.close()
    self._server.wait(30)


def serve(shared: Path) -> None:
  """Reads a request a line, forks a child for it and answers how that ended."""
  import tensorboardX  # noqa: F401  with torch, if it finds it

  from spo_jax.tokenizer import character_tokenizer

  character_tokenizer("0")  # imports transformers
  paths = [shared / f"{os.getpid()}.{name}" for name in ("out", "err", "compiled")]
  for line in sys.stdin:
    request = json.loads(line)
    for path in paths:
      path.write_text("")
    child = os.fork()
    if not child:
      _become(request, *paths)
    code = _wait(child, request["seconds"])
    out, err, compiled = (path.read_text(errors="replace") for path in paths)
    compiled = [json.loads(row) for row in compiled.splitlines()]
    print(json.dumps({"code": code, "out": out, "err": err, "compiled": compiled}), flush=True)


def _wait(child: int, seconds: float | None) -> int:
  end = time.monotonic() + (seconds or float("inf"))
  while time.monotonic() < end:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.01)
  os.kill(child, signal.SIGKILL)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(request: dict, out: Path, err: Path, compiled: Path) -> None:
  """The child is the command line, with the stop and a count of compilations built in."""
  for number, path in ((0, os.devnull), (1, out), (2, err)):
    os.dup2(os.open(path, os.O_RDWR), number)
  os.chdir(request["cwd"])
  signal.signal(signal.SIGINT, signal.default_int_handler)
  if request["stop"]:
    Stop(*request["stop"]).install()
  _count_compilations(compiled)
  sys.exit(spo_jax.train.main(request["arguments"]))


def _count_compilations(path: Path) -> None:
  from spo_jax.run import Run

  events, finish = [], Run.finish
  jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))

  def counting(self, iteration, *args):
    record = finish(self, iteration, *args)
    count = events.count("/jax/core/compile/backend_compile_duration")
    with path.open("a") as file:
      file.write(json.dumps([iteration, count]) + "\n")
    return record

  Run.finish = counting


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
  """A directory that the workers of one test session have in common."""
  base = tmp_path_factory.getbasetemp()
  directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
  directory.mkdir(exist_ok=True)
  (directory / "tiny.yaml").write_text(CONFIG)
  return directory


@pytest.fixture(scope="session")
def config(shared) -> Path:
  return shared / "tiny.yaml"


@pytest.fixture(scope="session")
def train(shared):
  server = Train(shared)
  yield server
  server.close()


@pytest.fixture
def refuse(capsys):
  """refuse(...) -> the one line with which the command line refuses these arguments."""

  def call(*arguments) -> str:
    code = spo_jax.train.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err

  return call


@pytest.fixture(scope="session")
def finished(train, shared, config):
  """finished(variant) -> (run directory, Result) of an uninterrupted run, made once a session."""

  def run(variant: str) -> tuple[Path, Result]:
    directory = shared / variant
    with (shared / f"{variant}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # workers that want the same run wait for it
      stored = shared / f"{variant}.json"
      if not stored.exists():
        result = train("--config", config, "--run-dir", directory, "--set", *VARIANTS[variant])
        assert result.code == 0, result.err
        stored.write_text(json.dumps(dataclasses.asdict(result)))
    return directory, Result(**json.loads(stored.read_text()))

  return run


def metrics(run_dir: Path, *ignored: str) -> list[dict]:
  """All records without the times, which no two runs share; every line must be whole."""
  records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in r.items() if not k.startswith(("time/", *ignored))} for r in records]


def summary(run_dir: Path) -> dict:
  return json.loads((run_dir / "summary.json").read_text())


def final_state(run_dir: Path) -> list[np.ndarray]:
  """Every array of the newest checkpoint of the policy: parameters, optimiser, step."""
  steps = [int(path.name) for path in (run_dir / "checkpoints" / "policy").iterdir()]
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(run_dir / "checkpoints" / "policy" / str(max(steps)) / "state")
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_same_run(run_dir: Path, reference: Path, *ignored: str) -> None:
  """Bitwise: metrics, texts and arrays; only seconds may differ."""
  assert metrics(run_dir, *ignored) == metrics(reference, *ignored)
  assert summary(run_dir) | {"seconds": 0} == summary(reference) | {"seconds": 0}
  texts = [path.relative_to(reference) for path in sorted(reference.glob("samples/*"))]
  weights = [path.relative_to(reference) for path in reference.glob("model/*.safetensors")]
  assert texts and weights
  for name in (*texts, *weights):
    assert (run_dir / name).read_bytes() == (reference / name).read_bytes()
  if (reference / "warm_start").exists():
    assert metrics(run_dir / "warm_start") == metrics(reference / "warm_start")
  ours, theirs = final_state(run_dir), final_state(reference)
  assert len(ours) == len(theirs) > 10
  for a, b in zip(ours, theirs):
    np.testing.assert_array_equal(a, b, strict=True)


if __name__ == "__main__":
  serve(Path(sys.argv[1]))
