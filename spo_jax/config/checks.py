"""What no run can have: bounds of single values, and combinations that contradict each other."""

from __future__ import annotations

import dataclasses
import difflib

from spo_jax.config.schema import (
  ALGORITHMS,
  ATTENTION,
  FAMILIES,
  KL_KINDS,
  REMAT,
  ROPE_KINDS,
  TREE_BASELINES,
  Config,
  ConfigError,
  ModelConfig,
  get,
)

_LARGEST = 2**31 - 1  # seeds, counts and positions are int32 on the device


def validate(config: Config) -> None:
  """Raises ConfigError for values that no run can have."""
  _validate_ranges(config)
  rollout, train = config.rollout, config.train
  if train.batch_rows % train.micro_batch_rows:
    raise ConfigError(
      f"train.batch_rows={train.batch_rows} is not divisible by train.micro_batch_rows="
      f"{train.micro_batch_rows}. Set train.micro_batch_rows to a divisor of it."
    )
  if train.pack_tokens:
    _validate_packs(config)
  if config.sft.batch_rows % (config.sft.micro_batch_rows or config.sft.batch_rows):
    raise ConfigError(
      f"sft.batch_rows={config.sft.batch_rows} is not divisible by sft.micro_batch_rows="
      f"{config.sft.micro_batch_rows}. Set sft.micro_batch_rows to a divisor of it."
    )
  if not config.model.path:
    _validate_shape(config.model)
    check_context(config, config.model.max_position)
  if config.algorithm == "tree":
    _validate_tree(config)
  elif rollout.samples > rollout.rows:
    raise ConfigError(
      f"rollout.samples={rollout.samples} does not fit into rollout.rows={rollout.rows}. "
      f"Raise rollout.rows to {rollout.samples}."
    )
  if config.algorithm in ("grpo", "rloo") and rollout.samples < 2:
    raise ConfigError(
      f"algorithm={config.algorithm} compares samples of one question; rollout.samples="
      f"{rollout.samples} leaves nothing to compare. Raise it to 2 or more."
    )


def _validate_packs(config: Config) -> None:
  width, longest = config.train.pack_tokens, config.row_tokens
  if width < longest:
    raise ConfigError(
      f"train.pack_tokens={width} cannot hold a row of rollout.max_prompt_tokens + "
      f"rollout.max_response_tokens = {longest} tokens. Raise it to {longest}, or set 0."
    )
  if config.train.official:
    raise ConfigError(
      f"train.official averages over micro-batches of samples; train.pack_tokens={width} packs "
      "several into one row. Set it to 0."
    )


def check_context(config: Config, max_position: int) -> None:
  """Raises ConfigError where prompt and response do not fit into the model's context."""
  if config.row_tokens > max_position:
    rollout = config.rollout
    raise ConfigError(
      f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} + rollout.max_response_tokens="
      f"{rollout.max_response_tokens} is {config.row_tokens}; model.max_position={max_position} is "
      "the context. Lower one of the first two."
    )


def _validate_tree(config: Config) -> None:
  rollout, spo = config.rollout, config.spo
  if not spo.branch_factors or min(spo.branch_factors) < 1:
    raise ConfigError(
      f"spo.branch_factors={list(spo.branch_factors)} needs at least one factor, each 1 or more."
    )
  if config.leaves > rollout.rows:
    raise ConfigError(
      f"spo.branch_factors={list(spo.branch_factors)} makes {config.leaves} leaves; rollout.rows="
      f"{rollout.rows} cannot hold one tree. Raise rollout.rows to {config.leaves}."
    )
  fixed = spo.segment_tokens * (len(spo.branch_factors) - 1)
  if fixed >= rollout.max_response_tokens:
    raise ConfigError(
      f"spo.segment_tokens={spo.segment_tokens} x {len(spo.branch_factors) - 1} levels is {fixed} "
      f"tokens; rollout.max_response_tokens={rollout.max_response_tokens} leaves none for the "
      "last level. Lower spo.segment_tokens."
    )


def _validate_shape(model: ModelConfig) -> None:
  if model.num_heads % model.num_kv_heads:
    raise ConfigError(
      f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads="
      f"{model.num_kv_heads}. Set model.num_kv_heads to a divisor of it."
    )
  if not model.head_dim and model.hidden_size % model.num_heads:
    raise ConfigError(
      f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads="
      f"{model.num_heads}. Set model.head_dim, or change one of them."
    )
  rope = model.rope_scaling
  if rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
    raise ConfigError(
      f"model.rope_scaling.high_freq_factor={rope.high_freq_factor} must be above "
      f"model.rope_scaling.low_freq_factor={rope.low_freq_factor}. Raise it."
    )
  width = model.head_dim or model.hidden_size // model.num_heads
  if width % 2:
    raise ConfigError(
      f"model.head_dim={width} is odd; rotary embeddings turn pairs of channels. Make it even."
    )


