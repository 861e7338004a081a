from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

import jax
import numpy as np
import pytest
import tiny
from tiny import CONFIG, ENDS, VOCAB, Recorder, T

from spo_jax import rollouts
from spo_jax.packing import trajectory_rows, tree_edges
from spo_jax.structs import Prompts
from spo_jax.tokenizer import bpe_tokenizer, encode_prompts

SAMPLES, N = 4, 3  # responses per question, continuations per boundary
M = 2  # tokens per tree level
KEY = jax.random.key(11)
PROMPTS = tiny.prompts(5)  # 12 slots take the rows of 3 questions, so there is a filler
BRANCHES = [(1,), (3,), (2, 1, 3)]


def flat(engine, prompts=PROMPTS, key=KEY, params=None):
  return rollouts.flat(engine, params or tiny.params(), prompts, SAMPLES, key)


def chain(engine, prompts=PROMPTS, key=KEY, params=None, threshold=0.4, interval=2, score=None):
  params = params or tiny.params()
  return rollouts.chain(engine, params, prompts, SAMPLES, N, threshold, interval, key, score)


def tree(engine, prompts=PROMPTS, key=KEY, params=None, branch_factors=(2, 1, 3)):
  return rollouts.tree(engine, params or tiny.params(), prompts, branch_factors, M, key)


every_kind = pytest.mark.parametrize("rollout", [flat, chain, tree])


def first_questions(count):
  return PROMPTS.replace(
    tokens=PROMPTS.tokens[:count], lengths=PROMPTS.lengths[:count],
    question=PROMPTS.question[:count], problems=PROMPTS.problems[:count],
  )  # fmt: skip


