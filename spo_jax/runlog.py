"""A run's directory and what a person sees of it: metrics, samples, summary, progress, table."""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.table import Table

from spo_jax.config import ConfigError
from spo_jax.tensorboard import EventFile


class RunLog:
  """Owns `run_dir`: config.yaml, metrics.jsonl, samples/, tensorboard/ and summary.json.

  Opening a directory that a killed run left behind drops the half-written last line of its
  metrics. One process writes to a directory at a time: it has a lock on `run_dir`/lock.

  Args:
    run_dir: made where it is missing.
    wandb_project: also send metrics to this Weights & Biases project; None leaves it unimported.
    tensorboard: whether event files are written.
  Raises: ValueError where wandb is asked for and not installed; ConfigError where another process
    has the lock.
  """

  def __init__(self, run_dir: str | Path, wandb_project: str | None = None,
               tensorboard: bool = True):
    self.run_dir = Path(run_dir)
    self._metrics = self.run_dir / "metrics.jsonl"
    self._samples = self.run_dir / "samples"
    self._samples.mkdir(parents=True, exist_ok=True)
    self._lock = locked(self.run_dir / "lock")
    self._has_events = tensorboard
    self._events: EventFile | None = None
    self._purge_step: int | None = None
    self._wandb = _start_wandb(wandb_project, self.run_dir) if wandb_project else None
    if self._metrics.exists():
      content = self._metrics.read_bytes()
      os.truncate(self._metrics, content.rfind(b"\n") + 1)

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write_config(self, yaml: str) -> None:
    """Writes the resolved config."""
    write_atomic(self.run_dir / "config.yaml", yaml)

  def last(self) -> int:
    """The last iteration up to which every one is logged; -1 where there is none."""
    logged = {record["iteration"] for record in read_metrics(self.run_dir)}
    return next(i for i in itertools.count(-1) if i + 1 not in logged)

  def resume_at(self, iteration: int) -> None:
    """Forgets everything after `iteration`; -1 forgets the whole run. Call it before `log`."""
    kept = [record for record in read_metrics(self.run_dir) if record["iteration"] <= iteration]
    write_atomic(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))
    for path in self._samples.iterdir():
      match = re.fullmatch(r"iteration_(\d+)\.jsonl", path.name)
      if match and int(match[1]) > iteration:
        path.unlink()
    self._purge_step = iteration + 1

  def log(self, iteration: int, metrics: Mapping[str, Any]) -> None:
    """Appends one record; it is on the disk when this returns.

    Args:
      metrics: numbers, strings, or numpy and jax arrays; what is not finite becomes null.
    Raises: TypeError for a value that JSON cannot hold.
    """
    record = {**plain(metrics), "iteration": iteration}
    with self._metrics.open("a", encoding="utf-8") as file:
      file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())
    scalars = {key: value for key, value in record.items()
               if key != "iteration" and isinstance(value, int | float)}
    if self._has_events and self._events is None:
      # Opened here rather than at the start, so that it tells TensorBoard what a resume took back.
      self._events = _event_file(self.run_dir / "tensorboard", self._purge_step)
      self._has_events = self._events is not None
    if self._events is not None:
      self._events.add_scalars(iteration, scalars)
    if self._wandb is not None:
      self._wandb.log(scalars, step=iteration)

  def log_samples(self, iteration: int, samples: Iterable[Mapping[str, Any]]) -> None:
    """Writes samples/iteration_NNNNNN.jsonl, a line each: prompt, response, reward, finished."""
    lines = "".join(json.dumps(plain(sample)) + "\n" for sample in samples)
    write_atomic(self._samples / f"iteration_{iteration:06d}.jsonl", lines)

  def write_summary(self, summary: Mapping[str, Any]) -> None:
    """Writes summary.json: initial, final, iterations, seconds, tokens."""
    write_atomic(self.run_dir / "summary.json", json.dumps(plain(summary), indent=2) + "\n")

  def close(self) -> None:
    """Closes the writers; the files are complete without it."""
    if self._events is not None:
      self._events.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._events = self._wandb = None
    self._lock.close()


def locked(path: Path) -> IO[str]:
  """A file that this process alone has locked, until it is closed or the process ends.

  Raises: ConfigError where another one has it.
  """
  file = path.open("a")
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EACCES, errno.EAGAIN):
      file.close()
      raise ConfigError(
        f"{path.parent} is being written by another process. End it, or name another folder."
      ) from error
    # Some mounts have no locks: there, nobody looks.
  return file


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
  """The complete records of a run, oldest first; empty where it has none."""
  return [record for record in read_jsonl(Path(run_dir) / "metrics.jsonl")
          if isinstance(record.get("iteration"), int)]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """The objects of a JSON lines file, less every line that a kill or a full disk left broken."""
  records = []
  # Bytes, because only "\n" ends a record: text lines also end at characters that JSON allows.
  for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
    try:
      record = json.loads(line)
    except ValueError:
      continue
    if isinstance(record, dict):
      records.append(record)
  return records


def assert_renames(folder: Path) -> None:
  """Checkpoints become complete when their folder is renamed, which mounts of buckets may refuse.

  Raises: ConfigError where that of this folder does.
  """
  probe = Path(tempfile.mkdtemp(prefix=".probe-", dir=folder))  # each process has one
  try:
    (probe / "from").mkdir()
    (probe / "from" / "file").touch()
    (probe / "from").rename(probe / "to")
  except OSError as error:
    raise ConfigError(
      f"--run-dir {folder}: no folder can be renamed there, as checkpoints must be "
      f"({error.strerror}). Name another; docs/launch.md tells of buckets."
    ) from error
  finally:
    shutil.rmtree(probe, ignore_errors=True)


