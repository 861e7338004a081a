"""One update on a full 6-6-6 tree, packed against edge by edge: same rows, same total loss.

    python benchmarks/packed_update.py --segment-tokens 30
    python benchmarks/packed_update.py --segment-tokens 100

Both ways run in turn in this process, so that what else the machine does meets both of them, and
must agree on the loss and on the norm of the first gradient. All of an edge's tokens are trained
on. FLOPs are counted by `spo_jax/plan/costs.py`, padding included.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side

from spo_jax import model, update
from spo_jax.attention import trie_keys
from spo_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.packing import edge_rows, optimiser_batches, tree_edges
from spo_jax.plan import costs
from spo_jax.structs import Prompts, RolloutTree, TrainRows

CONFIG = ModelConfig(
  vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8,
  num_kv_heads=4,
)  # fmt: skip
BRANCHES = (6, 6, 6)


def tree_rows(segment_tokens: int, prompt_tokens: int) -> TrainRows:
  """The edges of one tree whose segments are all full."""
  rng = np.random.default_rng(0)
  shapes = [(1, 6, segment_tokens), (1, 36, segment_tokens), (1, 216, segment_tokens)]
  nodes = [shape[:2] for shape in shapes]
  tree = RolloutTree(
    tokens=tuple(rng.integers(0, CONFIG.vocab_size, shape, np.int32) for shape in shapes),
    logprobs=tuple(np.full(shape, -np.log(CONFIG.vocab_size), np.float32) for shape in shapes),
    lengths=tuple(np.full(shape, segment_tokens, np.int32) for shape in nodes),
    finished=tuple(np.zeros(shape, bool) for shape in nodes),
    valid=tuple(np.ones(shape, bool) for shape in nodes),
    rewards=tuple(np.zeros(shape, np.float32) for shape in nodes),
    branch_factors=BRANCHES,
  )
  prompts = Prompts(
    rng.integers(0, CONFIG.vocab_size, (1, prompt_tokens), np.int32),
    np.array([prompt_tokens], np.int32), np.zeros(1, np.int64), (None,),
  )  # fmt: skip
  advantages = tuple(rng.normal(size=shape).astype(np.float32) for shape in nodes)
  edges = tree_edges(prompts, tree, advantages, iteration=0)
  return edge_rows(edges, None, len(edges.start))


def side(name: str, rows: TrainRows, params: Any, micro_rows: int, pack_tokens: int) -> Any:
  """A function that makes one update and returns its loss and the norm of its gradient."""
  count = len(rows.tokens)
  ((batch, used),) = optimiser_batches(
    rows, count, micro_rows, 1, np.random.default_rng(0), pack_tokens
  )
  length = batch.tokens.shape[-1]
  keys = trie_keys(length, rows.tokens.shape[1]) if pack_tokens else 0
  flops = costs.update(
    CONFIG, model.count_params(CONFIG), used, micro_rows, length, False, "none", costs.Split(), keys
  ).flops  # fmt: skip
  print(
    f"  {name:9} {int(batch.is_token.sum()):,} tokens in {used * micro_rows} rows of {length}, "
    f"{flops / 1e9:,.0f} GFLOP"
  )
  optimizer = update.make_optimizer(OptimizerConfig(learning_rate=1e-5))
  state = update.init_state(jax.tree.map(jnp.copy, params), optimizer)
  inputs = jax.device_put((batch, np.int32(used), np.float32(1)))

  def step(turn: int) -> tuple[float, float]:
    nonlocal state
    state, metrics = update.policy_update(CONFIG, TrainConfig(), optimizer, state, None, *inputs)
    return float(metrics["loss/policy"]), float(metrics["loss/gradient_norm"])

  return step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--segment-tokens", type=int, default=30, help="M, of every level")
  parser.add_argument("--prompt-tokens", type=int, default=64)
  parser.add_argument("--pack-tokens", type=int, default=4096)
  parser.add_argument("--micro-rows", type=int, default=6, help="edges of one forward pass")
  parser.add_argument("--repeat", type=int, default=5)
  args = parser.parse_args()
  rows = tree_rows(args.segment_tokens, args.prompt_tokens)
  unique = args.prompt_tokens + int(rows.mask.sum())
  params = jax.jit(lambda: model.init_params(CONFIG, jax.random.key(0)))()
  print(
    f"{model.count_params(CONFIG) / 1e6:.1f} M parameters, a 6-6-6 tree with M = "
    f"{args.segment_tokens}: {len(rows.tokens)} edges, {unique:,} unique tokens"
  )
  steps = {
    "edges": side("edges", rows, params, args.micro_rows, 0),
    "packed": side("packed", rows, params, 1, args.pack_tokens),
  }
  turns = side_by_side.compare(steps, unique, args.repeat, ("edges", "packed"))
  (edges, packed) = (np.array(found[0]) for found in turns.values())
  print(f"  loss and gradient norm: edges {edges}, packed {packed}")
  np.testing.assert_allclose(packed, edges, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
  main()