def same(actual, expected):
  """Equal integers, equal floats but for the order of additions in a matrix product."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0), actual, expected)


def exact_moments(prompt, temperature):
  """E[reward] and E[reward^2] of what follows every unfinished prefix, by enumeration.

  Returns: {prefix as a tuple: (mean, second moment)}.
  """
  inner = [token for token in range(VOCAB) if token not in ENDS]
  levels = [[()]]
  for _ in range(T - 1):
    levels.append([(*prefix, token) for prefix in levels[-1] for token in inner])
  contexts = [[*prompt, *prefix] for prefix in levels[-1]]  # all shorter ones are in them
  scores = tiny.reference_logits(CONFIG, tiny.params(), contexts)[:, len(prompt) - 1 :]
  probs = np.exp(scores / temperature)
  probs /= probs.sum(-1, keepdims=True)
  moments = {}
  for depth in reversed(range(T)):
    stride = len(inner) ** (T - 1 - depth)  # of one prefix's descendants on the last level
    for i, prefix in enumerate(levels[depth]):
      total = np.zeros(2)
      for token, p in enumerate(probs[i * stride, depth]):
        whole = (*prefix, token)
        if token in ENDS or depth == T - 1:
          r = tiny.reward(whole, token in ENDS)
          total += p * np.array([r, r**2])
        else:
          total += p * moments[whole]
      moments[prefix] = total
  return moments


# What all rollouts share.


@every_kind
@pytest.mark.parametrize("rows", [2, 5, 100])
def test_samples_do_not_depend_on_how_many_rows_are_decoded_at_once(rollout, rows):
  """Not even if one question or tree alone has more of them."""
  same(rollout(Recorder(rows=rows)), rollout(Recorder(rows=12)))


@every_kind
def test_samples_of_a_question_do_not_depend_on_the_questions_behind_it(rollout):
  two, five = rollout(Recorder(), first_questions(2)), rollout(Recorder())
  same(two, jax.tree.map(lambda x, y: x[: len(y)], five, two))


@every_kind
def test_every_token_is_counted_once(rollout):
  engine = Recorder()
  out = rollout(engine)
  counts, seconds = engine.take_counts()
  lengths = [samples.lengths for samples in engine.fetched]
  limits = [requests.limit for requests, _ in engine.grown]
  grown = sum((limit > 0).sum() for limit in limits)  # others are fillers
  assert grown == (sum(x.sum() for x in out.valid) if rollout is tree else len(engine.graded))
  assert counts["prefilled"] == PROMPTS.lengths.sum()  # each prompt once, fillers nothing
  assert counts["decoded"] == sum(x.sum() for x in lengths)
  assert counts["unique"] == counts["prefilled"] + counts["decoded"]  # none of it twice
  assert counts["slot_steps"] == sum(
    slots * tiny.steps_by_hand(limit, length, slots)
    for limit, length in zip(limits, lengths, strict=True)
    for slots in [min(12, len(limit))]
  )
  assert seconds["grade"] > 0 == seconds["reshard"]
  assert engine.take_counts() == (dict.fromkeys(counts, 0), {"grade": 0, "reshard": 0})


@every_kind
def test_parameters_are_rounded_once_for_a_rollout(rollout):
  engine = Recorder()
  assert engine.place(tiny.params()) is tiny.params()  # float32 is what they are
  engine.config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
  grow, given = engine.grow, []
  engine.grow = lambda params, *rest, **more: given.append(params) or grow(params, *rest, **more)
  assert rollout(engine) and given and all(p["embed_tokens"].dtype == "bfloat16" for p in given)


class PrefillsPerSample(Recorder):
  def prefill(self, *args):
    for _ in range(SAMPLES):
      cache = super().prefill(*args)
    return cache


class DecodesAgain(Recorder):
  def fetch(self, *args):
    super().fetch(*args)
    return super().fetch(*args)


@every_kind
@pytest.mark.parametrize("wasteful", [PrefillsPerSample, DecodesAgain])
def test_work_done_twice_shows_in_the_token_counts(rollout, wasteful):
  counts = []
  for engine in (Recorder(), wasteful()):
    rollout(engine)
    counts.append(engine.take_counts()[0])
  assert counts[0]["unique"] == counts[1]["unique"]
  ratios = [(count["prefilled"] + count["decoded"]) / count["unique"] for count in counts]
  assert ratios[0] == 1 and ratios[1] > 1.02


# Stop strings and token ids.


@every_kind
def test_a_response_ends_where_its_text_first_holds_a_stop_string(rollout):
  """Whatever of the string its prefix held already when it was continued."""
  across = 0
  for seed in range(10):
    engine = Recorder(sampling=tiny.sampling(stop_table=tiny.stop_table()))
    rollout(engine, key=jax.random.key(seed))
    for _, response, finished in engine.graded:
      assert not any(tiny.is_over(response[:n]) for n in range(len(response)))
      assert finished == tiny.is_over(response)
      assert finished or len(response) == T
      across += finished and len(response) > M and not tiny.is_over(response[M:])
  assert across > 4  # by a string that began in front of a tree's first boundary


@every_kind
def test_sampled_ids_are_trained_on_though_their_text_would_tokenise_differently(rollout):
  letters = np.random.default_rng(0).choice(list("abcd"), (600, 8)).tolist()
  tokenizer = bpe_tokenizer(map("".join, letters), 1500)
  config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer))
  grade = tiny.grade_into([])
  engine = rollouts.Engine(config, tiny.sampling(end_ids=(1,)), 12, T, grade)
  tokens, lengths = encode_prompts(tokenizer, ["ab", "c", "l"], 4)
  prompts = Prompts(tokens, lengths, np.arange(3), ("",) * 3)
  out = rollout(engine, prompts, params=tiny.params(config))
  sampled, trained = [], []
  if rollout is tree:
    edges = tree_edges(prompts, out, tuple(map(np.ones_like, out.rewards)), 0)
    trained = [row[a:b].tolist() for row, a, b in zip(edges.tokens, edges.start, edges.end)]
    for level in range(len(out.tokens)):
      rows = zip(out.tokens[level][out.valid[level]], out.lengths[level][out.valid[level]])
      sampled += [row[:length].tolist() for row, length in rows]
  else:
    rows = trajectory_rows(prompts, out, np.ones((len(out.prompt), T)), None)
    trained = [row[is_own].tolist() for row, is_own in zip(rows.tokens, rows.mask)]
    sampled = tiny.responses(out.samples)
  assert trained == sampled
  texts = tokenizer.batch_decode(sampled)
  again = tokenizer(texts)["input_ids"]
  differ = [a != b for a, b, text in zip(again, sampled, texts) if "\ufffd" not in text]
  assert sum(differ) > 2


@every_kind
def test_no_two_rows_draw_with_the_same_key(rollout):
  engine = Recorder()
  rollout(engine)
  used = Counter(
    (*jax.random.key_data(key).tolist(), int(i))
    for requests, key in engine.grown
    for i in requests.ids[requests.limit > 0]
  )
  assert len(used) >= len(engine.graded)
  assert set(used.values()) == {1}


@every_kind
def test_keys_change_samples_and_repeat_them(rollout):
  one, again, other = (rollout(Recorder(), key=jax.random.key(k)) for k in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, again)
  differ = jax.tree.map(lambda x, y: (x != y).any(), one, other)
  assert any(jax.tree.leaves(differ))


def test_later_calls_compile_nothing():
  """Of any kind: also the small programs that jax makes of single operations."""
  compiled, boundaries = [], []

  def listen(event, _, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(kwargs)

  engine = Recorder()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for call, threshold in enumerate([0.4, 0.7, 1.1, 0.2, 0.0]):
      if call == 2:
        compiled.clear()
      data = tiny.prompts(5, seed=call), jax.random.key(call), tiny.params(seed=call)
      boundaries.append(chain(engine, *data, threshold=threshold).segment.max(1).sum())
      tree(engine, *data)
    assert not compiled
    jax.jit(lambda x: x + len(boundaries))(1.0)
    assert compiled  # the listener does hear a compilation
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(set(boundaries)) == 5


# Flat.


def test_flat_grades_every_response_once_and_whole():
  engine = Recorder()
  out = flat(engine)
  responses = tiny.responses(out.samples)
  np.testing.assert_array_equal(out.prompt, np.repeat(np.arange(5), SAMPLES))
  assert engine.graded == [
    (PROMPTS.problems[p], response, bool(finished))
    for p, response, finished in zip(out.prompt, responses, out.samples.finished)
  ]
  for b, response in enumerate(responses):
    finished = response[-1] in ENDS
    assert out.samples.finished[b] == finished
    assert finished or len(response) == T
    assert out.rewards[b] == tiny.reward(response, finished)
    assert out.segment[b].tolist() == [0] * len(response) + [-1] * (T - len(response))
    expected = tiny.response_logprobs(tiny.params(), tiny.prompt_of(PROMPTS, b // 4), response)
    np.testing.assert_allclose(out.samples.logprobs[b, : len(response)], expected, atol=1e-4)
  assert 0 < out.samples.finished.mean() < 1


# Chain.


def boundaries_by_hand(logprobs, length, threshold, interval):
  """Where continuations start: in front of uncertain tokens number 0, k, 2k, ..."""
  uncertain = [t for t in range(length) if np.exp(logprobs[t]) < threshold]
  return uncertain[::interval]


def continuations(engine, prompts, out):
  """What a chain grew from boundaries: (row, start, whole, finished, logprobs)."""
  responses = tiny.responses(out.samples)
  for (requests, _), samples in zip(engine.grown[1:], engine.fetched[1:]):
    for b in np.flatnonzero(requests.limit):
      row, length = requests.pieces[b, 1], samples.lengths[b]
      start = int(requests.prefix[b] - prompts.lengths[out.prompt[row]])
      whole = responses[row][:start] + samples.tokens[b, :length].tolist()
      yield row, start, whole, bool(samples.finished[b]), samples.logprobs[b, :length]


@pytest.mark.parametrize(("threshold", "interval"), [(0.4, 2), (0.25, 1), (1.1, 1), (1.1, 9)])
def test_a_boundary_is_worth_the_mean_of_its_continuations(threshold, interval):
  engine, prompts = Recorder(), first_questions(3)
  out = chain(engine, prompts, threshold=threshold, interval=interval)
  grown = list(continuations(engine, prompts, out))
  rewards = defaultdict(list)
  for row, start, whole, finished, logprobs in grown:
    assert finished == (whole[-1] in ENDS)
    assert finished or len(whole) == T
    prompt = tiny.prompt_of(prompts, out.prompt[row])
    expected = tiny.response_logprobs(tiny.params(), prompt, whole)
    np.testing.assert_allclose(logprobs, expected[start:], atol=1e-4)
    rewards[out.prompt[row], *whole[:start]].append(tiny.reward(whole, finished))

  # Graded: every continuation behind its unchanged prefix, then the responses themselves.
  responses = tiny.responses(out.samples)
  assert engine.graded == [
    (prompts.problems[out.prompt[row]], whole, finished)
    for row, whole, finished in [
      *((row, whole, finished) for row, _, whole, finished, _ in grown),
      *zip(range(len(responses)), responses, out.samples.finished),
    ]
  ]

  seen = Counter()
  for row, response in enumerate(responses):
    starts = boundaries_by_hand(out.samples.logprobs[row], len(response), threshold, interval)
    segment = [sum(s <= t for s in starts) - 1 for t in range(len(response))]
    assert out.segment[row].tolist() == segment + [-1] * (T - len(response))
    for k, start in enumerate(starts):
      prefix = (out.prompt[row], *response[:start])
      seen[prefix] += 1
      assert out.values[row, k] == pytest.approx(np.mean(rewards[prefix]))
    assert out.rewards[row] == tiny.reward(response, response[-1] in ENDS)
  assert rewards.keys() == seen.keys()  # every boundary, and nothing else, is estimated ...
  assert {len(drawn) for drawn in rewards.values()} == {N}
  assert max(seen.values()) > 1  # ... once, however many rows stand there
  assert any(len(prefix) == 1 for prefix in seen)  # the prompt itself is one of them


def test_without_a_boundary_nothing_is_continued():
  engine = Recorder()
  out = chain(engine, threshold=0.0)
  assert len(engine.graded) == 5 * SAMPLES == len(out.rewards)
  assert len(engine.grown) == 1  # the responses
  assert (out.segment == -1).all() and (out.values == 0).all()
  same(out.samples, chain(Recorder(), threshold=1.1).samples)


def test_chain_cuts_where_the_scorer_hesitates():
  def score(prompts, prompt, samples):
    """A trainer that doubts a response's third token only."""
    third = (np.arange(T) == 2) & (samples.lengths[:, None] > 2)
    return np.where(third, -5.0, 0.0).astype(np.float32)

  engine, prompts = Recorder(), first_questions(3)
  out = chain(engine, prompts, score=score, interval=1)
  is_long = out.samples.lengths > 2
  assert {start for _, start, *_ in continuations(engine, prompts, out)} == {2}
  np.testing.assert_array_equal(out.segment.max(1), np.where(is_long, 0, -1))
  np.testing.assert_array_equal(out.samples.logprobs, score(None, None, out.samples))


