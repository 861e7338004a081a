"""Figures of an evaluation in plain numpy: pass@k, majority votes, bootstrap intervals.

Q questions, K samples of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
  """Chance that k of a question's samples, drawn without replacement, hold a right one.

    pass@k = 1 - C(n - c, k) / C(n, k)           Chen et al., arXiv:2107.03374

  As a product of k factors (n - c - j) / (n - j) no binomial coefficient can overflow.

  Args:
    correct: i[Q], right samples c of each question; samples: n.
  Returns: f64[Q].
  Raises: ValueError unless 1 <= k <= samples and every c is in 0..samples.
  """
  correct = np.asarray(correct)
  if not 1 <= k <= samples or ((correct < 0) | (correct > samples)).any():
    raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n; here k={k}, n={samples}, "
                     f"c={correct.tolist()}.")  # fmt: skip
  drawn = np.arange(k)
  wrong_left = np.maximum(samples - correct[:, None] - drawn, 0)
  return 1 - np.prod(wrong_left / (samples - drawn), axis=1)


def majority(answers: Sequence[str | None]) -> str | None:
  """The most frequent answer; of equally frequent ones, that of the earliest sample.

  None, where no answer was found, has no vote; it is returned where nothing else is there.
  """
  votes = Counter(answer for answer in answers if answer is not None)
  return max(votes, key=votes.__getitem__, default=None)  # the first of equals


def majority_correct(answers: Sequence[Sequence[str | None]], correct: np.ndarray) -> np.ndarray:
  """Whether each question's majority answer is right (maj@K).

  Answers are equal where their strings are. One is right where a sample that gave it was.

  Args:
    answers: Q lists of K; correct: bool[Q, K].
  Returns: bool[Q].
  """
  winners = [majority(row) for row in answers]
  return np.array([
    winner is not None and any(right for answer, right in zip(row, rights) if answer == winner)
    for winner, row, rights in zip(winners, answers, correct, strict=True)
  ], bool)  # fmt: skip


_DRAWS_AT_ONCE = 2**20  # indices in memory: 8 MiB


def bootstrap_interval(
  values: np.ndarray, seed: int, level: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean over questions.

  Questions are what is resampled: samples of one question are not independent.

  Args:
    values: f[Q], one figure per question.
  Raises: ValueError without questions.
  """
  values = np.asarray(values, np.float64)
  if not len(values):
    raise ValueError("an interval needs at least one question")
  rng = np.random.default_rng(seed)
  at_once = max(1, _DRAWS_AT_ONCE // len(values))
  means = []
  for first in range(0, resamples, at_once):
    shape = (min(at_once, resamples - first), len(values))
    means.append(values[rng.integers(0, len(values), shape)].mean(axis=1))
  low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def summarise(records: Sequence[Mapping[str, Any]], samples: int, seed: int) -> dict[str, Any]:
  """All figures of an evaluation.

  Args:
    records: one per response, a question's `samples` next to each other, with `reward` (right
      is the full 1), `extracted`, `finished` and `tokens` (length); unfinished ones do not vote.
    seed: of the bootstrap.
  Returns: `accuracy` (mean over samples), `pass@k` for k = 1, 2, 4, ... and K, `maj@K`,
    `intervals` with the 95 % interval [low, high] of each of these over questions,
    `unfinished_rate`, `mean_length` (tokens), `mean_reward`, and the counts `questions`,
    `samples` and `tokens`.
  """
  reward, finished, tokens = (
    np.array([record[name] for record in records]).reshape(-1, samples)
    for name in ("reward", "finished", "tokens")
  )
  correct = reward == 1
  votes = [record["extracted"] if record["finished"] else None for record in records]
  answers = [votes[i : i + samples] for i in range(0, len(votes), samples)]
  sizes = sorted({1 << i for i in range(samples.bit_length())} | {samples})
  by_question = {
    "accuracy": correct.mean(axis=1),
    **{f"pass@{k}": pass_at_k(correct.sum(axis=1), samples, k) for k in sizes},
    f"maj@{samples}": majority_correct(answers, correct),
  }
  return {
    **{name: float(values.mean()) for name, values in by_question.items()},
    "intervals": {
      name: list(bootstrap_interval(values, seed)) for name, values in by_question.items()
    },
    "unfinished_rate": float(np.mean(~finished)),
    "mean_length": float(np.mean(tokens)),
    "mean_reward": float(np.mean(reward)),
    "questions": len(answers),
    "samples": samples,
    "tokens": int(np.sum(tokens)),
  }
