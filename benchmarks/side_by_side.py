"""Sides that do the same work, taking turns, and what is printed of them.

A side is a function of the turn's number. One that needs packages of its own lives in an
interpreter of its own, a `Worker`, which waits between its turns and takes no core meanwhile.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Worker:
  """A side in an interpreter of its own: a script beside this one that answers with `Turns`.

  Once the script is ready, what versions it runs is printed.

  Args:
    python: the interpreter; case: what the script needs to know, sent as JSON.
  Raises: RuntimeError, with what the script wrote, where it ends or does not start.
  """

  def __init__(self, python: str, script: str, case: Mapping[str, Any]):
    self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 as long as the worker lives
    self._process = subprocess.Popen(
      [python, str(Path(__file__).with_name(script)), json.dumps(case)], text=True, bufsize=1,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
    )  # fmt: skip
    print("  " + ", ".join(f"{name} {found}" for name, found in self._hear().items()), flush=True)

  def __call__(self, turn: int) -> Any:
    assert self._process.stdin is not None
    self._process.stdin.write(f"{turn}\n")
    return self._hear()

  def __enter__(self) -> Worker:
    return self

  def __exit__(self, *_: object) -> None:
    """The script sees that nobody asks any more, and leaves."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()

  def _hear(self) -> Any:
    assert self._process.stdout is not None
    if line := self._process.stdout.readline():
      return json.loads(line)
    self._log.seek(0)
    raise RuntimeError("".join(self._log.readlines()[-15:]))


def compare(
  sides: Mapping[str, Callable[[int], Any]],
  tokens: int,
  repeat: int,
  *ratios: tuple[str, str],
  warm_up: int = 1,
) -> dict[str, list[Any]]:
  """Calls each side with the number of the turn, first to warm up; prints times.

  Args:
    tokens: of one call; ratios: which side's seconds are divided by which.
    warm_up: turns that do not count; repeat: turns that do.
  Returns: what each call of a side returned.
  """
  seconds: dict[str, list[float]] = {side: [] for side in sides}
  results: dict[str, list[Any]] = {side: [] for side in sides}
  for turn in range(warm_up + repeat):
    for side, call in sides.items():
      started = time.perf_counter()
      result = call(turn)
      seconds[side].append(time.perf_counter() - started)
      results[side].append(result)
  for side, took in seconds.items():
    first = took[0]
    took[:] = took[warm_up:]
    median = statistics.median(took)
    print(
      f"  {side:9} {tokens / median:9,.0f} tokens/s  median of {repeat}: {median:.3f} s "
      f"({min(took):.3f} to {max(took):.3f}), first call {first:.1f} s"
    )
  for above, below in ratios:
    each = [a / b for a, b in zip(seconds[above], seconds[below])]
    print(
      f"  {above} / {below}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})",
      flush=True,
    )
  return results
