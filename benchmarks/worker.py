"""What the sides of a comparison share where each runs in an interpreter of its own.

Only the standard library: a rival's environment holds what the rival needs, and nothing of ours.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Any


class Turns:
  """The far end of `side_by_side.Worker`: one line of stdin asks for a turn, one answers it."""

  def __init__(self, *packages: str):
    """Says that this side is ready, and which versions of `packages` it runs."""
    # What a library prints must not mix with the answers.
    self._answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    self.answer({name: importlib.metadata.version(name) for name in packages})

  def wait(self) -> int:
    """The number of the turn that is asked for; leaves the process when nobody asks any more."""
    line = sys.stdin.readline()
    if not line:
      os._exit(0)
    return int(line)

  def answer(self, found: Any) -> None:
    print(json.dumps(found), file=self._answers, flush=True)


class Reward:
  """Share of the words that end in 7: cheap, and it differs between responses.

  Every token is a word, so the words that it sees are the tokens of a turn, whoever samples.
  """

  __name__ = "reward"

  def __init__(self) -> None:
    self.tokens = [0, 0]  # of prompts (each counted once per response) and of responses

  def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    self.tokens[0] += sum(len(text.split()) for text in prompts)
    words = [text.split() for text in completions]
    self.tokens[1] += sum(map(len, words))
    return [sum(word.endswith("7") for word in row) / max(len(row), 1) for row in words]

  def take(self) -> list[int]:
    """Tokens seen since this was last asked."""
    taken, self.tokens = self.tokens, [0, 0]
    return taken
