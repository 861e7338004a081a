from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import equations_of
from tiny import CONFIG, PAD, PROMPT_WIDTH, VOCAB, T, steps_by_hand

from spo_jax import model, sampler, stops
from spo_jax.structs import KVCache, Requests, Sampling

P, B = 4, 12  # rows b, b + P, b + 2P, ... continue prompt b
SLOTS = 5  # so that rows wait for each other
WIDTH = PROMPT_WIDTH + 2 * T  # room to grow once more behind a full response
KEY = jax.random.key(7)
NO_END = tiny.sampling(end_ids=())

PROMPTS = tiny.prompts(P, seed=3)
few = settings(deadline=None, max_examples=12)
decode_step = jax.jit(model.decode_step, static_argnums=0)
truncate = jax.jit(sampler.truncate)


@functools.cache
def prefilled():
  return sampler.prefill(CONFIG, tiny.params(), PROMPTS.tokens, PROMPTS.lengths)


def requests(pieces, offsets, prefix, token, ids=None, limit=T, stop_state=0):
  """Of one row per entry of `prefix`; columns of pieces and offsets are one each per store."""
  rows = len(prefix)
  ids = np.arange(rows) if ids is None else ids
  pieces, offsets = (np.column_stack(np.broadcast_arrays(*x, prefix)[:-1]).astype(np.int32)
                     for x in (pieces, offsets))  # fmt: skip
  columns = (prefix, token, stop_state, ids, limit)
  return Requests(
    pieces, offsets, *(np.broadcast_to(x, rows).astype(np.int32) for x in columns)
  )


def grow(stores, wanted, sampling, key=KEY, slots=SLOTS, max_tokens=T):
  """`sampler.grow`: samples on the host, the store of the new rows, steps."""
  samples, kept, slot_steps = sampler.grow(
    CONFIG, tiny.params(), stores, wanted, key, sampling, slots=slots, width=WIDTH,
    max_tokens=max_tokens, keep=True,
  )  # fmt: skip
  return jax.device_get(samples), kept, int(slot_steps) / slots


def at_prompts(parent=np.arange(B) % P, **kwargs):
  prefix = PROMPTS.lengths[parent]
  return requests([parent], [0], prefix, PROMPTS.tokens[parent, prefix - 1], **kwargs)


def respond(sampling, parent=np.arange(B) % P, key=KEY, slots=SLOTS, **kwargs):
  """Responses to prompts; (samples, store, steps)."""
  return grow((prefilled(),), at_prompts(parent, **kwargs), sampling, key, slots)


def expected_logprobs(samples, temperature):
  """What the full forward says about responses to the prompts in turn, 0 behind them."""
  out = np.zeros((B, T))
  for b, response in enumerate(tiny.responses(samples)):
    prompt = tiny.prompt_of(PROMPTS, b % P)
    out[b, : len(response)] = tiny.response_logprobs(
      tiny.params(), prompt, response, temperature
    )
  return out


def close(actual, expected, tolerance=1e-4):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# Decoding against the full forward.


def test_decode_steps_equal_the_full_forward():
  """Forced tokens, rows of different lengths in one cache."""
  forced = np.random.default_rng(0).integers(0, VOCAB, (P, T))
  room = ((0, 0), (0, 0), (0, T), (0, 0))
  keys, values = (
    tuple(jnp.pad(x, room) for x in layers) for layers in (prefilled().keys, prefilled().values)
  )
  cache = KVCache(keys, values, PROMPTS.lengths - 1)
  token = PROMPTS.tokens[np.arange(P), PROMPTS.lengths - 1]
  for t in range(T):
    scores, cache = decode_step(CONFIG, tiny.params(), jnp.asarray(token), cache)
    for b in range(P):
      tokens = tiny.prompt_of(PROMPTS, b) + forced[b, :t].tolist()
      close(scores[b], tiny.reference_logits(CONFIG, tiny.params(), [tokens])[0, -1])
    token = forced[:, t]
  np.testing.assert_array_equal(cache.length, PROMPTS.lengths - 1 + T)


