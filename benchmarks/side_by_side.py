"""Two ways of doing the same work, in turn in one process, and what is printed of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def compare(
  sides: Mapping[str, Callable[[int], Any]], tokens: int, repeat: int, ratio: tuple[str, str]
) -> dict[str, list[Any]]:
  """Calls each side with the number of the turn, once to warm up and `repeat` times; prints times.

  Args:
    tokens: of one call; ratio: which side's seconds are divided by which.
  Returns: what each call of a side returned.
  """
  seconds: dict[str, list[float]] = {side: [] for side in sides}
  results: dict[str, list[Any]] = {side: [] for side in sides}
  for turn in range(repeat + 1):
    for side, call in sides.items():
      started = time.perf_counter()
      result = call(turn)
      seconds[side].append(time.perf_counter() - started)
      results[side].append(result)
  for side, (first, *took) in seconds.items():
    median = statistics.median(took)
    print(
      f"  {side:9} {tokens / median:9,.0f} tokens/s  median of {repeat}: {median:.3f} s "
      f"({min(took):.3f} to {max(took):.3f}), first call {first:.1f} s"
    )
  above, below = (seconds[side][1:] for side in ratio)
  ratios = [a / b for a, b in zip(above, below)]
  print(
    f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True
  )
  return results
