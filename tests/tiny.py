"""A model small enough to be read aloud in numpy, and an engine that remembers what it did."""

from __future__ import annotations

import dataclasses
import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax import model, stops
from spo_jax.config import ModelConfig, RopeScaling
from spo_jax.rollouts import Engine
from spo_jax.structs import Prompts, Samples, Sampling

VOCAB = 8
PAD = 0  # an ordinary token to the model: it samples it too
ENDS = (1, 2)
PROMPT_WIDTH = 3
T = 6  # most response tokens
WORDS = ("", "", "", "a", "b", "ab", "ba", "aab")  # what tokens mean where stop strings matter
STOPS = ("bab", "aaba")

LLAMA = ModelConfig(
  vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
  num_kv_heads=2, rope_theta=100.0, norm_eps=1e-3,
)  # fmt: skip
QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=6)
LLAMA31 = dataclasses.replace(  # of its three pairs of channels one each is kept, blended, slowed
  LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, head_dim=6, rope_scaling=RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=0.25, high_freq_factor=2.0, original_max_position=32
  ),
)  # fmt: skip
LINEAR = dataclasses.replace(LLAMA, rope_scaling=RopeScaling(kind="linear", factor=4.0))
CONFIG = dataclasses.replace(QWEN2, tie_embeddings=False)  # where any one will do

logits = jax.jit(model.logits, static_argnums=0)


@functools.cache
def params(config=CONFIG, seed=0):
  """Random everywhere: the biases of 0 and norms of 1 of a fresh model would hide mistakes."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))

  def leaf(path, shape):
    noise = 0.4 * rng.normal(size=shape.shape)
    return jnp.asarray(noise + (path[-1].key == "weight"), jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def frequencies(config, width):
  """Radians per position of every pair of channels."""
  scaling = config.rope_scaling
  for i in range(0, width, 2):
    fast = config.rope_theta ** (-i / width)
    slow = fast / scaling.factor
    turns = scaling.original_max_position * fast / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "linear" or (scaling.kind == "llama3" and turns < low):
      yield slow
    elif scaling.kind == "llama3" and turns < high:
      yield fast + (slow - fast) * (high - turns) / (high - low)
    else:
      yield fast


def reference_logits(config, params, tokens):
  """The equations of the family in float64, one head at a time: i[B, L] -> [B, L, V]."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  length = np.shape(tokens)[1]
  width = config.head_dim or config.hidden_size // config.num_heads
  group = config.num_heads // config.num_kv_heads
  angle = np.arange(length)[:, None] * np.array([*frequencies(config, width)])

  def norm(x, p):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * p["weight"]

  def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)

  def rotate(x):  # the two halves of a head are the real and the imaginary parts
    turned = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)

  def heads(x, p, p_norm=None):
    split = np.split(x, x.shape[-1] // width, axis=-1)
    return [rotate(norm(h, p_norm) if config.qk_norm else h) for h in split]

  def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  future = np.triu(np.full((length, length), -np.inf), 1)
  x = params["embed_tokens"][np.asarray(tokens)]
  for i in range(config.num_layers):
    layer = params[f"layers_{i}"]
    p, h = layer["self_attn"], norm(x, layer["input_layernorm"])
    q = heads(dense(h, p["q_proj"]), p, p.get("q_norm"))
    k = heads(dense(h, p["k_proj"]), p, p.get("k_norm"))
    v = np.split(dense(h, p["v_proj"]), config.num_kv_heads, axis=-1)
    seen = [
      softmax(q[n] @ k[n // group].swapaxes(-1, -2) / np.sqrt(width) + future) @ v[n // group]
      for n in range(config.num_heads)
    ]
    x = x + dense(np.concatenate(seen, -1), p["o_proj"])
    p, h = layer["mlp"], norm(x, layer["post_attention_layernorm"])
    gate = dense(h, p["gate_proj"])
    x = x + dense(gate / (1 + np.exp(-gate)) * dense(h, p["up_proj"]), p["down_proj"])
  head = params["embed_tokens"].T if config.tie_embeddings else params["lm_head"]
  return norm(x, params["norm"]) @ head


def next_logprobs(params, prefix, temperature=1.0):
  """log softmax(logits / temperature) behind a list of tokens: f64[V]."""
  scores = reference_logits(CONFIG, params, [prefix])[0, -1] / temperature
  return scores - np.logaddexp.reduce(scores)


def response_logprobs(params, prompt, response, temperature=1.0):
  """Reference logprobs of response tokens behind a prompt, both lists: f64[len(response)]."""
  scores = reference_logits(CONFIG, params, [prompt + response])[0, len(prompt) - 1 : -1]
  scores = scores / temperature
  return (scores - np.logaddexp.reduce(scores, -1, keepdims=True))[range(len(response)), response]


def sampling(temperature=1.0, top_p=1.0, top_k=0, end_ids=ENDS, stop_table=None):
  truncate = top_p < 1 or top_k > 0
  return Sampling(temperature, top_p, end_ids, PAD, top_k, truncate, stop_table)


def stop_table():
  return jnp.asarray(stops.token_table([w.encode() for w in WORDS], [s.encode() for s in STOPS]))


def is_over(response):
  """Whether nothing may follow: an end id is last, or the text holds a stop string."""
  text = "".join(WORDS[token] for token in response)
  return any(stop in text for stop in STOPS) or (len(response) > 0 and response[-1] in ENDS)


def prompts(count, seed=0):
  """`count` different questions of 1 to PROMPT_WIDTH tokens, with garbage in the padding."""
  rng = np.random.default_rng(seed)
  return Prompts(
    tokens=rng.integers(0, VOCAB, (count, PROMPT_WIDTH), np.int32),
    lengths=(np.arange(count, dtype=np.int32) + seed) % PROMPT_WIDTH + 1,
    question=np.arange(count) + 100,
    problems=tuple(f"question {i}" for i in range(count)),
  )


def prompt_of(prompts, i):
  return prompts.tokens[i, : prompts.lengths[i]].tolist()


def reward(response, finished):
  """A deterministic grader of 0, 1/2 and 1 to which every token of the response matters."""
  return float((sum((t + 2) * y for t, y in enumerate(response)) + 2 * finished) % 3) / 2


def responses(samples):
  """Samples as a list of token lists."""
  return [row[:n].tolist() for row, n in zip(np.asarray(samples.tokens), samples.lengths)]


def grade_into(graded):
  """A grade function that keeps (problem, response, finished) of all it has graded."""

  def grade(problems, tokens, lengths, finished):
    samples = Samples(tokens, None, lengths, finished)
    rows = list(zip(problems, responses(samples), finished.tolist(), strict=True))
    graded.extend(rows)
    return np.array([reward(*row[1:]) for row in rows])

  return grade


def steps_by_hand(limits, lengths, slots):
  """Steps until all rows have had a slot: whichever is free first takes the highest limit."""
  free = [0] * slots
  for n in np.argsort(-np.asarray(limits), kind="stable"):
    heapq.heapreplace(free, free[0] + lengths[n])
  return max(free)


class Recorder(Engine):
  """An engine that remembers every response graded, every row grown and what it sampled."""

  def __init__(self, rows=12, sampling=sampling()):
    self.graded, self.grown, self.fetched = [], [], []
    super().__init__(CONFIG, sampling, rows, T, grade_into(self.graded))

  def grow(self, params, stores, requests, key, *args, **kwargs):
    self.grown.append((requests, key))
    return super().grow(params, stores, requests, key, *args, **kwargs)

  def fetch(self, *grown):
    self.fetched.append(super().fetch(*grown))
    return self.fetched[-1]
