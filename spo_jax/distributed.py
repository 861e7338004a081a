"""Several processes as one run: who writes, prepares and grades which rows, what all agree on.

Every process runs the same program on its own devices of one mesh. Host code is a function of
(seed, iteration) and of arrays gathered from all, so it agrees without being told. With one
process everything here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spo_jax.config import ConfigError

# A process that is not heard of for this long ends the others.
HEARTBEAT_S = 30
GRACE_S = 5  # between a failure of one process and its end, which ends the others

Made = TypeVar("Made")  # an array of rows, or a tree of them


def initialize() -> None:
  """Joins the processes of the run, where the environment asks for it.

  SPO_COORDINATOR=host:port, SPO_PROCESSES and SPO_PROCESS_ID name them; SPO_DISTRIBUTED=auto
  leaves that to JAX, which knows TPU pods, Slurm (a process for each GPU) and Kubernetes.

  Raises: ConfigError where the variables do not belong together.
  """
  # JAX would take SIGTERM and do nothing with it, until `Preemption` does.
  jax.config.update("jax_enable_preemption_service", False)
  names = ("SPO_COORDINATOR", "SPO_PROCESSES", "SPO_PROCESS_ID")
  values = {name: os.environ.get(name) for name in names}
  if how := os.environ.get("SPO_DISTRIBUTED"):
    if how != "auto":
      raise ConfigError(f"SPO_DISTRIBUTED={how} is not auto. Set it so, or unset it.")
    try:
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S)
    except ValueError as error:
      raise ConfigError(
        f"SPO_DISTRIBUTED=auto finds no TPU pod, Slurm or Kubernetes here ({error}). Set "
        f"{', '.join(names)}, or unset it."
      ) from error
  elif any(values.values()):
    missing = [name for name, value in values.items() if not value]
    if missing:
      raise ConfigError(f"{missing[0]} is not set, but {', '.join(set(names) - set(missing))} is. "
                        "Set all three, or SPO_DISTRIBUTED=auto.")  # fmt: skip
    try:
      count, own = int(values["SPO_PROCESSES"] or ""), int(values["SPO_PROCESS_ID"] or "")
    except ValueError as error:
      raise ConfigError(f"SPO_PROCESSES={values['SPO_PROCESSES']} and SPO_PROCESS_ID="
                        f"{values['SPO_PROCESS_ID']} must be integers.") from error  # fmt: skip
    if not 0 <= own < count:
      raise ConfigError(f"SPO_PROCESS_ID={own} must be from 0 to SPO_PROCESSES - 1 = {count - 1}.")
    coordinator = str(values["SPO_COORDINATOR"])
    if not re.fullmatch(r".+:\d+", coordinator):
      raise ConfigError(f"SPO_COORDINATOR={coordinator} is not host:port, such as 10.0.0.1:8476.")
    print(f"Process {own} of {count} waits for the others at {coordinator}.", file=sys.stderr)
    jax.distributed.initialize(
      coordinator, count, own, heartbeat_timeout_seconds=HEARTBEAT_S,
      # Where JAX sees Slurm or MPI, it would leave this process one GPU of its node.
      cluster_detection_method="deactivate",
    )  # fmt: skip


def is_main() -> bool:
  """Whether this is the process that writes logs."""
  return jax.process_index() == 0


def is_alone() -> bool:
  return jax.process_count() == 1


def own_directory(directory: Path) -> Path:
  """The directory on the main process; elsewhere one that nobody looks at, removed at the end."""
  if is_main():
    return directory
  scratch = tempfile.mkdtemp(prefix="spo_jax-")
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  return Path(scratch)


@contextlib.contextmanager
def quiet_unless_main() -> Iterator[None]:
  """Within it only the main process prints to standard output."""
  if is_main():
    yield
    return
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    yield


def wait_for_all(what: str) -> None:
  """Returns once every process is here."""
  if not is_alone():
    multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
  """Whether the flag is set on one of them; all must ask."""
  return flag if is_alone() else bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def from_main(count: int) -> int:
  """The number that the main process has found; all must ask."""
  return count if is_alone() else int(multihost_utils.broadcast_one_to_all(np.int32(count)))


def total(counts: dict[str, int]) -> dict[str, int]:
  """Sums over all processes, which count the same things."""
  if is_alone() or not counts:
    return counts
  own = np.array(list(counts.values()), np.int32)
  sums = multihost_utils.process_allgather(own).sum(axis=0)
  return dict(zip(counts, map(int, sums)))


INTERRUPTED = 130  # exit code: what a shell reports for a program that Ctrl-C ended
PREEMPTED = 143  # and for one that SIGTERM ended


def leave(main: Callable[[], int]) -> NoReturn:
  """Ends a command with the exit code that `main` returns.

  A process that fails while others run ends without them, and they do when they miss it: in an
  orderly exit JAX would wait for them for minutes, and they for this one. Those that fail for the
  same reason, such as a setting, have a moment to say so.
  """
  try:
    code = main()
  except Exception:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    print("error: this process of several failed, and the others end. What is saved is whole: "
          "--resume continues.", file=sys.stderr)  # fmt: skip
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  if code == INTERRUPTED:
    os._exit(code)  # an orderly exit may crash where XLA was stopped within a compilation
  if code not in (0, PREEMPTED) and jax.distributed.is_initialized():
    time.sleep(GRACE_S)
    os._exit(code)
  sys.exit(code)


class Preempted(Exception):
  """The run was asked to stop, and everything that it needs to go on is saved."""


class Preemption:
  """Context manager in which SIGTERM asks the run to stop instead of ending the process.

  A second SIGTERM ends it at once. Ctrl-C raises KeyboardInterrupt as ever, and asks too:
  an exception raised inside a callback of a library may be lost there.
  """

  def __init__(self) -> None:
    self._asked: int | None = None

  def __enter__(self) -> Preemption:
    self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._ask)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
      self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._ask)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number: int, _: object) -> None:
    self._asked = number
    if number == signal.SIGINT:
      raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  def is_asked(self) -> bool:
    """Whether any process of the run was asked to stop; all must call this together."""
    return any_process(self._asked is not None)

  def reason(self) -> BaseException:
    """What to raise once everything is saved."""
    return KeyboardInterrupt() if self._asked == signal.SIGINT else Preempted()


def to_host(tree: Any) -> Any:
  """Numpy copies of whole arrays, on every process."""

  def fetch(x: Any) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
      return multihost_utils.process_allgather(x, tiled=True)
    return x

  return jax.device_get(jax.tree.map(fetch, tree))


def in_shares(count: int, make: Callable[[slice], Made]) -> Made:
  """What `make` makes of `count` rows, on every process, each of which makes its share alone.

  Raises: what `make` raises; ValueError where it does so in another process.
  """
  if is_alone():
    return make(slice(0, count))
  refused = None
  try:
    own = make(own_share(count))
  except ValueError as error:
    refused = error
  if any_process(refused is not None):
    raise refused or ValueError("another process was refused, and says why.")
  return jax.tree.map(lambda x: _gather(x, count), own)


def own_share(count: int) -> slice:
  """Which of `count` rows this process works on."""
  each = -(-count // jax.process_count())
  first = min(jax.process_index() * each, count)
  return slice(first, min(first + each, count))


def _gather(own: np.ndarray, count: int) -> np.ndarray:
  """The shares of all processes, one behind the other."""
  each = -(-count // jax.process_count())
  padded = np.zeros((each, *own.shape[1:]), own.dtype)
  padded[: len(own)] = own
  shares = multihost_utils.process_allgather(padded)
  return np.asarray(shares).reshape(-1, *own.shape[1:])[:count]


def gather_bytes(own: bytes) -> bytes:
  """What the processes have, in their order, on all of them."""
  if is_alone():
    return own
  lengths = multihost_utils.process_allgather(np.int32(len(own))).tolist()
  padded = np.zeros(max(lengths), np.uint8)
  padded[: len(own)] = np.frombuffer(own, np.uint8)
  parts = np.asarray(multihost_utils.process_allgather(padded))
  return b"".join(part[:length].tobytes() for part, length in zip(parts, lengths))