def test_chain_values_are_unbiased_and_continuations_independent():
  """z against the exact value of every prefix, which says its exact error, too."""
  prompts, temperature = first_questions(3), 0.8
  moments = [exact_moments(tiny.prompt_of(prompts, i), temperature) for i in range(3)]
  z = []
  for seed in range(40):
    engine = Recorder(sampling=tiny.sampling(temperature))
    out = chain(engine, prompts, key=jax.random.key(seed), threshold=0.5)
    seen = set()
    for row, response in enumerate(tiny.responses(out.samples)):
      for k in range(out.segment[row].max() + 1):
        prefix = tuple(response[: out.segment[row].tolist().index(k)])
        if (out.prompt[row], prefix) not in seen:
          seen.add((out.prompt[row], prefix))
          mean, second = moments[out.prompt[row]][prefix]
          z.append((out.values[row, k] - mean) / np.sqrt((second - mean**2) / N))
  z = np.array(z)
  assert len(z) > 300
  assert abs(z.mean()) * np.sqrt(len(z)) < 4
  # Continuations that are alike would inflate z^2.
  assert abs(np.mean(z**2) - 1) * np.sqrt(len(z)) / np.std(z**2) < 4


# Tree.


def paths_of(branch_factors):
  """Every node as the path of node numbers down to it, by the rule that children are i*b ..."""
  level = [()]
  for branch in branch_factors:
    level = [(*path, i * branch + c) for i, path in enumerate(level) for c in range(branch)]
    yield from level


