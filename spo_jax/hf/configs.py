"""config.json and generation_config.json <-> ModelConfig and ids that end a response."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

from spo_jax import model
from spo_jax.config import ConfigError, ModelConfig, RopeScaling
from spo_jax.hf.folders import find_folder, read_json

ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}


def read_config(path_or_name: str | os.PathLike[str]) -> ModelConfig:
  """What the config.json of a local folder or hub name describes; weights are not touched.

  Both spellings of rotary parameters are read: `rope_parameters` of transformers 5, and
  `rope_theta` with `rope_scaling` before. compute_dtype stays at its default.

  Raises: ConfigError, one line, for whatever is not supported.
  """
  return parse_config(find_folder(path_or_name, weights=False) / "config.json")


def parse_config(file: Path) -> ModelConfig:
  raw = read_json(file)
  family = str(raw.get("model_type"))
  architectures = raw.get("architectures") or [ARCHITECTURES.get(family)]
  if family not in ARCHITECTURES or architectures != [ARCHITECTURES[family]]:
    raise ConfigError(
      f"{file}: architectures={_shown(architectures)} with model_type={family} is not "
      f"supported; supported are {', '.join(ARCHITECTURES.values())}."
    )
  number = functools.partial(_number, file, raw)
  integer = functools.partial(_number, file, raw, kind=int)
  hidden, heads = integer("hidden_size"), integer("num_attention_heads")
  # Early Llama folders lack the key, elsewhere its absence means a number of that family's own.
  absent = None if family != "llama" and "num_key_value_heads" not in raw else heads
  kv_heads = integer("num_key_value_heads", absent)
  whole = hidden // heads if hidden % heads == 0 else None
  width = integer("head_dim", 128 if family == "qwen3" else whole)
  if heads % kv_heads or width % 2:
    raise ConfigError(
      f"{file}: num_attention_heads={heads}, num_key_value_heads={kv_heads}, head_dim={width}: "
      "heads must divide into groups, and a head into pairs of channels."
    )
  if family in ("llama", "qwen3"):
    bias = _flag(file, raw, "attention_bias")
    qkv_bias, o_bias = bias, bias
  else:
    qkv_bias, o_bias = family == "qwen2", False
  config = ModelConfig(
    family=family,
    vocab_size=integer("vocab_size"),
    hidden_size=hidden,
    intermediate_size=integer("intermediate_size"),
    num_layers=integer("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=0 if width == whole else width,
    norm_eps=number("rms_norm_eps", 1e-6),
    qk_norm=family == "qwen3",
    qkv_bias=qkv_bias,
    o_bias=o_bias,
    mlp_bias=family == "llama" and _flag(file, raw, "mlp_bias"),
    tie_embeddings=_flag(file, raw, "tie_word_embeddings"),
    rope_theta=_rope_theta(file, raw),
    rope_scaling=_rope_scaling(file, raw),
    max_position=integer("max_position_embeddings"),
  )
  _refuse_unsupported(file, raw, config)
  return config


def _refuse_unsupported(file: Path, raw: dict[str, Any], config: ModelConfig) -> None:
  """Raises ConfigError for settings that change what a model computes and are not built."""
  if (act := raw.get("hidden_act", "silu")) != "silu":
    raise ConfigError(f"{file}: hidden_act={_shown(act)} is not supported; silu is.")
  if raw.get("quantization_config") is not None:
    raise ConfigError(
      f"{file}: quantization_config={_shown(raw['quantization_config'])} is not supported; "
      "float32, bfloat16 and float16 weights are."
    )
  if raw.get("is_causal") is False:
    raise ConfigError(f"{file}: is_causal=false is not supported; tokens see what precedes them.")
  layers = raw.get("layer_types")
  kinds = layers if isinstance(layers, list) else [layers or "full_attention"]
  if other := [kind for kind in kinds if kind != "full_attention"]:
    raise ConfigError(
      f"{file}: layer_types has {_shown(other[0])}; only full_attention is supported."
    )
  asked = layers is None and _flag(file, raw, "use_sliding_window")  # layer_types decides instead
  can_slide = config.family == "mistral" or (config.family in ("qwen2", "qwen3") and asked)
  # A null means no window; where the key is absent, transformers takes 4096.
  if can_slide and raw.get("sliding_window", 4096) is not None:
    window = _number(file, raw, "sliding_window", 4096, kind=int)
    if window < config.max_position:
      raise ConfigError(
        f"{file}: sliding_window={window} is in use, as max_position_embeddings="
        f"{config.max_position} is longer; only attention to all positions is supported. To use "
        f"the first {window}, set max_position_embeddings to {window} in the file."
      )


def _rope(file: Path, raw: dict[str, Any]) -> dict[str, Any]:
  rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
    raise ConfigError(
      f"{file}: rope_parameters={_shown(rope)} is not supported; one set of parameters for "
      "all layers is."
    )
  return rope


def _rope_theta(file: Path, raw: dict[str, Any]) -> float:
  rope = _rope(file, raw)
  return _number(file, raw if rope.get("rope_theta") is None else rope, "rope_theta", 10_000.0)


def _rope_scaling(file: Path, raw: dict[str, Any]) -> RopeScaling:
  rope = _rope(file, raw)
  partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
  if partial not in (None, 1):
    raise ConfigError(f"{file}: partial_rotary_factor={partial} is not supported; 1 is.")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return RopeScaling()
  if kind not in ("linear", "llama3"):
    raise ConfigError(
      f"{file}: rope_type={_shown(kind)} is not supported; default, linear and llama3 are."
    )
  factor = _number(file, rope, "factor")
  if kind == "linear":
    return RopeScaling(kind="linear", factor=factor)
  low, high = _number(file, rope, "low_freq_factor"), _number(file, rope, "high_freq_factor")
  if high <= low:
    raise ConfigError(f"{file}: high_freq_factor={high} must be above low_freq_factor={low}.")
  # transformers looks in these three places, in this order.
  key = "original_max_position_embeddings"
  places = {**raw, key: raw.get(key, rope.get(key, raw.get("max_position_embeddings")))}
  return RopeScaling(
    kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
    original_max_position=_number(file, places, key, kind=int),
  )  # fmt: skip


def _number(
  file: Path, raw: dict[str, Any], key: str, default: Any = None, kind: type = float
) -> Any:
  """A positive number; a default of None makes the key required."""
  value = default if raw.get(key) is None else raw[key]
  if value is None:
    raise ConfigError(f"{file} lacks {key}.")
  right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
  if not right or kind(value) != value:
    noun = "integer" if kind is int else "number"
    raise ConfigError(f"{file}: {key}={_shown(value)} is not a positive {noun}.")
  return kind(value)


def _flag(file: Path, raw: dict[str, Any], key: str) -> bool:
  value = raw.get(key)
  if value not in (None, True, False):
    raise ConfigError(f"{file}: {key}={_shown(value)} is neither true nor false.")
  return bool(value)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def config_json(config: ModelConfig, family: str, dtype: str) -> dict[str, Any]:
  """config.json that transformers 5 and 4 read alike: rope and dtype in both spellings."""
  rope: dict[str, Any] = {"rope_type": "default"}
  scaling = config.rope_scaling
  if scaling.kind != "none":
    rope = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind == "llama3":
    rope["low_freq_factor"] = scaling.low_freq_factor
    rope["high_freq_factor"] = scaling.high_freq_factor
    rope["original_max_position_embeddings"] = scaling.original_max_position
  full = {"sliding_window": None}  # where the key is absent, transformers takes 4096
  own: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias},
    "mistral": full,
    "qwen2": {**full, "use_sliding_window": False},
    "qwen3": {**full, "use_sliding_window": False, "attention_bias": config.qkv_bias},
  }
  return {
    "architectures": [ARCHITECTURES[family]],
    "model_type": family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": model.head_width(config),
    "hidden_act": "silu",
    "max_position_embeddings": config.max_position,
    "rms_norm_eps": config.norm_eps,
    "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    "rope_theta": config.rope_theta,
    "rope_scaling": None if scaling.kind == "none" else rope,
    "tie_word_embeddings": config.tie_embeddings,
    "dtype": dtype,
    "torch_dtype": dtype,
    **own[family],
  }


def export_family(config: ModelConfig) -> str:
  """The family whose flags these are; where several fit, the one more programs know."""
  plain = not (config.qk_norm or config.mlp_bias)
  even = config.qkv_bias == config.o_bias
  # transformers refuses a Llama whose heads do not divide its width, even with a head_dim.
  divides = config.hidden_size % config.num_heads == 0
  fits = {
    "llama": not config.qk_norm and even and divides,
    "qwen2": plain and config.qkv_bias and not config.o_bias,
    "qwen3": config.qk_norm and even and not config.mlp_bias,
    "mistral": plain and even and not config.qkv_bias,
  }
  for family, fit in fits.items():
    if fit and config.family in ("auto", family):
      return family
  raise ConfigError(
    f"model.family={config.family} has no architecture with qk_norm={config.qk_norm}, qkv_bias="
    f"{config.qkv_bias}, o_bias={config.o_bias}, mlp_bias={config.mlp_bias}, hidden_size="
    f"{config.hidden_size}, num_heads={config.num_heads}. Change these, or set model.family=auto."
  )


def end_ids(path_or_name: str | os.PathLike[str], tokenizer: Any) -> tuple[int, ...]:
  """Ids that end a response: those of generation_config.json, or of config.json where that file
  is missing, then that of the tokenizer.

  Raises: ConfigError where there are none, or the file does not hold ids.
  """
  folder = find_folder(path_or_name, weights=False)
  files = (folder / name for name in ("generation_config.json", "config.json"))
  file = next((file for file in files if file.exists()), folder)
  found = None if file == folder else read_json(file).get("eos_token_id")
  ids = found if isinstance(found, list) else [] if found is None else [found]
  if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
    raise ConfigError(f"{file}: eos_token_id={_shown(found)} is no id and no list of ids.")
  if tokenizer.eos_token_id is not None:
    ids = [*ids, int(tokenizer.eos_token_id)]
  if not ids:
    raise ConfigError(
      f"{path_or_name} has no end-of-text token: set eos_token_id in its generation_config.json."
    )
  return tuple(dict.fromkeys(ids))
