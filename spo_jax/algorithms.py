"""From questions to training rows: rollouts, values, advantages, one function per algorithm."""

from __future__ import annotations

import jax
import numpy as np

from spo_jax import advantages, packing, rollouts
from spo_jax.compiles import program
from spo_jax.distributed import to_host
from spo_jax.experiment import Experiment, Purpose
from spo_jax.layout import before, behind_prompts, between, fill, unshift
from spo_jax.model import Params
from spo_jax.packing import EdgeBuffer
from spo_jax.structs import Edges, Prompts, Samples, TrainRows, Trajectories
from spo_jax.update import score_rows

segment_advantages = program()(advantages.segment_advantages)
group_advantages = program(static_argnames=("num_groups", "baseline"))(advantages.group_advantages)


@program(static_argnames=("branch_factors", "baseline"))
def tree_advantages(
  rewards: tuple[jax.Array, ...],
  finished: tuple[jax.Array, ...],
  valid: tuple[jax.Array, ...],
  branch_factors: tuple[int, ...],
  baseline: str,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The value of every root f32[P], and the advantage of every edge."""
  values = advantages.tree_values(rewards, finished, branch_factors)
  return values[0][:, 0], advantages.tree_advantages(values, valid, branch_factors, baseline)


def collect(
  experiment: Experiment, params: Params, prompts: Prompts, iteration: int, buffer: EdgeBuffer
) -> tuple[TrainRows, dict[str, float]]:
  """Rows to train on in this iteration, and figures of the rollout."""
  if experiment.config.algorithm == "chain":
    return _chain(experiment, params, prompts, iteration)
  if experiment.config.algorithm == "tree":
    return _tree(experiment, params, prompts, iteration, buffer)
  return _group(experiment, params, prompts, iteration)


def _chain(
  experiment: Experiment, params: Params, prompts: Prompts, iteration: int
) -> tuple[TrainRows, dict[str, float]]:
  """SPO-chain: A_k = V(s_{k+1}) - V(s_k) over segments between cutpoints."""
  config = experiment.config
  taken = rollouts.chain(
    experiment.engine, params, prompts, config.rollout.samples, config.spo.continuations,
    config.spo.threshold, config.spo.interval, experiment.key(Purpose.ROLLOUT, iteration),
    _scorer(experiment, params),
  )  # fmt: skip
  per_token = segment_advantages(taken.values, taken.rewards, taken.segment)
  rows = packing.trajectory_rows(prompts, taken, to_host(per_token), _threshold(experiment))
  segments = taken.segment.max(axis=1) + 1
  return rows, {**_figures(taken, rows), "rollout/segments": float(segments.mean())}


def _group(
  experiment: Experiment, params: Params, prompts: Prompts, iteration: int
) -> tuple[TrainRows, dict[str, float]]:
  """GRPO and RLOO: one advantage per response, against the others of its question."""
  config = experiment.config
  taken = rollouts.flat(
    experiment.engine, params, prompts, config.rollout.samples,
    experiment.key(Purpose.ROLLOUT, iteration), _scorer(experiment, params),
  )  # fmt: skip
  per_row = group_advantages(
    taken.rewards, taken.prompt.astype(np.int32), num_groups=len(prompts.lengths),
    baseline=config.algorithm,
  )  # fmt: skip
  per_token = np.broadcast_to(to_host(per_row)[:, None], taken.segment.shape)
  rows = packing.trajectory_rows(prompts, taken, per_token, _threshold(experiment))
  return rows, _figures(taken, rows)


def _tree(
  experiment: Experiment, params: Params, prompts: Prompts, iteration: int, buffer: EdgeBuffer
) -> tuple[TrainRows, dict[str, float]]:
  """SPO-tree: edges of this iteration's trees join the buffer, a draw from it is trained on."""
  spo = experiment.config.spo
  taken = rollouts.tree(
    experiment.engine, params, prompts, spo.branch_factors, spo.segment_tokens,
    experiment.key(Purpose.ROLLOUT, iteration),
  )  # fmt: skip
  roots, per_edge = to_host(
    tree_advantages(
      taken.rewards, taken.finished, taken.valid, branch_factors=spo.branch_factors,
      baseline=spo.baseline,
    )
  )  # fmt: skip
  edges = packing.tree_edges(prompts, taken, per_edge, iteration)
  buffer.add(_rescored(experiment, params, edges))
  drawn = buffer.draw(
    spo.edges_per_iteration, iteration, experiment.rng(Purpose.DRAW, iteration),
    spo.repeat_short_draws,
  )  # fmt: skip
  rows = packing.edge_rows(drawn, _threshold(experiment), spo.edges_per_iteration)
  return rows, {
    "rollout/reward_mean": float(roots.mean()),
    "rollout/edges": len(edges.start),
    "buffer/drawn": len(drawn.start),
    "buffer/size": len(buffer),
    "mask/fraction": float(rows.mask.sum() / max((drawn.end - drawn.start).sum(), 1)),
  }


def _figures(taken: Trajectories, rows: TrainRows) -> dict[str, float]:
  return {
    "rollout/reward_mean": float(taken.rewards.mean()),
    "rollout/length_mean": float(taken.samples.lengths.mean()),
    "rollout/unfinished_rate": float(1 - taken.samples.finished.mean()),
    "mask/fraction": float(rows.mask.sum() / max(taken.samples.lengths.sum(), 1)),
  }


def _threshold(experiment: Experiment) -> float | None:
  config = experiment.config
  return config.spo.threshold if config.train.probability_mask else None


def _score(
  experiment: Experiment,
  params: Params,
  tokens: np.ndarray,
  is_token: np.ndarray,
  mask: np.ndarray,
) -> np.ndarray:
  """The trainer's logprobs f32[B, L] of the mask, in programs of `rollout.rows` rows."""
  settings = experiment.config.rollout
  parts = [np.zeros((0, tokens.shape[1]), np.float32)]
  for begin in range(0, len(tokens), settings.rows):
    part = slice(begin, begin + settings.rows)
    scored = score_rows(
      experiment.model_config, params, fill(tokens[part], settings.rows),
      fill(is_token[part], settings.rows), fill(mask[part], settings.rows), settings.temperature,
    )  # fmt: skip
    parts.append(to_host(scored)[: len(tokens[part])])
  return np.concatenate(parts)


def _scorer(experiment: Experiment, params: Params) -> rollouts.Score | None:
  """Rescoring of fresh samples where `rollout.recompute_logprobs` asks for it."""
  if not experiment.config.rollout.recompute_logprobs:
    return None

  def score(prompts: Prompts, prompt: np.ndarray, own: Samples) -> np.ndarray:
    rows = behind_prompts(prompts, prompt, own.tokens, own.lengths)
    whole = _score(experiment, params, *rows)
    placed = unshift(whole, prompts.lengths[prompt], own.tokens.shape[1])
    return np.where(before(own.lengths, own.tokens.shape[1]), placed, 0).astype(np.float32)

  return score


def _rescored(experiment: Experiment, params: Params, edges: Edges) -> Edges:
  if not experiment.config.rollout.recompute_logprobs:
    return edges
  width = edges.tokens.shape[1]
  own = between(edges.start, edges.end, width)
  logprobs = _score(experiment, params, edges.tokens, before(edges.end, width), own)
  return edges.replace(logprobs=logprobs)
