"""One policy update with the head where the loss looks, against one with the head everywhere.

    python benchmarks/update_head.py                                    # Qwen2.5-0.5B, .15 of 512
    python benchmarks/update_head.py --ways packed --micro-batches 4    # memory of 4 x 512 tokens
    python benchmarks/update_head.py --layers 2 --rows 32 --remat layer --dtype bfloat16 \
      --topology v5p:2x2x1

The first way is compared with the last: "plain" makes the logits [B, T, V] of everything at once,
"chunked" a part of them at a time, "packed" those of the mask. They run in turn in this process,
so that what else the machine does meets all of them; the highest memory that is printed belongs
to the process, so it tells of one way only where one is given. With `--topology` they are compiled
for one chip of a slice, and do not run; libtpu's figures are too high by its fragmentation.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spo_jax import head, model, sharding, update
from spo_jax.config import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.plan.chips import parse_topology
from spo_jax.plan.compiling import described_devices
from spo_jax.structs import TrainRows

GIB = 2**30


def plain(hidden, weights, targets, mask, temperature, tied):
  """Logits of everything at once, and the derivative that JAX makes of it."""
  weights = weights.T if tied else weights
  logits = jnp.einsum("bte,ev->btv", hidden, weights) / temperature
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  return jnp.where(mask, chosen, 0.0)


def chunked(hidden, weights, targets, mask, temperature, tied):
  weights = weights.T if tied else weights
  return jnp.where(mask, head.chunked_logprobs(hidden, weights, targets, temperature), 0.0)


def packed(hidden, weights, targets, mask, temperature, tied):
  return head.packed_logprobs(hidden, weights, targets, mask, temperature, tied=tied)


WAYS = {"plain": plain, "chunked": chunked, "packed": packed}


def random_batch(shape: tuple[int, int, int], vocab: int, fraction: float) -> TrainRows:
  """Rows of a policy that is still the one that sampled them: all ratios are near 1."""
  rng = np.random.default_rng(0)
  mask = rng.random(shape) < fraction
  mask[..., 0] = False  # the first token of a row is given
  return TrainRows(
    tokens=rng.integers(0, vocab, shape, np.int32), is_token=np.ones(shape, bool), mask=mask,
    logprobs=np.full(shape, -np.log(vocab), np.float32),
    advantages=rng.normal(size=shape).astype(np.float32),
  )  # fmt: skip


def compiled(way: str, mesh: Mesh, static: tuple[Any, ...], inputs: Any) -> Any:
  """The program of an update whose head is evaluated in that way; prints what memory it takes."""
  jax.clear_caches()  # all ways have one name and one set of shapes
  started = time.perf_counter()
  everywhere = NamedSharding(mesh, PartitionSpec())
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), inputs
  )
  config, _, optimizer = static
  state = update.state_template(config, optimizer, mesh)
  with jax.set_mesh(mesh), mock.patch.object(update, "token_logprobs", WAYS[way]):
    program = update.policy_update.lower(*static, state, None, *shapes).compile()
  memory = program.memory_analysis()
  print(
    f"  {way:9} compiled in {time.perf_counter() - started:.0f} s, temporaries "
    f"{memory.temp_size_in_bytes / GIB:.2f} GiB beside {memory.argument_size_in_bytes / GIB:.2f} "
    "GiB of state and rows"
  )
  return program


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=24)
  parser.add_argument("--hidden", type=int, default=896)
  parser.add_argument("--vocab", type=int, default=151_936)
  parser.add_argument("--rows", type=int, default=1, help="of a micro-batch")
  parser.add_argument("--micro-batches", type=int, default=1)
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--fraction", type=float, default=0.15, help="of the tokens in the mask")
  parser.add_argument("--remat", default="none", help="train.remat: none, dots or layer")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--topology", help="compile only, for one chip of this slice")
  parser.add_argument("--repeat", type=int, default=5, help="0: compile only")
  parser.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "packed"])
  args = parser.parse_args()
  topology = parse_topology(args.topology or "local")
  mesh = sharding.make_mesh(MeshConfig(), described_devices(topology)[:1])
  config = ModelConfig(
    vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.hidden * 38 // 7,
    num_layers=args.layers, num_heads=args.hidden // 64, num_kv_heads=max(args.hidden // 448, 1),
    qkv_bias=True, rope_theta=1e6, norm_eps=1e-6,
    compute_dtype=args.dtype,
  )  # fmt: skip
  batch = random_batch((args.micro_batches, args.rows, args.length), args.vocab, args.fraction)
  # So small a step that every turn is the same work on the same weights, whoever goes first.
  optimizer = update.make_optimizer(OptimizerConfig(learning_rate=1e-20))
  train = TrainConfig(whiten=False, remat=args.remat)
  static = (config, train, optimizer)
  inputs = (batch, np.int32(args.micro_batches), np.float32(1))
  print(
    f"{model.count_params(config) / 1e6:.1f} M parameters, vocabulary {args.vocab}, "
    f"{args.micro_batches} micro-batches of {args.rows} x {args.length}, {batch.mask.sum()} tokens "
    f"in the mask, remat {args.remat}"
  )
  programs = {way: compiled(way, mesh, static, inputs) for way in args.ways}
  if args.topology or not args.repeat:
    return

  initial = jax.jit(lambda: model.init_params(config, jax.random.key(0)))
  state, inputs = update.init_state(initial(), optimizer), jax.device_put(inputs)

  def step(program: Any) -> Callable[[int], np.ndarray]:
    def turn(_: int) -> np.ndarray:
      nonlocal state  # one for all ways: an update gives its memory to the next
      state, metrics = program(state, None, *inputs)
      return np.array([metrics["loss/policy"], metrics["loss/gradient_norm"]])

    return turn

  found = side_by_side.compare(
    {way: step(program) for way, program in programs.items()}, batch.tokens.size, args.repeat,
    (args.ways[0], args.ways[-1]),
  )  # fmt: skip
  for way, turns in found.items():
    print(f"  {way:9} loss {turns[0][0]:.8g}, norm of the gradient {turns[0][1]:.8g}")
    np.testing.assert_allclose(turns, [found[args.ways[0]][0]] * len(turns), 1e-4, 1e-5)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(f"  this process took {peak / GIB:.2f} GiB of memory at most", flush=True)


if __name__ == "__main__":
  main()
