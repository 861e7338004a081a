"""Every struct that passes between rooms, as a struct of arrays.

Dimension letters used in every shape of this project:

  P prompts (questions)    B rows               T response tokens
  L row tokens             S segments           C cache slots
  V vocabulary             E embedding width    N query heads
  K key/value heads        H head width         D tree levels

A row is `prompt + response`, left-aligned and padded on the right. `logprobs[:, t]`
scores `tokens[:, t]`; it is 0 where nothing was sampled.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import struct

Array = Any  # numpy on the host, jax.Array on the device


class KVCache(struct.PyTreeNode):
  """Keys and values of every row, left-aligned, with a length of its own per row.

  `length[b]` tokens of row b are stored; what lies behind them is never seen.
  """

  keys: tuple[jax.Array, ...]  # per layer [B, K, C, H]
  values: tuple[jax.Array, ...]  # per layer [B, K, C, H]
  length: jax.Array  # i32[B]


class KVStore(struct.PyTreeNode):
  """Pieces of context, each stored once for all rows that continue it: prompts, or the own
  tokens of the rows of one level."""

  keys: tuple[jax.Array, ...]  # per layer [pieces, K, C, H]
  values: tuple[jax.Array, ...]  # per layer [pieces, K, C, H]


class Requests(struct.PyTreeNode):
  """R rows to grow. A context is one piece of every store, laid one behind another.

  A piece may be wider than what it holds: the next one, and in the end the row itself, is
  written over the rest before anything sees it.
  """

  pieces: Array  # i32[R, stores], which piece of each store
  offsets: Array  # i32[R, stores], where in the context it begins, ascending
  prefix: Array  # i32[R], tokens of context, at least 1
  token: Array  # i32[R], the last of those; it is fed first, so no piece need hold it
  stop_state: Array  # i32[R], see stops.py, of what of the context is response; 0 for none
  ids: Array  # i32[R], request r draws with fold_in(key, ids[r])
  limit: Array  # i32[R], most tokens to sample; 0 for a filler of the fixed shape


class Sampling(struct.PyTreeNode):
  """How tokens are drawn. Logprobs are those of the tempered, untruncated softmax."""

  temperature: float | jax.Array  # 0: greedy
  top_p: float | jax.Array  # 1: off
  end_ids: tuple[int, ...] = struct.field(pytree_node=False)
  pad_id: int = struct.field(pytree_node=False)
  top_k: int = struct.field(pytree_node=False, default=0)  # 0: off
  truncate: bool = struct.field(pytree_node=False, default=False)  # top-p or top-k in use
  stop_table: Array | None = None  # i16[V, states], see stops.py; None: no stop strings


class Samples(struct.PyTreeNode):
  """What the sampler drew for B rows, response tokens only."""

  tokens: Array  # i32[B, T], pad after the end
  logprobs: Array  # f32[B, T], 0 after the end
  lengths: Array  # i32[B], the end-of-text token or stop string included
  finished: Array  # bool[B], the row ended by an end-of-text token or a stop string


class Prompts(struct.PyTreeNode):
  """Tokenised questions of one iteration."""

  tokens: np.ndarray  # i32[P, Lp]
  lengths: np.ndarray  # i32[P]
  question: np.ndarray  # i64[P], identity of the question across iterations
  problems: tuple[Any, ...] = struct.field(pytree_node=False)  # tasks.Problem, for the grader


class Trajectories(struct.PyTreeNode):
  """Whole responses with the value of every segment boundary (flat and chain rollouts).

  The one intermediate form of all estimators: a segment id per token and a value in
  front of each segment; S = 0 where no value was estimated.
  """

  prompt: np.ndarray  # i32[B], row of Prompts
  samples: Samples  # host arrays
  rewards: np.ndarray  # f32[B]
  segment: np.ndarray  # i32[B, T], -1: no segment
  values: np.ndarray  # f32[B, S]


class RolloutTree(struct.PyTreeNode):
  """P trees; level d (1..D) holds n_d = b_1 * ... * b_d nodes per tree.

  Node i's children one level down are i*b .. i*b + b - 1, so there are no parent
  pointers. Nodes below a finished one are not valid. Tuples run over levels 1..D.
  """

  tokens: tuple[np.ndarray, ...]  # i32[P, n_d, M_d]
  logprobs: tuple[np.ndarray, ...]  # f32[P, n_d, M_d]
  lengths: tuple[np.ndarray, ...]  # i32[P, n_d]
  finished: tuple[np.ndarray, ...]  # bool[P, n_d]
  valid: tuple[np.ndarray, ...]  # bool[P, n_d]
  rewards: tuple[np.ndarray, ...]  # f32[P, n_d], 0 on nodes that were not graded
  branch_factors: tuple[int, ...] = struct.field(pytree_node=False)


class Edges(struct.PyTreeNode):
  """Tree nodes as training samples: context, own tokens and one advantage each."""

  tokens: np.ndarray  # i32[B, L], prompt, path and own tokens
  logprobs: np.ndarray  # f32[B, L], of the behaviour policy, 0 outside the own tokens
  start: np.ndarray  # i32[B], first own token
  end: np.ndarray  # i32[B], one behind the last
  advantage: np.ndarray  # f32[B]
  question: np.ndarray  # i64[B]
  born: np.ndarray  # i32[B], iteration of the rollout


class Trie(struct.PyTreeNode):
  """How rows that begin alike share slots: each token once, behind those in front of it.

  Slot t sees slot s where s <= t < end[s]: itself and what stands in front of it in its row.
  Slots are in depth-first order, and rows that share nothing stand one behind the other.
  """

  positions: Array  # i32[B, L], of the token in its row
  previous: Array  # i32[B, L], slot of the token in front of it; its own slot where none is
  end: Array  # i32[B, L], one behind the last slot that sees it; 0: padding, seen by none
  samples: Array  # i32[B], rows that are trained on
  row_tokens: int = struct.field(pytree_node=False)  # of the longest row that may occur


class TrainRows(struct.PyTreeNode):
  """Training rows of fixed width: the one form that the update consumes."""

  tokens: Array  # i32[B, L]
  is_token: Array  # bool[B, L], real tokens, context included
  mask: Array  # bool[B, L], where the loss looks
  logprobs: Array  # f32[B, L], of the behaviour policy, from generation
  advantages: Array  # f32[B, L]
  trie: Trie | None = None  # None: one sample per row


class TrainState(struct.PyTreeNode):
  """What an update changes."""

  params: Any
  opt_state: Any
  step: jax.Array  # i32[], optimiser updates applied
