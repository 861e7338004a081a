"""Competition mathematics: which answer a response gives, and whether it is the right one."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.config import TaskConfig
from spo_jax.tasks import Grade, Problem, load_task
from spo_jax.tasks.math import MAX_ANSWER_CHARS, MAX_DEPTH, Math, answer_of, quick_verdict, tidy

pytest.importorskip("math_verify", reason="pip install 'spo_jax[math]'")

ROWS = [  # of the data's format, written for this test
  {"problem": "Halve $3$.", "solution": r"It is $\boxed{\frac{3}{2}}$.", "answer": r"\frac{3}{2}"},
  {"problem": "Roots?", "solution": r"Both: $\boxed{\{1, -1\}}$.", "answer": r"\{1, -1\}"},
  {"problem": "A point?", "solution": r"At $\boxed{\left(0,\frac{\pi}{2}\right)}$, so",
   "answer": r"\left(0,\frac{\pi}{2}\right)"},
  {"problem": "Which word?", "solution": r"\boxed{\text{even}}", "answer": r"\text{even}"},
  {"problem": "Box twice.", "solution": r"First \boxed{1}, then $\framebox{204}$ hours."},
  {"problem": "How many?", "solution": r"So $\boxed 7$ of them.", "answer": 7},
]  # fmt: skip


def crash_at_a_bomb(gold, answer):
  """Runs in a worker; stands in for math-verify where that would do something terrible."""
  if answer == "hang":
    time.sleep(600)
  if answer == "die":
    import os

    os._exit(1)
  return gold == answer.removeprefix("is ")


@pytest.fixture(scope="module")
def task():
  task = load_task(TaskConfig(name="math", unfinished_penalty=0.5, repeat_penalty=0.25), seed=0)
  yield task
  task.close()


def gold(answer):
  return Problem(0, "", answer, None)


def reward(task, answer, response):
  return task.grade(gold(answer), response, finished=True).reward


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["problem"])
def test_gold_solutions_grade_to_one(task, row):
  problem = task.from_record(row, uid=4)
  assert (problem.uid, problem.prompt) == (4, row["problem"])
  assert problem.demonstration == row["solution"]
  assert task.judge(problem, row["solution"]).reward == 1.0


@pytest.mark.parametrize(
  ("answer", "response"),
  [
    (r"\frac{1}{2}", r"\boxed{\dfrac12}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    ("x^2-1", r"\boxed{(x-1)(x+1)}"),
    ("5", r"\boxed{x=5}"),
    ("x=5", r"\boxed{5}"),
    ("1000", r"\boxed{1,000}"),
    ("10000", r"\boxed{10{,}000}"),
    ("073", r"\boxed{73}"),
    ("90^\\circ", r"\boxed{90}"),
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}"),
    (r"[0,\infty)", r"\boxed{[0, \infty)}"),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"\text{even}", r"\boxed{\text{Even}}"),
    ("6", r"\boxed{5} is wrong, so \boxed{6}"),
    ("6", "Therefore, the final answer is: $\\boxed{6}$"),
    ("6", "The answer is $6$."),
    ("6", "the answer is: 6"),
  ],
)
def test_right_answers(task, answer, response):
  assert task.judge(gold(answer), response).reward == 1.0


@pytest.mark.parametrize(
  ("answer", "response"),
  [
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
    ("6", "6"),
    ("6", r"\boxed{6} or \boxed{7}"),
    ("6", r"\boxed{6, 7}"),
    ("6", r"\boxed{6"),
    ("6", r"\boxed{}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    (r"\text{even}", r"\boxed{\text{neve}}"),
    (r"[0,1)", r"\boxed{[0,1]}"),
    ("x^2-1", r"\boxed{(x-1)^2}"),
    ("12345678901234567890", r"\boxed{12345678901234567891}"),
    ("6", r"\boxed{6" + "x" * MAX_ANSWER_CHARS + "}"),
  ],
)
def test_wrong_answers(task, answer, response):
  assert task.judge(gold(answer), response).reward == 0.0


def test_penalties_are_those_of_every_task(task):
  assert task.grade(gold("6"), r"\boxed{6}", finished=False) == Grade(-0.5, None)
  assert task.grade(gold("6"), r"\boxed{6} \boxed{6}", finished=True) == Grade(0.75, "6")


def test_many_gradings_are_the_single_ones_in_their_order(task):
  problems = [gold(r"\frac{1}{2}"), gold("6"), gold(r"\sqrt{12}"), gold("6")]
  responses = [r"\boxed{0.5}", "none", r"\boxed{2\sqrt3}", r"\boxed{x}"]
  grades = task.grade_many(problems, responses, [True, True, True, False])
  assert grades == [Grade(1.0, "0.5"), Grade(0.0, None), Grade(1.0, r"2\sqrt3"), Grade(-0.5, None)]


def test_extracted_answers_that_only_look_different_are_one_text():
  for answer in ("\\dfrac{1}{2}", "\\frac{1} {2}", "$\\tfrac{1}{2}$.", "\\!\\frac{1}{2}\\,"):
    assert tidy(answer) == "\\frac{1}{2}"
  assert tidy("-007") == "-7" and tidy("1,000") == "1000" and tidy("1,00") == "1,00"
  assert tidy("\\left( 1 , 2 \\right)") == "(1,2)"
  assert tidy("\\leftarrow") == "\\leftarrow"


@pytest.mark.parametrize(
  ("response", "answer"),
  [
    (r"\boxed{x \} y} z}", r"x \} y"),
    (r"\boxed{\{1, 2\}} }", r"\{1, 2\}"),
    (r"\boxed{\frac{1}{\sqrt{2}}}, so", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\boxed{5} + 1}", "5"),
    (r"\boxed{1} \boxed{2", None),
    (r"\boxed 7$", "7"),
    (r"\fbox{8}", "8"),
    (rf"\boxed{{{'y' * MAX_ANSWER_CHARS}}}", "y" * MAX_ANSWER_CHARS),
    (rf"\boxed{{{'y' * (MAX_ANSWER_CHARS + 1)}}}", None),
    (rf"\boxed{{{'(' * MAX_DEPTH}1{')' * MAX_DEPTH}}}", "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH),
    (rf"\boxed{{{'(' * MAX_DEPTH}[1]{')' * MAX_DEPTH}}}", None),
    ("So the answer is $5$.\nThat is all.", "5"),
    ("5", None),
  ],
  ids=lambda text: ascii(text)[:40],
)
def test_the_answer_is_the_last_whole_box(response, answer):
  assert answer_of(response) == answer


def test_what_needs_no_computation_goes_to_no_worker():
  task = Math(TaskConfig(name="math"), 0, check=crash_at_a_bomb)
  assert reward(task, "6", r"\boxed{6}") == 1.0
  assert reward(task, "6", r"\boxed{7}") == 0.0
  assert reward(task, r"\text{no}", r"\boxed{yes}") == 0.0
  assert reward(task, "6", "nothing") == 0.0
  assert not task._pool.pids()


def test_what_hangs_or_kills_its_worker_earns_nothing_and_is_counted():
  task = Math(TaskConfig(name="math"), 0, check=crash_at_a_bomb)
  task._pool._timeout_s = 1.0
  responses = [rf"\boxed{{{answer}}}" for answer in ("is x", "hang", "die", "y", "is x", "die")]
  grades = task.grade_many([gold("x")] * 6, responses, [True] * 6)
  assert [grade.reward for grade in grades] == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
  # Equal answers are one call, so the second "die" killed nobody.
  assert task.counters() == {"timeouts": 1, "crashes": 1, "errors": 0}
  assert task.counters() == {"timeouts": 0, "crashes": 0, "errors": 0}
  assert reward(task, "x", r"\boxed{is x}") == 1.0
  task.close()
  assert not task._pool.pids()


@given(st.text(max_size=200), st.text(max_size=50))
def test_string_work_takes_any_text(response, answer):
  for text in (response, f"\\boxed{{{answer}}}", f"the answer is {answer}"):
    found = answer_of(text)
    if found is not None:
      assert 0 < len(found) <= MAX_ANSWER_CHARS
      assert quick_verdict("6", found) in (True, False, None)
      assert tidy(tidy(found)) == tidy(found) or "\\" in found


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"problem": "p"}, "field 'solution' is missing"),
    ({"solution": "no box"}, "field 'answer' is missing, and 'solution' has no"),
    ({"solution": r"\boxed{1"}, "field 'answer' is missing, and 'solution' has no"),
    ({"answer": " "}, "field 'answer' is empty"),
    ({"answer": ["6"]}, "field 'answer' is a list"),
    ({"answer": "6" * 301}, "field 'answer' has 301 characters"),
  ],
)
def test_rows_without_an_answer_name_the_field(task, record, message):
  with pytest.raises(ValueError, match=message):
    task.from_record(record, 0)


def test_without_math_verify_the_fix_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'spo_jax\[math\]'"):
    load_task(TaskConfig(name="math"), seed=0)


@pytest.mark.parametrize(
  ("given", "is_right"), [("4210_5", True), ("4210_{5}", True), ("4210_6", False), ("421_5", False)]
)
def test_numbers_in_another_base_are_other_numbers(given, is_right):
  assert quick_verdict("4210_{5}", given) is is_right