@pytest.mark.parametrize("temperature", [0.35, 1.0, 1.7])
def test_reported_logprobs_equal_the_full_forward_at_the_temperature(temperature):
  samples, _, _ = respond(tiny.sampling(temperature))
  close(samples.logprobs, expected_logprobs(samples, temperature))


def test_truncation_does_not_change_reported_logprobs():
  samples, _, _ = respond(tiny.sampling(0.7, top_p=0.6, top_k=3))
  close(samples.logprobs, expected_logprobs(samples, 0.7))


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9, "top_k": 3}])
def test_greedy_is_the_argmax_of_the_full_forward(truncation):
  sampling = tiny.sampling(0.0, **truncation)
  samples, _, _ = respond(sampling)
  for b, response in enumerate(tiny.responses(samples)):
    prompt = tiny.prompt_of(PROMPTS, b % P)
    scores = tiny.reference_logits(CONFIG, tiny.params(), [prompt + response])[0]
    assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == response
  close(samples.logprobs, expected_logprobs(samples, temperature=1.0))
  again, _, _ = respond(sampling, key=jax.random.key(8))
  np.testing.assert_array_equal(again.tokens, samples.tokens)


# Contexts made of pieces.


def test_a_row_grown_from_pieces_equals_one_prefilled_anew():
  """From every position of a response: at the prompt, inside, and behind the last token."""
  first, own, _ = respond(NO_END)
  row, start = np.divmod(np.arange(B) + T + 1, T + 1)  # rows 1 and 2, of longer prompts
  length = PROMPTS.lengths[row % P]
  prefix = length + start
  contexts = np.full((B, PROMPT_WIDTH + T), PAD, np.int32)
  for b in range(B):
    tokens = tiny.prompt_of(PROMPTS, row[b] % P) + tiny.responses(first)[row[b]][: start[b]]
    contexts[b, : len(tokens)] = tokens
  token = contexts[np.arange(B), prefix - 1]
  key = jax.random.key(9)
  pieces = requests([row % P, row], [0, length - 1], prefix, token)
  hot = tiny.sampling(temperature=4.0, end_ids=())
  grown, grown_store, _ = grow((prefilled(), own), pieces, hot, key)
  anew = sampler.prefill(CONFIG, tiny.params(), contexts, prefix)
  whole = requests([np.arange(B)], [0], prefix, token)
  expected, expected_store, _ = grow((anew,), whole, hot, key)
  np.testing.assert_array_equal(grown.tokens, expected.tokens)
  close(grown.logprobs, expected.logprobs)
  jax.tree.map(close, grown_store, expected_store)
  assert len(np.unique(grown.tokens, axis=0)) == B  # each row had a key of its own


def test_growing_leaves_what_is_grown_from_as_it_was():
  first, own, _ = respond(NO_END)
  before = jax.device_get(own)
  parent, length = np.arange(B) % P, PROMPTS.lengths[np.arange(B) % P]
  pieces = requests([parent, np.arange(B)], [0, length - 1], length + 1, first.tokens[:, 0])
  grow((prefilled(), own), pieces, NO_END)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(own), before)


# What a row depends on.


@few
@given(st.permutations(range(B)), st.integers(0, 1000))
def test_a_row_depends_on_its_own_key_and_context_only(order, seed):
  """Wherever it stands in the queue, and whoever has had its slot before."""
  key, order = jax.random.key(seed), np.array(order)
  samples, _, _ = respond(NO_END, key=key)
  stranger = np.arange(B) % 3 == 0  # the other rows only move
  moved, _, _ = respond(
    NO_END,
    np.where(stranger, 0, order % P),
    key=key,
    ids=np.where(stranger, 500 + order, order),
    limit=np.where(stranger, order % T, T),
  )
  same = order[~stranger]
  np.testing.assert_array_equal(moved.tokens[~stranger], samples.tokens[same])
  close(moved.logprobs[~stranger], samples.logprobs[same], 1e-5)


