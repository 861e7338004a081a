"""Prompt templates by name: from a question to the text, and the tokens, that the model sees.

Questions are put into templates by plain replacement: whatever braces they hold, nothing in
them is ever interpreted.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from spo_jax import tokenizer as tokens
from spo_jax.errors import said

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

_DATE = "26 Jul 2024"  # of templates that would say today's; theirs where there is no clock
_QUESTION = "{question}"


@dataclass(frozen=True)
class Template:
  """A prompt with `{question}` in it.

  With `chat` it is a user's message, put into words by the tokenizer's chat template. The
  response then begins with `opening`, unless the chat template writes that itself.
  """

  text: str
  chat: bool = False
  opening: str = ""


TEMPLATES: Mapping[str, Template] = MappingProxyType(
  {
    "plain": Template("{question}"),
    # The authors' supervised Rho-1B models (SPO, arXiv:2505.23564).
    "rho": Template("[MATH_TASK] Problem:\n{question}\n\nSolution:"),
    "boxed": Template(
      "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
      chat=True,
    ),
    # R1-Distill models reason inside <think>; some of their chat templates open it, some do not.
    "r1": Template(
      "{question}\n\nPlease reason step by step. End with a line of the form\n"
      "Therefore, the final answer is: $\\boxed{ANSWER}$",
      chat=True,
      opening="<think>\n",
    ),
    "game24": Template(
      "{question}\nMake 24 from these numbers with +, -, *, / and parentheses, using each number "
      "exactly once. Reason step by step, and put the expression within \\boxed{}.",
      chat=True,
    ),
    # Base models and models trained from nothing have no chat template.
    "countdown": Template(
      "{question}\nReach the target from these numbers with +, -, *, / and parentheses, using "
      "each number exactly once. End with the expression behind the word Answer:\n"
    ),
  }
)


def find(template: str) -> Template:
  """The template of that name, or that text with `{question}` in it as a plain one.

  Raises: ValueError for any other text, with the nearest name.
  """
  if template in TEMPLATES:
    return TEMPLATES[template]
  if _QUESTION in template:
    return Template(template)
  nearest = difflib.get_close_matches(template, TEMPLATES, n=1, cutoff=0.0)[0]
  raise ValueError(f"unknown task.prompt {template!r}: did you mean {nearest!r}? Known: "
                   f"{', '.join(TEMPLATES)}, or any text with {_QUESTION} in it.")  # fmt: skip


def render(tokenizer: PreTrainedTokenizerBase, template: str, question: str) -> str:
  """The prompt's whole text, with a chat's control tokens where the template is one.

  Raises: ValueError for an unknown template, or a chat where the tokenizer has none.
  """
  chosen = find(template)
  text = chosen.text.replace(_QUESTION, question)
  if not chosen.chat:
    return text
  if not tokenizer.chat_template:
    raise ValueError(f"task.prompt={template} is a chat, and this tokenizer has no chat template: "
                     "set task.prompt=plain (or a text of your own with {question} in it), or put "
                     "a chat_template into its tokenizer_config.json.")  # fmt: skip
  try:
    prompt = str(tokenizer.apply_chat_template(
      [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
      date_string=_DATE,
    ))  # fmt: skip
  except Exception as error:  # Chat templates are programs of their authors.
    raise ValueError(
      f"task.prompt={template}: the tokenizer's chat template fails ({said(error)}). Mend its "
      "tokenizer_config.json, or set task.prompt=plain."
    ) from error
  is_open = prompt.rstrip().endswith(chosen.opening.rstrip())
  return prompt if is_open else prompt + chosen.opening


def token_ids(
  tokenizer: PreTrainedTokenizerBase, template: str, questions: Sequence[str]
) -> list[list[int]]:
  """Token ids of each question's prompt. Raises: see `render`."""
  texts = [render(tokenizer, template, question) for question in questions]
  return tokens.token_ids(tokenizer, texts, _adds_special_tokens(template))


def encode(
  tokenizer: PreTrainedTokenizerBase, template: str, questions: Sequence[str], max_tokens: int,
  pad_id: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """Prompts as right-padded rows.

  Args:
    pad_id: see `tokenizer.encode_prompts`.
  Returns: tokens i32[B, max_tokens], lengths i32[B].
  Raises: ValueError, see `render` and `tokenizer.encode_prompts`.
  """
  texts = [render(tokenizer, template, question) for question in questions]
  special = _adds_special_tokens(template)
  return tokens.encode_prompts(tokenizer, texts, max_tokens, special, pad_id)


def _adds_special_tokens(template: str) -> bool:
  """False for a chat, whose text begins with whatever its chat template wants there."""
  return not find(template).chat
