"""Typed configuration: dataclasses below, YAML files and `--set a.b=c` on top of them.

Every number of a run lives here once. Files may name a `base:` file (relative to
themselves) that they change. Whatever is wrong stops with one line before any compute.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os.path
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write

ALGORITHMS = ("chain", "tree", "grpo", "rloo")
TREE_BASELINES = ("mean", "std", "leave_one_out")
KL_KINDS = ("k1", "abs", "k2", "k3")

_LARGEST = 2**31 - 1  # seeds, counts and positions are int32 on the device


class ConfigError(ValueError):
  """A configuration that cannot run; the message is one line naming value and fix."""

  def __init__(self, message: str):
    super().__init__(" ".join(message.split()))  # quoted values may hold line breaks


@dataclass(frozen=True)
class ModelConfig:
  """A decoder: Llama, Qwen2 or Qwen3 by its flags. Hashable, so it is a static argument."""

  path: str | None = None  # a model folder or hub name; None: a new model of this shape
  vocab_size: int = 0  # 0: that of the tokenizer
  hidden_size: int = 128
  intermediate_size: int = 512
  num_layers: int = 2
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 0  # 0: hidden_size / num_heads
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  qk_norm: bool = False
  qkv_bias: bool = False
  tie_embeddings: bool = True
  max_position: int = 2048
  compute_dtype: str = "float32"


@dataclass(frozen=True)
class TaskConfig:
  name: str = "arithmetic"
  path: str | None = None  # local data; generated tasks need none
  operations: int = 6  # arithmetic: steps per problem
  unfinished_penalty: float = 0.0  # subtracted from the reward of a response that never ends


@dataclass(frozen=True)
class SPOConfig:
  threshold: float = 0.9  # rho: cutpoints and the probability mask are tokens with p < rho
  interval: int = 5  # chain: cutpoints per segment
  continuations: int = 9  # chain: N rollouts per boundary
  branch_factors: tuple[int, ...] = (6, 6, 6)
  segment_tokens: int = 30  # tree: M tokens per level; the last level runs free
  baseline: str = "mean"  # tree: mean | std | leave_one_out
  edges_per_question: int = 32  # tree: quota of one draw from the edge buffer
  max_edge_age: int = 8  # tree: edges this old (in iterations) are discarded
  edges_per_iteration: int = 512  # tree: training rows drawn per iteration
  repeat_short_draws: bool = False  # tree: repeat edges where the buffer holds too few


@dataclass(frozen=True)
class RolloutConfig:
  questions: int = 64  # per iteration
  samples: int = 8  # responses per question (chain, grpo, rloo)
  rows: int = 256  # rows decoded at once
  max_prompt_tokens: int = 256
  max_response_tokens: int = 768
  temperature: float = 0.6
  top_p: float = 1.0
  top_k: int = 0
  recompute_logprobs: bool = False  # score with the trainer's forward instead of the sampler


@dataclass(frozen=True)
class KLConfig:
  coefficient: float = 0.0  # 0: no reference policy is kept or evaluated
  kind: str = "k3"
  aggregation: str = "sequence_sum"  # | token_mean


@dataclass(frozen=True)
class TrainConfig:
  iterations: int = 100
  epochs: int = 1  # passes over the rows of one iteration
  batch_rows: int = 128  # rows of one optimiser update
  micro_batch_rows: int = 32  # rows of one forward and backward pass
  clip_low: float = 0.2
  clip_high: float = 0.2
  probability_mask: bool = True  # train only on tokens with p_old < spo.threshold
  whiten: bool = True
  official: bool = False  # whiten and average per micro-batch, as the authors' code does
  max_ratio: float = 10.0  # skip an update whose mean probability ratio is above
  kl: KLConfig = field(default_factory=KLConfig)


@dataclass(frozen=True)
class OptimizerConfig:
  learning_rate: float = 1e-6
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.0
  clip_norm: float = 1.0


@dataclass(frozen=True)
class SFTConfig:
  """Warm start on demonstrations, ended by a dev set's accuracy rather than by a clock."""

  max_steps: int = 0  # 0: no warm start
  batch_rows: int = 16
  target_accuracy: float = 1.0  # stop when sampled dev accuracy reaches this
  check_every: int = 25
  check_problems: int = 256
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class EvalConfig:
  problems: int = 512
  every: int = 10  # iterations; the first and the last are always evaluated
  temperature: float = 1.0
  top_p: float = 1.0
  texts: int = 4  # sampled texts kept per evaluation


@dataclass(frozen=True)
class CheckpointConfig:
  every: int = 10  # iterations (and warm-start checks)
  keep: int = 2


@dataclass(frozen=True)
class MeshConfig:
  """Axes of the device mesh. Runs use one device so far, so no axis may be larger than 1."""

  data: int = -1  # -1: all devices that are left
  fsdp: int = 1
  tensor: int = 1


@dataclass(frozen=True)
class LogConfig:
  tensorboard: bool = True
  wandb: bool = False


