"""Game of 24 and countdown: exact expressions, questions, and worked answers."""

import dataclasses
import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.config import TaskConfig
from spo_jax.tasks import SPLITS, Grade, load_task
from spo_jax.tasks.expressions import evaluate, expression_of
from spo_jax.tasks.generated import split_of
from spo_jax.tasks.solutions import Solver, worked, write


@pytest.fixture(scope="module")
def game24():
  return load_task(TaskConfig(name="game24"), seed=0)


def countdown(seed=0, **options):
  return load_task(TaskConfig(name="countdown", **options), seed)


def grade(task, record, response):
  return task.grade(task.from_record(record, 0), response, finished=True)


# A tree as Python computes it, with its numbers, next to ours.
_TREES = st.recursive(
  st.integers(0, 999), lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner), max_leaves=8
)


def python_value(tree):
  if isinstance(tree, int):
    return Fraction(tree)
  left, operator, right = tree
  a, b = python_value(left), python_value(right)
  return a / b if operator == "/" else {"+": a + b, "-": a - b, "*": a * b}[operator]


def leaves(tree):
  return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[2])


@given(_TREES)
def test_written_expressions_are_read_back_exactly(tree):
  text = write(tree)
  try:
    expected = python_value(tree)
  except ZeroDivisionError:
    with pytest.raises(ValueError, match="division by zero"):
      evaluate(text)
    return
  assert evaluate(text) == (expected, leaves(tree))
  # Python's own grammar agrees about precedence: every leaf as an exact fraction.
  as_fractions = re.sub(r"\d+", r"Fraction(\g<0>)", text)
  assert eval(as_fractions, {"Fraction": Fraction}) == expected


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("8/(3-8/3)", 24),
    (r"\frac{8}{3-\frac{8}{3}}", 24),
    (r"8 \div \left(3 - \dfrac{8}{3}\right)", 24),
    (r"$6 \times 4$", 24),
    ("6 × 4", 24),
    ("6·4", 24),
    ("(1 + 3) ÷ 2", 2),
    ("5 − 7", -2),
    ("-3+27", 24),
    ("3*-2", -6),
    ("(-(1+2))*(-8)", 24),
    ("2-3-4", -5),
    ("24/4/3", 2),
    ("1000000*2/3", Fraction(2000000, 3)),
    ("(8-4)(7-1)", 24),
    ("2(3)", 6),
    ("[8-4] * [7-1]", 24),
    (r"\((8-4)*(7-1)\)", 24),
  ],
)
def test_expressions_that_are_understood(text, value):
  assert evaluate(text)[0] == value


