"""One policy update of this project against the same update in torch: weights, rows and optimiser.

    python benchmarks/update.py --rows 32 --micro-rows 8 --length 256    # needs the extra `parity`
    JAX_NUM_CPU_DEVICES=2 python benchmarks/update.py    # rows shared out to two devices

The torch side is what a user would write: a transformers model, log_softmax over the vocabulary,
the clipped objective, gradients over micro-batches, clipping by norm, AdamW; float32 on both
sides. They run in turn in this process, so that what else the machine does meets both of them,
and must agree on the norm of the first gradient.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side

from spo_jax import hf, model, sharding, update
from spo_jax.config import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.structs import TrainRows

CONFIG = ModelConfig(
  vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8,
  num_kv_heads=4,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
TRAIN = TrainConfig(whiten=False)


def ours(params: Any, batch: TrainRows) -> Any:
  """A function that makes one update and returns the norm of its gradient."""
  optimizer = update.make_optimizer(OPTIMIZER)
  mesh = sharding.make_mesh(MeshConfig())
  state = update.init_state(jax.tree.map(jnp.copy, params), optimizer)
  state = jax.device_put(state, sharding.placements(state, mesh))
  rows = sharding.place(batch, "micro_batches", mesh)
  used, temperature = jnp.int32(len(batch.tokens)), jnp.float32(1)

  def step(turn: int) -> float:
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = update.policy_update(
        CONFIG, TRAIN, optimizer, state, None, rows, used, temperature
      )
    return float(metrics["loss/gradient_norm"])

  return step


def theirs(folder: str, batch: TrainRows) -> Any:
  """The same in torch, for the folder's model."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(os.cpu_count() or 1)
  network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
  optimizer = torch.optim.AdamW(
    network.parameters(), lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2),
    weight_decay=OPTIMIZER.weight_decay,
  )  # fmt: skip
  micro_batches = [
    tuple(torch.from_numpy(np.array(x[i])) for x in
          (batch.tokens.astype(np.int64), batch.mask, batch.logprobs, batch.advantages))
    for i in range(len(batch.tokens))
  ]  # fmt: skip
  count = float(batch.mask.sum())

  def step(turn: int) -> float:
    optimizer.zero_grad(set_to_none=True)
    for tokens, mask, old, advantages in micro_batches:
      logits = network(tokens, use_cache=False).logits[:, :-1]
      logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
      ratio = torch.exp(logprobs - old[:, 1:])
      clipped = ratio.clamp(1 - TRAIN.clip_low, 1 + TRAIN.clip_high)
      gain = torch.minimum(ratio * advantages[:, 1:], clipped * advantages[:, 1:])
      (-(gain * mask[:, 1:]).sum() / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    return float(norm)

  return step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=32)
  parser.add_argument("--micro-rows", type=int, default=8)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--fraction", type=float, default=1.0, help="of the tokens in the mask")
  parser.add_argument("--repeat", type=int, default=5)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  shape = (args.rows // args.micro_rows, args.micro_rows, args.length)
  mask = rng.random(shape) < args.fraction
  mask[..., 0] = False  # the first token of a row is given
  batch = TrainRows(
    tokens=rng.integers(0, CONFIG.vocab_size, shape, np.int32), is_token=np.ones(shape, bool),
    mask=mask, logprobs=np.full(shape, -np.log(CONFIG.vocab_size), np.float32),
    advantages=rng.normal(size=shape).astype(np.float32),
  )  # fmt: skip
  params = jax.jit(lambda: model.init_params(CONFIG, jax.random.key(0)))()
  with tempfile.TemporaryDirectory() as folder:
    hf.save_pretrained(folder, CONFIG, params)
    steps = {"torch": theirs(folder, batch)}
  steps["spo_jax"] = ours(params, batch)
  print(
    f"{model.count_params(CONFIG) / 1e6:.1f} M parameters, {args.rows} rows of {args.length} in "
    f"micro-batches of {args.micro_rows}, {mask.sum()} tokens in the mask"
  )
  turns = side_by_side.compare(
    steps, args.rows * args.length, args.repeat, ("torch", "spo_jax")
  )
  norms = {side: found[0] for side, found in turns.items()}
  print("  gradient norms " + ", ".join(f"{side} {norm:.6g}" for side, norm in norms.items()))
  assert abs(norms["torch"] / norms["spo_jax"] - 1) < 1e-3, "the two sides are not the same update"


if __name__ == "__main__":
  main()
