"""Sampling with this project against Hugging Face `generate` (torch): same weights, same prompts.

    python benchmarks/rollouts.py 1m 7m 0.5b      # needs the extra `parity`, for torch

Every row samples its full length at temperature 1 from the whole vocabulary, in float32. Both
sides run in turn in this process, so that what else the machine does meets both of them.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import jax
import numpy as np
import side_by_side

from spo_jax import hf, model, rollouts
from spo_jax.config import ModelConfig
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


def ours(config: ModelConfig, params: Any, tokens: np.ndarray, new: int) -> Any:
  """A function that samples and returns the tokens, i32[B, new]."""
  rows, width = tokens.shape

  def grade(problems: Any, responses: np.ndarray, *_: Any) -> np.ndarray:
    return np.zeros(len(responses), np.float32)

  never = (config.vocab_size,)  # an id that no row samples
  sampling = Sampling(temperature=1.0, top_p=1.0, end_ids=never, pad_id=0, top_k=0, truncate=False)
  engine = Engine(config, sampling, rows, new, grade)
  prompts = Prompts(tokens, np.full(rows, width, np.int32), np.arange(rows), (None,) * rows)

  def sample(seed: int) -> np.ndarray:
    return rollouts.flat(engine, params, prompts, 1, jax.random.key(seed)).samples.tokens

  return sample


def theirs(folder: str, tokens: np.ndarray, new: int) -> Any:
  """The same with `generate` of the folder's model."""
  import torch
  from transformers import AutoModelForCausalLM

  network = AutoModelForCausalLM.from_pretrained(folder).eval()
  network.generation_config.eos_token_id = None
  prompts = torch.from_numpy(tokens.astype(np.int64))

  def sample(seed: int) -> np.ndarray:
    torch.manual_seed(seed)
    with torch.inference_mode():
      rows = network.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, max_new_tokens=new, pad_token_id=0,
      )  # fmt: skip
    return rows[:, tokens.shape[1] :].numpy()

  return sample


def compare(name: str, repeat: int) -> None:
  config, rows, width, new = CASES[name]
  params = jax.jit(lambda: model.init_params(config, jax.random.key(0)))()
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, width), np.int32)
  with tempfile.TemporaryDirectory() as folder:
    hf.save_pretrained(folder, config, params)
    samplers = {"generate": theirs(folder, tokens, new)}
  samplers["spo_jax"] = ours(config, params, tokens, new)
  print(
    f"{name}: {model.count_params(config) / 1e6:.1f} M parameters, {rows} rows, prompt {width}, "
    f"{new} new tokens"
  )
  sampled = side_by_side.compare(samplers, rows * new, repeat, ("generate", "spo_jax"))
  assert all(x.shape == (rows, new) for turns in sampled.values() for x in turns)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="+", choices=CASES)
  parser.add_argument("--repeat", type=int, default=5)
  options = parser.parse_args()
  for name in options.cases:
    compare(name, options.repeat)


if __name__ == "__main__":
  main()