@pytest.mark.parametrize("slots", [1, B, B + 4])
def test_rows_do_not_depend_on_the_number_of_slots(slots):
  """Samples and what is kept of them; fillers anywhere in the queue sample nothing."""
  limit = np.arange(B) * 5 % (T + 1)
  expected, store, steps = respond(tiny.sampling(), limit=limit)
  actual, other, other_steps = respond(tiny.sampling(), slots=slots, limit=limit)
  for name in ("tokens", "lengths", "finished"):
    np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
  close(actual.logprobs, expected.logprobs, 1e-5)
  assert (steps < other_steps) == (slots == 1)
  assert other_steps == (expected.lengths.sum() if slots == 1 else expected.lengths.max())
  is_own = (np.arange(T) < expected.lengths[:, None])[:, None, :, None]
  seen = [jax.tree.map(lambda x: np.where(is_own, x, 0), kept) for kept in (store, other)]
  jax.tree.map(close, *seen)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(seen))


def test_a_freed_slot_is_taken_at_once_and_long_rows_first():
  """12 rows of 1 to 6 tokens in 5 slots, in order of their limits: 6, 6, 5, 5, 4 | 4, 3, 3 ..."""
  limit = np.resize(np.arange(1, 7), B)
  samples, _, steps = respond(NO_END, limit=limit)
  np.testing.assert_array_equal(samples.lengths, limit)
  assert steps == steps_by_hand(limit, limit, SLOTS) == 9  # 42 tokens are 8.4 steps of 5 slots


def test_rows_that_all_end_at_their_first_token_take_a_step_per_slotful():
  samples, _, steps = respond(tiny.sampling(end_ids=tuple(range(VOCAB))))
  assert samples.finished.all() and (samples.lengths == 1).all()
  assert steps == -(-B // SLOTS)


def test_the_padding_width_of_prompts_does_not_change_samples():
  samples, _, _ = respond(NO_END)
  wider = np.pad(PROMPTS.tokens, ((0, 0), (0, 2)), constant_values=5)
  store = sampler.prefill(CONFIG, tiny.params(), wider, PROMPTS.lengths)
  other, _, _ = grow((store,), at_prompts(), NO_END)
  np.testing.assert_array_equal(other.tokens, samples.tokens)
  close(other.logprobs, samples.logprobs, 1e-5)


def test_the_same_key_and_id_repeats_a_row_and_others_do_not():
  samples, _, _ = respond(NO_END, ids=np.repeat([0, 1, 2], P))
  again, _, _ = respond(NO_END, ids=np.repeat([1, 0, 2], P))
  fresh, _, _ = respond(NO_END, ids=np.repeat([0, 1, 2], P), key=jax.random.key(8))
  np.testing.assert_array_equal(samples.tokens[:P], again.tokens[P : 2 * P])
  assert (samples.tokens[:P] != samples.tokens[P : 2 * P]).any(-1).all()
  assert (samples.tokens != fresh.tokens).any(-1).mean() > 0.8


def test_slots_and_what_is_kept_of_them_are_held_once():
  """The compiler says so: a loop that copies them would need room for both."""
  slots, width = 64, 256
  shapes = jax.eval_shape(lambda: sampler.empty_store(CONFIG, 2 * slots, 4))
  one, each = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((2 * slots,), (2 * slots, 1)))
  grown = sampler.grow.lower(
    CONFIG, tiny.params(), (shapes,), Requests(each, each, one, one, one, one, one), KEY, NO_END,
    slots=slots, width=width, max_tokens=128, keep=True,
  ).compile()  # fmt: skip
  held = sampler.store_bytes(CONFIG, slots, width)
  # The rest are scores of attention and samples.
  assert held < grown.memory_analysis().temp_size_in_bytes < 1.5 * held


