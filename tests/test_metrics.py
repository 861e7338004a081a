"""pass@k, majority votes and intervals against enumeration, counting and repetition."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.metrics import (
  bootstrap_interval,
  majority,
  majority_correct,
  pass_at_k,
  summarise,
)

ANSWERS = st.lists(st.sampled_from([None, "7", "07", "8"]), min_size=1, max_size=9)


@settings(max_examples=60)
@given(samples=st.integers(1, 8), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples, data):
  k = data.draw(st.integers(1, samples))
  rows = data.draw(
    st.lists(st.lists(st.booleans(), min_size=samples, max_size=samples), min_size=1, max_size=4)
  )
  counts = np.sum(rows, axis=1)
  expected = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in rows]
  np.testing.assert_allclose(pass_at_k(counts, samples, k), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(10_000, 1, 100), (5_000, 37, 2_500),
                                                     (4_096, 4_000, 90)])  # fmt: skip
def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_digits(samples, right, k):
  wrong = Fraction(math.comb(samples - right, k), math.comb(samples, k))
  got = pass_at_k(np.array([right]), samples, k)[0]
  assert got == pytest.approx(float(1 - wrong), rel=1e-9)


def test_pass_at_k_is_exact_at_its_ends():
  assert pass_at_k(np.array([0, 16]), 16, 4).tolist() == [0.0, 1.0]
  assert pass_at_k(np.array([13, 12]), 16, 4).tolist()[0] == 1.0  # only three are wrong
  counts = np.arange(17)
  np.testing.assert_allclose(pass_at_k(counts, 16, 1), counts / 16, atol=1e-15)
  assert pass_at_k(counts, 16, 16).tolist() == [0.0] + [1.0] * 16
  assert pass_at_k(np.array([4000]), 4096, 4096).tolist() == [1.0]


@pytest.mark.parametrize(("right", "samples", "k"), [(1, 4, 0), (1, 4, 5), (5, 4, 2), (-1, 4, 2)])
def test_pass_at_k_of_more_than_was_sampled_is_refused(right, samples, k):
  with pytest.raises(ValueError, match=rf"k={k}, n={samples}, c=\[{right}\]"):
    pass_at_k(np.array([right]), samples, k)


@given(ANSWERS)
def test_the_majority_is_the_most_frequent_answer_the_earliest_of_equals(answers):
  # A later answer wins only with strictly more votes than every earlier one.
  best, most = None, 0
  for answer in answers:
    votes = sum(other == answer for other in answers)
    if answer is not None and votes > most:
      best, most = answer, votes
  assert majority(answers) == best


def test_ties_go_to_the_earliest_sample_whatever_the_answers_are_called():
  assert majority(["b", "a", "a", "b"]) == "b"
  assert majority(["a", "b", "b", "a"]) == "a"
  assert majority([None, None, None, "z", "y"]) == "z"


def test_no_answer_never_wins_against_one_and_is_never_right():
  assert majority([None, None, None, "3"]) == "3"
  assert majority([None, None]) is None
  correct = np.array([[False, False, True], [True, True, True]])
  rows = [[None, None, "3"], [None, None, None]]
  assert majority_correct(rows, correct).tolist() == [True, False]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=5, max_size=5), min_size=1, max_size=6))
def test_a_majority_is_right_where_its_answer_is(rows):
  correct = np.array(rows) == "a"
  expected = [majority(row) == "a" for row in rows]
  assert majority_correct(rows, correct).tolist() == expected


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(0)
  truth, covered = 0.3, 0
  for trial in range(400):
    low, high = bootstrap_interval(rng.random(120) < truth, trial, resamples=1000)
    covered += low <= truth <= high
  assert 0.92 <= covered / 400 <= 0.975  # three standard errors about 95 %


@pytest.mark.parametrize(("level", "width"), [(0.95, 1.95996), (0.8, 1.28155)])
def test_a_bootstrap_interval_of_many_normal_figures_is_the_textbook_one(level, width):
  values = np.random.default_rng(1).normal(5, 2, 4000)
  error = values.std() / math.sqrt(len(values))
  low, high = bootstrap_interval(values, 0, level=level)
  assert low == pytest.approx(values.mean() - width * error, abs=0.1 * error)
  assert high == pytest.approx(values.mean() + width * error, abs=0.1 * error)


def test_a_bootstrap_drawn_in_parts_equals_one_drawn_at_once():
  values = np.random.default_rng(2).random(3000)  # 349 resamples at once
  index = np.random.default_rng(7).integers(0, 3000, (1000, 3000))
  expected = np.quantile(values[index].mean(axis=1), [0.025, 0.975])
  np.testing.assert_allclose(bootstrap_interval(values, 7, resamples=1000), expected, rtol=1e-12)


def test_a_bootstrap_is_repeatable_and_follows_its_seed():
  values = np.random.default_rng(3).random(50)
  assert bootstrap_interval(values, 5) == bootstrap_interval(values, 5)
  assert bootstrap_interval(values, 5) != bootstrap_interval(values, 6)
  assert bootstrap_interval(np.full(9, 0.25), 0) == (0.25, 0.25)


def test_an_interval_without_questions_is_refused():
  with pytest.raises(ValueError, match="at least one question"):
    bootstrap_interval(np.zeros(0), 0)


def record(reward, extracted, tokens, finished=True):
  return {"reward": reward, "extracted": extracted, "tokens": tokens, "finished": finished}


RECORDS = [
  # Two of three right, and the vote too.
  record(1.0, "4", 10), record(0.0, "5", 20), record(1.0, "4", 30),
  # Nearly the full reward is not a right answer; the unfinished pair would outvote the right one.
  record(1.0, "8", 40), record(-0.5, "9", 60, False), record(-0.5, "9", 60, False),
  # A tie of three: the first answer stands, and is wrong.
  record(0.5, "1", 5), record(1.0, "2", 5), record(0.0, None, 6),
  record(0.0, None, 7, False), record(0.0, None, 8), record(0.0, None, 9),
]  # fmt: skip


def test_a_summary_by_hand():
  summary = summarise(RECORDS, samples=3, seed=0)
  assert (summary["questions"], summary["samples"], summary["tokens"]) == (4, 3, 260)
  assert summary["accuracy"] == pytest.approx((2 + 1 + 1 + 0) / 12)
  assert summary["pass@1"] == pytest.approx(summary["accuracy"])
  assert summary["pass@2"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4)
  assert summary["pass@3"] == pytest.approx(3 / 4)
  assert summary["maj@3"] == pytest.approx(2 / 4)
  assert summary["unfinished_rate"] == pytest.approx(3 / 12)
  assert summary["mean_length"] == pytest.approx(260 / 12)
  assert summary["mean_reward"] == pytest.approx((2 + 0 + 1.5 + 0) / 12)
  assert summary["intervals"].keys() == {"accuracy", "pass@1", "pass@2", "pass@3", "maj@3"}


def test_intervals_are_over_questions_not_over_samples():
  rewards = np.random.default_rng(5).integers(0, 2, (101, 3))
  records = [record(float(r), str(r), 1) for r in rewards.ravel()]
  intervals = summarise(records, samples=3, seed=4)["intervals"]
  assert intervals["accuracy"] == list(bootstrap_interval(rewards.mean(axis=1), seed=4))
  assert intervals["maj@3"] == list(bootstrap_interval(rewards.sum(axis=1) >= 2, seed=4))
  assert intervals != summarise(records, samples=3, seed=5)["intervals"]


def test_pass_at_k_is_given_for_powers_of_two_and_for_all_samples():
  for samples, sizes in ((1, [1]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])):
    summary = summarise([record(1.0, "1", 1)] * samples, samples, seed=0)
    assert [k for k in summary if k.startswith("pass@")] == [f"pass@{k}" for k in sizes]
    assert summary[f"maj@{samples}"] == 1
