"""Rows that are to grow, as requests to the sampler, and the queues in which they wait."""

from __future__ import annotations

import numpy as np

from spo_jax.layout import before, select
from spo_jax.stops import prefix_states
from spo_jax.structs import Array, Requests, Samples

# Continuations that wait in one queue, per slot. The last ones leave slots idle once per queue, so
# it is long; and bounded, because no run knows beforehand how many there will be.
QUEUE = 64
_KEPT = 4  # responses whose keys and values wait to be continued from, per slot


def filled(questions: int, each: int, slots: int, shards: int) -> int:
  """Questions of `each` rows and the fillers of the fixed shape: slots have a row each, shards
  the same number of questions."""
  at_once = max(slots // each, 1)
  return _up(_up(questions, at_once), shards)


def kept_at_once(questions: int, samples: int, slots: int) -> int:
  """Questions whose responses are continued before others are answered, in equal parts: memory
  bounds how many."""
  parts = -(-questions // max(_KEPT * slots // samples, 1))
  return -(-questions // parts)


def _up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple


def at_prompts(tokens: np.ndarray, lengths: np.ndarray) -> Requests:
  """One row behind each prompt, with nothing to sample yet."""
  rows, prefix, nothing = np.arange(len(lengths)), np.maximum(lengths, 1), np.zeros_like(lengths)
  return Requests(
    pieces=rows[:, None].astype(np.int32), offsets=nothing[:, None], prefix=prefix,
    token=tokens[rows, prefix - 1], stop_state=nothing, ids=nothing, limit=nothing,
  )  # fmt: skip


def behind(rows: Requests, own: Samples, stop_table: Array | None) -> Requests:
  """One row behind what each of these has sampled, whose own tokens are its last piece."""
  number = np.arange(len(own.lengths), dtype=np.int32)
  states = prefix_states(stop_table, own.tokens, rows.stop_state)
  return rows.replace(
    pieces=np.column_stack([rows.pieces, number]),
    offsets=np.column_stack([rows.offsets, rows.prefix - 1]),
    prefix=rows.prefix + own.lengths,
    token=own.tokens[number, np.maximum(own.lengths, 1) - 1],
    stop_state=states[number, own.lengths].astype(np.int32),
  )


def unique_prefixes(
  prompt: np.ndarray, tokens: np.ndarray, row: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the distinct (question, tokens before start) and each boundary's index there.

  Sorted by question first, so the numbering does not depend on how many are kept at once.
  """
  prefix = np.where(before(start, tokens.shape[1]), tokens[row], -1)
  named = np.concatenate([prompt[row, None], prefix], axis=1)
  _, first, inverse = np.unique(named, axis=0, return_index=True, return_inverse=True)
  return first, inverse.reshape(-1)


def queues(shard: np.ndarray, shards: int, length: int) -> list[np.ndarray]:
  """Shares rows out to as few queues as hold them, each with a part for every shard.

  Args:
    shard: i[B], where row b has to be; length: of a queue, so that every call has one shape.
  Returns: i[length] per queue, numbers of rows, -1 for fillers.
  """
  rank = np.zeros(len(shard), np.int64)  # among the rows of its shard
  for each in range(shards):
    rank[shard == each] = np.arange((shard == each).sum())
  part = length // shards
  count = -(-(rank.max(initial=-1) + 1) // part)
  queues = np.full((count, length), -1)
  # In turn, so that all queues have as much to do.
  queues[rank % count, shard * part + rank // count] = np.arange(len(shard))
  return list(queues)


def only(requests: Requests, rows: np.ndarray) -> Requests:
  """Those rows, and fillers where one is -1."""
  return select(requests, rows).replace(
    limit=np.where(rows >= 0, requests.limit[rows], 0).astype(np.int32)
  )
