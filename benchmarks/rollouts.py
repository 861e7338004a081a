"""Sampling with this project against Hugging Face `generate` and google-tunix's own sampler.

    python benchmarks/rollouts.py 1m 7m 0.5b      # needs the extra `parity`, for torch
    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    JAX_NUM_CPU_DEVICES=2 python benchmarks/rollouts.py 1m 7m --tunix-python tunix/bin/python

Same weights, same prompts. Every row samples its full length at temperature 1 from the whole
vocabulary, on all cores, in float32 or, without tunix, in bfloat16. The sides take turns, so that
what else the machine does meets each of them. The limit of float32 is counted first: a step
multiplies each row with every parameter and reads the cache as far as it is filled, both at rates
that are measured on the machine in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
import words

from spo_jax import hf, model, rollouts, sharding
from spo_jax.config import MeshConfig, ModelConfig
from spo_jax.rollouts import Engine
from spo_jax.structs import Prompts, Sampling

# Model, rows, prompt tokens, new tokens.
CASES = {
  "1m": (ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4,
    num_kv_heads=4), 64, 32, 128),
  "7m": (ModelConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8,
    num_kv_heads=4), 64, 32, 128),
  "0.5b": (ModelConfig(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
    num_kv_heads=2, qkv_bias=True, rope_theta=1e6), 8, 64, 16),
}  # fmt: skip


Side = Callable[[int], int]  # samples with the seed, and returns the tokens drawn


def engine_for(config: ModelConfig, rows: int, new: int) -> Engine:
  """Every row samples its full length from the whole vocabulary; all devices share out the rows."""
  never = (config.vocab_size,)  # an id that no row samples
  sampling = Sampling(temperature=1.0, top_p=1.0, end_ids=never, pad_id=0)
  grade = lambda problems, *_: np.zeros(len(problems), np.float32)
  return Engine(config, sampling, rows, new, grade, sharding.make_mesh(MeshConfig()))


def prompts_of(tokens: np.ndarray) -> Prompts:
  rows, width = tokens.shape
  return Prompts(tokens, np.full(rows, width, np.int32), np.arange(rows), (None,) * rows)


def ours(config: ModelConfig, params: Any, tokens: np.ndarray, new: int) -> Side:
  engine, prompts = engine_for(config, len(tokens), new), prompts_of(tokens)
  params = engine.place(params)

  def sample(seed: int) -> int:
    drawn = rollouts.flat(engine, params, prompts, 1, jax.random.key(seed)).samples
    return int(drawn.lengths.sum())

  return sample


def limits(config: ModelConfig, rows: int, width: int, new: int) -> str:
  """What a decode step must compute and read, and how long that takes at measured rates."""
  heads, kv_heads = config.num_heads, config.num_kv_heads
  past, head = width + new / 2, model.head_width(config)
  parameters = model.count_params(config)
  attention = 4 * config.num_layers * past * heads * head  # scores, and weights times values
  flops = rows * (2 * parameters + attention)
  read = 4 * (parameters + rows * config.num_layers * 2 * past * kv_heads * head)
  narrow, wide = (rows, config.hidden_size), (config.hidden_size, config.intermediate_size)
  factors = tuple(jnp.ones(shape) for shape in (narrow, wide, wide[::-1]))
  chain = jax.jit(
    lambda x, up, down: jax.lax.fori_loop(0, 64, lambda _, x: (x @ up) @ down * 1e-9, x)
  )
  per_second = 64 * 4 * rows * np.prod(wide) / _seconds(chain, *factors)
  matrix, vector = jnp.ones((2**15, 2**10)), jnp.ones(2**10)
  bytes_per_second = matrix.nbytes / _seconds(jax.jit(jnp.matmul), matrix, vector)
  compute, memory = flops / per_second, read / bytes_per_second
  return (
    f"a step: {flops / 1e6:,.0f} MFLOP, {compute * 1e3:.2f} ms at the {per_second / 1e9:.0f} "
    f"GFLOP/s of its largest matmuls; {read / 1e6:,.0f} MB, {memory * 1e3:.2f} ms at the "
    f"{bytes_per_second / 1e9:.1f} GB/s of a matrix times a vector; at most "
    f"{rows / max(compute, memory):,.0f} tokens/s"
  )


def _seconds(program: Callable[..., Any], *inputs: Any) -> float:
  """The fastest of seven calls."""
  jax.block_until_ready(program(*inputs))
  took = []
  for _ in range(7):
    started = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    took.append(time.perf_counter() - started)
  return min(took)


def compare(name: str, dtype: str, tunix_python: str | None, repeat: int) -> None:
  config, rows, width, new = CASES[name]
  config = dataclasses.replace(config, compute_dtype=dtype)
  params = jax.jit(lambda: model.init_params(config, jax.random.key(0)))()
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, width), np.int32)
  print(
    f"{name}: {model.count_params(config) / 1e6:.1f} M parameters, {rows} rows, prompt {width}, "
    f"{new} new tokens"
  )
  print(f"  {limits(config, rows, width, new)}", flush=True)
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as workers:
    hf.save_pretrained(folder, config, params, words.tokenizer(config.vocab_size))
    rivals = {"generate": (sys.executable, {"prompts": tokens.tolist(), "dtype": dtype})}
    if tunix_python and not config.qkv_bias and dtype == "float32":
      rivals["tunix"] = (tunix_python, {"prompts": words.texts(tokens)})
    else:
      why = "is given" if tunix_python is None else f"samples this model in {dtype}"
      print(f"  tunix is left out: no --tunix-python {why}")
    sides: dict[str, Side] = {}
    for rival, (python, case) in rivals.items():
      case = {"folder": folder, "new": new, **case}
      worker = side_by_side.Worker(python, f"with_{rival}.py", case)
      sides[rival] = workers.enter_context(worker)
    sides["spo_jax"] = ours(config, params, tokens, new)
    ratios = [(rival, "spo_jax") for rival in rivals]
    drawn = side_by_side.compare(sides, rows * new, repeat, *ratios)
  assert all(found == rows * new for turns in drawn.values() for found in turns), drawn


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="+", choices=CASES)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--tunix-python", help="an interpreter that has google-tunix")
  parser.add_argument("--repeat", type=int, default=5)
  options = parser.parse_args()
  for name in options.cases:
    compare(name, options.dtype, options.tunix_python, options.repeat)


if __name__ == "__main__":
  main()
