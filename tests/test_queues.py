"""Slots are never idle for long, keys and values are stored once, and queues are shared out."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG

from spo_jax import queues, rollouts

END = 1
SLOTS = 16
LONGEST = 60  # tokens; with one end among 8 equally likely tokens half of all rows have 6 or fewer
GEOMETRIC = tiny.sampling(end_ids=(END,))
KEY = jax.random.key(3)


class Watched(rollouts.Engine):
  """Notes how many slot-steps of each queue were useful."""

  def __init__(self, sampling, rows, response_tokens):
    self.useful = []
    super().__init__(CONFIG, sampling, rows, response_tokens, tiny.grade_into([]))

  def fetch(self, *grown):
    before = self.counts["slot_steps"]
    samples = super().fetch(*grown)
    spent = self.counts["slot_steps"] - before
    self.useful.append((samples.lengths.sum() / spent, (samples.lengths > 0).sum()))
    return samples


def uniform():
  """Parameters to which all tokens are equally likely."""
  return jax.tree.map(np.zeros_like, tiny.params())


def flat(engine, key):
  rollouts.flat(engine, uniform(), tiny.prompts(64), 8, key)


def chain(engine, key):
  rollouts.chain(engine, uniform(), tiny.prompts(32), 2, 3, 0.4, 4, key)


def tree(engine, key):
  rollouts.tree(engine, uniform(), tiny.prompts(32), (2, 8), 1, key)


@pytest.mark.parametrize("rollout", [flat, chain, tree])
def test_slots_do_useful_work_on_lengths_as_spread_as_real_ones(rollout):
  """Geometric lengths: of N rows in S slots the last ones leave slots idle, as long as the
  longest of S takes longer than their mean: useful = N / (N + S (H_S - 1)), H_16 = 3.38."""
  last = []
  for key in jax.random.split(KEY, 4):
    engine = Watched(GEOMETRIC, SLOTS, LONGEST)
    rollout(engine, key)
    last.append(engine.useful[-1])
    counts, _ = engine.take_counts()
    assert (counts["prefilled"] + counts["decoded"]) / counts["unique"] <= 1.02
  useful, rows = np.transpose(last)
  assert (rows >= 14 * SLOTS).all() and (rows < 33 * SLOTS).all()
  assert useful.min() >= 0.85
  harmonic = sum(1 / s for s in range(1, SLOTS + 1))
  expected = rows / (rows + SLOTS * (harmonic - 1))
  assert useful.mean() == pytest.approx(expected.mean(), abs=0.03)


def test_a_tree_of_six_branches_holds_hardly_more_keys_and_values_than_distinct_tokens():
  """Every response at its full length, so that no token that is held is not there."""
  segment, prompts = 4, tiny.prompts(1, seed=tiny.PROMPT_WIDTH - 1)
  engine = Watched(tiny.sampling(end_ids=()), 216 // 14, 3 * segment)
  rollouts.tree(engine, tiny.params(), prompts, (6, 6, 6), segment, KEY)
  held = engine.kv_bytes
  counts, _ = engine.take_counts()
  assert counts["unique"] == tiny.PROMPT_WIDTH + (6 + 36 + 216) * segment
  of_a_token = CONFIG.num_layers * 2 * CONFIG.num_kv_heads * 4 * 4  # 4 channels of 4 bytes
  assert held <= 1.15 * counts["unique"] * of_a_token
  slots, last = 216 // 14, tiny.PROMPT_WIDTH + 3 * segment
  stored = tiny.PROMPT_WIDTH + (6 + 36) * segment
  assert held == (stored + slots * last) * of_a_token
  assert engine.kv_bytes == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_queues_hold_every_row_once_in_the_part_of_its_shard(data):
  shards, part = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
  shard = np.array(data.draw(st.lists(st.integers(0, shards - 1), max_size=40)), int)
  made = queues.queues(shard, shards, shards * part)
  most = max(np.bincount(shard, minlength=1).tolist())
  assert len(made) == -(-most // part)  # as few as hold them
  assert sorted(x for queue in made for x in queue if x >= 0) == list(range(len(shard)))
  for queue in made:
    for place, row in enumerate(queue.tolist()):
      assert row == -1 or shard[row] == place // part
  for each in range(shards):  # and all of them as full
    filled = [(queue.reshape(shards, part)[each] >= 0).sum() for queue in made]
    assert max(filled, default=0) - min(filled, default=0) <= 1


@pytest.mark.parametrize(
  ("questions", "each", "slots", "shards", "expected"),
  [(5, 4, 12, 1, 6), (5, 4, 3, 1, 5), (5, 4, 3, 2, 6), (128, 2, 256, 8, 128), (7, 1, 16, 8, 16)],
)
def test_fillers_give_every_slot_a_row_and_every_shard_as_many(
  questions, each, slots, shards, expected
):
  assert queues.filled(questions, each, slots, shards) == expected


@pytest.mark.parametrize(
  ("questions", "samples", "slots", "expected"),
  [(128, 2, 256, 128), (128, 2, 50, 64), (5, 9, 2, 1)],
)
def test_questions_that_do_not_fit_at_once_come_in_equal_parts(questions, samples, slots, expected):
  assert queues.kept_at_once(questions, samples, slots) == expected


def test_a_request_apart_from_its_pieces_is_a_mistake():
  """Two shards hold two prompts each."""
  engine = Watched(GEOMETRIC, 4, 2)
  engine.mesh = SimpleNamespace(shape={"data": 2, "fsdp": 1})
  store = SimpleNamespace(keys=[np.zeros((4, 1, 1, 1))])
  wanted = queues.at_prompts(np.ones((4, 1), np.int32), np.ones(4, np.int32))
  with pytest.raises(AssertionError, match="apart from the pieces"):
    far = wanted.replace(pieces=np.array([[0], [1], [2], [1]]), limit=np.ones(4, np.int32))
    engine.grow(None, (store,), far, None, 2, 2)


def test_the_pieces_of_one_part_are_gone_when_the_next_one_samples(monkeypatch):
  """What `kv_bytes` and the plan count is what there is."""
  held, grow = [], rollouts.Engine.grow

  def watched(engine, params, stores, *args):
    if len(stores) == 1:  # prompts alone: responses begin
      gc.collect()
      held.append(sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4))
    return grow(engine, params, stores, *args)

  monkeypatch.setattr(rollouts.Engine, "grow", watched)
  engine, prompts = tiny.Recorder(rows=4), tiny.prompts(6)
  rollouts.chain(engine, tiny.params(), prompts, 4, 2, 0.4, 2, KEY)
  assert len(held) > 1 and set(held) == {held[0]}
