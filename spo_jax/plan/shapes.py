"""The shape of the model to plan for, without its weights and, where known, without the hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from spo_jax import hf
from spo_jax.config import Config, ConfigError, ModelConfig, check_context

_QWEN = ModelConfig(
  family="qwen2", vocab_size=151936, qkv_bias=True, tie_embeddings=False, rope_theta=1e6,
  max_position=32768,
)  # fmt: skip
_LLAMA = ModelConfig(family="llama", tie_embeddings=False)


def _shape(
  base: ModelConfig, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **other: Any
) -> ModelConfig:
  changes: dict[str, Any] = {
    "hidden_size": hidden, "intermediate_size": inner, "num_layers": layers, "num_heads": heads,
    "num_kv_heads": kv_heads, **other,
  }  # fmt: skip
  return dataclasses.replace(base, **changes)


_QWEN_1_5B = _shape(_QWEN, 1536, 8960, 28, 12, 2, max_position=131072)
_RHO = _shape(_LLAMA, 2048, 5632, 22, 32, 4, vocab_size=32000)

# Dimensions as the models' own config.json state them; the names are those of the configs.
SHAPES = {
  "rho-1.1b": _RHO,
  "qwen2.5-0.5b": _shape(_QWEN, 896, 4864, 24, 14, 2, tie_embeddings=True),
  "qwen2.5-1.5b": dataclasses.replace(_QWEN_1_5B, tie_embeddings=True),
  "r1-qwen-1.5b": dataclasses.replace(_QWEN_1_5B, rope_theta=1e4),
  "deepseekmath-7b": _shape(_LLAMA, 4096, 11008, 30, 32, 32, vocab_size=102400, max_position=4096),
  "qwen2.5-7b": _shape(_QWEN, 3584, 18944, 28, 28, 4, vocab_size=152064),
  "qwen2.5-32b": _shape(_QWEN, 5120, 27648, 64, 40, 8, vocab_size=152064),
}
HUB_NAMES = {
  "microsoft/rho-math-1b-v0.1": "rho-1.1b",
  "realtreetune/rho-1b-sft-GSM8K": "rho-1.1b",
  "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
  "Qwen/Qwen2.5-1.5B": "qwen2.5-1.5b",
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "r1-qwen-1.5b",
  "realtreetune/deepseekmath-7b-sft-MATH-v2": "deepseekmath-7b",
}


def model_shape(
  config: Config, model_config: str | None, vocab_size: int | None
) -> tuple[ModelConfig, str]:
  """The model of a run, and where its shape was taken from.

  Args:
    model_config: a config.json or a name of SHAPES that stands for model.path.
    vocab_size: of a new model, whose tokenizer is not trained here.
  Raises: ConfigError where nothing says what the shape is, or rows exceed its context.
  """
  path = config.model.path
  if vocab_size is not None and vocab_size < 1:
    raise ConfigError(f"--vocab-size {vocab_size} must be 1 or more.")
  if vocab_size is not None and (model_config or path):
    raise ConfigError(
      f"--vocab-size {vocab_size} is for new models; {model_config or path} has its own. Leave it "
      "out."
    )
  if model_config in SHAPES:
    shape, source = SHAPES[model_config], f"built-in shape {model_config}"
  elif model_config is not None:
    if not os.path.isfile(model_config):
      raise ConfigError(
        f"--model-config {model_config} is no file and none of {', '.join(SHAPES)}."
      )
    shape, source = hf.parse_config(Path(model_config)), model_config
  elif path in HUB_NAMES and not os.path.isdir(path):
    shape, source = SHAPES[HUB_NAMES[path]], f"built-in shape {HUB_NAMES[path]}"
  elif path:
    shape, source = hf.read_config(path), f"config.json of {path}"
  else:
    words = vocab_size or config.model.vocab_size or config.model.tokenizer_tokens
    shape, source = dataclasses.replace(config.model, vocab_size=words), "model.* of the config"
  check_context(config, shape.max_position)
  own = config.model
  shape = dataclasses.replace(shape, compute_dtype=own.compute_dtype, attention=own.attention)
  return shape, source
