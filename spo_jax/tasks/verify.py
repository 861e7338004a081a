"""Whether two mathematical answers mean the same. Only worker processes call this on model text."""


def equivalent(gold: str, answer: str) -> bool:
  """What math-verify says of two LaTeX texts; may run for ever, exhaust memory, or crash."""
  from math_verify import LatexExtractionConfig, parse, verify

  settings = [LatexExtractionConfig(boxed_match_priority=0)]
  # Without timeouts of its own: they need signals, and cannot stop a long integer operation.
  wanted, given = (
    parse(f"\\boxed{{{text}}}", settings, parsing_timeout=None) for text in (gold, answer)
  )
  return bool(verify(wanted, given, timeout_seconds=None))