@pytest.mark.parametrize(
  "text",
  [
    "", " ", "()", "1+", "+1", "1 2", "1  2", "1\n2", "(1", "1)", "(2)3", "2**3", "2^3",
    "2//3", "1e3", "1.5", "1_0", "0x1", "x", "2x", "3!", "5%2", "--1", "1/0", "1/(2-2)",
    r"\frac{1}{0}", r"\frac12", r"\frac{1}", r"\sqrt{4}", "{1}", "[1", "1,2", "1;2", "٣",
    "３", "½", "2²", "1\0", "\ud800", "9**9**9", "__import__('os')", "1 if 1 else 2", "9" * 10,
    "(" * 31 + "1" + ")" * 31, "1+" * 16 + "1", "1" + "+0" * 150,
  ],
  ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_everything_else_is_refused(text):
  with pytest.raises(ValueError):
    evaluate(text)


def test_limits_leave_room_for_every_real_expression():
  assert evaluate("(" * 30 + "1" + ")" * 30) == (1, [1])
  assert evaluate("+".join(["999999999"] * 16))[0] == 16 * 999999999
  assert evaluate("1" + " " * 299) == (1, [1])
  with pytest.raises(ValueError, match="over 300 characters"):
    evaluate("1" + " " * 300)


RIGHT = [
  r"\boxed{8/(3-8/3)}",
  r"\boxed{8/(3 - 8/3) = 24}",
  r"so $\boxed{\frac{8}{3 - \frac{8}{3}}}$.",
  "Answer: 8/(3-8/3)",
  "**Answer:** 8/(3-8/3).",
  "Answer: 8/(3-8/3)\nand nothing else",
  r"Answer: \boxed{8/(3-8/3)}",
  "Answer: 1\nAnswer: 8/(3-8/3)",
  r"\boxed{1} Answer: 8/(3-8/3)",
  r"\boxed{24 = 8/(3-8/3)}",
  r"\boxed{8/(3-8/3) = 8*3 = 24}",
  "Answer:\n8/(3-8/3)",
  "\\boxed{8/(3-8/3)}\n\n**Final Answer:** The expression above makes 24.",
]
WRONG = [
  "8/(3-8/3)",
  r"\boxed{8*3*3/3}",
  r"\boxed{8*3}",
  r"\boxed{24}",
  r"\boxed{8/(3-8/3)+0}",
  r"\boxed{8+8+8}",
  r"\boxed{8*8/3+3}",
  r"\boxed{8/(3-8/3) = 25}",
  r"\boxed{24 = 24}",
  r"\boxed{8/(3-8/3) = 24 = 25}",
  r"\boxed{8/(3-8/3)",
  r"\boxed{8/(3-8/3)} \boxed{1}",
  "Answer: 8/(3-8/3)\nAnswer: 1",
  r"Answer: 8/(3-8/3) \boxed{1}",
  "Answer:",
  "Answer:\n",
  r"\boxed{88/33}",
  r"\boxed{8/(3-8/3)+9**9**9}",
]


@pytest.mark.parametrize(
  ("response", "reward"), [(text, 1.0) for text in RIGHT] + [(text, 0.0) for text in WRONG]
)
def test_an_expression_must_use_each_number_once_and_hit_the_target(response, reward, game24):
  assert grade(game24, {"numbers": [3, 3, 8, 8]}, response).reward == reward
  assert grade(countdown(), {"nums": [3, 3, 8, 8], "target": 24}, response).reward == reward


def test_spaces_are_not_part_of_what_is_extracted_and_join_no_numbers(game24):
  assert expression_of("Answer: 8 / ( 3 - 8 / 3 ) .") == "8/(3-8/3)"
  assert expression_of("Answer: 1 2 +  3") == "1 2+3"
  assert grade(game24, {"numbers": "1 1 2 12"}, r"\boxed{1 2*2*1/1}").reward == 0.0
  assert grade(game24, {"numbers": "1 1 2 12"}, r"\boxed{12*2*1/1}").reward == 1.0


def test_the_questions_of_game24_are_all_hands_that_can_be_solved(game24):
  splits = {name: game24.split(name) for name in SPLITS}
  texts = [problem.prompt for problems in splits.values() for problem in problems]
  uids = [problem.uid for problems in splits.values() for problem in problems]
  assert len(texts) == len(set(texts)) == len(set(uids)) == 1362  # a known count
  assert len(splits["train"]) > len(splits["validation"]) + len(splits["test"]) - 100
  assert min(map(len, splits.values())) > 250
  assert "Numbers: 3 3 8 8." in texts and "Numbers: 1 1 1 1." not in texts
  again = load_task(TaskConfig(name="game24"), seed=7).split("test")
  assert again == splits["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_game24_demonstrations_earn_one_and_their_steps_are_right(split, game24):
  for problem in game24.split(split):
    assert game24.grade(problem, problem.demonstration, finished=True).reward == 1.0
    check_steps(problem.demonstration.partition(". Answer: ")[0], problem, 24)


def check_steps(steps, problem, target):
  """Every step is right, takes two values that are there, and the last one makes the target."""
  values = [Fraction(number) for number in problem.numbers]
  for step in steps.split(", "):
    a, operator, b, result = re.fullmatch(
      r"\(?(\d+(?:/\d+)?)\)?([-+*/])\(?(\d+(?:/\d+)?)\)?=(\d+(?:/\d+)?)", step
    ).groups()  # fmt: skip
    a, b, result = map(Fraction, (a, b, result))
    values.remove(a)
    values.remove(b)
    assert result == (a / b if operator == "/" else {"+": a + b, "-": a - b, "*": a * b}[operator])
    values.append(result)
  assert values == [target]


@pytest.mark.parametrize(("numbers", "largest"), [(2, 10), (3, 99), (4, 50), (6, 999)])
@pytest.mark.parametrize("split", SPLITS)
def test_countdown_questions_are_solved_by_their_demonstrations(numbers, largest, split):
  task = countdown(numbers=numbers, largest=largest)
  for problem in task.split(split)[:60]:
    text = re.fullmatch(r"Numbers: ([\d ]+)\. Target: (\d+)\.", problem.prompt)
    assert tuple(map(int, text[1].split())) == problem.numbers and len(problem.numbers) == numbers
    assert all(1 <= value <= largest for value in (*problem.numbers, int(text[2])))
    steps, _, expression = problem.demonstration.partition(". Answer: ")
    assert steps.count("=") == numbers - 1
    check_steps(steps, problem, int(text[2]))
    assert all(1 <= int(result) <= largest for result in re.findall(r"=(\d+)", steps))
    assert task.grade(problem, problem.demonstration, finished=True) == Grade(1.0, expression)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_countdown_splits_share_no_question_in_another_order(split):
  for problem in countdown(numbers=3, largest=50).split(split)[:50]:
    for numbers in itertools.permutations(problem.numbers):
      prompt = f"Numbers: {' '.join(map(str, numbers))}. Target: {problem.answer}."
      same = dataclasses.replace(problem, numbers=numbers, prompt=prompt)
      assert split_of(same) == split


def test_countdown_splits_share_no_question_and_depend_on_seed_and_index():
  texts = {
    split: {problem.prompt for seed in range(2)
            for problem in countdown(seed, numbers=2, largest=10).split(split)[:300]}
    for split in SPLITS
  }  # fmt: skip
  assert min(map(len, texts.values())) > 20
  assert not texts["train"] & texts["validation"] and not texts["train"] & texts["test"]
  assert not texts["validation"] & texts["test"]
  train = countdown().split("train")
  assert train[5] == countdown().split("train")[:6][5] != countdown(seed=1).split("train")[5]
  assert len(train) > 10**9
  assert {op for p in train[:200] for op in "+-*/" if op in p.demonstration} == set("+-*/")
  # Spelled out, because a checkpoint's cursor must mean the same problems in every version.
  assert train[0].prompt == "Numbers: 60 5 86. Target: 21."


def test_the_solver_finds_what_exhaustive_search_finds():
  solver = Solver(10)
  for numbers in itertools.combinations_with_replacement(range(1, 8), 3):
    reachable = any(
      python_value_or_none(tree) == 10
      for a, b, c in set(itertools.permutations(numbers))
      for first, second in itertools.product("+-*/", repeat=2)
      for tree in (((a, first, b), second, c), (a, first, (b, second, c)))
    )
    tree = solver.solve(numbers)
    assert (tree is not None) == reachable
    if tree is not None:
      assert python_value(tree) == 10 and sorted(leaves(tree)) == sorted(numbers)


def python_value_or_none(tree):
  try:
    return python_value(tree)
  except ZeroDivisionError:
    return None


def test_fractions_are_used_only_where_there_is_no_other_way():
  solver = Solver(24)
  assert worked(solver.solve((3, 3, 8, 8))) == "8/3=8/3, 3-(8/3)=1/3, 8/(1/3)=24"
  for numbers in ((1, 3, 8, 10), (2, 3, 4, 9)):  # fractions would be found first
    assert not re.search(r"=\d+/", worked(solver.solve(numbers)))
  assert solver.solve((1, 1, 1, 1)) is None


@pytest.mark.parametrize(
  ("name", "record", "message"),
  [
    ("game24", {}, "field 'numbers' is missing"),
    ("game24", {"numbers": [1, 2, 3]}, "holds 3 numbers, not 4"),
    ("game24", {"numbers": [1, 1, 1, 1]}, "1 1 1 1 cannot make 24"),
    ("game24", {"numbers": [1, 2, 3, 4.0]}, "no integer"),
    ("game24", {"numbers": [True, 2, 3, 4]}, "no integer"),
    ("game24", {"numbers": [0, 2, 3, 4]}, "no integer in 1..999999999"),
    ("game24", {"numbers": "1 2 x 4"}, "not integers with spaces"),
    ("game24", {"numbers": "1 2 ٣ 4"}, "not integers with spaces"),
    ("game24", {"numbers": 24}, "must be a list"),
    ("countdown", {"target": 3}, "field 'nums' is missing"),
    ("countdown", {"nums": [1, 2]}, "field 'target' is missing"),
    ("countdown", {"nums": [1, 2], "target": "-3"}, "field 'target' is '-3'"),
    ("countdown", {"nums": [1, 2], "target": 2.5}, "field 'target' is '2.5'"),
    ("countdown", {"nums": [], "target": 3}, "a list of 1 to 8 integers"),
    ("countdown", {"nums": [1] * 9, "target": 9}, "a list of 1 to 8 integers"),
  ],
)
def test_rows_that_are_no_question_name_the_field(name, record, message):
  task = load_task(TaskConfig(name=name), seed=0)
  with pytest.raises(ValueError, match=message) as error:
    task.from_record(record, 0)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"numbers": 1}, "task.numbers=1 must be from 2 to 8"),
    ({"numbers": 9}, "task.numbers=9"),
    ({"largest": 9}, "task.largest=9 must be from 10"),
    ({"largest": 2**16}, "task.largest=65536"),
  ],
)
def test_countdown_options_that_make_no_question_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    countdown(**options)
