"""Problems from files or from the hub: which rows are a split, which are skipped and why."""

import dataclasses
import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spo_jax.errors import said
from spo_jax.tasks.base import SPLITS, Problem, Task, unknown_name

SUFFIXES = (".jsonl", ".json", ".parquet")
# Without validation data this many of train are held out, and at most a tenth of it.
VALIDATION_ROWS = 500
MAX_INTEGERS = 8  # of one question
_NAMED_ROWS = 5  # skipped rows of a task that are kept with their reason

_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_SHARD = re.compile(r"[a-z]+(?:[-_.]?\d+(?:[-_]of[-_]\d+)?)?", re.IGNORECASE)
_BLANK = object()  # a line without a row
_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Dataset:
  """The splits of a task's data.

  `path` is a .jsonl, .json or .parquet file; a folder with files called train*, validation* (or
  val*, dev*) and test*; or a hub dataset, `owner/name` or `owner/name:config`. A file whose name
  says no split is train. Without validation data, validation are the train questions with the
  smallest hashes, and train is the rest: the same rows in whatever order the file has them.

  Args:
    task: makes problems of rows, and hears in `skipped` of those that it cannot use.
    path: what `task.path` says, or the task's own default; None where there is no data, only
      files to grade.
  Raises: ValueError where there is no such file or folder.
  """

  def __init__(self, task: Task, path: str | None):
    self._task, self._path = task, path
    self._sources = {} if path is None else _find_files(path)
    self._splits: dict[str, Sequence[Problem]] = {}

  def split(self, name: str) -> Sequence[Problem]:
    """The problems of a split, read at the first call.

    Raises: ValueError for an unknown name, a split that the data lacks, or one without a usable
      row.
    """
    if name not in SPLITS:
      raise unknown_name("split", name, SPLITS)
    if name not in self._splits:
      self._read(name)
    return self._splits[name]

  def _read(self, name: str) -> None:
    if self._path is None:
      raise ValueError(f"task.name={self._task.name} has no data of its own: set task.path to a "
                       "file, a folder or a hub dataset")  # fmt: skip
    if self._sources is None:
      self._sources = _load_hub(self._path)
    if name in self._sources and (name != "train" or "validation" in self._sources):
      self._splits[name] = self._usable(name, self._sources[name]())
    elif name != "test" and "train" in self._sources:
      train = self._usable("train", self._sources["train"]())
      self._splits["train"], self._splits["validation"] = self._hold_out(train)
    else:
      raise ValueError(f"task.path={self._path} has no {name} split, only "
                       f"{', '.join(self._sources)}: name a folder in task.path that holds a "
                       f"{name}.jsonl too")  # fmt: skip

  def _hold_out(self, problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Train and validation."""
    if len(problems) < 2:
      raise ValueError(f"task.path={self._path} has one usable row: of two or more, one is held "
                       "out for validation. Add rows, or a validation.jsonl")  # fmt: skip
    count = min(VALIDATION_ROWS, max(1, len(problems) // 10))
    hashes = [_hash(problem.identity) for problem in problems]
    # By that alone, so that a question that stands there twice is on one side only.
    last = heapq.nsmallest(count, hashes)[-1]
    train = [problem for problem, digest in zip(problems, hashes) if digest > last]
    if not train:
      raise ValueError(f"task.path={self._path} has one question, {len(problems)} times, which is "
                       "held out for validation. Add others, or a validation.jsonl")  # fmt: skip
    return train, [problem for problem, digest in zip(problems, hashes) if digest <= last]

  def _usable(self, split: str, rows: Iterable[tuple[str, Any]]) -> list[Problem]:
    """Problems of the rows that make one; the others are skipped and counted."""
    field = self._task.question_field
    problems: list[Problem] = []
    skipped: list[str] = []
    seen: dict[str, int] = {}
    for place, row in rows:
      try:
        if isinstance(row, Exception):
          raise ValueError(row)
        if not isinstance(row, dict):
          raise ValueError(f"a {type(row).__name__}, not an object with fields")
        if field is not None:
          text_field(row, field)
        problem = self._task.from_record(row, 0)
        nth = seen[problem.prompt] = seen.get(problem.prompt, 0) + 1
        uid = _hash(f"{split}\0{nth}\0{problem.prompt}")
        problems.append(dataclasses.replace(problem, uid=uid))
      except ValueError as error:
        skipped.append(f"{place}: {said(error)}")
        file = place.rpartition(":")[0]
        self._task.skipped[file] = self._task.skipped.get(file, 0) + 1
    if not problems:
      raise ValueError(f"task.path={self._path}: {split} has no usable row, {len(skipped)} skipped"
                       f"{''.join(f'; {reason}' for reason in skipped[:1])}")  # fmt: skip
    self._task.skipped_rows += skipped[:_NAMED_ROWS - len(self._task.skipped_rows)]
    return problems


def text_field(record: Mapping[str, Any], key: str) -> str:
  """The text, or the number as text, of a field.

  Raises: ValueError naming a field that is missing, empty or neither.
  """
  value = record.get(key)
  if value is None:
    raise ValueError(f"field {key!r} is missing")
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise ValueError(f"field {key!r} is a {type(value).__name__}, not text")
  if not (text := str(value)).strip():
    raise ValueError(f"field {key!r} is empty")
  return text


def integers_field(record: Mapping[str, Any], key: str) -> tuple[int, ...]:
  """The positive integers of a list, or of a text that has spaces between them.

  Raises: ValueError naming a field that is missing or holds anything else.
  """
  value = record.get(key)
  if value is None:
    raise ValueError(f"field {key!r} is missing")
  if isinstance(value, str):
    words = value.split()
    value = [int(w) for w in words if w.isascii() and w.isdigit() and len(w) <= 9]
    if len(value) != len(words):
      raise ValueError(f"field {key!r} is {' '.join(words)[:40]!r}, not integers with spaces "
                       "between them")  # fmt: skip
  if not isinstance(value, list) or not 1 <= len(value) <= MAX_INTEGERS:
    raise ValueError(f"field {key!r} must be a list of 1 to {MAX_INTEGERS} integers")
  if not all(type(item) is int and 0 < item < 10**9 for item in value):
    raise ValueError(f"field {key!r} holds something that is no integer in 1..999999999")
  return tuple(value)


def parse_json(line: bytes) -> Any:
  """What a line of JSON says, or the ValueError that tells why it says nothing."""
  try:
    return json.loads(line)
  except RecursionError:
    return ValueError("too deeply nested JSON")
  except ValueError as error:  # UnicodeDecodeError and integers beyond all bounds are ValueErrors
    return ValueError(f"not JSON ({error})")


def _hash(text: str) -> int:
  """62 bits of it, so that arrays can hold it as i64."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def _split_name(name: str) -> str | None:
  match = _SPLIT_NAME.match(name)
  return match and _ALIASES.get(match[1].lower(), match[1].lower())


_Rows = Callable[[], Iterator[tuple[str, Any]]]  # (file:line, row, or why it cannot be read)


def _find_files(path: str) -> dict[str, _Rows] | None:
  """split -> what reads its files, in order; None for a hub name."""
  place = Path(path).expanduser()
  if place.is_file():
    if place.suffix not in SUFFIXES:
      raise ValueError(f"task.path={path}: a file must end in {', '.join(SUFFIXES)}")
    return {_split_name(place.stem) or "train": partial(_file_rows, [place])}
  if place.is_dir():
    files: dict[str, list[Path]] = {}
    for file in sorted(place.iterdir()):
      if file.suffix in SUFFIXES and (split := _split_name(file.stem)):
        files.setdefault(split, []).append(file)
    if not files:
      raise ValueError(f"task.path={path} holds no train, validation or test file that ends in "
                       f"{', '.join(SUFFIXES)}{_where_else(place)}")  # fmt: skip
    for split, found in files.items():
      if len({file.suffix for file in found}) > 1:
        raise ValueError(f"task.path={path} holds {split} twice, as {found[0].name} and "
                         f"{found[-1].name}: keep one format")  # fmt: skip
      if len(found) > 1 and (odd := [file for file in found if not _SHARD.fullmatch(file.stem)]):
        raise ValueError(f"task.path={path} holds {split} as {found[0].name} and {found[-1].name}, "
                         f"of which {odd[0].name} is no numbered part: keep one")  # fmt: skip
    return {split: partial(_file_rows, found) for split, found in files.items()}
  if _HUB_NAME.fullmatch(path) and place.suffix not in SUFFIXES and path[0] not in "./~":
    return None
  raise ValueError(f"task.path={path} does not exist: name a file, a folder or a hub dataset "
                   "(owner/name)")  # fmt: skip


def _where_else(folder: Path) -> str:
  """What to do where a folder has no files of splits, as far as it can be told."""
  for file in sorted(folder.glob("*/*")):
    if file.suffix in SUFFIXES and _split_name(file.stem):
      return f". Name {file.parent}, which does"
  if any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
    return ". It was made by save_to_disk: write its splits with to_parquet"
  return ""


def _file_rows(files: list[Path]) -> Iterator[tuple[str, Any]]:
  for file in files:
    try:
      if file.suffix == ".parquet":
        import pyarrow.parquet

        rows: Iterable[Any] = pyarrow.parquet.read_table(file).to_pylist()
      else:
        rows = _json_rows(file)
      for number, row in enumerate(rows, 1):
        if row is not _BLANK:
          yield f"{file.name}:{number}", row
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
      raise ValueError(f"{file} cannot be read ({said(error)}): replace it") from error


def _json_rows(file: Path) -> Iterator[Any]:
  """One row per line, or those of the one array that a .json file may hold."""
  with file.open("rb") as lines:
    if file.suffix == ".json" and lines.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
      lines.seek(0)
      rows = parse_json(lines.read())
      yield from [rows] if isinstance(rows, ValueError) else rows
      return
    lines.seek(0)
    for line in lines:
      yield parse_json(line) if line.strip() else _BLANK


def _load_hub(path: str) -> dict[str, _Rows]:
  """split -> what reads its rows, of a hub dataset."""
  name, _, config = path.partition(":")
  try:
    import datasets

    loaded = datasets.load_dataset(name, config or None)
  except Exception as error:  # the hub, the network and the builder raise many kinds
    raise ValueError(f"task.path={path}: the hub dataset cannot be loaded ({said(error)}): check "
                     "name and network, or name a local file or folder") from error  # fmt: skip
  splits: dict[str, _Rows] = {
    split: partial(_hub_rows, rows, f"{path}/{split}")
    for key, rows in loaded.items() if (split := _split_name(str(key)))
  }  # fmt: skip
  if not splits:
    raise ValueError(f"task.path={path} has the splits {', '.join(map(str, loaded))}: none is "
                     "train, validation or test")  # fmt: skip
  return splits


def _hub_rows(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
  for number, row in enumerate(rows, 1):
    yield f"{name}:{number}", row
