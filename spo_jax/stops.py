"""Stop strings as a table over tokens, so that the sampler ends a row without making text.

A stop string may begin and end anywhere inside tokens, so strings are looked for in bytes, by
an Aho-Corasick automaton (1975): state 0 has seen nothing of any stop string, the last state has
found one and keeps it. The table says where each token takes each state. It is built once from
the tokenizer; a response, and only the response, starts in state 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.structs import Array

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def table(
  tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], vocab_size: int
) -> jax.Array:
  """Where token v takes state s: i16[V, S]; S - 1 says that a stop string was found.

  Args:
    vocab_size: V, that of the model; ids behind the tokenizer's vocabulary are no text.
  Raises: ValueError for no or an empty stop string, or a tokenizer whose bytes are not known.
  """
  if not stops or not all(stops):
    raise ValueError(f"rollout.stop={list(stops)} must hold strings of one character or more; for "
                     "none set rollout.stop=[].")  # fmt: skip
  return jnp.asarray(token_table(token_bytes(tokenizer, vocab_size), [s.encode() for s in stops]))


def token_table(tokens: Sequence[bytes], stops: Sequence[bytes]) -> np.ndarray:
  """`table` of tokens given as bytes: i16[V, S]."""
  step = _automaton(stops)
  lengths = np.array([len(token) for token in tokens])
  longest_first = np.argsort(-lengths, kind="stable")
  states = np.broadcast_to(np.arange(len(step), dtype=np.int16), (len(tokens), len(step))).copy()
  for place in range(lengths.max(initial=0)):
    # All tokens that have a byte at this place make their step together.
    alive = longest_first[: np.count_nonzero(lengths > place)]
    byte = np.array([tokens[i][place] for i in alive.tolist()])
    states[alive] = step[states[alive], byte[:, None]]
  return states


def prefix_states(
  table: Array | None, tokens: np.ndarray, start: np.ndarray | int = 0
) -> np.ndarray:
  """The state in front of each token and behind the last: i32[B, T + 1], 0 without a table.

  Args:
    tokens: i32[B, T]; start: i32[B], the state in front of the first; 0 at a response's.
  """
  states = np.zeros((tokens.shape[0], tokens.shape[1] + 1), np.int32)
  if table is not None:
    host = np.asarray(table)
    states[:, 0] = start
    for t in range(tokens.shape[1]):
      states[:, t + 1] = host[tokens[:, t], states[:, t]]
  return states


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
  """What each token adds to the text, as its decoder would: V strings of bytes.

  Raises: ValueError for a decoder that does more than put the tokens' bytes together.
  """
  steps = _decoder_steps(tokenizer)
  replaced = [
    (step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"
  ] + [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
  kinds = {step["type"] for step in steps}
  of_character = _byte_of_character() if "ByteLevel" in kinds else {}

  def spell(token: str) -> bytes:
    for old, new in replaced:
      token = token.replace(old, new)
    if "ByteFallback" in kinds and (match := _BYTE_TOKEN.fullmatch(token)):
      return bytes.fromhex(match[1])
    # A token with one character outside the byte alphabet stands for itself as a whole.
    if of_character and all(character in of_character for character in token):
      return bytes(of_character[character] for character in token)
    return token.encode()

  spelled = [b""] * vocab_size
  for token, i in tokenizer.get_vocab().items():
    if i < vocab_size:
      spelled[i] = spell(token)
  return spelled


def _decoder_steps(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
  """The decoder of a fast tokenizer as a list of its steps."""
  decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
  state: dict[str, Any] = {"type": "None"}
  if decoder is not None:
    state = json.loads(decoder.__getstate__())
  steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
  known = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
  for step in steps:
    is_regex = step["type"] == "Replace" and "String" not in step["pattern"]
    if step["type"] not in known or is_regex:
      raise ValueError(f"rollout.stop: stop strings cannot be found in text that the tokenizer's "
                       f"decoder {step['type']} makes (known: {', '.join(sorted(known))}). Set "
                       "rollout.stop=[].")  # fmt: skip
  return steps


def _byte_of_character() -> dict[str, int]:
  """The alphabet of byte-level BPE: printable bytes are themselves, the others follow U+0100."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {
    chr(256 + i): byte for i, byte in enumerate(others)
  }


def _automaton(stops: Sequence[bytes]) -> np.ndarray:
  """Where byte c takes state s: i16[S, 256].

  A state is the longest end of what was read that is the beginning of a stop string.
  """
  beginnings = sorted({stop[:n] for stop in stops for n in range(len(stop))}, key=len)
  state = {beginning: s for s, beginning in enumerate(beginnings)}
  found = len(state)
  if found >= np.iinfo(np.int16).max:
    raise ValueError(f"rollout.stop: stop strings of {found} bytes are too long. Shorten them.")
  step = np.zeros((found + 1, 256), np.int16)
  step[found] = found
  for beginning, s in state.items():
    for byte in set(b"".join(stops)):
      read = beginning + bytes([byte])
      ends = (read[n:] for n in range(len(read) + 1))
      is_found = read.endswith(tuple(stops))
      step[s, byte] = found if is_found else next(state[end] for end in ends if end in state)
  return step
