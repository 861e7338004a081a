"""Text to tokens and back, without a network."""

import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.tasks import load_task
from spo_jax.tokenizer import character_tokenizer, decode_responses, encode_prompts, eos_ids

CHARSET = "#+-0123456789;="
TOKENIZER = character_tokenizer(CHARSET)


def test_ids_are_pad_eos_then_the_characters_in_order():
  assert TOKENIZER.get_vocab() == {
    "<pad>": 0,
    "<eos>": 1,
    **{character: i + 2 for i, character in enumerate(CHARSET)},
  }
  assert TOKENIZER.pad_token_id == 0
  assert eos_ids(TOKENIZER) == (1,)


def test_it_reloads_through_auto_tokenizer_without_a_network(tmp_path, monkeypatch):
  from transformers import AutoTokenizer

  def refuse(*_):
    raise AssertionError("a connection was tried")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  TOKENIZER.save_pretrained(tmp_path)
  reloaded = AutoTokenizer.from_pretrained(tmp_path)
  assert reloaded.get_vocab() == TOKENIZER.get_vocab()
  assert (reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1)
  tokens, lengths = encode_prompts(reloaded, ["85+1-5="], 10)
  assert decode_responses(reloaded, tokens, lengths, eos_ids(reloaded)) == ["85+1-5="]


@pytest.mark.parametrize("charset", ["", "abca"])
def test_an_empty_or_repeating_charset_is_refused(charset):
  with pytest.raises(ValueError, match="charset="):
    character_tokenizer(charset)


def test_a_tokenizer_without_end_of_text_is_refused():
  tokenizer = character_tokenizer("ab")
  tokenizer.eos_token = None
  with pytest.raises(ValueError, match="no end-of-text token"):
    eos_ids(tokenizer)


AWKWARD = "a .,!?'nt\n\t\r\0é😀�"


@settings(deadline=None)
@given(texts=st.lists(st.text(AWKWARD, min_size=1, max_size=20), max_size=5))
def test_text_survives_the_way_to_tokens_and_back(texts):
  tokenizer = character_tokenizer(AWKWARD)
  tokens, lengths = encode_prompts(tokenizer, texts, 20)
  assert lengths.tolist() == [len(text) for text in texts]
  assert decode_responses(tokenizer, tokens, lengths, (1,)) == texts


def test_prompts_are_right_padded_rows_of_int32():
  tokens, lengths = encode_prompts(TOKENIZER, ["1+2=", "#"], 6)
  assert tokens.dtype == lengths.dtype == np.int32
  assert tokens.tolist() == [[6, 3, 7, 16, 0, 0], [2, 0, 0, 0, 0, 0]]
  assert lengths.tolist() == [4, 1]


def test_no_prompts_make_no_rows():
  tokens, lengths = encode_prompts(TOKENIZER, [], 6)
  assert tokens.shape == (0, 6) and lengths.shape == (0,)
  assert decode_responses(TOKENIZER, tokens, lengths, (1,)) == []


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (
      ["1+1=", "1+2+3=", "1+2+3+4="],
      "prompt 1 has 6 tokens, rollout.max_prompt_tokens=5 .* Raise it to 8",
    ),
    (["1+1=", ""], "prompt 1 is empty"),
    (["1 + 1="], "no token"),
  ],
)
def test_a_prompt_that_does_not_fit_is_one_line_that_names_it(texts, message):
  with pytest.raises(ValueError, match=message) as error:
    encode_prompts(TOKENIZER, texts, 5)
  assert "\n" not in str(error.value)


def test_decoding_stops_at_the_length_or_the_first_end_of_text():
  tokens = np.array(
    [
      [2, 12, 10, 1, 0, 0],
      [2, 12, 10, 1, 9, 9],
      [2, 12, 10, 9, 9, 9],
      [1, 2, 2, 2, 2, 2],
      [2, 12, 10, 11, 9, 9],
    ],
    np.int32,
  )
  lengths = np.array([4, 6, 3, 6, 6], np.int32)
  assert decode_responses(TOKENIZER, tokens, lengths, (1,)) == ["#75", "#75", "#75", "", "#75644"]
  assert decode_responses(TOKENIZER, tokens, lengths, (1, 11))[4] == "#75"


def test_padding_sampled_inside_a_response_stays_visible_to_the_grader():
  [text] = decode_responses(TOKENIZER, np.array([[2, 12, 0, 10, 1]]), np.array([5]), (1,))
  assert text == "#7<pad>5"
  task = load_task("arithmetic", None, 6, 0.0, 0)
  problem = next(problem for problem in task.split("train")[:2000] if problem.answer == "75")
  assert task.grade(problem, text, finished=True).reward == 0.0
