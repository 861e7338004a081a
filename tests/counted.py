"""A command of spo_jax that says how many responses this process graded; run by test_distributed.

    python -m tests.counted train --config FILE ...
"""

from __future__ import annotations

import importlib
import sys

from spo_jax import distributed
from spo_jax.tasks import Task

if __name__ == "__main__":
  graded = 0
  grade_many = Task.grade_many

  def counting(self, problems, *rest):
    global graded
    graded += len(problems)
    return grade_many(self, problems, *rest)

  Task.grade_many = counting

  def main() -> int:
    code = importlib.import_module(f"spo_jax.{sys.argv[1]}").main(sys.argv[2:])
    print(f"graded {graded}", file=sys.stderr)
    return code

  distributed.leave(main)