def _validate_ranges(config: Config) -> None:
  """Bounds and choices of single values, as one table."""
  choices: dict[str, tuple[str, ...]] = {
    "algorithm": ALGORITHMS,
    "spo.baseline": TREE_BASELINES,
    "train.kl.kind": KL_KINDS,
    "train.remat": REMAT,
    "train.kl.aggregation": ("sequence_sum", "token_mean"),
    "model.attention": ATTENTION,
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.family": FAMILIES,
    "model.rope_scaling.kind": ROPE_KINDS,
  }
  minimum: dict[str, float] = {
    "seed": 0, "model.hidden_size": 1, "model.intermediate_size": 1, "model.num_layers": 1,
    "model.num_heads": 1, "model.num_kv_heads": 1, "model.head_dim": 0, "model.vocab_size": 0,
    "model.max_position": 1, "model.tokenizer_tokens": 258, "model.rope_scaling.factor": 1,
    "model.rope_scaling.low_freq_factor": 0, "model.rope_scaling.high_freq_factor": 0,
    "model.rope_scaling.original_max_position": 1,
    "task.operations": 1, "task.numbers": 2, "task.largest": 2, "task.unfinished_penalty": 0,
    "task.repeat_penalty": 0,
    "spo.interval": 1, "spo.continuations": 1, "spo.segment_tokens": 1,
    "spo.edges_per_question": 1, "spo.max_edge_age": 1, "spo.edges_per_iteration": 1,
    "rollout.questions": 1, "rollout.samples": 1, "rollout.rows": 1,
    "rollout.max_prompt_tokens": 1, "rollout.max_response_tokens": 1, "rollout.temperature": 0,
    "rollout.top_k": 0, "train.iterations": 0, "train.epochs": 1, "train.batch_rows": 1,
    "train.micro_batch_rows": 1, "train.pack_tokens": 0, "train.clip_low": 0, "train.clip_high": 0,
    "train.max_ratio": 1, "train.kl.coefficient": 0, "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0,
    "sft.max_steps": 0,
    "sft.batch_rows": 1, "sft.micro_batch_rows": 0, "eval.validation_problems": 0,
    "sft.check_every": 1, "sft.check_problems": 1,
    "sft.optimizer.learning_rate": 0, "sft.optimizer.warmup_steps": 0,
    "sft.optimizer.weight_decay": 0, "sft.optimizer.clip_norm": 0, "eval.problems": 1,
    "eval.every": 1, "eval.temperature": 0, "eval.texts": 0, "checkpoint.every": 1,
    "checkpoint.keep": 1, "model.rope_theta": 1, "model.norm_eps": 0,
  }  # fmt: skip
  for key, allowed in choices.items():
    if (value := get(config, key)) not in allowed:
      near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3)
      hint = f" (did you mean {near[0]}?)" if near else ""
      raise ConfigError(f"{key}={value} is not one of {', '.join(allowed)}{hint}.")
  for key, low in minimum.items():
    if not low <= (value := get(config, key)) <= _LARGEST:  # False for NaN too
      raise ConfigError(f"{key}={value} must be a number from {low:g} to {_LARGEST}.")
  for section, low in (("mesh", 1), ("rollout.mesh", 0)):
    for name, size in dataclasses.asdict(get(config, section)).items():
      if size != -1 and not low <= size <= _LARGEST:
        raise ConfigError(f"{section}.{name}={size} is no number of devices. Set {low} or more, or "
                          "-1 for all that are left.")  # fmt: skip
  if config.rollout.temperature == 0:
    raise ConfigError("rollout.temperature=0 samples without exploring. Set it above 0, e.g. 0.6.")
  for section in ("optimizer", "sft.optimizer"):
    for key in (f"{section}.b1", f"{section}.b2"):
      if not 0 <= get(config, key) < 1:
        raise ConfigError(f"{key}={get(config, key)} is outside [0, 1). Set e.g. 0.9.")
  for key, fix in (
    ("rollout.top_p", "1 to switch it off"), ("eval.top_p", "1 to switch it off"),
    ("spo.threshold", "e.g. 0.9; train.probability_mask=false trains on all tokens"),
    ("sft.target_accuracy", "1 to stop only where all are right"),
  ):  # fmt: skip
    if not 0 < get(config, key) <= 1:
      raise ConfigError(f"{key}={get(config, key)} is outside (0, 1]. Set {fix}.")
