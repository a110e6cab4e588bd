"""Pairs on disk: their records, files, splits and boxes."""

from .pair_dataset import PairDataset

__all__ = ["PairDataset"]
