"""Grades responses of any model: python -m spo_jax.grade --task gsm8k IN.jsonl OUT.jsonl

A line of IN is an object with `response`, the fields of the task that hold the right answer (such
as `answer`), and perhaps `finished`: false where the response was cut off. OUT gets the same
objects, each with its `reward` and with `extracted`, the answer that was read from the response.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spo_jax import runlog
from spo_jax.config import TaskConfig
from spo_jax.errors import said
from spo_jax.tasks import LOADERS, Problem, Task, load_task
from spo_jax.tasks.data import parse_json

BATCH_LINES = 256
NAMED_LINES = 20  # bad lines that are named one by one

_Row = tuple[dict[str, Any], Problem]


def grade_file(task: Task, source: Path, target: Path) -> tuple[int, int]:
  """Writes `target`, all of it or nothing; names bad lines on standard error.

  Returns: the numbers of graded and of skipped lines. Without a graded line nothing is written.
  """
  with source.open("rb") as lines:
    total = sum(1 for line in lines if line.strip())
  graded = correct = skipped = 0
  target = target.resolve()  # a link stays one
  temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
  try:
    with (
      source.open("rb") as lines,
      temporary.open("w", encoding="ascii") as output,
      runlog.progress(f"grading {task.name}", total) as bar,
    ):
      for batch in _batches(lines):
        good: list[_Row] = []
        for number, line in batch:
          try:
            good.append(_read(task, line))
          except ValueError as error:
            skipped += 1
            if skipped <= NAMED_LINES:
              print(f"{source.name}:{number}: skipped: {said(error)}", file=sys.stderr)
        rewards = _write(task, good, output)
        graded += len(good)
        correct += sum(reward == 1 for reward in rewards)
        bar.advance(len(batch), correct=correct / max(1, graded))
      output.flush()
      os.fsync(output.fileno())
    if graded:
      os.replace(temporary, target)
  finally:
    temporary.unlink(missing_ok=True)
  return graded, skipped


def _batches(lines: Iterable[bytes]) -> Iterator[list[tuple[int, bytes]]]:
  """(line number from 1, line) of the lines that are not blank, some at a time."""
  numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
  while batch := list(itertools.islice(numbered, BATCH_LINES)):
    yield batch


def _read(task: Task, line: bytes) -> _Row:
  """Raises ValueError for a line that cannot be graded."""
  record = parse_json(line)
  if isinstance(record, ValueError):
    raise record
  if not isinstance(record, dict):
    raise ValueError(f"a {type(record).__name__}, not an object with fields")
  if not isinstance(record.get("response"), str):
    raise ValueError("field 'response' is missing or no text")
  if not isinstance(record.get("finished", True), bool):
    raise ValueError("field 'finished' must be true or false")
  return record, task.from_record(record, 0)


def _write(task: Task, rows: Sequence[_Row], output: Any) -> list[float]:
  grades = task.grade_many(
    [problem for _, problem in rows],
    [record["response"] for record, _ in rows],
    [record.get("finished", True) for record, _ in rows],
  )
  for (record, _), grade in zip(rows, grades, strict=True):
    record |= {"reward": grade.reward, "extracted": grade.extracted}
    output.write(json.dumps(record) + "\n")
  return [grade.reward for grade in grades]


def _check_files(source: Path, target: Path) -> None:
  """Raises ValueError, in one line, for files that cannot be used."""
  if not source.is_file():
    raise ValueError(f"{source} is not a file: name one with a JSON object per line")
  try:
    folder = target.resolve().parent
  except (OSError, RuntimeError):  # links in a circle
    folder = None
  if folder is None or target.is_dir() or not folder.is_dir():
    raise ValueError(f"{target} cannot be written: name a file in a folder that exists")
  if target.exists() and not target.is_file():  # a device or a pipe would become a file
    raise ValueError(f"{target} is no regular file: name one, which is replaced as a whole")
  if target.exists() and target.samefile(source):
    raise ValueError(f"{target} is the file to grade, which is never overwritten: name another")
  for file, mode, wanted in ((source, os.R_OK, "read"), (folder, os.W_OK, "write")):
    if not os.access(file, mode):
      raise ValueError(f"{file}: no permission to {wanted}")


def _stop(signum: int, _: object) -> None:
  raise SystemExit(128 + signum)


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m spo_jax.grade", description="Grade responses in a JSON lines file."
  )
  parser.add_argument("--task", required=True, help=f"one of {', '.join(LOADERS)}")
  parser.add_argument("source", type=Path, metavar="IN.jsonl",
                      help="objects with `response` and the task's fields, such as `answer`")
  parser.add_argument("target", type=Path, metavar="OUT.jsonl",
                      help="the same objects with `reward` and `extracted`")
  for kind, what in (("unfinished", "whose `finished` is false"), ("repeat", "concluding twice")):
    parser.add_argument(f"--{kind}-penalty", type=float, default=0.0, metavar="R",
                        help=f"subtracted from the reward of a response {what}")
  options = parser.parse_args(arguments)
  try:
    config = TaskConfig(name=options.task, unfinished_penalty=options.unfinished_penalty,
                        repeat_penalty=options.repeat_penalty)
    task = load_task(config, seed=0)
    _check_files(options.source, options.target)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  before = signal.signal(signal.SIGTERM, _stop)  # so that what we have begun is cleaned up
  try:
    graded, skipped = grade_file(task, options.source, options.target)
  except KeyboardInterrupt:
    print("Stopped; nothing was written.", file=sys.stderr)
    return 128 + signal.SIGINT
  except (OSError, RuntimeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  finally:
    task.close()
    signal.signal(signal.SIGTERM, before)
  stopped = ", ".join(f"{count} {name}" for name, count in task.counters().items() if count)
  print(f"{graded} graded, {skipped} skipped{f' ({stopped})' if stopped else ''}: {options.target}"
        if graded else f"error: {options.source} has no line that can be graded",
        file=sys.stdout if graded else sys.stderr)
  return 0 if graded else 1


if __name__ == "__main__":
  sys.exit(main())
