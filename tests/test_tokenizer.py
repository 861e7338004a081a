"""Text to tokens and back, without a network."""

import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.config import TaskConfig
from spo_jax.tasks import load_task
from spo_jax.tokenizer import (
  bpe_tokenizer,
  character_tokenizer,
  decode_responses,
  encode_prompts,
  eos_ids,
  load_tokenizer,
  token_ids,
)

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
  def refuse(*_):
    raise AssertionError("a connection was tried")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  TOKENIZER.save_pretrained(tmp_path)
  reloaded = load_tokenizer(tmp_path)
  assert reloaded.get_vocab() == TOKENIZER.get_vocab()
  assert (reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1)
  tokens, lengths = encode_prompts(reloaded, ["85+1-5="], 10)
  assert decode_responses(reloaded, tokens, lengths, eos_ids(reloaded)) == ["85+1-5="]


# Loading.


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("nowhere", "nowhere: there is no such folder"),
    ("empty", r"empty holds no tokenizer \(tokenizer.json, .*Copy"),
    ("broken", r"broken: its tokenizer cannot be loaded\. Save the tokenizer there anew\. \("),
  ],
)
def test_a_folder_without_a_tokenizer_is_one_line_that_names_it(tmp_path, name, message):
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty" / "config.json").write_text("{}")
  TOKENIZER.save_pretrained(tmp_path / "broken")
  (tmp_path / "broken" / "tokenizer.json").write_text('{"model": ')
  with pytest.raises(ValueError, match=message) as error:
    load_tokenizer(str(tmp_path / name))
  assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_model(monkeypatch):
  def refuse(*_, **__):
    raise OSError("We couldn't connect\nto the hub")

  monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
  with pytest.raises(ValueError, match=r"^owner/name: .*network, or name a .*connect to") as error:
    load_tokenizer("owner/name")
  assert "\n" not in str(error.value)


# Byte-level BPE.


TEXTS = ["Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "naïve 😀 text\n\n\nProblem:"] * 5
BPE = bpe_tokenizer(TEXTS, 300)


@settings(deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=20), max_size=5))
def test_every_text_survives_byte_level_bpe(texts):
  tokens, lengths = encode_prompts(BPE, texts, 80)
  assert decode_responses(BPE, tokens, lengths, eos_ids(BPE)) == texts


def test_the_same_texts_train_the_same_bpe():
  assert BPE.backend_tokenizer.to_str() == bpe_tokenizer(TEXTS, 300).backend_tokenizer.to_str()
  assert (len(BPE), BPE.pad_token_id, eos_ids(BPE)) == (300, 0, (1,))
  assert len(BPE(TEXTS[1])["input_ids"]) < len(TEXTS[1].encode()) / 2
  assert len(bpe_tokenizer(["ab"], 330)) == 259  # there was one pair to merge


def test_bpe_reloads_as_it_was(tmp_path):
  BPE.save_pretrained(tmp_path)
  reloaded = load_tokenizer(tmp_path)
  assert reloaded.get_vocab() == BPE.get_vocab()
  assert reloaded(TEXTS)["input_ids"] == BPE(TEXTS)["input_ids"]
  tokens, lengths = encode_prompts(reloaded, TEXTS[:2], 60)
  assert decode_responses(reloaded, tokens, lengths, eos_ids(reloaded)) == TEXTS[:2]


def test_a_bpe_that_cannot_hold_every_byte_is_refused():
  with pytest.raises(ValueError, match=r"size=257 .*from 258"):
    bpe_tokenizer(TEXTS, 257)


# To tokens and back.


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
  task = load_task(TaskConfig(), 0)
  problem = next(problem for problem in task.split("train")[:2000] if problem.answer == "75")
  assert task.grade(problem, text, finished=True).reward == 0.0


def test_special_tokens_are_added_only_where_asked_for():
  from tokenizers import processors

  tokenizer = bpe_tokenizer(TEXTS, 300)
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single="<eos> $A", special_tokens=[("<eos>", 1)]
  )
  [bare] = token_ids(BPE, TEXTS[:1])
  for add in (True, False):
    expected = [1, *bare] if add else bare
    assert token_ids(tokenizer, TEXTS[:1], add) == [expected]
    tokens, lengths = encode_prompts(tokenizer, TEXTS[:1], 60, add)
    assert tokens[0, : lengths[0]].tolist() == expected


# Stop strings.


@pytest.mark.parametrize(
  ("stops", "expected"),
  [
    ((), "#75-=;"),
    (("9",), "#75-=;"),
    (("5-",), "#7"),
    ((";", "-="), "#75"),
    (("=;", "9", "#7"), ""),
  ],
)
def test_text_is_cut_in_front_of_the_first_stop_string(stops, expected):
  tokens, lengths = encode_prompts(TOKENIZER, ["#75-=;"], 8)
  tokens[0, 6:] = 1, 2
  assert decode_responses(TOKENIZER, tokens, lengths + 2, (1,), stops) == [expected]


def test_spaces_stay_as_they_were_sampled():
  tokenizer = character_tokenizer("a .")
  tokenizer.clean_up_tokenization_spaces = True  # as many a tokenizer_config.json says
  assert decode_responses(tokenizer, np.array([[2, 3, 4]]), np.array([3]), (1,)) == ["a ."]
