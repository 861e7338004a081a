"""Datasets from files and folders: splits, identities, and rows that cannot be used."""

import json
import sys
import types

import pytest

from spo_jax.config import TaskConfig
from spo_jax.tasks import SPLITS, load_task
from spo_jax.tasks.data import VALIDATION_ROWS


def row(i):
  return {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>\n#### {i + 1}"}


def write(path, rows):
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif path.suffix == ".json":
    path.write_text(json.dumps(rows, indent=1))
  else:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def task(path, name="gsm8k", seed=0):
  return load_task(TaskConfig(name=name, path=str(path)), seed)


def texts(problems):
  return [problem.prompt for problem in problems]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("validation", ["validation", "val", "dev-0", "valid"])
def test_a_folder_holds_a_file_per_split(tmp_path, suffix, validation):
  for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", validation, "test")):
    write(tmp_path / f"{name}.{suffix}", [row(i), row(10 + i)])
  (tmp_path / "README.md").write_text("not data")
  (tmp_path / "training.jsonl").write_text("not a split either")
  gsm8k = task(tmp_path)
  assert texts(gsm8k.split("train")) == [row(i)["question"] for i in (0, 10, 1, 11)]
  assert texts(gsm8k.split("validation")) == [row(i)["question"] for i in (2, 12)]
  assert texts(gsm8k.split("test")) == [row(i)["question"] for i in (3, 13)]
  assert gsm8k.split("test")[1].answer == "14"
  assert not gsm8k.skipped and not gsm8k.skipped_rows


def test_every_format_makes_the_same_problems(tmp_path):
  splits = []
  for suffix in ("jsonl", "json", "parquet"):
    write(tmp_path / f"mine.{suffix}", [row(i) for i in range(30)])
    loaded = task(tmp_path / f"mine.{suffix}")
    splits.append([loaded.split(name) for name in ("train", "validation")])
  (tmp_path / "lines.json").write_text((tmp_path / "mine.jsonl").read_text())
  loaded = task(tmp_path / "lines.json")
  splits.append([loaded.split(name) for name in ("train", "validation")])
  assert all(split == splits[0] for split in splits)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (40, 4), (6000, VALIDATION_ROWS)])
def test_validation_is_held_out_of_train_whatever_the_order(tmp_path, count, held_out):
  rows = [row(i) for i in range(count)]
  write(tmp_path / "train.jsonl", rows)
  write(tmp_path / "train_backwards.jsonl", rows[::-1])
  one, other = task(tmp_path / "train.jsonl"), task(tmp_path / "train_backwards.jsonl")
  assert len(one.split("validation")) == held_out
  assert len(one.split("train")) == count - held_out
  assert not set(texts(one.split("train"))) & set(texts(one.split("validation")))
  for split in ("train", "validation"):
    assert one.split(split) == other.split(split)[::-1]


def test_uids_are_stable_and_unique_across_splits(tmp_path):
  rows = [row(i) for i in range(50)]
  write(tmp_path / "train.jsonl", [*rows, rows[7], rows[7]])
  write(tmp_path / "test.jsonl", rows[:20])
  problems = [p for split in SPLITS for p in task(tmp_path).split(split)]
  uids = [problem.uid for problem in problems]
  assert len(set(uids)) == len(uids) == 72
  assert all(0 <= uid < 2**62 for uid in uids)
  # Neither other rows nor another order, which move problems to other splits, change a uid.
  write(tmp_path / "train.jsonl", rows[30::-1])
  again = task(tmp_path)
  for split in ("train", "validation"):
    assert {problem.uid for problem in again.split(split)} < set(uids)
  # Spelled out, because saved samples are matched by it in later versions.
  assert again.split("test")[0].uid == 2515185352288571879


def test_a_question_that_stands_twice_is_on_one_side_only(tmp_path):
  rows = [row(i % 20) for i in range(60)]
  write(tmp_path / "train.jsonl", rows)
  loaded = task(tmp_path)
  train, validation = set(texts(loaded.split("train"))), set(texts(loaded.split("validation")))
  assert train and validation and not train & validation
  assert len(loaded.split("train")) + len(loaded.split("validation")) == 60


