"""Every number of a run, once: typed sections with their defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

ALGORITHMS = ("chain", "tree", "grpo", "rloo")
TREE_BASELINES = ("mean", "std", "leave_one_out")
KL_KINDS = ("k1", "abs", "k2", "k3")
FAMILIES = ("auto", "llama", "mistral", "qwen2", "qwen3")
ROPE_KINDS = ("none", "linear", "llama3")
ATTENTION = ("auto", "xla", "cudnn", "splash")
REMAT = ("none", "layer", "dots")


class ConfigError(ValueError):
  """A configuration that cannot run; the message is one line naming value and fix."""

  def __init__(self, message: str):
    super().__init__(" ".join(message.split()))  # quoted values may hold line breaks


@dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for longer contexts, as in Hugging Face."""

  kind: str = "none"  # none | linear | llama3
  factor: float = 1.0
  low_freq_factor: float = 1.0  # llama3 only, as are the next two
  high_freq_factor: float = 4.0
  original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
  """A decoder: Llama, Mistral, Qwen2 or Qwen3 by its flags. Hashable: a static argument.

  With `path` the folder says everything but compute_dtype and attention.
  """

  path: str | None = None  # a model folder or hub name; None: a new model of this shape
  tokenizer_tokens: int = 512  # new model, real text: size of the BPE trained on the task
  family: str = "auto"  # of an exported folder: auto | llama | mistral | qwen2 | qwen3
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
  o_bias: bool = False
  mlp_bias: bool = False
  tie_embeddings: bool = True
  rope_scaling: RopeScaling = field(default_factory=RopeScaling)
  max_position: int = 2048
  compute_dtype: str = "float32"
  attention: str = "auto"  # | xla | cudnn | splash: the kernel of full rows, see attention.py


@dataclass(frozen=True)
class TaskConfig:
  name: str = "arithmetic"
  path: str | None = None  # local file or folder, or hub name; generated tasks need none
  prompt: str = "default"  # a template of prompts.py, or text with {question} in it
  operations: int = 6  # arithmetic: steps per problem
  numbers: int = 3  # countdown: numbers per problem
  largest: int = 99  # countdown: largest number and target
  unfinished_penalty: float = 0.0  # subtracted from the reward of a response that never ends
  repeat_penalty: float = 0.0  # subtracted where a response concludes more than once


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
class RolloutMeshConfig:
  """How rollouts share out the devices of training; 0: as `mesh` does, -1: all that are left.

  Parameters lie whole along `data`: on an `fsdp` axis every step of decoding gathers them.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 0


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
  stop: tuple[str, ...] = ()  # strings that end a response, as end-of-text does
  recompute_logprobs: bool = False  # score with the trainer's forward instead of the sampler
  mesh: RolloutMeshConfig = field(default_factory=RolloutMeshConfig)


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
  micro_batch_rows: int = 32  # rows of one forward and backward pass, or packs of as many slots
  pack_tokens: int = 0  # slots of a pack, in which rows share their beginnings; 0: no packs
  remat: str = "none"  # | dots | layer: what the backward pass computes again, see model.py
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
  micro_batch_rows: int = 0  # rows of one forward and backward pass, 0: the whole batch
  target_accuracy: float = 1.0  # stop when greedy dev accuracy reaches this
  check_every: int = 25
  check_problems: int = 256
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class EvalConfig:
  problems: int = 512
  validation_problems: int = 0  # more than 0: the best policy on that many is kept
  every: int = 10  # iterations; the first and the last are always evaluated
  temperature: float = 1.0
  top_p: float = 1.0
  texts: int = 4  # sampled texts kept per evaluation


@dataclass(frozen=True)
class CheckpointConfig:
  every: int = 10  # iterations; a warm start is saved at each check
  keep: int = 2
  export: bool = True  # write the final (or best) policy as a Hugging Face folder, model/


@dataclass(frozen=True)
class MeshConfig:
  """Axes of the device mesh, see sharding.py."""

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
  schedule: tuple[str, ...] = ()  # "400: spo.interval=5" sets a key from iteration 400 on
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
    """L: tokens of the longest training row, and slots of one cache row."""
    return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

  @property
  def leaves(self) -> int:
    """Nodes of a tree's last level."""
    return math.prod(self.spo.branch_factors)


def get(config: Config, key: str) -> Any:
  """The value of a dotted key."""
  value: Any = config
  for name in key.split("."):
    value = getattr(value, name)
  return value
