"""Where tokens stand: host-side gathers between responses and rows, no loop over rows."""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np

from spo_jax.structs import Prompts, Samples

Rows = TypeVar("Rows")  # a struct of arrays whose first axis is rows


def select(rows: Rows, index: np.ndarray | slice) -> Rows:
  """The indexed rows of every array."""
  return jax.tree.map(lambda x: x[index], rows)


def concatenate(parts: list[Rows]) -> Rows:
  """The rows of all parts, in order."""
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def unsampled(rows: int, width: int) -> Samples:
  """Responses of which nothing is sampled yet, the roots of trees."""
  return Samples(
    tokens=np.zeros((rows, width), np.int32),
    logprobs=np.zeros((rows, width), np.float32),
    lengths=np.zeros(rows, np.int32),
    finished=np.zeros(rows, bool),
  )


def fill(x: np.ndarray, count: int, value: int = 0) -> np.ndarray:
  """`x` with rows of `value` appended up to `count` rows, the fixed shape of a program."""
  pad = [(0, count - len(x))] + [(0, 0)] * (x.ndim - 1)
  return np.pad(x, pad, constant_values=value)


def before(lengths: np.ndarray, columns: int) -> np.ndarray:
  """bool[B, columns]: True on the first `lengths[b]` columns of row b."""
  return np.arange(columns) < lengths[:, None]


def between(start: np.ndarray, end: np.ndarray, columns: int) -> np.ndarray:
  """bool[B, columns]: True on columns `start[b] .. end[b] - 1` of row b."""
  return before(end, columns) & ~before(start, columns)


def join(prefix: np.ndarray, start: np.ndarray, own: Samples) -> Samples:
  """Whole responses: `prefix[:start]` followed by what was sampled behind it.

  Args:
    prefix: i32[B, T]; start: i32[B]; own: samples of any width.
  Returns: Samples of width T; logprobs are 0 on the prefix.
  """
  width = prefix.shape[1]
  is_prefix = before(start, width)
  is_own = between(start, start + own.lengths, width)
  return Samples(
    tokens=np.where(is_own, shift(own.tokens, start, width), np.where(is_prefix, prefix, 0)),
    logprobs=np.where(is_own, shift(own.logprobs, start, width), 0).astype(np.float32),
    lengths=start + own.lengths,
    finished=own.finished,
  )


def shift(x: np.ndarray, start: np.ndarray, width: int) -> np.ndarray:
  """Moves row b of [B, T] to the right by `start[b]`; what lies outside is arbitrary."""
  source = np.clip(np.arange(width) - start[:, None], 0, x.shape[1] - 1)
  return np.take_along_axis(x, source, axis=1)


def unshift(x: np.ndarray, start: np.ndarray, width: int) -> np.ndarray:
  """Columns `start[b] .. start[b] + width - 1` of row b, the inverse of `shift`."""
  return np.take_along_axis(x, start[:, None] + np.arange(width), axis=1)


def behind_prompts(
  prompts: Prompts, prompt: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows of `prompt + response`.

  Args:
    prompt: i[B], row of `prompts`; tokens: i32[B, T]; lengths: i32[B].
  Returns: tokens i32[B, L], is_token bool[B, L] and is_response bool[B, L], L = Lp + T.
  """
  start = prompts.lengths[prompt]
  width = prompts.tokens.shape[1] + tokens.shape[1]
  is_prompt = before(start, width)
  is_token = before(start + lengths, width)
  padded = np.pad(prompts.tokens[prompt], ((0, 0), (0, tokens.shape[1])))
  row = np.where(is_prompt, padded, np.where(is_token, shift(tokens, start, width), 0))
  return row.astype(np.int32), is_token, is_token & ~is_prompt
