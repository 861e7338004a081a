"""The house is as docs/architecture.md draws it: imports only point down, files stay short."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spo_jax"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# A room imports rooms of lower levels only, and none of its own.
LEVELS = {
  0: "structs config errors tensorboard",
  1: "segments advantages losses sharding distributed layout compiles tasks tokenizer stops "
  "metrics runlog flash_decode",
  2: "attention head packs prompts queues",
  3: "model",
  4: "sampler hf",
  5: "rollouts packing checkpoint update",
  6: "validation report compare grade",
  7: "experiment",
  8: "algorithms warm_start",
  9: "run",
  10: "train sources",
  11: "evaluate sft plan",
}
LEVEL = {room: level for level, rooms in LEVELS.items() for room in rooms.split()}

MAX_LINES = 450
LONG_FILES = {  # path: why it may be longer
  "tests/test_evaluate.py": "every refusal, kill moment and source of one command line",
  "tests/test_advantages.py": "numpy twins, hand numbers and exact values of every estimator",
  "tests/test_losses.py": "the same for every loss",
  "tests/test_update.py": "every option of one update against a loss written anew",
}

# Paths of one machine, and names of package registries, which differ from place to place.
NOT_IN_THE_HOUSE = re.compile(
  r"(?<![\w.~$}-])/(?:work|root|home|Users|opt/wheels|opt/pypi)/[\w.]"
  r"|pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian|index[-]url"
)


def room_of(module):
  """`tasks/arithmetic.py` is in the room tasks, `model.py` in model."""
  return module.split("/")[0].removesuffix(".py")


def imported_rooms(module):
  """(line, room) of every import of spo_jax in a file, inside functions too."""
  package = ("spo_jax", *module.split("/")[:-1])
  for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      names = [".".join((*base, *filter(None, [node.module]), a.name)) for a in node.names]
    else:
      continue
    for name in names:
      parts = name.split(".")
      if parts[0] == "spo_jax" and len(parts) > 1:
        yield node.lineno, parts[1]


def house_files():
  """What git tracks or would track; without git, everything but hidden folders and outputs."""
  command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  try:
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    listed = ""
  if listed:
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
  files = []
  for folder, subfolders, names in os.walk(ROOT):
    hidden = {name for name in subfolders if name.startswith(".") and name != ".ci"}
    subfolders[:] = sorted(set(subfolders) - hidden - {"runs", "build", "dist", "__pycache__"})
    files += [Path(folder, name) for name in names]
  return files


def test_every_module_has_a_level():
  homeless = {room_of(module) for module in MODULES} - set(LEVEL) - {"__init__"}
  assert not homeless, f"add {sorted(homeless)} to LEVELS here and to docs/architecture.md"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_point_down(module):
  room = room_of(module)
  here = LEVEL.get(room, -1)  # spo_jax/__init__.py imports no room
  wrong = [
    f"spo_jax/{module}:{line} (level {here}) imports {other} (level {LEVEL[other]})"
    for line, other in imported_rooms(module)
    if other in LEVEL and other != room and LEVEL[other] >= here
  ]
  assert not wrong, "\n".join(wrong)


def test_rooms_table_of_the_docs_agrees():
  text = (ROOT / "docs" / "architecture.md").read_text()
  table = {name: int(level) for level, name in re.findall(r"^\| (\d+) \| `([^`]+)` \|", text, re.M)}
  rooms = {f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py": LEVEL[room] for room in LEVEL}
  built = {module.split("/")[0] + "/" * module.count("/") for module in MODULES} - {"__init__.py"}
  missing = {name: rooms.get(name) for name in built if table.get(name) != rooms.get(name)}
  assert not missing, f"docs/architecture.md: rooms table lacks or misplaces {missing}"
  assert not (gone := set(table) - built), f"docs/architecture.md: there is no {sorted(gone)}"


def test_files_are_short():
  lengths = {
    path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
    for path in house_files()
    if path.suffix == ".py"
  }
  long = {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONG_FILES}
  assert not long, f"split it, or give LONG_FILES its reason: {long}"


def test_no_machine_path_or_registry_host():
  found = []
  for path in house_files():
    try:
      text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
      continue  # a picture
    found += [
      f"{path.relative_to(ROOT)}:{number}: {match.group()}"
      for number, line in enumerate(text.splitlines(), 1)
      if (match := NOT_IN_THE_HOUSE.search(line))
    ]
  assert not found, "\n".join(found)
