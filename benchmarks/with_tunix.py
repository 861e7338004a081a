"""The sides of google-tunix, see iteration.py and rollouts.py: `with_tunix.py CASE`.

With `micro_rows` in the case a turn is one GRPO iteration, otherwise one call of the sampler.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from worker import Reward, Turns


def load(folder: str, mesh: jax.sharding.Mesh) -> llama3.Llama3:
  """The model of a Hugging Face folder, in float32."""
  raw = json.loads((Path(folder) / "config.json").read_text())
  config = llama3.ModelConfig(
    num_layers=raw["num_hidden_layers"], vocab_size=raw["vocab_size"],
    embed_dim=raw["hidden_size"], hidden_dim=raw["intermediate_size"],
    num_heads=raw["num_attention_heads"], num_kv_heads=raw["num_key_value_heads"],
    head_dim=raw["hidden_size"] // raw["num_attention_heads"], rope_theta=10_000,
    norm_eps=raw["rms_norm_eps"], weight_tying=True,
  )  # fmt: skip
  return create_model_from_safe_tensors(folder, config, mesh, jnp.float32)


def sample(case: dict[str, Any], model: llama3.Llama3, tokenizer: Any, turns: Turns) -> None:
  """One call of the sampler per turn, over the whole vocabulary; no end id is ever drawn."""
  width = len(case["prompts"][0].split())
  c = model.config
  cache = CacheConfig(width + case["new"], c.num_layers, c.num_kv_heads, c.head_dim)
  sampler = Sampler(model, tokenizer, cache)
  while True:
    turn = turns.wait()
    drawn = sampler(
      case["prompts"], max_generation_steps=case["new"], max_prompt_length=width, temperature=1.0,
      top_p=1.0, seed=turn,
    )  # fmt: skip
    turns.answer(sum(map(len, drawn.tokens)))


def iterate(
  case: dict[str, Any], model: llama3.Llama3, mesh: Any, tokenizer: Any, turns: Turns
) -> None:
  """One GRPO iteration per turn: the learner asks for its questions when the turn begins."""
  prompts, samples, new = case["prompts"], case["samples"], case["new"]
  width, reward = len(prompts[0].split()), Reward()
  adamw = optax.adamw(case["learning_rate"], weight_decay=0.0)
  training = RLTrainingConfig(
    actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw), eval_every_n_steps=2**30,
    max_steps=2**30, mini_batch_size=len(prompts),
    train_micro_batch_size=case["micro_rows"] // samples, rollout_micro_batch_size=len(prompts),
    compute_logps_micro_batch_size=len(prompts),
  )  # fmt: skip
  rollout = RolloutConfig(
    max_tokens_to_generate=new, max_prompt_length=width, kv_cache_size=width + new,
    temperature=1.0, top_p=1.0,
  )  # fmt: skip
  cluster = RLCluster(
    actor=model, tokenizer=tokenizer,
    cluster_config=ClusterConfig(
      role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh}, training_config=training,
      rollout_config=rollout,
    ),
  )  # fmt: skip

  def questions() -> Iterator[dict[str, list[str]]]:
    while True:
      turns.wait()
      yield {"prompts": prompts}
      # The update of this turn may still be running.
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      turns.answer(reward.take())

  learner = GRPOLearner(cluster, GRPOConfig(num_generations=samples, beta=0.0), reward)
  learner.train(questions())


def main() -> None:
  case = json.loads(sys.argv[1])
  mesh = jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp"))
  tokenizer = AutoTokenizer.from_pretrained(case["folder"])
  model = load(case["folder"], mesh)
  turns = Turns("google-tunix", "jax", "flax")
  if "micro_rows" in case:
    iterate(case, model, mesh, tokenizer, turns)
  else:
    sample(case, model, tokenizer, turns)


if __name__ == "__main__":
  main()
