"""Held-out accuracy of a policy, greedy and sampled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from spo_jax import rollouts
from spo_jax.model import Params
from spo_jax.rollouts import Engine
from spo_jax.structs import Prompts, Trajectories


def respond(
  engine: Engine, params: Params, prompts: Prompts, temperature: float, top_p: float, key: jax.Array
) -> Trajectories:
  """One response per question; greedy at temperature 0."""
  return rollouts.flat(at(engine, temperature, top_p), params, prompts, 1, key)


def accuracy(responses: Trajectories) -> float:
  """Share of responses that earn the full reward."""
  return float(np.mean(responses.rewards == 1))


def accuracies(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  temperature: float,
  top_p: float,
  key: jax.Array,
) -> tuple[dict[str, float], Trajectories]:
  """One greedy and one sampled response per question.

  Returns: `greedy_accuracy`, `sampled_accuracy`, `unfinished_rate` and `mean_length` (tokens)
    of the sampled responses, and those responses.
  """
  greedy = respond(engine, params, prompts, 0.0, 1.0, key)
  is_greedy = temperature == 0
  sampled = greedy if is_greedy else respond(engine, params, prompts, temperature, top_p, key)
  return {
    "greedy_accuracy": accuracy(greedy),
    "sampled_accuracy": accuracy(sampled),
    "unfinished_rate": float(np.mean(~sampled.samples.finished)),
    "mean_length": float(np.mean(sampled.samples.lengths)),
  }, sampled


def at(engine: Engine, temperature: float, top_p: float) -> Engine:
  """The same engine at another temperature, with counters of its own."""
  sampling = engine.sampling.replace(
    temperature=temperature, top_p=top_p, truncate=top_p < 1, top_k=0
  )
  return dataclasses.replace(engine, sampling=sampling, counts={})


def texts(prompts: Prompts, sampled: Trajectories, responses: list[str]) -> list[dict[str, Any]]:
  """The first responses as records for a person to read."""
  return [
    {
      "prompt": prompts.problems[sampled.prompt[i]].prompt,
      "response": response,
      "reward": float(sampled.rewards[i]),
      "finished": bool(sampled.samples.finished[i]),
    }
    for i, response in enumerate(responses)
  ]