def write_atomic(path: Path, text: str) -> None:
  """Replaces a file so that a kill leaves the old content or the new, nothing in between."""
  temporary = path.with_name(f".{path.name}.tmp")
  with temporary.open("w", encoding="utf-8", errors="replace") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Around a library that writes `path`: its ways to say that the disk is full become OSError.

  Raises: OSError, of one line.
  """
  try:
    yield
  except Exception as error:
    # Libraries that are not Python's quote the system's words in a text of their own.
    full = re.search("No space left on device|Disk quota exceeded|File too large", str(error))
    if full is None:
      raise
    raise OSError(f"{path} could not be written: {full[0]}") from error


def plain(value: Any) -> Any:
  """The value as JSON can hold it: arrays as numbers or lists, what is not finite as None.

  Raises: TypeError for anything that is no number, string, array, mapping or sequence.
  """
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else None
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if hasattr(value, "__array__"):
    array = np.asarray(value)
    return plain(array.item() if array.size == 1 else array.tolist())
  raise TypeError(f"cannot log {value!r}: JSON has no {type(value).__name__}")


def _event_file(directory: Path, purge_step: int | None) -> EventFile | None:
  try:
    return EventFile(directory, purge_step)
  except ImportError:
    print("warning: no TensorBoard files are written: pip install tensorboardX", file=sys.stderr)
    return None


def _start_wandb(project: str, run_dir: Path) -> Any:
  try:
    import wandb
  except ImportError as error:
    raise ValueError("wandb logging is asked for, but wandb is not installed: "
                     "pip install wandb, or leave it off") from error
  own = run_dir / "wandb_id"  # with it a resumed run goes on in its own page
  if not own.exists():
    write_atomic(own, uuid.uuid4().hex)
  return wandb.init(
    project=project, dir=str(run_dir), name=run_dir.name, id=own.read_text(), resume="allow"
  )


def format_seconds(seconds: float) -> str:
  """A duration for people: 7.3 s, 5 min 12 s, 2 h 05 min."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"


def format_count(count: float) -> str:
  """A count for people: 950, 81.3 k, 1.92 M."""
  for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
    if float(f"{abs(count):.3g}") >= size:
      return f"{count / size:.3g}{unit}"
  return f"{count:.3g}" if count % 1 else f"{count:.0f}"


def format_figure(value: Any) -> str:
  """A live figure or an accuracy: three decimals, counts whole, a dash where there is none."""
  value = plain(value)
  if isinstance(value, float):
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
  return "–" if value is None else str(value)


ACCURACIES = (("greedy accuracy", "greedy_accuracy"), ("sampled accuracy", "sampled_accuracy"))


def final_table(summary: Mapping[str, Any], run_dir: str | Path) -> None:
  """Prints what a run ends with: accuracies before and after, its cost, where it lies."""
  table = Table(title="Held-out accuracy", title_justify="left")
  table.add_column("")
  for column in ("before", "after"):
    table.add_column(column, justify="right")
  for label, key in ACCURACIES:
    table.add_row(label, *(format_figure(summary[when].get(key)) for when in ("initial", "final")))
  Console(file=sys.stdout).print(table)
  # Plain prints: rich would fold a long path, which then cannot be copied.
  print(f"{summary['iterations']} iterations, {format_seconds(summary['seconds'])}, "
        f"{format_count(summary['tokens'])} tokens")
  print(f"Run directory: {run_dir}")


class ProgressBar:
  """Made by `progress`."""

  def __init__(self, title: str, total: int, start: int):
    self._title, self._total, self._done = title, total, start
    self._figures: dict[str, Any] = {}
    self._last = time.monotonic()
    self._live: Progress | None = None
    console = Console(file=sys.stdout)
    if sys.stdout.isatty() and not console.is_dumb_terminal:
      self._live = Progress(TextColumn("{task.description}", markup=False), BarColumn(),
                            MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                            TextColumn("{task.fields[figures]}", markup=False), console=console)
      self._task = self._live.add_task(title, total=total, completed=start, figures="")

  def __enter__(self) -> "ProgressBar":
    if self._live is not None:
      self._live.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._live is not None:
      self._live.stop()

  def advance(self, steps: int = 1, **figures: Any) -> None:
    """Moves on and shows the figures; live, one that is not given again keeps its last value."""
    self._done += steps
    self._figures.update(figures)
    if self._live is not None:
      self._live.update(self._task, completed=self._done, figures=_figure_text(self._figures))
      return
    now = time.monotonic()
    line = f"{self._title} {self._done}/{self._total} {_figure_text(figures)}".rstrip()
    print(f"{line} ({now - self._last:.1f} s)", flush=True)
    self._last = now


def _figure_text(figures: Mapping[str, Any]) -> str:
  return " ".join(f"{name} {format_figure(value)}" for name, value in figures.items())


def progress(title: str, total: int, start: int = 0) -> ProgressBar:
  """A progress bar to use in a `with`; plain lines, one for each `advance`, off a terminal."""
  return ProgressBar(title, total, start)
