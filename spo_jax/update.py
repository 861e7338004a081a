"""One optimiser update as one program: gradients over micro-batches, one division, one step.

Whitening, the mask's size and the KL denominator belong to the whole optimiser batch, so
micro-batch size and device count do not change the gradient (`official` reproduces the
authors' per-micro-batch form). A batch that is not finite, or whose mean probability
ratio is too large, changes nothing and is counted.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spo_jax import model, sharding
from spo_jax.advantages import whiten
from spo_jax.attention import take_slots
from spo_jax.compiles import program
from spo_jax.config import ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.distributed import to_host
from spo_jax.head import token_logprobs
from spo_jax.losses import kl_loss, policy_loss
from spo_jax.sharding import constrain, constrain_parameters
from spo_jax.structs import TrainRows, TrainState, Trie


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """AdamW with linear warm-up and clipping by global norm (0: no clipping)."""
  warmup = config.warmup_steps
  schedule = optax.linear_schedule(
    config.learning_rate / (warmup + 1), config.learning_rate, warmup
  ) if warmup else config.learning_rate  # fmt: skip
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
  )


def init_state(params: model.Params, optimizer: optax.GradientTransformation) -> TrainState:
  return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))


def state_template(
  config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Shapes, dtypes and placement of a train state, without its values."""
  # The key is made inside, because the devices of the mesh may be described ones.
  shapes = jax.eval_shape(
    lambda: init_state(model.init_params(config, jax.random.key(0)), optimizer)
  )
  places = sharding.placements(shapes, mesh)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
  )


def score(
  config: ModelConfig,
  params: model.Params,
  tokens: jax.Array,
  is_token: jax.Array,
  mask: jax.Array,
  temperature: float | jax.Array = 1.0,
  remat: str = "none",
  trie: Trie | None = None,
) -> jax.Array:
  """Logprobs f32[B, L] of the mask by a full forward: slot t scores token t, others are 0."""
  hidden = model.hidden_states(config, params, tokens, is_token, remat, trie)
  if trie is None:
    states, tokens, mask = hidden[:, :-1], tokens[:, 1:], mask[:, 1:]
  else:
    states = take_slots(hidden, trie.previous)
  head = model.head_weight(config, params)
  logprobs = token_logprobs(states, head, tokens, mask, temperature, config.tie_embeddings)
  return jnp.pad(logprobs, ((0, 0), (1, 0))) if trie is None else logprobs


@program(static_argnames=("config",))
def score_rows(
  config: ModelConfig,
  params: model.Params,
  tokens: jax.Array,
  is_token: jax.Array,
  mask: jax.Array,
  temperature: float,
) -> jax.Array:
  """`score` as a program of its own."""
  return score(config, params, tokens, is_token, mask, temperature)