# Ends.


def test_steps_do_not_round_matrices_that_are_rounded():
  """A step reads 2 bytes of every parameter; to round them it would move 12."""
  config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
  stores = (sampler.empty_store(config, P, PROMPT_WIDTH),)
  program = functools.partial(
    sampler.grow, config, slots=2, width=PROMPT_WIDTH + T, max_tokens=T, keep=False
  )
  matrices = {leaf.shape for leaf in jax.tree.leaves(tiny.params()) if leaf.ndim > 1}

  def made_again(params):
    jaxpr = jax.make_jaxpr(program)(params, stores, at_prompts(), KEY, NO_END)
    casts = [x for x in equations_of(jaxpr.jaxpr) if x.primitive.name == "convert_element_type"]
    return {x.outvars[0].aval.shape for x in casts} & matrices

  assert not made_again(model.rounded(config, tiny.params()))
  assert made_again(tiny.params())


def test_rows_end_at_any_end_id_or_at_their_limit():
  """Where they would not end is known from the same draws without end ids."""
  limit = np.arange(B) % (T + 1)
  endings = set()
  for key in jax.random.split(KEY, 4):
    samples, _, steps = respond(tiny.sampling(), limit=limit, key=key)
    endless, _, _ = respond(NO_END, key=key)
    for b, free in enumerate(endless.tokens.tolist()):
      n = next((t + 1 for t in range(limit[b]) if free[t] in tiny.ENDS), limit[b])
      assert samples.lengths[b] == n
      assert samples.tokens[b].tolist() == free[:n] + [PAD] * (T - n)
      assert samples.finished[b] == (n > 0 and free[n - 1] in tiny.ENDS)
      close(samples.logprobs[b, :n], endless.logprobs[b, :n], 1e-5)
      assert (samples.logprobs[b, n:] == 0).all()
      endings.add((free[n - 1] if samples.finished[b] else "limit", n == limit[b]))
    assert steps == steps_by_hand(limit, samples.lengths, SLOTS)
  assert endings == {(1, False), (1, True), (2, False), (2, True), ("limit", True)}


def test_rows_end_where_their_text_first_holds_a_stop_string():
  """Responses go on from texts of which a stop string may have read a part already."""
  table, begun, endings = tiny.stop_table(), ([], [4], [3, 3], [5], [6, 3]), set()
  states = [stops.prefix_states(table, np.array([b], np.int32))[0, len(b)] for b in begun]
  row = np.arange(B) % len(begun)
  sampling = tiny.sampling(stop_table=table)
  for key in jax.random.split(KEY, 4):
    samples, _, steps = respond(sampling, key=key, stop_state=np.array(states)[row])
    endless, _, _ = respond(NO_END, key=key)
    for b, free in enumerate(endless.tokens.tolist()):
      over = [tiny.is_over(begun[row[b]] + free[: t + 1]) for t in range(T)]
      n = over.index(True) + 1 if any(over) else T
      assert samples.tokens[b].tolist() == free[:n] + [PAD] * (T - n)
      assert (samples.lengths[b], samples.finished[b]) == (n, any(over))
      close(samples.logprobs[b, :n], endless.logprobs[b, :n], 1e-5)
      by_stop = any(over) and free[n - 1] not in tiny.ENDS
      endings.add((by_stop and not tiny.is_over(free[:n]), by_stop, any(over)))
    assert steps == steps_by_hand(np.full(B, T), samples.lengths, SLOTS)
  # By a stop string, also one begun before; by an end id; by the limit.
  assert endings == {(True, True, True), (False, True, True), (False, False, True), (False,) * 3}


def test_the_loop_stops_when_all_rows_are_done():
  samples, _, steps = respond(NO_END, limit=np.arange(B) % 3, slots=B)
  np.testing.assert_array_equal(samples.lengths, np.arange(B) % 3)
  assert steps == 2
  idle, _, steps = respond(NO_END, limit=0)
  assert steps == 0
  assert (idle.tokens == PAD).all() and not idle.finished.any()


