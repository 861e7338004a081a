from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

from spo_jax import validation
from spo_jax.rollouts import Engine
from spo_jax.tasks import Problem

PROMPTS = tiny.prompts(13)
KEY = jax.random.key(3)


def greedy_by_hand(prompt):
  response = []
  while len(response) < tiny.T and (not response or response[-1] not in tiny.ENDS):
    response.append(int(tiny.next_logprobs(tiny.params(), prompt + response).argmax()))
  return response


@pytest.fixture(scope="module")
def evaluated():
  graded = []
  engine = Engine(tiny.CONFIG, tiny.sampling(), 12, tiny.T, tiny.grade_into(graded))
  figures, sampled = validation.accuracies(
    engine, tiny.params(), PROMPTS, temperature=0.7, top_p=1.0, key=KEY
  )
  return figures, sampled, graded


def test_greedy_accuracy_is_that_of_greedy_responses_by_hand(evaluated):
  figures, _, graded = evaluated
  expected = [greedy_by_hand(tiny.prompt_of(PROMPTS, i)) for i in range(13)]
  assert [response for _, response, _ in graded[:13]] == expected
  # A reward of 1/2 is not a right answer.
  rewards = [tiny.reward(response, response[-1] in tiny.ENDS) for response in expected]
  assert {0.0, 0.5, 1.0} == set(rewards)
  assert figures["greedy_accuracy"] == pytest.approx(rewards.count(1.0) / 13)


def test_sampled_figures_are_those_of_the_sampled_responses(evaluated):
  figures, sampled, graded = evaluated
  problems, responses, finished = zip(*graded[13:])
  assert problems == PROMPTS.problems
  assert tiny.responses(sampled.samples) == list(responses)
  rewards = [tiny.reward(*row) for row in zip(responses, finished)]
  assert sampled.rewards.tolist() == rewards
  assert figures["sampled_accuracy"] == pytest.approx(rewards.count(1.0) / 13)
  assert figures["unfinished_rate"] == pytest.approx(1 - np.mean(finished))
  assert figures["mean_length"] == pytest.approx(np.mean([len(r) for r in responses]))
  assert 0 < figures["unfinished_rate"] < 1


def test_sampling_is_at_the_evaluation_temperature(evaluated):
  _, sampled, _ = evaluated
  for i, response in enumerate(tiny.responses(sampled.samples)):
    expected = tiny.response_logprobs(
      tiny.params(), tiny.prompt_of(PROMPTS, i), response, temperature=0.7
    )
    np.testing.assert_allclose(
      sampled.samples.logprobs[i, : len(response)], expected, rtol=1e-4, atol=1e-4
    )


def test_evaluation_neither_changes_the_engine_nor_samples_as_training_does(evaluated):
  mine = Engine(tiny.CONFIG, tiny.sampling(9.0, 0.5, 1), 12, tiny.T, tiny.grade_into([]))
  mine.counts["decoded"], mine.grade_seconds = 7, 1.5
  before = dict(mine.counts), mine.grade_seconds, mine.sampling
  figures, _ = validation.accuracies(
    mine, tiny.params(), PROMPTS, temperature=0.7, top_p=1.0, key=KEY
  )
  assert (mine.counts, mine.grade_seconds, mine.sampling) == before
  assert figures == evaluated[0]


def test_a_tiny_top_p_makes_samples_greedy(evaluated):
  engine = Engine(tiny.CONFIG, tiny.sampling(), 12, tiny.T, tiny.grade_into([]))
  sampled = validation.respond(engine, tiny.params(), PROMPTS, 0.7, 1e-6, KEY)
  assert tiny.responses(sampled.samples) == [response for _, response, _ in evaluated[2][:13]]


def test_texts_are_records_of_the_first_responses(evaluated):
  _, sampled, _ = evaluated
  problems = tuple(Problem(i, f"{i}+{i}=", str(i + i), None) for i in range(13))
  records = validation.texts(PROMPTS.replace(problems=problems), sampled, ["a", "b"])
  assert records == [
    {
      "prompt": f"{i}+{i}=",
      "response": text,
      "reward": float(sampled.rewards[i]),
      "finished": bool(sampled.samples.finished[i]),
    }
    for i, text in enumerate("ab")
  ]
