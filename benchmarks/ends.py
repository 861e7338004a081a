"""Random weights that end their responses, so that lengths are as spread as real ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax import model
from spo_jax.config import ModelConfig

LONGEST = 10  # times the median: where responses are cut


def mean_length(longest: int) -> float:
  """The mean of geometric lengths whose median is `longest / LONGEST`."""
  return 1 / (1 - 0.5 ** (LONGEST / longest))


def lengths(rng: np.random.Generator, rows: int, longest: int) -> np.ndarray:
  """i[rows], geometric with that mean, cut at `longest`."""
  return np.minimum(rng.geometric(1 / mean_length(longest), rows), longest)


def ending(config: ModelConfig, params: Any, end: int, mean: float) -> Any:
  """The weights of a model with a tied head, changed so that it draws `end` once in `mean` tokens.

  One channel is the same for all tokens, and so much the same in all hidden states that the end's
  share of it adds to its logit.
  """
  rows = np.random.default_rng(1).integers(0, config.vocab_size, (8, 64), np.int32)
  table = params["embed_tokens"].at[:, 0].set(20 * jnp.std(params["embed_tokens"]))

  @jax.jit
  def share(more: float) -> jax.Array:
    changed = {**params, "embed_tokens": table.at[end, 0].add(more)}
    logits = model.logits(config, changed, rows, np.ones(rows.shape, bool))
    return jnp.mean(jax.nn.softmax(logits)[..., end])

  low, high = 0.0, 100.0
  for _ in range(30):
    middle = (low + high) / 2
    low, high = (low, middle) if share(middle) * mean > 1 else (middle, high)
  return {**params, "embed_tokens": table.at[end, 0].add(low)}