@pytest.mark.parametrize("branch_factors", BRANCHES)
def test_a_tree_is_grown_and_graded_as_its_paths_say(branch_factors):
  engine = Recorder()
  out = tree(engine, branch_factors=branch_factors)
  assert out.branch_factors == branch_factors
  leaves, most = [], len(branch_factors) - 1
  for p in range(5):
    for path in paths_of(branch_factors):
      level, node = len(path) - 1, path[-1]
      length, finished, valid, reward = (
        x[level][p, node] for x in (out.lengths, out.finished, out.valid, out.rewards)
      )
      assert valid == (not any(out.finished[l][p, i] for l, i in enumerate(path[:-1])))
      if not valid:  # below an early leaf nothing is sampled
        assert length == 0 and not finished and reward == 0
        continue
      parts = [out.tokens[l][p, i, : out.lengths[l][p, i]] for l, i in enumerate(path)]
      whole, own = np.concatenate(parts).tolist(), parts[-1].tolist()
      assert len(whole) == level * M + len(own)
      assert len(own) == length > 0
      assert finished == (own[-1] in ENDS)
      assert not set(own[:-1]) & set(ENDS)
      assert finished or length == (T - level * M if level == most else M)
      expected = tiny.response_logprobs(tiny.params(), tiny.prompt_of(PROMPTS, p), whole)
      np.testing.assert_allclose(
        out.logprobs[level][p, node, :length], expected[level * M :], atol=1e-4
      )
      if finished or level == most:
        assert reward == tiny.reward(whole, finished)
        leaves.append((PROMPTS.problems[p], whole, bool(finished)))
      else:
        assert reward == 0
  assert sorted(engine.graded) == sorted(leaves)  # once each, on the whole response
  assert most == 0 or out.finished[0].any()


