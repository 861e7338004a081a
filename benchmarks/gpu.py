"""How near one GPU comes to its own peaks at the Qwen2.5-1.5B shape: bfloat16, random weights.

    python benchmarks/gpu.py attention   # of one new token: share of the bandwidth of a copy
    python benchmarks/gpu.py update      # share of the FLOP/s of a large matrix product
    python benchmarks/gpu.py decode      # a whole step: share of the bandwidth of a copy
    XLA_PYTHON_CLIENT_MEM_FRACTION=.6 python benchmarks/gpu.py generate    # against Hugging Face
    python benchmarks/gpu.py tree        # a whole rollout, 6-6-6

Both peaks are measured first, in the same process. FLOPs and bytes are counted, not read from a
profile: of an update what it must compute (nothing twice), of a step of decoding what it must
read (each parameter in bfloat16, keys and values as far as a row is filled). `--tiny` runs all of
it at a small shape, on whatever is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
from rollouts import engine_for, ours, prompts_of
from update_head import random_batch

from spo_jax import attention, hf, model, sampler, sharding, update
from spo_jax import rollouts as growing
from spo_jax.config import MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.hf.configs import config_json
from spo_jax.plan import costs
from spo_jax.queues import at_prompts
from spo_jax.structs import Prompts

QWEN = ModelConfig(
  vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
  num_kv_heads=2, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, max_position=32_768,
  compute_dtype="bfloat16",
)  # fmt: skip


def seconds(call: Callable[[], Any], repeat: int) -> list[float]:
  """Of `repeat` calls, each waited for, behind two that do not count."""
  took = []
  for _ in range(repeat + 2):
    started = time.perf_counter()
    jax.block_until_ready(call())
    took.append(time.perf_counter() - started)
  print(f"  first call {took[0]:.1f} s", flush=True)
  return took[2:]


def peaks(size: int) -> tuple[float, float]:
  """FLOP/s of a bfloat16 product of [size, size], bytes per second of a copy of 32 times as many,
  read and written."""
  key = jax.random.key(0)
  x = jax.random.normal(key, (size, size), jnp.bfloat16) * size**-0.5  # the variance stays
  product = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: x @ y, x))
  flops = 20 * 2 * size**3 / statistics.median(seconds(lambda: product(x), 5))
  y = jax.random.normal(key, (16 * size, size), jnp.float32)
  copy = jax.jit(lambda y: y + 1)
  copied = 2 * y.nbytes / statistics.median(seconds(lambda: copy(y), 9))
  print(f"peaks: {flops / 1e12:.0f} TFLOP/s, {copied / 1e9:,.0f} GB/s copied", flush=True)
  return flops, copied


def measure_attention(config: ModelConfig, options: argparse.Namespace) -> None:
  """Both ways of attending to a cache, full and half full; layers of their own, so that none is
  left in the chip's cache from the layer before."""
  _, copied = peaks(options.peak)
  layers, calls, width = 6, 8, model.head_width(config)
  shape = (options.rows, config.num_kv_heads, options.context, width)
  keys = jax.random.split(jax.random.key(0), 2 * layers)
  caches = [jax.random.normal(key, shape, config.compute_dtype) for key in keys]
  q = jax.random.normal(keys[0], (options.rows, 1, config.num_heads, width), config.compute_dtype)
  for asked in ("xla", "auto"):

    @jax.jit
    def attend(q: jax.Array, caches: list[jax.Array], positions: jax.Array) -> jax.Array:
      for keys, values in zip(caches[::2], caches[1::2]):
        q += attention.cache_attention(q, keys, values, positions, asked)  # noqa: B023
      return q

    for filled in (options.context, options.context // 2):
      positions = jnp.full((options.rows, 1), filled - 1)
      took = seconds(lambda: [attend(q, caches, positions) for _ in range(calls)], options.repeat)  # noqa: B023
      median = statistics.median(took) / calls / layers
      rate = 2 * caches[0].nbytes * filled / options.context / median
      print(
        f"attention={asked}, {filled} of {options.context} slots filled: {median * 1e6:.0f} us a "
        f"layer, {rate / 1e9:,.0f} GB/s of what is filled, {rate / copied:.3f} of the peak"
      )


def measure_update(config: ModelConfig, options: argparse.Namespace) -> None:
  """One update, all tokens in the mask, no reference."""
  flops, _ = peaks(options.peak)
  shape = (options.micro_batches, options.micro_rows, options.length)
  train = TrainConfig(whiten=False, remat=options.remat)
  optimizer = update.make_optimizer(OptimizerConfig(learning_rate=1e-6))
  mesh = sharding.make_mesh(MeshConfig())
  batch = sharding.place(random_batch(shape, config.vocab_size, 1.0), "micro_batches", mesh)
  state = jax.jit(lambda params: update.init_state(params, optimizer))(drawn_params(config))

  def step() -> Any:
    nonlocal state
    with jax.set_mesh(mesh):
      state, metrics = update.policy_update(
        config, train, optimizer, state, None, batch, jnp.int32(shape[0]), jnp.float32(1)
      )
    return metrics

  step_seconds = seconds(step, options.repeat)
  once = costs.Split(fused=True)
  forward = costs.forward(config, *shape[1:], once) + costs.head(config, *shape[1:], once)
  counted, median = 3 * forward.flops * shape[0], statistics.median(step_seconds)
  print(
    f"update of {shape[0]} x {shape[1]} rows of {shape[2]}, remat {options.remat}: "
    f"{median:.3f} s ({min(step_seconds):.3f} to {max(step_seconds):.3f}), "
    f"{batch.tokens.size / median:,.0f} tokens/s, {counted / 1e12:.0f} TFLOP, "
    f"{counted / median / 1e12:.0f} TFLOP/s, {counted / median / flops:.3f} of the peak"
  )


def random_prompts(config: ModelConfig, rows: int, width: int) -> Prompts:
  rng = np.random.default_rng(0)
  return prompts_of(rng.integers(0, config.vocab_size, (rows, width), np.int32))


def drawn_params(config: ModelConfig) -> Any:
  """Each leaf by itself: `init_params` of so many layers takes a minute to compile."""
  shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
  draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape), static_argnums=1)
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return structure.unflatten([draw(key, leaf.shape) for key, leaf in zip(keys, leaves)])


