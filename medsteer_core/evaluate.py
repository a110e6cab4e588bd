"""`score_pairs` and `summarise` under their documented name; they live in `scores.scorer`."""

from .scores.scorer import score_pairs, summarise

__all__ = ["score_pairs", "summarise"]
