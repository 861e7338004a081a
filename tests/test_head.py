"""Log-probabilities of masked tokens are those of log_softmax over the whole vocabulary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from programs import arrays_in

from spo_jax import head as under_test
from spo_jax.head import SMALL_VOCABULARY, chunked_logprobs, packed_logprobs, token_logprobs

B, T = 3, 10
TEMPERATURE = np.float32(0.6)
LARGE = 151_936


def close(actual, expected, tolerance=1e-6):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def same(actual, expected):
  """Equal but for rounding, which is as large as the norm of everything makes it."""
  rounding = 1e-6 * max(1, float(optax.tree.norm(expected)))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=rounding), actual, expected
  )


def plain(hidden, head, targets, mask, temperature):
  logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32) / temperature
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  return jnp.where(mask, chosen, 0.0)


def everywhere(hidden, head, targets, mask, temperature, chunk_tokens=None):
  logprobs = chunked_logprobs(hidden, head, targets, temperature, chunk_tokens)
  return jnp.where(mask, logprobs, 0.0)


BOTH = [
  jax.jit(function, static_argnames="chunk_tokens") for function in (packed_logprobs, everywhere)
]


def problem(rows=B, length=T, width=4, vocab=17, seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
  head = rng.normal(size=(width, vocab)).astype(np.float32)
  return hidden, head, rng.integers(0, vocab, (rows, length))


@functools.cache
def weighted_sum(function, *chunk_tokens):
  """A program: mask -> ((weighted sum, logprobs), gradients of hidden, head, temperature)."""
  hidden, head, targets = problem()
  weights = np.random.default_rng(1).normal(size=targets.shape)

  def total(hidden, head, temperature, mask):
    logprobs = function(hidden, head, targets, mask, temperature, *chunk_tokens)
    return (logprobs * weights).sum(), logprobs

  value_and_grad = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
  return functools.partial(value_and_grad, hidden, head, TEMPERATURE)


def first(count):
  return (np.arange(B * T) < count).reshape(B, T)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, None])
@given(mask=hnp.arrays(bool, (B, T)), flip=st.booleans())
@example(mask=first(0), flip=False)
@example(mask=first(B * T), flip=False)
@example(mask=first(1), flip=False)
@example(mask=first(1), flip=True)
@example(mask=first(4), flip=False)
@example(mask=first(5), flip=True)
@example(mask=first(7), flip=False)
@example(mask=first(28), flip=True)
@settings(deadline=None, max_examples=40)
def test_packed_logprobs_and_gradients_are_those_of_the_whole_softmax(chunk_tokens, mask, flip):
  mask = mask[::-1, ::-1] if flip else mask
  same(weighted_sum(packed_logprobs, chunk_tokens)(mask), weighted_sum(plain)(mask))


@pytest.mark.parametrize("chunk_tokens", [None, 3, 64])
def test_chunked_logprobs_and_gradients_are_those_of_the_whole_softmax(chunk_tokens):
  mask = np.random.default_rng(2).random((B, T)) < 0.5
  same(weighted_sum(everywhere, chunk_tokens)(mask), weighted_sum(plain)(mask))


@pytest.mark.parametrize("vocab", [SMALL_VOCABULARY, SMALL_VOCABULARY + 1])
def test_small_and_large_vocabularies_agree_with_the_whole_softmax(vocab):
  hidden, head, targets = problem(vocab=vocab)
  mask = first(11)
  actual = jax.jit(token_logprobs)(hidden, head, targets, mask, TEMPERATURE)
  close(actual, plain(hidden, head, targets, mask, TEMPERATURE), 1e-5)
  assert np.count_nonzero(actual) == 11


def test_what_stands_outside_the_mask_reaches_neither_loss_nor_gradient():
  hidden, head, targets = problem()
  mask = np.random.default_rng(2).random((B, T)) < 0.4

  @jax.jit
  def both(hidden, targets):
    total = lambda h, w: packed_logprobs(h, w, targets, mask, TEMPERATURE, 4).sum()
    return jax.value_and_grad(total, (0, 1))(hidden, head)

  spoilt = np.where(mask[..., None], hidden, np.nan), np.where(mask, targets, 0)
  jax.tree.map(np.testing.assert_array_equal, both(*spoilt), both(hidden, targets))


def test_the_number_of_chunks_follows_the_mask_and_compiles_nothing_new():
  """Counted by the logits that a program computes, in one compilation."""
  hidden, head, targets = problem()
  seen = []
  logits = under_test._logits

  def counting(states, weights):
    jax.debug.callback(lambda: seen.append(states.shape[1]))
    return logits(states, weights)

  traced = []

  @jax.jit
  def gradient(mask):
    traced.append(1)
    return jax.grad(lambda w: packed_logprobs(hidden, w, targets, mask, 1.0, 4).sum())(head)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(under_test, "_logits", counting)
    for count in (0, 1, 4, 5, 8, 29, 30):
      seen.clear()
      jax.block_until_ready(gradient(first(count)))
      jax.effects_barrier()
      assert seen == [4] * (2 * -(-count // 4))  # forward and backward
  assert len(traced) == 1


def largest(function, hidden, head, targets):
  """The most logits in one array, forward and backward."""
  total = jax.value_and_grad(lambda h, w: function(h, w, targets).sum(), (0, 1))
  arrays = arrays_in(jax.make_jaxpr(total)(hidden, head).jaxpr)
  return max(x.size for x in arrays if x.shape[-1:] == head.shape[1:])


@pytest.mark.parametrize("chunk_tokens", [1, 3, 9])
def test_no_array_of_all_logits_forward_or_backward(chunk_tokens):
  arrays = problem(width=2, vocab=50)
  everything = B * T * 50
  whole, mask = np.full((B, T), TEMPERATURE), np.ones((B, T), bool)
  packed = lambda h, w, y: packed_logprobs(h, w, y, mask, TEMPERATURE, chunk_tokens)
  chunked = lambda h, w, y: chunked_logprobs(h, w, y, TEMPERATURE, chunk_tokens)
  assert largest(packed, *arrays) == max(chunk_tokens, 2) * 50  # the head itself has 2 * 50
  assert largest(chunked, *arrays) == chunk_tokens * B * 50
  assert largest(lambda h, w, y: plain(h, w, y, mask, whole[..., None]), *arrays) >= everything


def large_problem(rows, length, width, dtype=jnp.float32):
  shape = jax.ShapeDtypeStruct
  return (
    shape((rows, length, width), dtype), shape((width, LARGE), dtype),
    shape((rows, length), jnp.int32), shape((rows, length), bool),
  )  # fmt: skip


def test_default_chunk_is_bounded_by_the_vocabulary():
  hidden, head, targets, mask = large_problem(8, 2048, 8, jnp.bfloat16)
  total = lambda h, w, y, m: token_logprobs(h, w, y, m).sum()
  jaxpr = jax.make_jaxpr(jax.value_and_grad(total, (0, 1)))(hidden, head, targets, mask).jaxpr
  sizes = [x.size for x in arrays_in(jaxpr) if x.shape[-1:] == (LARGE,)]
  assert 2**26 < max(sizes) <= 2**27


def test_at_a_large_vocabulary_an_eighth_of_the_memory_of_the_plain_way_is_enough():
  """Of a program with its gradients, compiled and not run; 4 rows of 512 tokens."""
  arrays = large_problem(4, 512, 8)

  def temporaries(function):
    total = lambda h, w, y, m: function(h, w, y, m, TEMPERATURE).sum()
    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(token_logprobs) <= temporaries(plain) / 8


@pytest.mark.parametrize("function", BOTH, ids=["packed", "chunked"])
def test_bfloat16_inputs_give_float32_logprobs_and_sum_head_gradients_in_float32(function):
  hidden, head, targets = problem(rows=2, length=256, width=4, vocab=5)
  hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
  mask = np.ones_like(targets, bool)

  def total(head, function, **chunk):
    logprobs = function(hidden, head, targets, mask, 1.0, **chunk)
    return logprobs.sum(), logprobs

  grad = jax.grad(total, has_aux=True)
  gradient, logprobs = grad(head, function, chunk_tokens=1)
  exact, expected = grad(head.astype(np.float32), jax.jit(plain))
  assert (logprobs.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
  close(logprobs, expected, 1e-5)
  error = np.abs(gradient.astype(jnp.float32) - exact).max() / np.abs(exact).max()
  assert error < 2**-8, "256 additions in bfloat16 would lose several percent"


@pytest.mark.parametrize("function", BOTH, ids=["packed", "chunked"])
def test_extreme_logits_stay_finite(function):
  hidden = np.array([[[1000.0], [-1000.0]]], np.float32)
  head, targets = np.array([[1.0, -1.0, 0.0]], np.float32), np.array([[0, 0]])
  close(function(hidden, head, targets, np.ones((1, 2), bool), 1.0), [[0, -2000]])


@pytest.mark.parametrize("function", BOTH, ids=["packed", "chunked"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3)])
def test_smallest_shapes(shape, function):
  hidden, head = np.ones((*shape, 2), np.float32), np.ones((2, 4), np.float32)
  logprobs = function(hidden, head, np.zeros(shape, np.int32), np.ones(shape, bool), 1.0)
  close(logprobs, np.full(shape, -np.log(4)))


@pytest.mark.parametrize("function", BOTH, ids=["packed", "chunked"])
def test_a_row_does_not_depend_on_its_mates(function):
  hidden, head, targets = problem()
  mask = np.random.default_rng(2).random((B, T)) < 0.7
  whole = function(hidden, head, targets, mask, 1.0, chunk_tokens=3)
  for b in range(B):
    row = slice(b, b + 1)
    alone = function(hidden[row], head, targets[row], mask[row], 1.0, chunk_tokens=3)
    close(alone, whole[row])


def test_bad_arguments_name_themselves():
  x, mask = np.zeros((1, 2)), np.ones((1, 2), bool)
  for function in BOTH:
    with pytest.raises(ValueError, match="chunk_tokens=0"):
      function(np.zeros((1, 2, 3)), np.zeros((3, 4)), x.astype(int), mask, 1.0, chunk_tokens=0)
    with pytest.raises(AssertionError):
      function(x, x, x, mask, 1.0)
