"""What an error says, in one line: most of those that a library raises have several."""

_LONGEST = 200


def said(error: BaseException) -> str:
  """Its text, cut, or its type where it has none."""
  return " ".join(str(error).split())[:_LONGEST] or type(error).__name__
