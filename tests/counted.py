"""A command of spo_jax that says how much this process did of it; run by test_distributed.

    python -m tests.counted train --config FILE ...
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter

from spo_jax import distributed, packs, tokenizer
from spo_jax.tasks import Task

if __name__ == "__main__":
  counts = Counter()

  def count(of, name, what, amount):
    function = getattr(of, name)

    def counting(*arguments, **named):
      counts[what] += amount(*arguments)
      return function(*arguments, **named)

    setattr(of, name, counting)

  count(Task, "grade_many", "graded", lambda task, problems, *_: len(problems))
  count(tokenizer, "token_ids", "encoded", lambda tokens, texts, *_: len(texts))
  count(packs, "_walk", "packed", lambda rows, *_: len(rows.tokens))

  def main() -> int:
    code = importlib.import_module(f"spo_jax.{sys.argv[1]}").main(sys.argv[2:])
    print(f"did {json.dumps(counts)}", file=sys.stderr)
    return code

  distributed.leave(main)
