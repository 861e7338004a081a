"""Prompt templates: from a question to the text and tokens that the model sees."""

import numpy as np
import pytest
from tokenizers import processors

from spo_jax import prompts
from spo_jax.tokenizer import bpe_tokenizer

CHAT = (
  "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
  "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = "What is {7} {question} {{x}} {% if %} {0} \\frac{1}{2}?"


def make(chat=CHAT):
  """A tokenizer that puts <s> in front of what it encodes, as Llama's do."""
  tokenizer = bpe_tokenizer([], 258)
  tokenizer.add_special_tokens({"bos_token": "<s>"})
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
  )
  tokenizer.chat_template = chat
  return tokenizer


def user(text):
  return f"<s><|user|>{text}<|assistant|>"


BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
  ("template", "expected"),
  [
    ("plain", "1+1?"),
    ("rho", "[MATH_TASK] Problem:\n1+1?\n\nSolution:"),
    ("boxed", user("1+1?" + BOXED)),
    ("Q: {question} A:", "Q: 1+1? A:"),
  ],
)
def test_a_template_is_written_as_published(template, expected):
  assert prompts.render(make(), template, "1+1?") == expected


@pytest.mark.parametrize("template", [*prompts.TEMPLATES, "{0}{x}{question}{{}}"])
def test_braces_of_a_question_are_never_interpreted(template):
  text = prompts.render(make(), template, QUESTION)
  assert text.count(QUESTION) == 1
  assert prompts.find(template).chat == (text.startswith("<s>"))


def test_r1_opens_think_once_whether_or_not_the_chat_template_does():
  request = "Therefore, the final answer is: $\\boxed{ANSWER}$"
  for ending in ("", "<think>", "<think>\\n"):
    chat = CHAT.replace("<|assistant|>", f"<|assistant|>{{{{ '{ending}' }}}}")
    text = prompts.render(make(chat), "r1", "1+1?")
    assert request in text
    assert text.endswith("<|assistant|><think>" + "\n" * (ending != "<think>"))
    assert text.count("<think>") == 1


def test_no_prompt_depends_on_the_day():
  # As Llama 3 asks for it.
  clock = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}. "
  )
  assert prompts.render(make(clock + CHAT), "boxed", "1?").startswith("Today: 26 Jul 2024. <s>")


def test_no_prompt_ends_with_an_end_that_a_tokenizer_puts_there():
  tokenizer = make()
  ids = [("<s>", tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
  own = tokenizer.backend_tokenizer
  expected = prompts.token_ids(tokenizer, "plain", ["1+1?", "1" + tokenizer.eos_token])
  own.post_processor = processors.TemplateProcessing(
    single=f"<s> $A {tokenizer.eos_token}", special_tokens=ids
  )
  whole, ended = prompts.token_ids(tokenizer, "plain", ["1+1?", "1" + tokenizer.eos_token])
  assert whole == expected[0]
  assert ended[: len(expected[1])] == expected[1]  # the text itself ends so


def test_a_chat_without_a_chat_template_is_one_line_with_both_fixes():
  with pytest.raises(ValueError, match=r"task\.prompt=boxed .*task\.prompt=plain.*chat_template "):
    prompts.render(make(None), "boxed", "1+1?")
  assert prompts.render(make(None), "rho", "1+1?")


def test_a_chat_template_that_fails_is_one_line():
  broken = make("{{ raise_exception('only\nassistants') }}")
  with pytest.raises(ValueError, match=r"chat template fails .*only assistants") as error:
    prompts.encode(broken, "boxed", ["1+1?"], 99)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "nearest"), [("boxd", "boxed"), ("Rho", "rho"), ("{q}", "")])
def test_an_unknown_name_is_one_line_with_the_nearest(name, nearest):
  with pytest.raises(ValueError, match=f"mean '{nearest}.*any text with {{question}}") as error:
    prompts.render(make(), name, "1+1?")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["plain", "rho", "boxed", "r1"])
def test_a_prompt_begins_with_one_beginning_of_text(template):
  """A chat template writes it; for plain text the tokenizer puts it there."""
  tokenizer = make()
  questions = ["1+1?", "é"]
  tokens, lengths = prompts.encode(tokenizer, template, questions, 300)
  ids = prompts.token_ids(tokenizer, template, questions)
  for row, length, own, question in zip(tokens, lengths, ids, questions):
    assert row[:length].tolist() == own
    assert own[0] == tokenizer.bos_token_id and own.count(tokenizer.bos_token_id) == 1
    written = prompts.render(tokenizer, template, question)
    assert tokenizer.decode(own).removeprefix("<s>") == written.removeprefix("<s>")
  assert tokens.dtype == lengths.dtype == np.int32


def test_a_prompt_that_is_too_long_names_the_limit():
  with pytest.raises(ValueError, match=r"rollout\.max_prompt_tokens=20 .*Raise it to 37"):
    prompts.encode(make(), "rho", ["1+1?"], 20)


def test_templates_cannot_be_changed_by_accident():
  with pytest.raises(TypeError):
    prompts.TEMPLATES["plain"] = prompts.Template("")
  with pytest.raises(AttributeError):
    prompts.TEMPLATES["plain"].chat = True