def step_bytes(config: ModelConfig, rows: int, context: float) -> float:
  """What a step must read: 2 bytes of every parameter, keys and values of every row."""
  of_token = sampler.store_bytes(config, 1, 1)
  return 2 * model.count_params(config) + rows * context * of_token


def measure_decode(config: ModelConfig, options: argparse.Namespace) -> None:
  """A step, from two calls of one program that differ in how many they take."""
  _, copied = peaks(options.peak)
  rows, new, few = options.rows, options.new, options.new // 4
  width = options.context - (new + few) // 2  # so that it is `context` halfway between them
  engine = engine_for(config, rows, new)
  params = engine.place(drawn_params(config))
  prompts = random_prompts(config, rows // 8, width)
  stores = (engine.prefill(params, prompts.tokens, prompts.lengths),)
  parent = np.repeat(np.arange(rows // 8), 8)
  requests = jax.tree.map(lambda x: x[parent], at_prompts(prompts.tokens, prompts.lengths))
  requests = requests.replace(ids=np.arange(rows, dtype=np.int32))

  def call(limit: int) -> Callable[[], Any]:
    limited = requests.replace(limit=np.full(rows, limit, np.int32))
    return lambda: engine.grow(params, stores, limited, jax.random.key(1), new, new)

  many, less = seconds(call(new), options.repeat), seconds(call(few), options.repeat)
  steps = [(a - b) / (new - few) for a, b in zip(many, less)]
  median, needed = statistics.median(steps), step_bytes(config, rows, options.context)
  print(
    f"decode, {rows} rows with {options.context} tokens: {median * 1e3:.2f} ms a step "
    f"({min(steps) * 1e3:.2f} to {max(steps) * 1e3:.2f}), {rows / median:,.0f} tokens/s, "
    f"{needed / 1e9:.2f} GB, {needed / median / 1e9:,.0f} GB/s, "
    f"{needed / median / copied:.3f} of the peak; a call of {few}: {statistics.median(less):.2f} s"
  )


def measure_generate(config: ModelConfig, options: argparse.Namespace) -> None:
  rows, width, new = options.rows, options.prompt, options.new
  hf_config = config_json(config, hf.export_family(config), "bfloat16")
  case = {
    "config": hf_config, "dtype": config.compute_dtype, "rows": rows, "width": width, "new": new
  }  # fmt: skip
  tokens = random_prompts(config, rows, width).tokens
  sides = {"spo_jax": ours(config, drawn_params(config), tokens, new)}
  print(f"{rows} rows, prompts of {width}, {new} new tokens")
  with side_by_side.Worker(options.torch_python, "with_generate.py", case) as theirs:
    drawn = side_by_side.compare(
      {"generate": theirs, **sides}, rows * new, options.repeat, ("generate", "spo_jax")
    )
  assert all(found == rows * new for turns in drawn.values() for found in turns), drawn


def measure_tree(config: ModelConfig, options: argparse.Namespace) -> None:
  """A tree whose rows all grow to their full length, in one slot for each of its leaves."""
  _, copied = peaks(options.peak)
  branches, segment = (6, 6, 6), options.segment_tokens
  leaves = int(np.prod(branches))
  engine = engine_for(config, leaves, len(branches) * segment)
  params = engine.place(drawn_params(config))
  prompts = random_prompts(config, 1, options.prompt)
  for turn in range(2):
    engine.take_counts()
    started = time.perf_counter()
    growing.tree(engine, params, prompts, branches, segment, jax.random.key(turn))
    took = time.perf_counter() - started
    counts = engine.counts
    print(
      f"tree 6-6-6 of {segment}, {['with compilation', 'again'][turn]}: {took:.2f} s, "
      f"{counts['decoded'] / took:,.0f} tokens/s, prefilled and decoded / unique "
      f"{(counts['prefilled'] + counts['decoded']) / counts['unique']:.4f}, keys and values "
      f"{engine.kv_bytes / 1e9:.1f} GB", flush=True,
    )  # fmt: skip
  needed, rows = 0.0, 1
  for depth, branch in enumerate(branches):
    rows *= branch
    context = options.prompt + (depth + 0.5) * segment
    needed += segment * step_bytes(config, rows, context)
  print(f"  {needed / 1e12:.2f} TB to read, {needed / copied / took:.3f} of the peak")


PARTS = {
  "attention": measure_attention, "update": measure_update, "decode": measure_decode,
  "generate": measure_generate, "tree": measure_tree,
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("part", choices=PARTS)
  parser.add_argument("--layers", type=int, default=QWEN.num_layers)
  parser.add_argument("--length", type=int, default=2048, help="of a row of the update")
  parser.add_argument("--micro-rows", type=int, default=8)
  parser.add_argument("--micro-batches", type=int, default=4)
  parser.add_argument("--remat", default="none", help="train.remat: none, dots or layer")
  parser.add_argument("--rows", type=int, default=256, help="decoded at once")
  parser.add_argument("--context", type=int, default=1024, help="of a row, halfway")
  parser.add_argument("--prompt", type=int, default=256, help="of generate and of the tree")
  parser.add_argument("--new", type=int, default=128, help="tokens of a row")
  parser.add_argument("--segment-tokens", type=int, default=600, help="M of the tree")
  parser.add_argument("--torch-python", default=sys.executable, help="has torch, transformers")
  parser.add_argument("--repeat", type=int, default=5)
  parser.add_argument("--peak", type=int, default=8192, help="width of the matrices of the peaks")
  parser.add_argument("--tiny", action="store_true")
  options = parser.parse_args()
  config = replace(QWEN, num_layers=options.layers)
  if options.tiny:
    config = replace(config, vocab_size=640, hidden_size=64, intermediate_size=128, num_layers=2,
                     num_heads=4)  # fmt: skip
    small = {"length": 64, "rows": 16, "context": 64, "prompt": 16, "new": 16, "repeat": 2,
             "segment_tokens": 8, "peak": 256}  # fmt: skip
    vars(options).update(small)
  device = jax.devices()[0]
  print(f"{device.device_kind}, jax {jax.__version__}, {model.count_params(config) / 1e9:.2f} G "
        "parameters")  # fmt: skip
  PARTS[options.part](config, options)


if __name__ == "__main__":
  main()
