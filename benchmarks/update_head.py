"""One update with the head at every position against one with the head where the loss looks.

    python benchmarks/update_head.py [--vocab 20 --hidden 128 --layers 2 --rows 32 --length 67]

All ways run in turn in this process, so that what else the machine does meets all of them. The
default is the shape of Qwen2.5-0.5B in float32: 12 GiB of memory and some minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax import head, model, update
from spo_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.structs import TrainRows


def plain(hidden, weights, targets, mask, temperature):
  """Logits of everything at once, and the derivative that JAX makes of it."""
  logits = jnp.einsum("bte,ev->btv", hidden, weights) / temperature
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  return jnp.where(mask, chosen, 0.0)


def chunked(hidden, weights, targets, mask, temperature):
  """Every position, chunk by chunk."""
  return jnp.where(mask, head.chunked_logprobs(hidden, weights, targets, temperature), 0.0)


WAYS = {"plain": plain, "chunked": chunked, "packed": head.packed_logprobs}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--vocab", type=int, default=151_936)
  parser.add_argument("--hidden", type=int, default=896)
  parser.add_argument("--layers", type=int, default=24)
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--fraction", type=float, default=0.15, help="of the tokens in the mask")
  parser.add_argument("--repeat", type=int, default=5)
  parser.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "packed"])
  args = parser.parse_args()
  config = ModelConfig(
    vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.hidden * 38 // 7,
    num_layers=args.layers, num_heads=args.hidden // 64, num_kv_heads=max(args.hidden // 448, 1),
    qkv_bias=True, rope_theta=1e6, norm_eps=1e-6,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  shape = (1, args.rows, args.length)
  batch = TrainRows(
    tokens=rng.integers(0, args.vocab, shape, np.int32), is_token=np.ones(shape, bool),
    mask=rng.random(shape) < args.fraction, logprobs=np.full(shape, -3, np.float32),
    advantages=rng.normal(size=shape).astype(np.float32),
  )  # fmt: skip
  optimizer = update.make_optimizer(OptimizerConfig(learning_rate=1e-6))
  state = jax.jit(
    lambda: update.init_state(model.init_params(config, jax.random.key(0)), optimizer)
  )()
  static = (config, TrainConfig(), optimizer)
  inputs = (None, jax.device_put(batch), jnp.int32(1), jnp.float32(1))
  print(
    f"{model.count_params(config) / 1e6:.1f} M parameters, vocabulary {args.vocab}, rows "
    f"{args.rows} x {args.length}, {batch.mask.sum()} tokens in the mask"
  )

  programs, seconds, losses = {}, {name: [] for name in args.ways}, {}
  for name in args.ways:
    jax.clear_caches()  # the program has one name for all ways
    started = time.perf_counter()
    with mock.patch.object(update, "token_logprobs", WAYS[name]):
      programs[name] = update.policy_update.lower(*static, state, *inputs).compile()
    memory = programs[name].memory_analysis()
    print(
      f"{name:8} compiled in {time.perf_counter() - started:.0f} s, temporaries "
      f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB, arguments "
      f"{memory.argument_size_in_bytes / 2**20:,.0f} MiB"
    )
  for turn in range(args.repeat + 1):
    for name, program in programs.items():
      started = time.perf_counter()
      state, metrics = jax.block_until_ready(program(state, *inputs))
      if turn:  # the first one warms up
        seconds[name].append(time.perf_counter() - started)
      losses.setdefault(name, []).append(float(metrics["loss/gradient_norm"]))
  first = statistics.median(seconds[args.ways[0]])
  for name, took in seconds.items():
    median = statistics.median(took)
    print(
      f"{name:8} {median:8.3f} s  ({min(took):.3f} to {max(took):.3f})  "
      f"{first / median:.2f} x {args.ways[0]}; gradient norm {losses[name][0]:.7g}"
    )


if __name__ == "__main__":
  main()
