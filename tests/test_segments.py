from __future__ import annotations

import golden
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spo_jax import segments

B, T = 3, 11  # one shape for all drawn examples: one compilation

uncertain_tokens = jax.jit(segments.uncertain_tokens)
cutpoint_segments = jax.jit(segments.cutpoint_segments)
even_segments = jax.jit(segments.even_segments, static_argnames="T")
whole_segments = jax.jit(segments.whole_segments, static_argnames="T")
token_segments = jax.jit(segments.token_segments, static_argnames="T")
num_segments = jax.jit(segments.num_segments)
segment_starts = jax.jit(segments.segment_starts, static_argnames="max_segments")

logprobs_drawn = hnp.arrays(
  np.float32, (B, T), elements=st.sampled_from([0.0, -0.01, -0.2, -1.0, -30.0])
)
lengths_drawn = hnp.arrays(np.int32, (B,), elements=st.integers(0, T))
masks_drawn = hnp.arrays(bool, (B, T))
many = settings(deadline=None, max_examples=60)


def prefix_mask(lengths, width=T):
  return np.arange(width)[None, :] < np.asarray(lengths)[:, None]


def brute_force_cutpoints(logprobs, mask, threshold, interval):
  """The rule, read aloud: count cutpoints, open a segment at number 0, k, 2k, ..."""
  segment = np.full(logprobs.shape, -1)
  for b in range(logprobs.shape[0]):
    cutpoints, current = 0, -1
    for t in range(logprobs.shape[1]):
      if not mask[b, t]:
        continue
      if np.exp(logprobs[b, t]) < threshold:
        if cutpoints % interval == 0:
          current += 1
        cutpoints += 1
      segment[b, t] = current
  return segment


@pytest.mark.parametrize("case", golden.load("segments")["chain"])
def test_cutpoints_agree_with_the_reference(case):
  width, length = 80, len(case["logprobs"])  # one width, one compilation
  logprobs = np.full((1, width), np.nan, np.float32)
  logprobs[0, :length] = case["logprobs"]
  mask = prefix_mask([length], width)
  segment = cutpoint_segments(logprobs, mask, case["threshold"], case["interval"])
  starts = np.asarray(segment_starts(segment, max_segments=width))[0]
  assert [s - 1 for s in starts if s < width] == case["cutpoints"]
  assert num_segments(segment)[0] == len(case["cutpoints"])


@pytest.mark.parametrize("case", golden.load("segments")["naive_even_cutpoints"])
def test_even_segments_agree_with_the_reference(case):
  length, parts = case["length"], case["segments"]
  segment = np.asarray(even_segments(np.array([length]), parts, T=60))[0]
  last_tokens = [int(np.flatnonzero(segment == k)[-1]) for k in range(parts - 1)]
  assert last_tokens == case["cutpoints"]
  assert (segment[length:] == -1).all()


def test_cutpoint_segments_by_hand():
  p = np.array([[0.99, 0.5, 0.95, 0.2, 0.1, 0.3, 0.99, 0.8], [0.1, 1, 1, 1, 1, 0.1, 0.1, 0.1]])
  mask = prefix_mask([8, 6], 8)
  segment = cutpoint_segments(np.log(p), mask, 0.9, 2)
  np.testing.assert_array_equal(segment, [[-1, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, -1, -1]])
  np.testing.assert_array_equal(
    segment_starts(segment, max_segments=4), [[1, 4, 7, 8], [0, 8, 8, 8]]
  )
  np.testing.assert_array_equal(num_segments(segment), [3, 1])


def test_a_token_at_the_threshold_is_certain():
  logprobs = np.log(np.array([[0.25, 0.5, 0.75]], np.float32))
  uncertain = uncertain_tokens(logprobs, np.ones((1, 3), bool), 0.5)
  np.testing.assert_array_equal(uncertain, [[True, False, False]])


@many
@given(logprobs_drawn, masks_drawn, st.sampled_from([0.5, 0.9]), st.integers(1, T + 4))
def test_cutpoint_segments_equal_brute_force(logprobs, mask, threshold, interval):
  segment = cutpoint_segments(logprobs, mask, threshold, interval)
  expected = brute_force_cutpoints(logprobs, mask, threshold, interval)
  np.testing.assert_array_equal(segment, expected)
  uncertain = np.asarray(uncertain_tokens(logprobs, mask, threshold))
  np.testing.assert_array_equal(uncertain, (np.exp(logprobs) < threshold) & mask)
  assert segment.dtype == np.int32
  for row, hesitates in zip(np.asarray(segment), uncertain):
    held = np.bincount(row[hesitates])
    assert (held[:-1] == interval).all(), "every segment but the last holds `interval` cutpoints"


@many
@given(lengths_drawn, st.integers(1, T + 3))
def test_even_segments_equal_array_split(lengths, parts):
  segment = np.asarray(even_segments(lengths, parts, T=T))
  for row, length in zip(segment, lengths):
    pieces = np.array_split(np.arange(length), parts)
    expected = [k for k, piece in enumerate(pieces) for _ in piece]
    np.testing.assert_array_equal(row, expected + [-1] * (T - length))


