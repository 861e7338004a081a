"""A tokenizer whose tokens are words, so that sides which pass text count the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np


def tokenizer(vocab_size: int) -> Any:
  """Token i of a model's vocabulary is the word "i"; its end and padding no model can draw."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = [*map(str, range(vocab_size)), "<end>", "<pad>"]
  backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=None))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<end>", pad_token="<pad>",
    clean_up_tokenization_spaces=False,
  )  # fmt: skip


def texts(tokens: np.ndarray) -> list[str]:
  """The text of each row of i32[B, T]."""
  return [" ".join(map(str, row)) for row in tokens.tolist()]
