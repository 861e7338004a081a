"""What all tasks share, generated arithmetic, the order of questions, and the docs' example."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax import grade
from spo_jax.config import TaskConfig
from spo_jax.tasks import LOADERS, SPLITS, Grade, Problem, load_task, question_order
from spo_jax.tasks.generated import VIRTUAL_LENGTH

DOCS = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()


def arithmetic(operations=6, penalty=0.0, seed=0, **options):
  config = TaskConfig(operations=operations, unfinished_penalty=penalty, **options)
  return load_task(config, seed)


@pytest.mark.parametrize("operations", [1, 6, 40])
@pytest.mark.parametrize("split", SPLITS)
def test_demonstrations_grade_to_one_and_their_arithmetic_is_right(operations, split):
  task = arithmetic(operations)
  for problem in task.split(split)[:50]:
    assert task.grade(problem, problem.demonstration, finished=True) == (1.0, problem.answer)
    start, *steps = re.findall(r"^\d+|[+-]\d", problem.prompt)
    values = [int(start)]
    for step in steps:
      values.append(values[-1] + int(step))
    assert len(steps) == operations and min(values) >= 0 and max(values) <= 99
    assert all(step[1] != "0" for step in steps)
    worked = [f"{a:02d}{step}={b:02d};" for a, step, b in zip(values, steps, values[1:])]
    assert problem.demonstration == "".join(worked) + f"#{values[-1]:02d}"
    assert set(problem.prompt + problem.demonstration) <= set(task.charset)


def test_no_problem_text_is_in_two_splits_whatever_the_seeds():
  # With one operation there are under 1,800 problems, so that overlapping splits would meet.
  texts = {
    split: {
      problem.prompt
      for seed in range(2)
      for problem in arithmetic(operations=1, seed=seed).split(split)[:1500]
    }
    for split in SPLITS
  }
  assert min(len(split) for split in texts.values()) > 200
  assert not texts["train"] & texts["validation"]
  assert not texts["train"] & texts["test"]
  assert not texts["validation"] & texts["test"]


def test_a_problem_depends_on_seed_split_and_index_only():
  validation = arithmetic().split("validation")
  late = validation[7]
  assert late == arithmetic().split("validation")[:8][7]
  uids = [arithmetic().split(split)[7].uid for split in SPLITS]
  assert uids == [7, 7 + VIRTUAL_LENGTH, 7 + 2 * VIRTUAL_LENGTH]
  assert late.prompt != arithmetic(seed=1).split("validation")[7].prompt
  assert len({problem.prompt for problem in validation[:500]}) == 500
  # Spelled out, because a checkpoint's cursor must mean the same problems in every version.
  assert arithmetic().split("train")[0].prompt == "56-6+2-2-6-5-3="


def test_a_generated_split_is_long_and_lazy():
  train = arithmetic().split("train")
  assert len(train) > 10**9
  assert train[len(train) - 1] == train[-1]
  assert train[np.int64(3)] == train[3]
  with pytest.raises(IndexError):
    train[len(train)]


PROBLEM = Problem(uid=0, prompt="66+9=", answer="75", demonstration="66+9=75;#75")


@pytest.mark.parametrize(
  "response",
  [
    "",
    "#",
    "75",
    "#74",
    "#75 ",
    "# 75",
    "#75;",
    "#75#75",
    "#12#75",
    "##75",
    "#+75",
    "#-75",
    "#7_5",
    "#7<pad>5",
    "#00075",
    "#75\n",
    "#75\0",
    "#٧٥",
    "#⁷⁵",
    "#７５",
    "#75.0",
    "#0x4b",
    "#9**9**9",
    "#__import__('os')",
    "#int('75')",
    "#\\boxed{75}",
    "\ud800#\udfff",
    "#" + "{" * 100_000,
    "#" + "9" * 10_000_000,
    "#" * 10_000_000,
  ],
  ids=lambda text: ascii(text[:20]),
)
def test_wrong_and_hostile_responses_earn_nothing_quickly(response):
  start = time.process_time()
  assert arithmetic().grade(PROBLEM, response, finished=True).reward == 0.0
  assert time.process_time() - start < 0.1


@pytest.mark.parametrize("response", ["#75", "nonsense 1+1=3;#75", "#075", "9" * 1_000_000 + "#75"])
def test_only_the_answer_after_the_first_mark_counts(response):
  assert arithmetic().grade(PROBLEM, response, finished=True).reward == 1.0


def test_the_extracted_answer_is_what_was_read():
  assert arithmetic().grade(PROBLEM, "#12", finished=True) == Grade(0.0, "12")
  assert arithmetic().grade(PROBLEM, "no mark", finished=True) == Grade(0.0, None)


def test_an_unfinished_response_earns_zero_less_the_penalty():
  assert arithmetic().grade(PROBLEM, "#75", finished=False) == Grade(0.0, None)
  assert arithmetic(penalty=0.5).grade(PROBLEM, "#75", finished=False) == Grade(-0.5, None)
  assert arithmetic(penalty=0.5).grade(PROBLEM, "#74", finished=True).reward == 0.0


def test_a_repeated_conclusion_costs_its_penalty_once_and_only_where_it_ended():
  task = arithmetic(penalty=0.5, repeat_penalty=2.0)
  assert task.grade(PROBLEM, "#75", finished=True).reward == 1.0
  assert task.grade(PROBLEM, "#74#75#76", finished=True).reward == -2.0
  assert task.grade(PROBLEM, "#74#75", finished=False).reward == -0.5


def test_penalties_can_be_left_out_where_right_answers_are_counted():
  task = load_task(TaskConfig(name="gsm8k", unfinished_penalty=0.5, repeat_penalty=2.0), 0)
  responses, finished = ["#### 7\n#### 75", "#### 75\n#### 7", "#### 75"], [True, True, False]
  for with_penalties, expected in ((True, [-1.0, -2.0, -0.5]), (False, [1.0, 0.0, 0.0])):
    grades = task.grade_many([PROBLEM] * 3, responses, finished, with_penalties)
    assert [grade.reward for grade in grades] == expected


def test_many_gradings_are_the_single_ones_in_their_order():
  task = arithmetic(penalty=0.5)
  problems = task.split("train")[:4]
  responses = [problems[0].demonstration, "#", problems[2].demonstration, "#x"]
  finished = [True, True, False, True]
  together = task.grade_many(problems, responses, finished)
  assert together == [task.grade(*row) for row in zip(problems, responses, finished)]
  assert [grade.reward for grade in together] == [1.0, 0.0, -0.5, 0.0]


def test_rows_of_a_file_can_be_graded_without_their_question():
  problem = arithmetic().from_record({"answer": "75", "response": "#75"}, uid=3)
  assert (problem.uid, problem.answer) == (3, "75")
  assert arithmetic().from_record({"answer": 75}, 0).answer == "75"
  for record, message in (
    ({}, "field 'answer' is missing"),
    ({"answer": "٧٥"}, "field 'answer' is '٧٥'"),
    ({"answer": "12345"}, "field 'answer'"),
    ({"answer": [75]}, "field 'answer' is a list"),
  ):
    with pytest.raises(ValueError, match=message):
      arithmetic().from_record(record, 0)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: arithmetic(name="arithmetics"), "did you mean 'arithmetic'"),
    (lambda: arithmetic(name=""), "unknown task ''.*Known: arithmetic"),
    (lambda: arithmetic(path="data.jsonl"), "task.path='data.jsonl'"),
    (lambda: arithmetic(operations=0), "task.operations=0"),
    (lambda: arithmetic(penalty=-1.0), "task.unfinished_penalty=-1.0"),
    (lambda: arithmetic(penalty=float("nan")), "task.unfinished_penalty=nan"),
    (lambda: arithmetic(repeat_penalty=float("inf")), "task.repeat_penalty=inf"),
    (lambda: arithmetic().split("valid"), "unknown split 'valid': did you mean 'validation'"),
  ],
)
def test_a_wrong_option_is_one_line_that_names_it(make, message):
  with pytest.raises(ValueError, match=message) as error:
    make()
  assert "\n" not in str(error.value)


@settings(deadline=None)
@given(num_problems=st.integers(1, 300), seed=st.integers(-5, 2**70), epoch=st.integers(0, 10**6))
def test_each_epoch_asks_every_question_once(num_problems, seed, epoch):
  order = question_order(num_problems, seed, epoch * num_problems, num_problems)
  assert order.dtype == np.int64
  assert sorted(order) == list(range(num_problems))


@settings(deadline=None)
@given(num_problems=st.integers(1, 2**62), cursor=st.integers(0, 10**6), split=st.integers(0, 40))
def test_the_order_resumes_from_the_cursor_alone(num_problems, cursor, split):
  whole = question_order(num_problems, 3, cursor, 40)
  parts = (
    question_order(num_problems, 3, cursor, split),
    question_order(num_problems, 3, cursor + split, 40 - split),
  )
  assert np.array_equal(whole, np.concatenate(parts))
  assert whole.min() >= 0 and whole.max() < num_problems


def test_epochs_and_seeds_have_orders_of_their_own():
  orders = [
    question_order(50, seed, epoch * 50, 50).tolist() for seed in range(3) for epoch in range(3)
  ]
  assert len({tuple(order) for order in orders}) == 9
  assert list(range(50)) not in orders


def test_every_question_comes_first_equally_often():
  for num_problems in (2, 5, 17):
    epochs = 4000
    order = question_order(num_problems, 0, 0, epochs * num_problems).reshape(epochs, num_problems)
    counts = np.bincount(order[:, 0], minlength=num_problems)
    expected = epochs / num_problems
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < (num_problems - 1) + 5 * np.sqrt(2 * (num_problems - 1))


def test_a_huge_split_is_ordered_without_repeats_or_runs():
  order = question_order(2**32, 0, 0, 100_000)
  assert len(set(order.tolist())) == 100_000
  assert abs(order.mean() / 2**32 - 0.5) < 0.01
  assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize(
  "arguments", [(0, 0, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1), (2**63, 0, 0, 1)]
)
def test_an_impossible_order_is_refused(arguments):
  with pytest.raises(ValueError, match="cannot order questions"):
    question_order(*arguments)


def docs_block(language, containing):
  blocks = re.findall(rf"```{language}\n(.*?)```", DOCS, re.S)
  return next(block for block in blocks if containing in block)


def test_the_task_that_the_docs_add_works_as_written(tmp_path, monkeypatch, capsys):
  names = {}
  exec(docs_block("python", "class Words"), names)
  loader = eval("{" + docs_block("python", '"words": ') + "}", names)
  monkeypatch.setitem(LOADERS, "words", loader["words"])
  rows = docs_block("json", "Norway")
  for split in ("train", "test"):
    (tmp_path / f"{split}.jsonl").write_text(rows)
  task = load_task(TaskConfig(name="words", path=str(tmp_path)), seed=0)
  test = task.split("test")
  assert [problem.answer for problem in test] == ["Oslo", "Nairobi"]
  assert len(task.split("train")) == len(task.split("validation")) == 1
  assert task.grade(test[0], test[0].demonstration, finished=True) == Grade(1.0, "Oslo")
  assert task.grade(test[0], "Oslo", finished=True) == Grade(0.0, None)

  source, target = tmp_path / "responses.jsonl", tmp_path / "graded.jsonl"
  source.write_text(json.dumps({"answer": "Oslo", "response": "Answer: oslo"}) + "\n")
  assert grade.main(["--task", "words", str(source), str(target)]) == 0
  assert json.loads(target.read_text())["reward"] == 1.0
  assert "1 graded" in capsys.readouterr().out
  with pytest.raises(ValueError, match=r"set task\.path"):
    load_task(TaskConfig(name="words"), seed=0).split("train")


def test_the_docs_name_every_task_and_field():
  for name, loader in LOADERS.items():
    assert f"| `{name}` |" in DOCS
    assert f"`{loader.conclusion}`" in DOCS or name == "arithmetic"