@program(static_argnames=("config", "train", "optimizer"), donate_argnames=("state",))
def policy_update(
  config: ModelConfig,
  train: TrainConfig,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  reference: model.Params | None,
  batch: TrainRows,
  used: jax.Array,
  temperature: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The masked clipped objective of SPO over one optimiser batch.

    L = -(1/Z) sum_t M_t min(r_t A_t, clip(r_t) A_t) + beta * KL     arXiv:2505.23564, eq. 7

  Args:
    reference: parameters of the reference policy, None where train.kl.coefficient is 0.
    batch: [micro-batches, rows, L], of samples or of packs of them; used: i32[], how many
      micro-batches hold rows.
  Returns: the new state and scalar metrics, means over the masked tokens of the batch.
  """
  kl = train.kl
  mask = batch.mask
  total_tokens = jnp.maximum(jnp.sum(mask), 1)
  samples = jnp.any(mask, axis=2) if batch.trie is None else batch.trie.samples
  total_rows = jnp.maximum(jnp.sum(samples), 1)
  if train.whiten and train.official:
    advantages = jax.vmap(whiten)(batch.advantages, mask)
  elif train.whiten:
    flat = (-1, mask.shape[-1])
    advantages = whiten(batch.advantages.reshape(flat), mask.reshape(flat)).reshape(mask.shape)
  else:
    advantages = batch.advantages
  batch = batch.replace(advantages=advantages)

  def loss(params: model.Params, rows: TrainRows) -> tuple[jax.Array, dict[str, jax.Array]]:
    inputs = (rows.tokens, rows.is_token, rows.mask, temperature)
    logprobs = score(config, params, *inputs, train.remat, rows.trie)
    objective, count, sums = policy_loss(
      logprobs, rows.logprobs, rows.advantages, rows.mask, train.clip_low, train.clip_high
    )
    divergence = jnp.float32(0)
    if reference is not None:
      ref = score(config, reference, *inputs, trie=rows.trie)
      floor = 0.0 if train.official else None
      divergence, _ = kl_loss(logprobs, ref, rows.mask, kl.kind, floor)
    if train.official:
      ratio_ok = sums["ratio_sum"] <= train.max_ratio * count
      objective, divergence = (jnp.where(ratio_ok, x, 0.0) for x in (objective, divergence))
      sums["skipped"] = ~ratio_ok / used
      policy = objective / jnp.maximum(count, 1) / used
      own_rows = jnp.maximum(jnp.sum(jnp.any(rows.mask, axis=1)), 1)
      kl_rows, kl_tokens = own_rows * used, jnp.maximum(count, 1) * used
    else:
      policy = objective / total_tokens
      kl_rows, kl_tokens = total_rows, total_tokens
    divergence /= kl_rows if kl.aggregation == "sequence_sum" else kl_tokens
    return policy + kl.coefficient * divergence, {"policy": policy, "kl": divergence, **sums}

  batch = jax.tree.map(lambda x: constrain(x, "micro_batches"), batch)
  value, sums, grads = _accumulate(loss, state.params, batch, used)
  mean_ratio = sums["ratio_sum"] / total_tokens
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(value) & jnp.isfinite(norm)
  ratio_ok = train.official | (mean_ratio <= train.max_ratio)
  new_state = _apply(optimizer, state, grads, finite & ratio_ok)
  metrics = {
    "tokens/trained": jnp.sum(batch.is_token),
    "loss/policy": sums["policy"],
    "loss/kl": sums["kl"],
    "loss/clip_fraction": sums["clipped_sum"] / total_tokens,
    "loss/approx_kl": sums["approx_kl_sum"] / total_tokens,
    "loss/ratio_mean": mean_ratio,
    "loss/gradient_norm": norm,
    "loss/skipped_nonfinite": (~finite).astype(jnp.float32),
    "loss/skipped_ratio": jnp.where(finite, sums.get("skipped", ~ratio_ok), 0.0),
  }
  return new_state, metrics


def summarise(updates: list[dict[str, jax.Array]]) -> dict[str, float]:
  """The metrics of an iteration's updates on the host: means, and counts."""
  on_host = to_host(updates)

  def total(name: str) -> float:
    return float(sum(metrics[name] for metrics in on_host))

  means = ("policy", "kl", "clip_fraction", "approx_kl", "ratio_mean", "gradient_norm")
  return {
    **{f"loss/{name}": total(f"loss/{name}") / max(len(on_host), 1) for name in means},
    "loss/skipped_nonfinite": total("loss/skipped_nonfinite"),
    "loss/skipped_ratio": total("loss/skipped_ratio"),
    "loss/updates": float(len(on_host)),
    "tokens/trained": int(total("tokens/trained")),
  }


@program(
  static_argnames=("config", "optimizer", "micro_rows", "remat"), donate_argnames=("state",)
)
def supervised_update(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  tokens: jax.Array,
  is_token: jax.Array,
  mask: jax.Array,
  micro_rows: int,
  remat: str = "none",
) -> tuple[TrainState, jax.Array]:
  """Cross-entropy on the masked tokens of rows i32[..., L]; returns the mean loss too.

  Args:
    micro_rows: rows of one forward and backward pass, a divisor of all; remat: see model.Decoder.
  """
  count = jnp.maximum(jnp.sum(mask), 1)

  def loss(params: model.Params, rows: Any) -> tuple[jax.Array, tuple[()]]:
    tokens, is_token, mask = rows
    logprobs = score(config, params, tokens, is_token, mask, remat=remat)
    return -jnp.sum(jnp.where(mask, logprobs, 0.0)) / count, ()

  batch = jax.tree.map(
    lambda x: constrain(x.reshape(-1, micro_rows, x.shape[-1]), "micro_batches"),
    (tokens, is_token, mask),
  )
  value, _, grads = _accumulate(loss, state.params, batch, len(batch[0]))
  return _apply(optimizer, state, grads, jnp.isfinite(value)), value


def _accumulate(loss: Any, params: model.Params, batch: Any, used: jax.Array | int) -> Any:
  """Sums of value, metrics and gradient of `loss(params, rows)` over `used` micro-batches."""

  def add(i: jax.Array, carry: Any) -> Any:
    rows = jax.tree.map(lambda x: x[i], batch)
    (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
    grads = constrain_parameters(grads)
    return jax.tree.map(jnp.add, carry, (value, sums, grads))

  first = jax.tree.map(lambda x: x[0], batch)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda p: (*loss(p, first), p), params)
  )
  return jax.lax.fori_loop(0, used, add, zeros)


def _apply(
  optimizer: optax.GradientTransformation,
  state: TrainState,
  grads: Any,
  wanted: jax.Array,
) -> TrainState:
  """One optimiser step where `wanted`; the unchanged state otherwise."""

  def step() -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)

  return constrain_parameters(jax.lax.cond(wanted, step, lambda: state))
