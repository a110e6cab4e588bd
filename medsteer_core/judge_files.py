"""`load_judge` under its documented name; it lives in `judges.files`."""

from .judges.files import load_judge

__all__ = ["load_judge"]