@pytest.mark.parametrize("branch_factors", BRANCHES)
def test_tree_arrays_are_empty_outside_what_was_sampled(branch_factors):
  out = tree(Recorder(), branch_factors=branch_factors)
  count = 1
  for level, branch in enumerate(branch_factors):
    count *= branch
    width = T - level * M if level == len(branch_factors) - 1 else M
    assert out.tokens[level].shape == out.logprobs[level].shape == (5, count, width)
    outside = np.arange(width) >= out.lengths[level][..., None]
    assert (out.logprobs[level][outside] == 0).all()
    assert (out.tokens[level][outside] == tiny.PAD).all()


def test_tree_values_are_unbiased():
  questions, repeats, temperature = 3, 30, 0.8
  prompts = first_questions(questions)
  tiled = prompts.replace(
    tokens=np.tile(prompts.tokens, (repeats, 1)), lengths=np.tile(prompts.lengths, repeats),
    question=np.arange(questions * repeats), problems=prompts.problems * repeats,
  )  # fmt: skip
  out = tree(Recorder(sampling=tiny.sampling(temperature)), tiled)
  value = out.rewards[-1]
  for level in (1, 0):  # the mean of the children, unless the node was graded itself
    means = value.reshape(*out.rewards[level].shape, -1).mean(-1)
    value = np.where(out.finished[level], out.rewards[level], means)
  root = value.mean(-1).reshape(repeats, questions)
  for i in range(questions):
    exact = exact_moments(tiny.prompt_of(prompts, i), temperature)[()][0]
    error = root[:, i].std(ddof=1) / np.sqrt(repeats)
    assert abs(root[:, i].mean() - exact) < 4 * error
