"""Stop strings found on the device, against looking for them in the decoded text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from spo_jax import stops
from spo_jax.tokenizer import bpe_tokenizer, character_tokenizer, decode_responses

STOP = "\n\n\nProblem:"
TEXTS = ["So.\n\n\n\n\n\n", "Problem:\n2.\n\n\nProblem: é:- :é", "Prob lem:-:-\n"] * 9
BPE = bpe_tokenizer(TEXTS, 330)
BYTES = stops.token_bytes(BPE, len(BPE))


def wrapped(backend, **kwargs):
  from transformers import PreTrainedTokenizerFast

  return PreTrainedTokenizerFast(tokenizer_object=backend, **kwargs)


def with_added_tokens():
  """Control tokens of all kinds go through the decoder, too."""
  tokenizer = bpe_tokenizer(TEXTS, 330)
  tokenizer.add_tokens(["é", "</s>", AddedToken("<|end of x|>", special=True), "<｜User▁｜>"])
  return tokenizer


def sentencepiece_like():
  """As Llama 2 and Mistral have it: ▁ is a space, <0x0A> a byte, a first space is dropped."""
  tokens = ["</s>", "<0x0A>", "▁", "▁a", "a", "▁▁", "b▁c", "é", "▁</s>", "<0x0a>", "0x0A"]
  backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
     decoders.Strip(" ", 1, 0)]
  )  # fmt: skip
  return wrapped(backend)


def metaspace():
  backend = Tokenizer(models.BPE({"▁a": 0, "b": 1, "▁": 2, "▁c": 3, "<0x0A>": 4}, []))
  backend.decoder = decoders.Metaspace()
  return wrapped(backend)


TOKENIZERS = {
  "byte-level": lambda: BPE,
  "with added tokens": with_added_tokens,
  "sentencepiece-like": sentencepiece_like,
  "metaspace": metaspace,
  "characters": lambda: character_tokenizer("ab \né😀▁Ġ"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_bytes_are_what_the_tokenizer_decodes(kind):
  tokenizer = TOKENIZERS[kind]()
  spelled = stops.token_bytes(tokenizer, len(tokenizer))
  rng = np.random.default_rng(0)
  for ids in rng.integers(0, len(tokenizer), (400, 5)).tolist():
    text = tokenizer.decode(ids, skip_special_tokens=False)
    expected = b"".join(spelled[i] for i in ids).decode(errors="replace")
    drops_a_first_space = kind in ("sentencepiece-like", "metaspace")
    assert text == expected or (drops_a_first_space and f" {text}" == expected)


def test_ids_behind_the_vocabulary_of_the_tokenizer_are_no_text():
  table = np.asarray(stops.table(BPE, [STOP], len(BPE) + 7))
  assert table.dtype == np.int16 and table.shape == (len(BPE) + 7, len(STOP) + 1)
  assert (table[len(BPE) :] == np.arange(len(STOP) + 1)).all()
  assert (table[:, -1] == len(STOP)).all()  # what is found stays found


# Against looking for the string.


@settings(deadline=None, max_examples=400)
@given(
  words=st.lists(st.text("ab", max_size=4), min_size=1, max_size=6),
  wanted=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
  response=st.lists(st.integers(0, 5), min_size=1, max_size=8),
)
def test_any_strings_are_found_wherever_they_lie_in_any_tokens(words, wanted, response):
  """Several at once, one inside another, across tokens and in the middle of one."""
  table = stops.token_table([w.encode() for w in words], [w.encode() for w in wanted])
  ids = np.array([[i % len(words) for i in response]])
  states = stops.prefix_states(table, ids)[0]
  for t in range(len(response) + 1):
    text = "".join(words[i] for i in ids[0, :t])
    assert (states[t] == table.shape[1] - 1) == any(w in text for w in wanted)


@st.composite
def tokens_of_some_text(draw):
  """Text around stop strings, cut into tokens in any way: not the tokenizer's own."""
  pieces = st.sampled_from(["\n", "\n\n", "Prob", "lem", ":", STOP, STOP[:-1], "é", "é:"])
  text = "".join(draw(st.lists(pieces, min_size=1, max_size=6))).encode()
  ids = []
  while text:
    fitting = [i for i, token in enumerate(BYTES) if token and text.startswith(token)]
    ids.append(draw(st.sampled_from(fitting)))
    text = text[len(BYTES[ids[-1]]) :]
  return ids


@settings(deadline=None)
@given(tokens_of_some_text(), st.sampled_from([(STOP,), (STOP, "é:"), ("\n\n",), ("blem", STOP)]))
def test_a_row_is_over_when_its_decoded_text_holds_a_stop_string(ids, wanted):
  table = np.asarray(stops.table(BPE, wanted, len(BPE)))
  states = stops.prefix_states(table, np.array([ids]))[0]
  texts = [BPE.decode(ids[:t]) for t in range(len(ids) + 1)]
  held = [any(stop in text for stop in wanted) for text in texts]
  assert (states == len(table[0]) - 1).tolist() == held
  # Text for grading ends in front of the first of them.
  whole = texts[-1]
  [graded] = decode_responses(BPE, np.array([ids]), np.array([len(ids)]), (1,), wanted)
  assert graded == whole[: min((whole.find(s) for s in wanted if s in whole), default=len(whole))]


def test_tokens_reach_across_both_ends_of_the_stop_string():
  """The tests above would prove little if no merge did."""
  assert any(token.endswith(b"\n\n\n\n") for token in BYTES)
  assert any(b":" in token[:-1] for token in BYTES)


def test_states_go_on_from_where_a_prefix_left_them():
  table = np.asarray(stops.table(BPE, [STOP], len(BPE)))
  ids = BPE(f"7.{STOP} 2", add_special_tokens=False)["input_ids"]
  whole = stops.prefix_states(table, np.array([ids]))
  for cut in range(len(ids)):
    rest = stops.prefix_states(table, np.array([ids[cut:]] * 2), np.array([0, whole[0, cut]]))
    assert rest[1].tolist() == whole[0, cut:].tolist()
  assert whole[0, -1] == len(STOP)


def test_without_stop_strings_every_state_is_0():
  assert (stops.prefix_states(None, np.ones((2, 3), np.int32)) == np.zeros((2, 4))).all()


# What is refused.


@pytest.mark.parametrize("wanted", [[], ["a", ""]])
def test_an_empty_stop_string_is_refused(wanted):
  with pytest.raises(ValueError, match=r"rollout\.stop=\[.*set rollout\.stop=\[\]"):
    stops.table(BPE, wanted, len(BPE))


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder()])
def test_a_decoder_that_is_not_known_is_one_line_that_names_it(decoder):
  backend = Tokenizer(models.WordLevel({"a": 0}, unk_token=None))
  if decoder is not None:
    backend.decoder = decoder
  with pytest.raises(ValueError, match=r"decoder (None|WordPiece|BPEDecoder) makes") as error:
    stops.table(wrapped(backend), ["a"], 1)
  assert "\n" not in str(error.value)
