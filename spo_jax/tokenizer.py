"""Text to token ids and back. Token ids are what everything else works on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spo_jax.errors import said

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"

# Any of these makes a folder one with a tokenizer.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
  """The tokenizer of a local folder, else of a model on the Hugging Face hub.

  Raises: ValueError, one line, where there is none or it cannot be read.
  """
  folder, name = Path(path_or_name), str(path_or_name)
  if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
    raise ValueError(f"{name}: there is no such folder. Name a folder that exists, or a model of "
                     "the hub as owner/name.")
  if folder.is_dir() and not any((folder / file).is_file() for file in _FILES):
    raise ValueError(f"{name} holds no tokenizer ({', '.join(_FILES)}). Copy that of its base "
                     "model there.")
  _hush_transformers()
  from transformers import AutoTokenizer

  try:
    return AutoTokenizer.from_pretrained(name)
  except Exception as error:  # A broken file raises whatever its reader raises.
    fix = ("Save the tokenizer there anew" if folder.is_dir() else
           "Check the spelling and the network, or name a local folder")
    raise ValueError(f"{name}: its tokenizer cannot be loaded. {fix}. ({said(error)})") from error


def character_tokenizer(charset: str) -> PreTrainedTokenizerFast:
  """A tokenizer with one token per character, built without a hub.

  Ids: 0 is `<pad>`, 1 is `<eos>`, then the characters in the order given. It saves and reloads
  through `transformers.AutoTokenizer` like any other.

  Raises: ValueError where a character appears twice or there is none.
  """
  if not charset or len(set(charset)) != len(charset):
    raise ValueError(f"charset={charset!r} must name at least one character, and each only once")
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

  vocab = {token: i for i, token in enumerate((PAD, EOS, *charset))}
  backend = Tokenizer(models.WordLevel(vocab, unk_token=None))
  backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
  backend.decoder = decoders.Fuse()
  return _wrapped(backend)


def bpe_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
  """A byte-level BPE trained on `texts`, without a hub; the same texts give the same tokenizer.

  Ids: 0 is `<pad>`, 1 is `<eos>`, then every byte, so that any text can be expressed, then
  merges up to `size` tokens, fewer where the texts have no more pairs to merge.

  Raises: ValueError where `size` does not hold every byte.
  """
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  if size < (smallest := len(alphabet) + 2):
    raise ValueError(f"size={size} of a tokenizer holds {smallest - 2} bytes, {PAD} and {EOS} only "
                     f"from {smallest} on. Raise it.")
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False))
  return _wrapped(backend)


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
  """Ids that end a response. Raises: ValueError where the tokenizer has none."""
  if tokenizer.eos_token_id is None:
    raise ValueError("the tokenizer has no end-of-text token: set eos_token in its "
                     "tokenizer_config.json")
  return (int(tokenizer.eos_token_id),)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str],
              add_special_tokens: bool = True) -> list[list[int]]:
  """Token ids of each text.

  Args:
    add_special_tokens: put the model's beginning-of-text token in front, where it has one, but no
      end behind. False for text that already holds it, and for text that continues another.
  Raises: ValueError for a character that is not expressible in the vocabulary.
  """
  try:
    rows = (tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
            if len(texts) else [])
  except Exception as error:  # The Rust library raises plain Exception for an unknown token.
    raise ValueError("a prompt holds a character for which the tokenizer has no token: is it the "
                     f"tokenizer of this task? ({error})") from error
  if add_special_tokens and (end := tokenizer.eos_token):
    rows = [
      row[:-1] if row[-1:] == [tokenizer.eos_token_id] and not text.endswith(end) else row
      for text, row in zip(texts, rows)
    ]
  return rows


def encode_prompts(
  tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int,
  add_special_tokens: bool = True, pad_id: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """Prompts as right-padded rows; see `token_ids`.

  Args:
    pad_id: the token that rows are filled up with; None: the tokenizer's own.
  Returns: tokens i32[B, max_tokens], lengths i32[B].
  Raises: ValueError for a prompt that is empty, too long or not expressible in the vocabulary.
  """
  rows = token_ids(tokenizer, texts, add_special_tokens)
  lengths = np.array([len(row) for row in rows], np.int32)
  for i in np.flatnonzero(lengths > max_tokens)[:1]:
    raise ValueError(f"prompt {i} has {lengths[i]} tokens, rollout.max_prompt_tokens={max_tokens} "
                     f"cannot hold it. Raise it to {lengths.max()}.")
  for i in np.flatnonzero(lengths == 0)[:1]:
    raise ValueError(f"prompt {i} is empty: there is no token to continue from")
  if pad_id is None:
    own = tokenizer.pad_token_id
    pad_id = eos_ids(tokenizer)[0] if own is None else own
  tokens = np.full((len(rows), max_tokens), pad_id, np.int32)
  is_prompt = np.arange(max_tokens) < lengths[:, None]
  tokens[is_prompt] = [token for row in rows for token in row]
  return tokens, lengths


def decode_responses(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, lengths: np.ndarray,
                     eos_ids: Collection[int], stops: Sequence[str] = ()) -> list[str]:
  """Text of each response, up to its length, its first end-of-text token or stop string.

  Args:
    tokens: i32[B, T], right-padded.
    lengths: i32[B], tokens of each response, its end-of-text token included.
    stops: the text is cut in front of the first of these.
  Returns: B strings.
  """
  tokens = np.asarray(tokens)
  is_end = np.isin(tokens, list(eos_ids)) | (np.arange(tokens.shape[1]) >= lengths[:, None])
  ends = np.where(is_end.any(1), is_end.argmax(1), tokens.shape[1])
  rows = [row[:end] for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)]
  # Special tokens inside a response stay visible: dropped, "#7<pad>5" would be graded as "#75".
  # Spaces stay as sampled: cleaned up, " ." and "." would be graded alike.
  texts: list[str] = tokenizer.batch_decode(
      rows, skip_special_tokens=False, clean_up_tokenization_spaces=False) if rows else []
  return [_cut(text, stops) for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
  found = [at for stop in stops if (at := text.find(stop)) >= 0]
  return text[:min(found)] if found else text


def _wrapped(backend: object) -> PreTrainedTokenizerFast:
  _hush_transformers()
  from transformers import PreTrainedTokenizerFast

  return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS,
                                 clean_up_tokenization_spaces=False)


def _hush_transformers() -> None:
  """Otherwise it prints at its import that torch, which nothing here needs, is missing."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
