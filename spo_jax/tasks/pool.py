"""A pool of processes for a function that may hang, crash or eat memory on hostile arguments."""

import collections
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import spo_jax

START_S = 120.0  # for a worker to import what it needs, on a machine that is busy
MAX_STARTS = 3  # in a row that fail, before the environment must be what is broken
MAX_REPLY_BYTES = 1 << 16
MEMORY_BYTES = 1 << 30  # a worker may allocate on top of what it has once it is warm


class WorkerPool:
  """Runs a function on many argument tuples, each within bounds, in processes of their own.

  Workers are started at the first use, serve one call at a time, and end with this process
  however it ends. They know nothing of the caller's modules, so they never load JAX.

  Args:
    function: a module's function from texts to something that JSON can hold.
    size: processes at most.
    warm_up: arguments of one call that each worker makes before it counts as started.
    timeout_s: seconds by the clock that one call may take.
    cpu_s: seconds of computing that one call may take, which does not depend on other load.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    size: int,
    warm_up: Sequence[str],
    timeout_s: float = 10.0,
    cpu_s: int = 3,
  ):
    self._size, self._timeout_s = size, timeout_s
    self._setup = {
      "function": f"{function.__module__}:{function.__qualname__}",
      "path": [entry for entry in sys.path if entry],
      "warm_up": list(warm_up),
      "cpu_s": cpu_s,
      "memory_bytes": MEMORY_BYTES,
    }
    self._workers: list[_Worker] = []
    self._failed_starts = 0
    self._counts = collections.Counter[str]()

  def map(self, calls: Sequence[Sequence[str]]) -> list[Any]:
    """What the function returns for each argument tuple.

    None where it raised or had to be stopped; `counters` tells how often. It is in no case called
    again.

    Raises: RuntimeError where no worker can be started at all.
    """
    results: list[Any] = [None] * len(calls)
    waiting = collections.deque(range(len(calls)))
    try:
      while waiting or any(worker.call is not None for worker in self._workers):
        self._start(len(waiting))
        for worker in [worker for worker in self._workers if worker.is_idle][: len(waiting)]:
          call = waiting.popleft()
          if not worker.send(calls[call], call, self._timeout_s):
            waiting.appendleft(call)  # it had died while idle
            self._drop(worker, "crashes")
        if self._workers:
          self._receive(results)
    except BaseException:
      self.close()  # a worker that is busy would answer the next map with this one's result
      raise
    return results

  def counters(self) -> dict[str, int]:
    """Calls since the last time that ran into a limit, ended their worker, or raised."""
    counts = {name: self._counts[name] for name in ("timeouts", "crashes", "errors")}
    self._counts.clear()
    return counts

  def pids(self) -> list[int]:
    """Process ids of the workers that are there."""
    return [worker.process.pid for worker in self._workers]

  def close(self) -> None:
    """Ends all workers; the next map starts new ones."""
    for worker in self._workers:
      worker.end()
    self._workers.clear()

  def _start(self, waiting: int) -> None:
    busy = sum(worker.call is not None for worker in self._workers)
    while len(self._workers) < min(self._size, busy + waiting):
      self._workers.append(_Worker(self._setup))

  def _receive(self, results: list[Any]) -> None:
    """Waits for the next reply, end or deadline of a worker, and takes note of it."""
    with selectors.DefaultSelector() as selector:
      for worker in self._workers:
        selector.register(worker.output, selectors.EVENT_READ, worker)
      first = min(worker.deadline for worker in self._workers)
      ready = selector.select(max(0.0, min(first - time.monotonic(), START_S)))
    for key, _ in ready:
      worker = key.data
      call, reply = worker.call, worker.receive()
      if reply is None:  # it has ended, or sends what no worker sends
        self._drop(worker, "timeouts" if worker.ran_out_of_cpu() else "crashes")
      elif "failed" in reply:
        raise RuntimeError(f"grading processes cannot start: {reply['failed']}")
      elif "ready" in reply:
        self._failed_starts = 0
      elif reply and call is not None:
        results[call] = reply.get("result")
        self._counts["errors"] += "error" in reply
    for worker in [worker for worker in self._workers if worker.deadline < time.monotonic()]:
      self._drop(worker, "timeouts")

  def _drop(self, worker: "_Worker", count: str) -> None:
    self._workers.remove(worker)
    worker.end()
    if worker.is_started:
      self._counts[count] += 1
      return
    self._failed_starts += 1
    if self._failed_starts >= MAX_STARTS:
      raise RuntimeError(f"grading processes end as they start, {MAX_STARTS} times in a row: "
                         "is there too little memory?")  # fmt: skip


class _Worker:
  """A process and the call that it works on."""

  def __init__(self, setup: dict[str, Any]):
    root = str(Path(spo_jax.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # their buffers are large
    self.process = subprocess.Popen(
      [sys.executable, "-P", "-m", "spo_jax.tasks.worker"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      bufsize=0,
      env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
      start_new_session=True,  # Ctrl-C is for the caller, who ends us
    )
    assert self.process.stdin is not None and self.process.stdout is not None
    self._input, self.output = self.process.stdin, self.process.stdout
    self.call: int | None = None
    self.is_started = False
    self.deadline = time.monotonic() + START_S
    self._received = b""
    self._write(setup)

  @property
  def is_idle(self) -> bool:
    return self.is_started and self.call is None

  def send(self, arguments: Sequence[str], call: int, timeout_s: float) -> bool:
    """Hands over a call; False where the process is no longer there."""
    self.call, self.deadline = call, time.monotonic() + timeout_s
    return self._write(arguments)

  def _write(self, message: Any) -> bool:
    try:
      rest = json.dumps(message).encode()  # ASCII, lone surrogates included
      rest += b"\n"
      while rest:
        rest = rest[os.write(self._input.fileno(), rest):]
    except OSError:
      return False
    return True

  def receive(self) -> dict[str, Any] | None:
    """The reply that is there, {} for a part of one; None where none can come any more."""
    chunk = os.read(self.output.fileno(), MAX_REPLY_BYTES)
    self._received += chunk
    if not chunk or len(self._received) > MAX_REPLY_BYTES:
      return None
    if not self._received.endswith(b"\n"):
      return {}
    try:
      reply = json.loads(self._received)
    except (ValueError, RecursionError):
      return None
    if not isinstance(reply, dict):
      return None
    self._received, self.call, self.deadline = b"", None, float("inf")
    self.is_started = True
    return reply

  def ran_out_of_cpu(self) -> bool:
    """Whether an ended process was stopped at its limit of computing time."""
    try:
      return self.process.wait(timeout=1) == -signal.SIGXCPU
    except subprocess.TimeoutExpired:
      return False

  def end(self) -> None:
    """Kills the process, and waits until it is gone."""
    self.process.kill()
    self.process.wait()
    self._input.close()
    self.output.close()
