"""GSM8K answers: what is read from a response, and when two numbers are one."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.config import TaskConfig
from spo_jax.tasks import Grade, load_task
from spo_jax.tasks.gsm8k import number_of

ROWS = [  # of the data's format, written for this test
  ("Ann has 3 boxes of 12 eggs. How many?", "She has 3*12 = <<3*12=36>>36 eggs.\n#### 36", "36"),
  ("It costs $1,250 less $170.", "It is 1250-170 = $<<1250-170=1080>>1,080.\n#### 1,080", "1080"),
  ("Half of 5?", "5/2=<<5/2=2.5>>2.5\n#### 2.50", "2.5"),
  ("From 3 take 10.", "3-10=<<3-10=-7>>-7\n#### -7", "-7"),
  ("No note here.", "Just one. \n#### 1", "1"),
]


def gsm8k(**options):
  return load_task(TaskConfig(name="gsm8k", **options), seed=0)


def problem(answer="18"):
  return gsm8k().from_record({"answer": answer}, uid=0)


@pytest.mark.parametrize(("question", "gold", "answer"), ROWS)
def test_gold_answers_grade_to_one_and_lose_their_calculator_notes(question, gold, answer):
  row = gsm8k().from_record({"question": question, "answer": gold}, uid=5)
  assert (row.uid, row.prompt, row.answer) == (5, question, answer)
  assert "<<" not in row.demonstration and row.demonstration.endswith(gold[gold.index("####"):])
  for response in (gold, row.demonstration):
    assert gsm8k().grade(row, response, finished=True) == Grade(1.0, answer)


def test_only_calculator_notes_are_removed_from_a_demonstration():
  row = gsm8k().from_record({"answer": "a < b << c\n<<1+1=2>>2 >> 1 <<\n>>\n#### 2"}, 0)
  assert row.demonstration == "a < b << c\n2 >> 1 <<\n>>\n#### 2"


@pytest.mark.parametrize(
  "response",
  [
    "#### 18",
    "####18",
    "#### 18\n",
    "#### 18.",
    "#### 18.0",
    "#### 18.000 dollars",
    "#### $18",
    "#### \\$18.00",
    "#### 018",
    "#### **18**",
    "#### $**18**",
    "**Answer:** the answer is **18** eggs",
    "#### 18%",
    "#### 18\nProblem: and more 19",
    "#### 17\nNo. #### 18",
    "The answer is 18.",
    "the ANSWER  is: $18.",
    "So the answer is 18 dollars. I hope it is correct.",
    "The answer is \\boxed{18}.",
    "so \\boxed{17}, no, \\boxed{18}",
    "\\boxed{18 \\text{ dollars}}",
    "\\boxed{\\$18}",
    "\\boxed{17} #### 18",
    "\\boxed{\\text{18 dollars}}",
    "\\boxed{18\\text{ eggs}}",
    "The answer is 17 #### 18",
    "The answer is 17 \\boxed{18}",
    "#### Step 17\nIt is \\boxed{18}.",
    "#### 17. Compute\nIt is \\boxed{18}.",
    "\\boxed{18}\n#### Notes\nNone.",
    "#### Summary\nThe answer is 18.",
    "#### +18",
    "#### €18",
    "#### 1. Cost\n9 x 2\n#### 2. Total\nThe answer is 18.",
    "The final answer is **18**.\n\n#### 3. Check\nok",
    "#### 18. That is all",
    "\\boxed{18 \\text{ km/h}}",
    "\\boxed{18\\text{ m}^2}",
    "\\boxed{18\\text{ miles/hour}}",
    "\\boxed{3 + 15 = 18}",
    "\\boxed{\\text{Total} = 18}",
    "\\boxed{\\textbf{18}}",
    "\\boxed{18^\\circ}",
    "x" * 1_000_000 + "#### 18",
  ],
  ids=lambda text: ascii(text[-30:]),
)
def test_right_answers(response):
  assert gsm8k().grade(problem(), response, finished=True) == Grade(1.0, "18")


@pytest.mark.parametrize(
  "response", ["#### -10", "#### −10", "\\boxed{-\\$10}", "\\boxed{x = −10}"]
)
def test_negative_answers(response):
  assert gsm8k().grade(problem("-10"), response, finished=True) == Grade(1.0, "-10")
  assert gsm8k().grade(problem("10"), response, finished=True).reward == 0.0


@pytest.mark.parametrize(
  "response",
  [
    "18",
    "#### 18\n#### 17",
    "#### 18 17",
    "#### 18/1",
    "#### 18 / 1",
    "#### 18 = 18",
    "#### 18 * x",
    "#### 18=x",
    "#### 18/x",
    "#### 18^x",
    "#### 18\\cdot x",
    "#### 18^1",
    "#### 1**8",
    "\\boxed{1**8}",
    "#### 1_8",
    "#### 1,8",
    "#### 18,00",
    "#### 18e0",
    "#### 18k",
    "#### 18 million",
    "#### 18m^4",
    "#### 18.0.0",
    "#### --18",
    "#### -18",
    "#### 0x12",
    "#### 9+9",
    "#### ١٨",
    "#### １８",
    "#### 18½",
    "#### 18²",
    "#### 18٥",
    "#### eighteen",
    "####\n18",
    "\\boxed{18} #### 17",
    "#### 17 \n The answer is 18",
    "\\boxed{18",
    "\\boxed{}",
    "\\boxed{18} \\boxed{17}",
    "#### 18" + "x" * 5000,
  ],
  ids=lambda text: ascii(text[:30]),
)
def test_wrong_answers(response):
  assert gsm8k().grade(problem(), response, finished=True).reward == 0.0


def test_penalties_are_for_repeats_and_for_what_never_ended():
  task = gsm8k(unfinished_penalty=0.5, repeat_penalty=2.0)
  assert task.grade(problem(), "#### 18", finished=True).reward == 1.0
  assert task.grade(problem(), "#### 17 #### 18", finished=True) == Grade(-1.0, "18")
  assert task.grade(problem(), "#### 17 #### 17", finished=True).reward == -2.0
  assert task.grade(problem(), "#### 18", finished=False) == Grade(-0.5, None)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9),
                   max_value=10**9), st.booleans(), st.integers(0, 4))  # fmt: skip
def test_equal_decimals_have_one_text_and_others_another(value, with_commas, zeros):
  plain = f"{value:f}"
  sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
  whole, _, decimals = digits.partition(".")
  grouped = f"{int(whole):,}" if with_commas else whole
  text = number_of(f"{sign}{grouped}.{decimals}{'0' * zeros}")
  assert text is not None and Decimal(text) == value
  assert text == number_of(text) == number_of(plain)
  assert number_of(f"{value + Decimal('0.001'):f}") != text


def test_numbers_are_read_up_to_thirty_digits():
  assert number_of("9" * 30) == "9" * 30
  assert number_of("9" * 31) is None
  assert number_of("." + "0" * 29 + "1") == "0." + "0" * 29 + "1"
  assert number_of("-0.00") == "0"
  assert number_of("18 " + "x" * 97) == "18"
  assert number_of("18 " + "x" * 98) is None


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"question": "q"}, "field 'answer' is missing"),
    ({"answer": None}, "field 'answer' is missing"),
    ({"answer": "  "}, "field 'answer' is empty"),
    ({"answer": True}, "field 'answer' is a bool"),
    ({"answer": "so\n#### many"}, "no number behind ####: 'many'"),
    ({"answer": "It is 18"}, "no number behind ####"),
  ],
)
def test_rows_without_an_answer_name_the_field(record, message):
  with pytest.raises(ValueError, match=message):
    gsm8k().from_record(record, 0)


def test_a_bare_number_is_an_answer_to_grade_with():
  assert gsm8k().from_record({"answer": 18}, 0).answer == "18"
  assert gsm8k().from_record({"answer": "1,080"}, 0) == gsm8k().from_record({"answer": "1080.0"}, 0)
