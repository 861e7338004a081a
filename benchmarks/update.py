"""One policy update of this project against the same update in torch: weights, rows and optimiser.

    python benchmarks/update.py --rows 32 --micro-rows 8 --length 256    # needs the extra `parity`
    JAX_NUM_CPU_DEVICES=2 python benchmarks/update.py    # rows shared out to two devices
    python benchmarks/update.py --rows 64 --longest 480 --pack-tokens 1152

The torch side is what a user would write: a transformers model, log_softmax over the vocabulary,
the clipped objective, gradients over micro-batches, each as long as its longest row, clipping by
norm, AdamW; float32 on both sides, or products in bfloat16, in torch with its autocast. They run in
turn in this process, so that what else the machine does meets both of them, and must agree on the
norm of the first gradient.

All tokens of all rows are trained on, or with `--longest` those of responses whose lengths are as
spread as real ones (ends.py), behind prompts of 32 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from typing import Any

import ends
import jax
import jax.numpy as jnp
import numpy as np
import side_by_side

from spo_jax import hf, model, sharding, update
from spo_jax.config import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.layout import before, between
from spo_jax.packing import optimiser_batches
from spo_jax.structs import TrainRows

CONFIG = ModelConfig(
  vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8,
  num_kv_heads=4,
)  # fmt: skip
PROMPT = 32  # tokens in front of responses
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
TRAIN = TrainConfig(whiten=False)


def ours(
  config: ModelConfig, params: Any, rows: TrainRows, micro_rows: int, pack_tokens: int
) -> Any:
  """A function that makes one update and returns the norm of its gradient."""
  optimizer = update.make_optimizer(OPTIMIZER)
  mesh = sharding.make_mesh(MeshConfig())
  state = update.init_state(jax.tree.map(jnp.copy, params), optimizer)
  state = jax.device_put(state, sharding.placements(state, mesh))
  ((batch, used),) = optimiser_batches(
    rows, len(rows.tokens), micro_rows, 1, np.random.default_rng(0), pack_tokens
  )
  print(f"  spo_jax: {used} micro-batches of {batch.tokens.shape[1:]} tokens")
  batch = sharding.place(batch, "micro_batches", mesh)
  used, temperature = jnp.int32(used), jnp.float32(1)

  def step(turn: int) -> float:
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = update.policy_update(
        config, TRAIN, optimizer, state, None, batch, used, temperature
      )
    return float(metrics["loss/gradient_norm"])

  return step


def theirs(folder: str, rows: TrainRows, micro_rows: int, dtype: str) -> Any:
  """The same in torch, for the folder's model."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(os.cpu_count() or 1)
  network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
  optimizer = torch.optim.AdamW(
    network.parameters(), lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2),
    weight_decay=OPTIMIZER.weight_decay,
  )  # fmt: skip
  micro_batches = []
  for first in range(0, len(rows.tokens), micro_rows):
    own = slice(first, first + micro_rows)
    longest = rows.is_token[own].sum(axis=1).max()
    columns = (rows.tokens.astype(np.int64), rows.mask, rows.logprobs, rows.advantages)
    micro_batches.append([torch.from_numpy(x[own, :longest].copy()) for x in columns])
  print("  torch: micro-batches of", *(tuple(batch[0].shape) for batch in micro_batches))
  count = float(rows.mask.sum())

  def step(turn: int) -> float:
    optimizer.zero_grad(set_to_none=True)
    for tokens, mask, old, advantages in micro_batches:
      with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = network(tokens, use_cache=False).logits[:, :-1]
      logprobs = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
      ratio = torch.exp(logprobs - old[:, 1:])
      clipped = ratio.clamp(1 - TRAIN.clip_low, 1 + TRAIN.clip_high)
      gain = torch.minimum(ratio * advantages[:, 1:], clipped * advantages[:, 1:])
      (-(gain * mask[:, 1:]).sum() / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    return float(norm)

  return step


def drawn_rows(args: argparse.Namespace) -> TrainRows:
  rng = np.random.default_rng(0)
  lengths, start = np.full(args.rows, args.length), np.ones(args.rows, int)
  if args.longest:
    lengths, start = PROMPT + ends.lengths(rng, args.rows, args.longest), start * PROMPT
  width = PROMPT + args.longest if args.longest else args.length
  shape = (args.rows, width)
  mask = between(start, lengths, width) & (rng.random(shape) < args.fraction)
  return TrainRows(
    tokens=rng.integers(0, CONFIG.vocab_size, shape, np.int32), is_token=before(lengths, width),
    mask=mask, logprobs=np.full(shape, -np.log(CONFIG.vocab_size), np.float32),
    advantages=rng.normal(size=shape).astype(np.float32),
  )  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--micro-rows", type=int, default=8)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--fraction", type=float, default=1.0, help="of the tokens in the mask")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--longest", type=int, default=0, help="response, where lengths differ")
  parser.add_argument("--pack-tokens", type=int, default=0, help="of ours; 0: no packs")
  parser.add_argument("--repeat", type=int, default=5)
  args = parser.parse_args()
  rows = drawn_rows(args)
  params = jax.jit(lambda: model.init_params(CONFIG, jax.random.key(0)))()
  with tempfile.TemporaryDirectory() as folder:
    hf.save_pretrained(folder, CONFIG, params)
    print(
      f"{model.count_params(CONFIG) / 1e6:.1f} M parameters, {args.rows} rows of "
      f"{rows.is_token.sum() / args.rows:.0f} tokens, {rows.tokens.shape[1]} at most, in "
      f"micro-batches of {args.micro_rows}, {rows.mask.sum()} tokens in the mask"
    )
    steps = {"torch": theirs(folder, rows, args.micro_rows, args.dtype)}
  micro_rows = len(jax.devices()) if args.pack_tokens else args.micro_rows
  config = dataclasses.replace(CONFIG, compute_dtype=args.dtype)
  steps["spo_jax"] = ours(config, params, rows, micro_rows, args.pack_tokens)
  turns = side_by_side.compare(
    steps, int(rows.is_token.sum()), args.repeat, ("torch", "spo_jax")
  )
  norms = {side: found[0] for side, found in turns.items()}
  print("  gradient norms " + ", ".join(f"{side} {norm:.6g}" for side, norm in norms.items()))
  allowed = 1e-3 if args.dtype == "float32" else 0.02
  assert abs(norms["torch"] / norms["spo_jax"] - 1) < allowed, "the sides are not the same update"


if __name__ == "__main__":
  main()
