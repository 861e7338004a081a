"""Where the answer stands in a response: bounded string work, safe on text of any length."""

import re

# An answer stands at the end, and what is in front of this many characters is not looked at.
TAIL_CHARS = 4000
_BOXES = ("\\boxed", "\\fbox", "\\framebox")
_ANSWER_IS = re.compile(r"answer\s{1,3}is\s{0,3}:?", re.IGNORECASE | re.ASCII)


def last_boxed(response: str) -> str | None:
  r"""What the last `\boxed{...}` holds, None where there is none or it is never closed."""
  tail = response[-TAIL_CHARS:]
  start, box = max((tail.rfind(box), box) for box in _BOXES)
  if start < 0:
    return None
  rest = tail[start + len(box):].lstrip(" ")
  if not rest.startswith("{"):  # TeX also boxes the single token that follows
    return re.split(r"[\s$.,]", rest, maxsplit=1)[0] or None
  depth = i = 0
  while i < len(rest):
    if rest[i] == "\\":
      i += 1  # whatever it escapes is no brace of ours
    elif rest[i] == "{":
      depth += 1
    elif rest[i] == "}":
      depth -= 1
      if not depth:
        return rest[1:i].strip() or None
    i += 1
  return None


def line_behind(response: str, mark: str) -> str | None:
  """The rest of the line behind the last `mark`, None where it stands nowhere."""
  _, found, rest = response[-TAIL_CHARS:].rpartition(mark)
  return rest.partition("\n")[0].strip() if found else None


def line_behind_answer_is(response: str) -> str | None:
  """The rest of the line behind the last "answer is", None where it stands nowhere."""
  tail = response[-TAIL_CHARS:]
  ends = [match.end() for match in _ANSWER_IS.finditer(tail)]
  return tail[ends[-1]:].partition("\n")[0].strip() if ends else None