def test_an_end_id_in_the_prompt_does_not_end_a_row():
  parent, token = np.arange(B) % P, np.resize(tiny.ENDS, B)
  wanted = requests([parent], [0], PROMPTS.lengths[parent], token)
  samples, _, _ = grow((prefilled(),), wanted, tiny.sampling())
  assert (samples.lengths > 0).all() and (samples.lengths > 1).any()


# Distributions.


def allowed_by_hand(p, top_p, top_k):
  """The top_k most likely; of those, most likely first, up to one that reaches their top_p."""
  likely, kept, mass = np.argsort(-p)[: top_k or None], [], 0.0
  for token in likely:
    if mass >= top_p:
      break
    kept.append(token)
    mass += p[token] / p[likely].sum()
  return np.isin(np.arange(len(p)), kept) * p / p[kept].sum()


@pytest.mark.parametrize(
  ("temperature", "top_p", "top_k"),
  [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.3, 0.75, 0), (1.0, 1.0, 3), (1.2, 0.8, 3)],
)
def test_sampled_pairs_of_tokens_match_the_softmax(temperature, top_p, top_k):
  """Two tokens behind one prompt in many rows: the second depends on the first as it must."""
  rows, prompt = 6000, tiny.prompt_of(PROMPTS, 2)
  sampling = tiny.sampling(temperature, top_p, top_k, end_ids=())
  wanted = requests([2], [0], np.full(rows, len(prompt)), prompt[-1], limit=2)
  samples, _, _ = grow((prefilled(),), wanted, sampling, slots=2000, max_tokens=2)

  def step(prefix):
    probs = np.exp(tiny.next_logprobs(tiny.params(), prefix, temperature))
    return allowed_by_hand(probs, top_p, top_k)

  first = step(prompt)
  expected = np.concatenate([first[a] * step([*prompt, a]) for a in range(VOCAB)]) * rows
  observed = np.bincount(samples.tokens @ [VOCAB, 1], minlength=VOCAB**2)
  assert (observed[expected == 0] == 0).all()  # nothing outside the support ...
  assert (observed[expected > 15] > 0).all()  # ... and all of it
  rare = expected < 5
  observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
  used = expected > 0
  assert scipy.stats.chisquare(observed[used], expected[used]).pvalue > 1e-3


@pytest.mark.parametrize("size", [2, 5, 128, 300, 331, 40_000])  # blocks of one, and of many
def test_tokens_are_drawn_by_their_probability(size):
  rows = 20_000 if size < 1000 else 400
  scores = 2 * np.random.default_rng(size).normal(size=size).astype(np.float32)
  keys = jax.random.split(KEY, rows)
  tokens, logprobs = jax.jit(sampler.draw)(
    keys, jnp.broadcast_to(scores, (rows, size)), tiny.sampling(temperature=1.5)
  )
  expected = scipy.special.log_softmax(scores.astype(np.float64) / 1.5)
  close(logprobs, expected[tokens], 1e-5)
  # Groups of about equal probability: of likely and of rare tokens, and of neighbours.
  for order in (np.argsort(scores), np.arange(size)):
    group = np.empty(size, int)
    group[order] = np.minimum(np.cumsum(np.exp(expected[order])) * 5, 4).astype(int)
    share = np.bincount(group, np.exp(expected), minlength=5)
    observed = np.bincount(group[tokens], minlength=5)
    assert scipy.stats.chisquare(observed[share > 0], share[share > 0] * rows).pvalue > 1e-3


def test_of_equal_largest_logits_greedy_takes_the_first():
  scores = np.zeros((3, 400), np.float32)
  for row, largest in enumerate([[7, 8, 390], [399], [128, 256]]):
    scores[row, largest] = 2
  for seed in range(5):
    tokens, _ = sampler.draw(jax.random.split(jax.random.key(seed), 3), scores, tiny.sampling(0.0))
    assert tokens.tolist() == [7, 399, 128]