@many
@given(logprobs_drawn, masks_drawn, st.integers(1, 4), st.sampled_from([1, 4, T]))
def test_segment_starts_are_first_tokens(logprobs, mask, interval, max_segments):
  segment = np.asarray(cutpoint_segments(logprobs, mask, 0.9, interval))
  starts = np.asarray(segment_starts(segment, max_segments=max_segments))
  for row, start in zip(segment, starts):
    first = [np.flatnonzero(row == k)[0] if (row == k).any() else T for k in range(max_segments)]
    np.testing.assert_array_equal(start, first)
  np.testing.assert_array_equal(num_segments(segment), segment.max(axis=1) + 1)


@pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3)])
def test_smallest_shapes(shape):
  logprobs, mask = np.full(shape, -1.0), np.ones(shape, bool)
  segment = cutpoint_segments(logprobs, mask, 0.9, 5)
  np.testing.assert_array_equal(segment, np.zeros(shape))
  assert segment_starts(segment, max_segments=2).shape == (shape[0], 2)
  np.testing.assert_array_equal(num_segments(segment), [min(shape[1], 1)] * shape[0])


def test_no_cutpoint_makes_no_segment():
  segment = cutpoint_segments(np.zeros((2, 5)), np.ones((2, 5), bool), 0.9, 1)
  np.testing.assert_array_equal(segment, -np.ones((2, 5)))
  np.testing.assert_array_equal(segment_starts(segment, max_segments=3), np.full((2, 3), 5))


def test_all_cutpoints_with_interval_one_is_one_segment_per_token():
  mask = prefix_mask([5, 2, 0], 5)
  segment = cutpoint_segments(np.full((3, 5), -1.0), mask, 0.9, 1)
  np.testing.assert_array_equal(segment, token_segments(np.array([5, 2, 0]), T=5))
  np.testing.assert_array_equal(segments.cutpoint_segments(mask - 2.0, mask, 0.9, 1), segment)


def test_interval_beyond_the_length_makes_one_segment():
  segment = cutpoint_segments(np.full((1, 5), -1.0), np.ones((1, 5), bool), 0.9, 100)
  np.testing.assert_array_equal(segment, whole_segments(np.array([5]), T=5))


def test_whole_segments_and_token_segments_by_hand():
  lengths = np.array([3, 0, 4])
  np.testing.assert_array_equal(
    segments.whole_segments(lengths, 4), [[0, 0, 0, -1], [-1] * 4, [0] * 4]
  )
  np.testing.assert_array_equal(
    segments.token_segments(lengths, 4), [[0, 1, 2, -1], [-1] * 4, [0, 1, 2, 3]]
  )


def test_segments_from_starts_cuts_at_lines():
  starts = np.array(
    [[True, False, False, True, False, True], [True, False, True, True, False, False]]
  )
  mask = np.array([[True] * 5 + [False], [False, True, True, False, True, True]])
  segment = segments.segments_from_starts(starts, mask)
  np.testing.assert_array_equal(segment, [[0, 0, 0, 1, 1, -1], [-1, -1, 0, -1, 0, 0]])


@pytest.mark.parametrize("garbage", [np.nan, -np.inf, -50.0])
def test_padding_does_not_change_segments(garbage):
  rng = np.random.default_rng(0)
  logprobs = -rng.exponential(0.3, (B, T)).astype(np.float32)
  mask = prefix_mask([4, T, 0])
  dirty = np.where(mask, logprobs, garbage).astype(np.float32)
  clean = cutpoint_segments(logprobs, mask, 0.9, 2)
  np.testing.assert_array_equal(cutpoint_segments(dirty, mask, 0.9, 2), clean)
  assert (np.asarray(clean)[~mask] == -1).all()
  narrow = cutpoint_segments(dirty[:1, :4], mask[:1, :4], 0.9, 2)
  np.testing.assert_array_equal(narrow, np.asarray(clean)[:1, :4])


def test_integer_and_float_masks_are_accepted():
  logprobs, mask = np.full((B, T), -1.0, np.float32), prefix_mask([4, T, 0])
  expected = cutpoint_segments(logprobs, mask, 0.9, 2)
  for kind in (np.int32, np.float32):
    segment = cutpoint_segments(logprobs, mask.astype(kind), 0.9, 2)
    np.testing.assert_array_equal(segment, expected)


def test_bad_arguments_name_themselves():
  logprobs = np.zeros((1, 2))
  with pytest.raises(ValueError, match="interval=0"):
    segments.cutpoint_segments(logprobs, logprobs, 0.9, 0)
  with pytest.raises(ValueError, match="num_segments=0"):
    segments.even_segments(np.array([1]), 0, 2)
  with pytest.raises(AssertionError):
    segments.uncertain_tokens(np.zeros(3), np.zeros(3), 0.9)
