"""What a run takes on a slice of chips, from the compiler and from formulas; no weights needed."""
