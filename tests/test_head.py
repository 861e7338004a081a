"""Log-probabilities of masked tokens are those of log_softmax over the whole vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from programs import arrays_in, collectives, equations_of, printed_on_eight_devices

from spo_jax import head as under_test
from spo_jax import model, sharding
from spo_jax.config import MeshConfig
from spo_jax.head import (
  SMALL_VOCABULARY,
  chunked_logprobs,
  packed_logprobs,
  project,
  token_logprobs,
)
from spo_jax.structs import KVCache
from spo_jax.update import score

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


def packed_tied(hidden, head, targets, mask, temperature, chunk_tokens=None):
  """From the head as an embedding is stored; its gradient comes back as that of the others."""
  return packed_logprobs(hidden, head.T, targets, mask, temperature, chunk_tokens, tied=True)


BOTH = [
  jax.jit(function, static_argnames="chunk_tokens") for function in (packed_logprobs, everywhere)
]
PACKED = {"as lm_head": packed_logprobs, "tied": packed_tied}
# Gradients [4, 17] in blocks of 3 and 1 rows, gradients [17, 4] in blocks of 14 and 3.
BLOCK = 3 * 17 + 5


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
@pytest.mark.parametrize("layout", PACKED)
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
def test_packed_logprobs_and_gradients_are_those_of_the_whole_softmax(
  layout, chunk_tokens, mask, flip
):
  mask = mask[::-1, ::-1] if flip else mask
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(under_test, "_BLOCK", BLOCK)  # read where it is traced
    actual = weighted_sum(PACKED[layout], chunk_tokens)(mask)
  same(actual, weighted_sum(plain)(mask))


@pytest.mark.parametrize("chunk_tokens", [None, 3, 64])
def test_chunked_logprobs_and_gradients_are_those_of_the_whole_softmax(chunk_tokens):
  mask = np.random.default_rng(2).random((B, T)) < 0.5
  same(weighted_sum(everywhere, chunk_tokens)(mask), weighted_sum(plain)(mask))


@pytest.mark.parametrize("vocab", [SMALL_VOCABULARY, SMALL_VOCABULARY + 1])
@pytest.mark.parametrize("tied", [False, True])
def test_small_and_large_vocabularies_agree_with_the_whole_softmax(vocab, tied):
  hidden, head, targets = problem(vocab=vocab)
  mask, stored = first(11), head.T if tied else head
  actual = jax.jit(partial(token_logprobs, tied=tied))(hidden, stored, targets, mask, TEMPERATURE)
  close(actual, plain(hidden, head, targets, mask, TEMPERATURE), 1e-5)
  assert np.count_nonzero(actual) == 11
  close(project(hidden, stored, tied), hidden @ head, 1e-5)


def test_a_small_tied_head_is_the_program_that_it_always_was():
  """Learning curves of small vocabularies depend on its last bits."""
  hidden, head, targets = problem(vocab=SMALL_VOCABULARY)
  mask = first(11)
  always = lambda h, w: jnp.where(mask, chunked_logprobs(h, w.T, targets, TEMPERATURE), 0.0)
  today = lambda h, w: token_logprobs(h, w, targets, mask, TEMPERATURE, tied=True)

  def text(function):
    total = lambda h, w: function(h, w).sum()
    return str(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, head.T))

  assert text(today) == text(always)


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

  def counting(states, *head):
    jax.debug.callback(lambda: seen.append(states.shape[1]))
    return logits(states, *head)

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
  tied = lambda h, w, y: packed_logprobs(h, w.T, y, mask, TEMPERATURE, chunk_tokens, tied=True)
  assert largest(packed, *arrays) == max(chunk_tokens, 2) * 50  # the head itself has 2 * 50
  assert largest(tied, *arrays) == max(chunk_tokens, 2) * 50
  assert largest(chunked, *arrays) == chunk_tokens * B * 50
  assert largest(lambda h, w, y: plain(h, w, y, mask, whole[..., None]), *arrays) >= everything


def large_problem(rows, length, width, dtype=jnp.float32, tied=False):
  shape = jax.ShapeDtypeStruct
  return (
    shape((rows, length, width), dtype), shape((LARGE, width) if tied else (width, LARGE), dtype),
    shape((rows, length), jnp.int32), shape((rows, length), bool),
  )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_default_chunk_is_bounded_by_the_vocabulary(tied):
  arguments = large_problem(8, 2048, 8, jnp.bfloat16, tied)
  total = lambda h, w, y, m: token_logprobs(h, w, y, m, tied=tied).sum()
  jaxpr = jax.make_jaxpr(jax.value_and_grad(total, (0, 1)))(*arguments).jaxpr
  logits = max((x.shape for x in arrays_in(jaxpr) if x.shape[-1:] == (LARGE,)), key=math.prod)
  assert 2**26 < math.prod(logits) <= 2**27
  assert logits[-2] % 16 == 0, "units of matrices multiply so many rows"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [SMALL_VOCABULARY, SMALL_VOCABULARY + 1])
def test_products_are_in_the_type_of_hidden_states_and_sums_in_float32(vocab, tied):
  """Master weights are float32, and so is their gradient: a GPU takes twice as long to multiply."""
  hidden, head, targets = problem(rows=2, length=8, width=16, vocab=vocab)
  head, mask = head.T if tied else head, np.ones_like(targets, bool)

  def total(hidden, head):
    return token_logprobs(hidden, head, targets, mask, tied=tied).sum()

  gradients = jax.value_and_grad(total, (0, 1))
  hidden = hidden.astype(jnp.bfloat16)
  products = [
    equation for equation in equations_of(jax.make_jaxpr(gradients)(hidden, head).jaxpr)
    if equation.primitive.name == "dot_general"
  ]  # fmt: skip
  assert len(products) >= 4
  for product in products[:2]:
    assert [x.aval.dtype for x in product.invars] == [jnp.bfloat16] * 2
    assert product.params["preferred_element_type"] == jnp.float32
  if vocab > SMALL_VOCABULARY:  # those of the other are what JAX makes of the forward pass
    assert {x.aval.dtype for product in products for x in product.invars} == {jnp.dtype("bfloat16")}
  value, (by_hidden, by_head) = gradients(hidden, head)
  assert (value.dtype, by_hidden.dtype, by_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_at_a_large_vocabulary_an_eighth_of_the_memory_of_the_plain_way_is_enough(tied):
  """Of Qwen2.5-0.5B's head with its gradients, compiled and not run; a row of 512 tokens.

  What is left are logits of one chunk and a block of the gradient, in the layout of the head.
  """
  width = 896
  arguments = large_problem(1, 512, width, tied=tied)

  def compiled(function):
    total = lambda h, w, y, m: function(h, w, y, m, TEMPERATURE).sum()
    return jax.jit(jax.value_and_grad(total, (0, 1))).lower(*arguments).compile()

  def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes

  packed = compiled(partial(token_logprobs, tied=tied))
  whole = compiled((lambda h, w, *rest: plain(h, w.T, *rest)) if tied else plain)
  assert temporaries(packed) <= temporaries(whole) / 8
  assert temporaries(packed) <= LARGE * width * 4 / 4
  turned = f"[{width},{LARGE}]" if tied else f"[{LARGE},{width}]"
  assert turned not in packed.as_text()


def test_gradients_of_many_micro_batches_need_one_more_array_of_the_head():
  """A second one, of zeros to begin with, would wait all the time; compiled and not run."""
  hidden, head, targets, mask = large_problem(1, 512, 256, tied=True)
  total = lambda w, h, y, m: token_logprobs(h, w, y, m, TEMPERATURE, tied=True).sum()

  @jax.jit
  def summed(head, count, *batch):
    add = lambda i, sums: sums + jax.grad(total)(head, *batch)
    return jax.lax.fori_loop(0, count, add, jnp.zeros_like(head))

  count = jax.ShapeDtypeStruct((), jnp.int32)
  compiled = summed.lower(head, count, hidden, targets, mask).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * LARGE * 256 * 4


def test_no_program_of_a_tied_model_turns_its_embedding_over():
  """Of an update, of decoding and of logits."""
  vocab = SMALL_VOCABULARY + 1
  config = dataclasses.replace(tiny.QWEN2, vocab_size=vocab)
  width, tokens = config.hidden_size, jnp.ones((2, 12), jnp.int32)
  params = jax.eval_shape(partial(model.init_params, config), jax.random.key(0))
  keys = (jnp.zeros((2, config.num_kv_heads, 12, width // config.num_heads)),) * config.num_layers
  cache = KVCache(keys, keys, jnp.ones(2, jnp.int32))
  scores = lambda p: score(config, p, tokens, tokens > 0, tokens > 0).sum()
  programs = {
    "update": jax.make_jaxpr(jax.grad(scores))(params),
    "decoding": jax.make_jaxpr(lambda p: model.decode_step(config, p, tokens[:, 0], cache))(params),
    "logits": jax.make_jaxpr(lambda p: model.logits(config, p, tokens, tokens > 0))(params),
  }
  for name, program in programs.items():
    shapes = [x.shape for x in arrays_in(program.jaxpr)]
    assert any(shape[-1:] == (vocab,) for shape in shapes), name
    assert not any(shape[-2:] == (width, vocab) for shape in shapes), name


@pytest.mark.devices
def test_on_meshes_logprobs_and_gradients_are_the_same_and_no_head_is_gathered():
  names = ["8x1x1", "1x8x1", "2x1x4", "2x2x2", "1x1x8"]
  assert printed_on_eight_devices("test_head") == names


def check_meshes():
  """56 words, 7 or more on every device, in blocks of 5."""
  hidden, head, targets = problem(rows=8, width=16, vocab=56)
  weights = np.random.default_rng(1).normal(size=targets.shape)
  mask = np.random.default_rng(2).random(targets.shape) < 0.4
  under_test._BLOCK = 5 * 16

  def total(hidden, head, targets, mask, name):
    tied = name == "embed_tokens"
    logprobs = packed_logprobs(hidden, head, targets, mask, TEMPERATURE, 3, tied)
    return (logprobs * weights).sum(), logprobs

  @partial(jax.jit, static_argnames="name")
  def program(hidden, head, targets, mask, name):
    value, (by_state, by_head) = jax.value_and_grad(total, (0, 1), has_aux=True)(
      hidden, head, targets, mask, name
    )
    return value, by_state, sharding.constrain_parameters({name: by_head})

  for shape in ((8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2), (1, 1, 8)):
    for name, stored in (("embed_tokens", head.T), ("lm_head", head)):
      expected = program(hidden, stored, targets, mask, name=name)
      mesh = sharding.make_mesh(MeshConfig(*shape))
      with jax.set_mesh(mesh):
        rows = [sharding.place(x, "rows", mesh) for x in (hidden, targets, mask)]
        arguments = (rows[0], jax.device_put(stored, sharding.placement(name, stored.shape, mesh)))
        compiled = program.lower(*arguments, *rows[1:], name=name).compile()
        same(jax.device_get(compiled(*arguments, *rows[1:])), jax.device_get(expected))
      words = 56 // shape[2]
      sent = [(kind, made) for kind, made in collectives(compiled.as_text()) if words in made]
      assert bool(sent) == (shape != (1, 1, 8))
      for kind, made in sent:
        # Gradients of devices with rows of their own are added up; `fsdp` shares a head out.
        assert kind == "all-reduce" or (kind == "all-gather" and shape[1] > 1), (kind, made)
        assert made == ([words, 16] if name == "embed_tokens" else [16, words]), (kind, made)
    print("x".join(map(str, shape)))


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
