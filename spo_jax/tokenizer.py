"""Text to token ids and back. Token ids are what everything else works on."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def character_tokenizer(charset: str) -> PreTrainedTokenizerFast:
  """A tokenizer with one token per character, built without a hub.

  Ids: 0 is `<pad>`, 1 is `<eos>`, then the characters in the order given. It saves and reloads
  through `transformers.AutoTokenizer` like any other.

  Raises: ValueError where a character appears twice or there is none.
  """
  if not charset or len(set(charset)) != len(charset):
    raise ValueError(f"charset={charset!r} must name at least one character, and each only once")
  # transformers otherwise prints at its import that torch, which nothing here needs, is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  vocab = {token: i for i, token in enumerate((PAD, EOS, *charset))}
  backend = Tokenizer(models.WordLevel(vocab, unk_token=None))
  backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
  backend.decoder = decoders.Fuse()
  return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS,
                                 clean_up_tokenization_spaces=False)


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
  """Ids that end a response. Raises: ValueError where the tokenizer has none."""
  if tokenizer.eos_token_id is None:
    raise ValueError("the tokenizer has no end-of-text token: set eos_token in its "
                     "tokenizer_config.json")
  return (int(tokenizer.eos_token_id),)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str],
                   max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as right-padded rows.

  Returns: tokens i32[B, max_tokens], lengths i32[B].
  Raises: ValueError for a prompt that is empty, too long or not expressible in the vocabulary.
  """
  try:
    rows = tokenizer(list(texts))["input_ids"] if len(texts) else []
  except Exception as error:  # The Rust library raises plain Exception for an unknown token.
    raise ValueError("a prompt holds a character for which the tokenizer has no token: is it the "
                     f"tokenizer of this task? ({error})") from error
  lengths = np.array([len(row) for row in rows], np.int32)
  for i in np.flatnonzero(lengths > max_tokens)[:1]:
    raise ValueError(f"prompt {i} has {lengths[i]} tokens, rollout.max_prompt_tokens={max_tokens} "
                     f"cannot hold it. Raise it to {lengths.max()}.")
  for i in np.flatnonzero(lengths == 0)[:1]:
    raise ValueError(f"prompt {i} is empty: there is no token to continue from")
  pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids(tokenizer)[0]
  tokens = np.full((len(rows), max_tokens), pad, np.int32)
  is_prompt = np.arange(max_tokens) < lengths[:, None]
  tokens[is_prompt] = [token for row in rows for token in row]
  return tokens, lengths


def decode_responses(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, lengths: np.ndarray,
                     eos_ids: Collection[int]) -> list[str]:
  """Text of each response, up to its length or its first end-of-text token.

  Args:
    tokens: i32[B, T], right-padded.
    lengths: i32[B], tokens of each response, its end-of-text token included.
  Returns: B strings.
  """
  tokens = np.asarray(tokens)
  is_end = np.isin(tokens, list(eos_ids)) | (np.arange(tokens.shape[1]) >= lengths[:, None])
  ends = np.where(is_end.any(1), is_end.argmax(1), tokens.shape[1])
  rows = [row[:end] for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)]
  # Special tokens inside a response stay visible: dropped, "#7<pad>5" would be graded as "#75".
  return tokenizer.batch_decode(rows, skip_special_tokens=False) if rows else []