def test_rows_that_cannot_be_used_are_skipped_counted_and_named(tmp_path):
  good = json.dumps(row(1)).encode()
  lines = [
    good,
    b"",
    b"{broken",
    b"[1, 2]",
    b'{"answer": "#### 3"}',
    b'{"question": null, "answer": "#### 3"}',
    b'{"question": "q"}',
    b'{"question": "q", "answer": "#### none"}',
    b'{"question": "\\ud800", "answer": "#### 3"}',
    b"\xff\xfe",
    b'{"question": "q", "answer": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    json.dumps(row(2)).encode(),
  ]
  (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
  write(tmp_path / "test.jsonl", [row(3), {"question": "?"}])
  loaded = task(tmp_path)
  problems = [*loaded.split("train"), *loaded.split("validation")]
  assert sorted(texts(problems)) == [row(1)["question"], row(2)["question"]]
  assert loaded.skipped == {"train.jsonl": 10}
  loaded.split("test")
  loaded.split("train")
  assert loaded.skipped == {"train.jsonl": 10, "test.jsonl": 1}
  assert len(loaded.skipped_rows) == 5
  named = "\n".join(loaded.skipped_rows)
  assert "train.jsonl:3: not JSON" in named and "train.jsonl:4: a list, not an object" in named
  assert "train.jsonl:5: field 'question' is missing" in named
  assert "train.jsonl:7: field 'answer' is missing" in named
  assert all("\n" not in reason for reason in loaded.skipped_rows)


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n", "broken"])
def test_a_file_without_a_usable_row_is_an_error(tmp_path, content):
  (tmp_path / "train.jsonl").write_text(content)
  with pytest.raises(ValueError, match=r"train has no usable row") as error:
    task(tmp_path).split("train")
  assert "\n" not in str(error.value)
  assert ("train.jsonl:1: " in str(error.value)) == bool(content.strip())


def test_a_single_file_is_the_split_that_its_name_says(tmp_path):
  write(tmp_path / "test_2024.jsonl", [row(i) for i in range(5)])
  assert len(task(tmp_path / "test_2024.jsonl").split("test")) == 5
  with pytest.raises(ValueError, match="has no train split, only test"):
    task(tmp_path / "test_2024.jsonl").split("train")
  write(tmp_path / "mine.jsonl", [row(i) for i in range(5)])
  assert len(task(tmp_path / "mine.jsonl").split("train")) == 4
  with pytest.raises(ValueError, match=r"has no test split, only train: .*holds a test\.jsonl"):
    task(tmp_path / "mine.jsonl").split("test")
  with pytest.raises(ValueError, match="unknown split 'tests': did you mean 'test'"):
    task(tmp_path / "mine.jsonl").split("tests")


def test_one_question_many_times_leaves_nothing_to_train_on(tmp_path):
  write(tmp_path / "train.jsonl", [row(1)] * 3)
  with pytest.raises(ValueError, match="has one question, 3 times"):
    task(tmp_path).split("train")


def test_one_row_leaves_nothing_to_hold_out(tmp_path):
  write(tmp_path / "train.jsonl", [row(1)])
  with pytest.raises(ValueError, match="has one usable row"):
    task(tmp_path).split("train")


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("missing.jsonl", "missing.jsonl does not exist"),
    ("data/missing.jsonl", "data/missing.jsonl does not exist"),
    ("./org/name", "./org/name does not exist"),
    ("/nowhere/at/all", "/nowhere/at/all does not exist"),
    ("notes.txt", r"notes\.txt: a file must end in \.jsonl, \.json, \.parquet"),
    ("empty", "empty holds no train, validation or test file"),
    ("above", "above/data, which does"),
    ("saved", "write its splits with to_parquet"),
    ("double", "double holds train twice, as train.json and train.jsonl"),
    ("styles", "of which train_socratic.jsonl is no numbered part"),
  ],
)
def test_a_wrong_path_is_an_error_at_once(tmp_path, monkeypatch, path, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "notes.txt").write_text("x")
  (tmp_path / "empty").mkdir()
  for folder in ("double", "styles", "above", "above/data", "saved"):
    (tmp_path / folder).mkdir()
  for name in ("train", "train_socratic"):
    write(tmp_path / "styles" / f"{name}.jsonl", [row(1)])
  write(tmp_path / "above" / "data" / "train-00000-of-00001.jsonl", [row(1)])
  (tmp_path / "saved" / "dataset_dict.json").touch()
  for suffix in ("json", "jsonl"):
    write(tmp_path / "double" / f"train.{suffix}", [row(1)])
  with pytest.raises(ValueError, match=message) as error:
    task(path)
  assert "\n" not in str(error.value)


def test_a_broken_parquet_file_is_one_line(tmp_path):
  (tmp_path / "train.parquet").write_bytes(b"not parquet")
  with pytest.raises(ValueError, match=r"train\.parquet cannot be read") as error:
    task(tmp_path).split("train")
  assert "\n" not in str(error.value)


def hub(monkeypatch, splits):
  """Stands in for the datasets package; returns what it was asked for."""
  asked = []

  def load_dataset(*arguments):
    asked.append(arguments)
    if splits is None:
      raise ConnectionError("no\nnetwork")
    return splits

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  return asked


def test_hub_datasets_are_loaded_when_a_split_is_asked_for(monkeypatch):
  asked = hub(monkeypatch, {"train": [row(i) for i in range(30)], "test": [row(99), {}]})
  loaded = load_task(TaskConfig(name="gsm8k"), seed=0)
  assert not asked
  assert texts(loaded.split("test")) == [row(99)["question"]]
  assert (len(loaded.split("train")), len(loaded.split("validation"))) == (27, 3)
  assert asked == [("openai/gsm8k", "main")]
  assert loaded.skipped == {"openai/gsm8k:main/test": 1}
  assert task("some/data").split("test") and asked[1:] == [("some/data", None)]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
  hub(monkeypatch, None)
  with pytest.raises(ValueError, match=r"some/data: the hub dataset cannot.*no network") as error:
    task("some/data").split("train")
  assert "\n" not in str(error.value)
  hub(monkeypatch, {"everything": []})
  with pytest.raises(ValueError, match="has the splits everything"):
    task("some/data").split("train")


def test_game24_and_countdown_read_files_too(tmp_path):
  write(tmp_path / "train.jsonl", [{"numbers": [3, 3, 8, 8]}, {"numbers": [1, 1, 1, 1]},
                                   {"numbers": [4, 6, 1, 1]}])  # fmt: skip
  game24 = task(tmp_path, "game24")
  problems = [*game24.split("train"), *game24.split("validation")]
  assert sorted(texts(problems)) == ["Numbers: 3 3 8 8.", "Numbers: 4 6 1 1."]
  assert all(game24.grade(p, p.demonstration, finished=True).reward == 1 for p in problems)
  assert game24.skipped == {"train.jsonl": 1}
  write(tmp_path / "test.parquet", [{"nums": [3, 7, 25], "target": 46}])
  countdown = task(tmp_path / "test.parquet", "countdown")
  (problem,) = countdown.split("test")
  assert problem.prompt == "Numbers: 3 7 25. Target: 46." and problem.demonstration is None
  assert countdown.grade(problem, "Answer: 25+3*7", finished=True).reward == 1.0
