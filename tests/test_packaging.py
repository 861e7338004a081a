"""Imports are declared, declarations are locked, and commands explain themselves."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted((ROOT / "spo_jax").rglob("*.py"))
COMMANDS = sorted(
  [p.stem for p in (ROOT / "spo_jax").glob("*.py") if "\nif __name__ ==" in p.read_text()]
  + [p.parent.name for p in (ROOT / "spo_jax").glob("*/__main__.py")]
)

DISTRIBUTION = {"orbax": "orbax-checkpoint", "yaml": "pyyaml"}  # where the import differs
# A GPU machine that trains on generated tasks may lack these.
NEEDED_LATE = {"datasets", "tensorboardx"}


def declared(*extras):
  """{distribution: Requirement} of the dependencies and the named extras."""
  lines = PROJECT["dependencies"] + [
    line for extra in extras for line in PROJECT["optional-dependencies"][extra]
  ]
  return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def locked(name="requirements.txt"):
  """{distribution: version} of a lock."""
  lines = (ROOT / name).read_text().splitlines()
  pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
  for pin in pins:
    assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"not a pin: {pin}"
  return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def imports(path):
  """(distribution, is it inside a function) of each import of another package."""
  tree = ast.parse(path.read_text())
  functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
  late = {id(node) for function in functions for node in ast.walk(function)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      names = [node.module]
    else:
      continue
    for name in {name.split(".")[0] for name in names}:
      if name != "spo_jax" and name not in sys.stdlib_module_names:
        yield canonicalize_name(DISTRIBUTION.get(name, name)), id(node) in late


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_are_declared(path):
  always, optional = declared(), declared(*PROJECT["optional-dependencies"])
  for name, is_late in imports(path):
    if is_late:
      assert name in optional, f"declare {name} in pyproject.toml"
    else:
      assert name in always, f"declare {name} in pyproject.toml, or import it where it is used"
      assert name not in NEEDED_LATE, f"import {name} where it is used"


def test_lock_satisfies_the_ranges():
  pins = locked()
  for name, requirement in declared("test", "lint", "math").items():
    assert name in pins, f"requirements.txt lacks {name}: make lock"
    assert requirement.specifier.contains(pins[name]), f"{requirement} but locked {pins[name]}"


def test_lock_is_the_cpu_set_without_torch():
  assert not [name for name in locked() if name == "torch" or "nvidia" in name or "cuda" in name]


def test_torch_and_libtpu_are_locked_for_tests_alone_and_change_nothing_else():
  parity = locked("requirements-parity.txt")
  assert {"torch": parity["torch"]} == {
    name: str(requirement.specifier).removeprefix("==")
    for name, requirement in declared("parity").items()
    if name == "torch"
  }
  assert "libtpu" in parity and not parity.keys() & locked().keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_help(command):
  run = [sys.executable, "-m", f"spo_jax.{command}", "--help"]
  result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("usage:")
