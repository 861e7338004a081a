"""SPO, Segment Policy Optimization, for JAX and TPUs (arXiv:2505.23564)."""

__version__ = "0.1.0"