def test_rounding_of_the_running_sum_lets_no_forbidden_token_in(monkeypatch):
  """A device that adds up in another order moves the sum where nothing is added."""
  rng = np.random.default_rng(0)
  noise = (1 + 1e-3 * rng.normal(size=(400, 1500))).astype(np.float32)
  cumsum = jnp.cumsum
  monkeypatch.setattr(jnp, "cumsum", lambda x, axis: cumsum(x, axis) * noise)
  shares = rng.exponential(size=(400, 1500)).astype(np.float32)
  shares *= rng.random(shares.shape) < 0.02
  for chance in rng.random((5, 400)).astype(np.float32) * (1 - 2**-24):
    token = np.asarray(sampler._passed(shares, chance))
    assert (shares[np.arange(400), token] > 0).all()


@pytest.mark.parametrize("chance", [2**-24, 0.5, 1 - 2**-24])
def test_only_tokens_of_some_probability_are_drawn(chance):
  """At either end of a block, alone in one, between thousands that are too small to count."""
  shares = np.zeros((6, 1000), np.float32)
  for row, wanted in enumerate([[0], [999], [127, 128], [500], [0, 999], [383, 384, 640]]):
    shares[row, wanted] = 1 + row / 3
  numbers = np.full((6, 2), chance, np.float32)
  token = jax.jit(sampler._by_share)(shares, numbers)
  assert (shares[np.arange(6), token] > 0).all()
  tiny_ones = np.full((1, 1000), 1e-30, np.float32)
  tiny_ones[0, [3, 700]] = 1
  assert jax.jit(sampler._by_share)(tiny_ones, numbers[:1])[0] in (3, 700)


@few
@given(seed=st.integers(0, 2**32 - 1), top_p=st.floats(0.01, 1.0), scale=st.floats(0.1, 4.0))
@pytest.mark.parametrize("top_k", [0, 1, 4])
def test_truncation_keeps_the_smallest_set_that_reaches_top_p(seed, top_p, scale, top_k):
  scores = scale * np.random.default_rng(seed).normal(size=(5, VOCAB)).astype(np.float32)
  kept = np.isfinite(truncate(scores, Sampling(1.0, top_p, (), PAD, top_k, True)))
  for row, keep in zip(scores.astype(np.float64), kept):
    probs = np.exp(row - np.logaddexp.reduce(row))
    likely = np.sort(probs)[::-1][: top_k or None]
    mass = np.cumsum(likely / likely.sum())[:-1]
    edge = np.abs(mass - top_p).min(initial=1) < 1e-5  # float32 may say otherwise
    assert edge or (keep == (allowed_by_hand(probs, top_p, top_k) > 0)).all()


def test_top_p_looks_at_what_top_k_has_left():
  """.4 .3 .2 .1: of the top two, the first holds .57; of all four, two are needed for .5."""
  scores = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
  for top_p, top_k, expected in [
    (0.5, 2, [1]), (0.5, 0, [1, 3]), (0.6, 2, [1, 3]), (1, 2, [1, 3]), (1, 9, [0, 1, 2, 3]),
  ]:  # fmt: skip
    kept = np.isfinite(truncate(scores, Sampling(1.0, top_p, (), PAD, top_k, True)))
    assert np.flatnonzero(kept[0]).tolist() == expected


@pytest.mark.parametrize("top_k", [0, 2])
def test_equal_logits_stay_or_go_together(top_k):
  scores = np.array([[3.0, 1.0, 1.0, 1.0, -2.0]], np.float32)
  kept = np.isfinite(truncate(scores, Sampling(1.0, 0.99, (), PAD, top_k, True)))
  assert kept[0].tolist() == [True, True, True, True, False]