@dataclass(frozen=True)
class Config:
  seed: int = 0
  algorithm: str = "chain"  # chain | tree | grpo | rloo
  model: ModelConfig = field(default_factory=ModelConfig)
  task: TaskConfig = field(default_factory=TaskConfig)
  spo: SPOConfig = field(default_factory=SPOConfig)
  rollout: RolloutConfig = field(default_factory=RolloutConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  sft: SFTConfig = field(default_factory=SFTConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  log: LogConfig = field(default_factory=LogConfig)

  @property
  def row_tokens(self) -> int:
    """L: tokens of one training row, and slots of one cache row."""
    return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

  @property
  def leaves(self) -> int:
    """Nodes of a tree's last level."""
    return math.prod(self.spo.branch_factors)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
  """Reads a YAML file and `key=value` overrides into a validated Config.

  Raises:
    ConfigError: one line, naming the value and the fix.
  """
  resolved = OmegaConf.structured(Config)
  for settings in _read_files(Path(path)):
    _assign(resolved, settings)
  for override in overrides:
    key, sep, _ = override.partition("=")
    if not sep or not key:
      raise ConfigError(f"--set {override}: expected key=value, such as --set seed=1.")
    try:
      settings = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except Exception as error:  # YAML raises many kinds, none of them ours
      raise ConfigError(f"--set {override} is not valid: {error}") from error
    _assign(resolved, settings)
  config = OmegaConf.to_object(resolved)
  assert isinstance(config, Config)
  validate(config)
  return config


def to_yaml(config: Config) -> str:
  """The resolved configuration; `load` reads it back to an equal Config."""
  return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_files(path: Path, seen: tuple[Path, ...] = ()) -> list[Any]:
  """The file and its chain of bases, furthest base first, as plain dicts."""
  if not os.path.isfile(path):  # unlike Path.is_file, never raises
    wrong = "is a directory, not a file" if os.path.isdir(path) else "does not exist"
    raise ConfigError(f"config file {path} {wrong}; configs/ holds the ones that ship.")
  if path.resolve() in seen:
    raise ConfigError(f"{path}: its `base:` files form a circle; remove one of them.")
  try:
    loaded = OmegaConf.to_container(OmegaConf.load(path))
  except Exception as error:  # YAML raises many kinds, none of them ours
    raise ConfigError(f"{path} is not valid YAML: {error}") from error
  if not isinstance(loaded, dict):
    raise ConfigError(f"{path}: expected `key: value` lines at the top level.")
  base = loaded.pop("base", None)
  if base is None:
    return [loaded]
  if not isinstance(base, str):
    raise ConfigError(f"{path}: base={base} is not a file name; write base: other.yaml.")
  return [*_read_files(path.parent / base, (*seen, path.resolve())), loaded]


def _assign(resolved: DictConfig, settings: Any, prefix: str = "") -> None:
  """Sets one key at a time, so that whatever is wrong is said with its key."""
  for name, value in settings.items():
    key = f"{prefix}{name}"
    if key not in known_keys():
      near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.4)
      hint = f" did you mean {near[0]}?" if near else " --dry-run prints the known ones."
      raise ConfigError(f"unknown configuration key {key!r};{hint}")
    is_section = OmegaConf.is_dict(OmegaConf.select(resolved, key))
    if is_section and isinstance(value, dict):
      _assign(resolved, value, key + ".")
      continue
    if is_section:
      raise ConfigError(f"{key} is a section; set one of its keys instead of {key}={value}.")
    if any(mark in str(value) for mark in ("${", "???")):
      raise ConfigError(f"{key}={value} is a reference, not a value; write the value itself.")
    parent, _, leaf = key.rpartition(".")
    section = OmegaConf.select(resolved, parent) if parent else resolved
    try:
      with read_write(section):  # frozen dataclasses make read-only nodes
        OmegaConf.update(section, leaf, value)
    except Exception as error:  # OmegaConf converts, and passes on what int() or float() raise
      raise ConfigError(f"{key}={value} has the wrong type: expected {_type_of(key)}.") from error


def known_keys(kind: Any = Config, prefix: str = "") -> list[str]:
  """Every key that a file or `--set` may name, sections included."""
  keys = []
  for entry in dataclasses.fields(kind):
    keys.append(prefix + entry.name)
    if isinstance(entry.default_factory, type):
      keys += known_keys(entry.default_factory, f"{prefix}{entry.name}.")
  return keys


def _type_of(key: str) -> str:
  kind: Any = Config
  *sections, name = key.split(".")
  for section in sections:
    kind = next(f.default_factory for f in dataclasses.fields(kind) if f.name == section)
  return str(next(f.type for f in dataclasses.fields(kind) if f.name == name))


def changed_keys(old: Config, new: Config) -> list[str]:
  """Keys of single values that differ between two configurations."""
  sections = {key.rpartition(".")[0] for key in known_keys()}
  leaves = [key for key in known_keys() if key not in sections]
  return [key for key in leaves if _get(old, key) != _get(new, key)]


def validate(config: Config) -> None:
  """Raises ConfigError for values that no run can have."""
  _validate_ranges(config)
  _validate_model(config.model)
  rollout, train = config.rollout, config.train
  if train.batch_rows % train.micro_batch_rows:
    raise ConfigError(
      f"train.batch_rows={train.batch_rows} is not divisible by train.micro_batch_rows="
      f"{train.micro_batch_rows}. Set train.micro_batch_rows to a divisor of it."
    )
  if config.row_tokens > config.model.max_position:
    raise ConfigError(
      f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} + rollout.max_response_tokens="
      f"{rollout.max_response_tokens} is {config.row_tokens}; model.max_position="
      f"{config.model.max_position} is the context. Lower one of the first two."
    )
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
  if config.sft.max_steps and config.model.path:
    raise ConfigError(
      f"sft.max_steps={config.sft.max_steps} trains a new model; model.path={config.model.path} "
      "names a trained one. Set sft.max_steps=0."
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


def _validate_model(model: ModelConfig) -> None:
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
  width = model.head_dim or model.hidden_size // model.num_heads
  if width % 2:
    raise ConfigError(
      f"model.head_dim={width} is odd; rotary embeddings turn pairs of channels. Make it even."
    )
  if model.path and not Path(model.path).exists() and Path(model.path).is_absolute():
    raise ConfigError(f"model.path={model.path} does not exist.")


def _validate_ranges(config: Config) -> None:
  """Bounds and choices of single values, as one table."""
  choices: dict[str, tuple[str, ...]] = {
    "algorithm": ALGORITHMS,
    "spo.baseline": TREE_BASELINES,
    "train.kl.kind": KL_KINDS,
    "train.kl.aggregation": ("sequence_sum", "token_mean"),
    "model.compute_dtype": ("float32", "bfloat16"),
  }
  minimum: dict[str, float] = {
    "seed": 0, "model.hidden_size": 1, "model.intermediate_size": 1, "model.num_layers": 1,
    "model.num_heads": 1, "model.num_kv_heads": 1, "model.head_dim": 0, "model.vocab_size": 0,
    "model.max_position": 1, "task.operations": 1, "task.unfinished_penalty": 0,
    "spo.interval": 1, "spo.continuations": 1, "spo.segment_tokens": 1,
    "spo.edges_per_question": 1, "spo.max_edge_age": 1, "spo.edges_per_iteration": 1,
    "rollout.questions": 1, "rollout.samples": 1, "rollout.rows": 1,
    "rollout.max_prompt_tokens": 1, "rollout.max_response_tokens": 1, "rollout.temperature": 0,
    "rollout.top_k": 0, "train.iterations": 0, "train.epochs": 1, "train.batch_rows": 1,
    "train.micro_batch_rows": 1, "train.clip_low": 0, "train.clip_high": 0, "train.max_ratio": 1,
    "train.kl.coefficient": 0, "optimizer.learning_rate": 0, "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0, "optimizer.clip_norm": 0, "sft.max_steps": 0,
    "sft.batch_rows": 1, "sft.check_every": 1, "sft.check_problems": 1,
    "sft.optimizer.learning_rate": 0, "sft.optimizer.warmup_steps": 0,
    "sft.optimizer.weight_decay": 0, "sft.optimizer.clip_norm": 0, "eval.problems": 1,
    "eval.every": 1, "eval.temperature": 0, "eval.texts": 0, "checkpoint.every": 1,
    "checkpoint.keep": 1, "model.rope_theta": 1, "model.norm_eps": 0,
  }  # fmt: skip
  for key, allowed in choices.items():
    if (value := _get(config, key)) not in allowed:
      near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3)
      hint = f" (did you mean {near[0]}?)" if near else ""
      raise ConfigError(f"{key}={value} is not one of {', '.join(allowed)}{hint}.")
  for key, low in minimum.items():
    if not low <= (value := _get(config, key)) <= _LARGEST:  # False for NaN too
      raise ConfigError(f"{key}={value} must be a number from {low:g} to {_LARGEST}.")
  for name, size in dataclasses.asdict(config.mesh).items():
    if size not in (-1, 1):
      raise ConfigError(f"mesh.{name}={size}: a run uses one device so far. Set mesh.{name}=1.")
  if config.rollout.temperature == 0:
    raise ConfigError("rollout.temperature=0 samples without exploring. Set it above 0, e.g. 0.6.")
  for section in ("optimizer", "sft.optimizer"):
    for key in (f"{section}.b1", f"{section}.b2"):
      if not 0 <= _get(config, key) < 1:
        raise ConfigError(f"{key}={_get(config, key)} is outside [0, 1). Set e.g. 0.9.")
  for key in ("rollout.top_p", "eval.top_p", "spo.threshold", "sft.target_accuracy"):
    if not 0 < _get(config, key) <= 1:
      raise ConfigError(f"{key}={_get(config, key)} is outside (0, 1]. Set 1 to switch it off.")


def _get(config: Config, key: str) -> Any:
  value: Any = config
  for name in key.split("."):
    value = getattr(value, name)
  return value
