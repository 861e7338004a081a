from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax import layout
from spo_jax.structs import Prompts, Samples

many = settings(deadline=None, max_examples=80)
rngs = st.integers(0, 2**32 - 1).map(np.random.default_rng)
widths = st.integers(1, 7)


def lengths_up_to(rng, most, rows=5):
  """Random lengths; a row of 0 and a row of `most` are always there."""
  return np.concatenate([[0, most], rng.integers(0, most + 1, rows - 2)]).astype(np.int32)


def random_samples(rng, lengths, width):
  shape = (len(lengths), width)
  return Samples(
    tokens=rng.integers(1, 100, shape, np.int32),  # garbage behind the end, never 0
    logprobs=-rng.random(shape, np.float32),
    lengths=lengths,
    finished=rng.random(len(lengths)) < 0.5,
  )


@many
@given(rngs, widths, st.integers(0, 3))
def test_before_is_true_on_the_first_columns(rng, columns, more):
  lengths = lengths_up_to(rng, columns + more)
  expected = [[t < n for t in range(columns)] for n in lengths]
  np.testing.assert_array_equal(layout.before(lengths, columns), expected)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (0, 2)])
def test_fill_appends_rows_of_the_value(shape):
  x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
  filled = layout.fill(x, 5, value=7)
  assert filled.shape == (5, *shape[1:]) and filled.dtype == x.dtype
  np.testing.assert_array_equal(filled[: len(x)], x)
  assert (filled[len(x) :] == 7).all()
  np.testing.assert_array_equal(layout.fill(x, len(x)), x)


@many
@given(rngs, widths, st.integers(0, 5))
def test_join_is_prefix_then_own(rng, width, own_more):
  start = lengths_up_to(rng, width)
  room = rng.permutation(width - start)  # rows that are full by chance, too
  lengths = np.minimum(room, width - start).astype(np.int32)
  prefix = rng.integers(1, 100, (len(start), width), np.int32)
  own = random_samples(rng, lengths, max(lengths.max(), 1) + own_more)
  whole = layout.join(prefix, start, own)
  for b, (s, n) in enumerate(zip(start, lengths)):
    tail = [0] * (width - s - n)
    assert whole.tokens[b].tolist() == [*prefix[b, :s], *own.tokens[b, :n], *tail]
    assert whole.logprobs[b].tolist() == [*[0] * s, *own.logprobs[b, :n], *tail]
    assert whole.lengths[b] == s + n
    assert whole.finished[b] == own.finished[b]
  assert whole.tokens.dtype == np.int32 and whole.logprobs.dtype == np.float32


@many
@given(rngs, widths, st.integers(0, 6))
def test_shift_moves_rows_right_and_unshift_takes_them_back(rng, width, most):
  x = rng.normal(size=(5, width))
  start = lengths_up_to(rng, most)
  shifted = layout.shift(x, start, width + most)
  assert shifted.shape == (5, width + most)
  for b, s in enumerate(start):
    np.testing.assert_array_equal(shifted[b, s : s + width], x[b])
  np.testing.assert_array_equal(layout.unshift(shifted, start, width), x)


@many
@given(rngs, widths, widths)
def test_shift_may_narrow(rng, width, narrow):
  x = rng.normal(size=(5, width))
  start = lengths_up_to(rng, width)
  shifted = layout.shift(x, start, narrow)
  for b, s in enumerate(start):
    for t in range(s, min(narrow, s + width)):
      assert shifted[b, t] == x[b, t - s]


@many
@given(rngs, widths, widths)
def test_unshift_takes_columns_from_start(rng, width, total):
  x = rng.normal(size=(5, width + total))
  start = lengths_up_to(rng, total)
  expected = [[x[b, s + t] for t in range(width)] for b, s in enumerate(start)]
  np.testing.assert_array_equal(layout.unshift(x, start, width), expected)


@many
@given(rngs, widths, widths)
def test_responses_stand_right_behind_their_prompts(rng, prompt_width, width):
  prompts = Prompts(
    tokens=rng.integers(1, 100, (4, prompt_width), np.int32),
    lengths=lengths_up_to(rng, prompt_width, rows=4),
    question=np.arange(4),
    problems=(None,) * 4,
  )
  lengths = rng.permutation(lengths_up_to(rng, width))
  prompt = np.array([0, 1, 1, *rng.integers(0, 4, 2)])
  tokens = rng.integers(1, 100, (5, width), np.int32)
  row, is_token, is_response = layout.behind_prompts(prompts, prompt, tokens, lengths)
  assert row.shape == is_token.shape == is_response.shape == (5, prompt_width + width)
  assert row.dtype == np.int32
  for b, (q, n) in enumerate(zip(prompt, lengths)):
    m = prompts.lengths[q]
    pad = prompt_width + width - m - n
    assert row[b].tolist() == [*prompts.tokens[q, :m], *tokens[b, :n], *[0] * pad]
    assert is_token[b].tolist() == [True] * (m + n) + [False] * pad
    assert is_response[b].tolist() == [False] * m + [True] * n + [False] * pad
