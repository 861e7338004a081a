"""A tokenizer whose tokens are words, so that sides which pass text count the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np


def tokenizer(vocab_size: int, end: int | None = None) -> Any:
  """Token i of a model's vocabulary is the word "i".

  No model can draw its end and padding, unless one of these words is both.
  """
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = [*map(str, range(vocab_size)), "<end>", "<pad>"]
  end_word, pad_word = ("<end>", "<pad>") if end is None else (str(end), str(end))
  backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=None))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token=end_word, pad_token=pad_word,
    clean_up_tokenization_spaces=False,
  )  # fmt: skip


def texts(tokens: np.ndarray) -> list[str]:
  """The text of each row of i32[B, T]."""
  return [" ".join(map(str, row)) for row in tokens.tolist()]
