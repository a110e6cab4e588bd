"""The one error that users see."""

from collections.abc import Iterator
from contextlib import contextmanager


class MedSteerError(ValueError):
    """Something the user gave does not fit. The message says what was wrong, what was expected and what to do."""

    # ComfyUI shows it before the message, and its name for a pack's modules begins with the path of their folder.
    __module__ = "medsteer_core.errors"


@contextmanager
def needs(package: str, what: str = "scores and pictures need") -> Iterator[None]:
    """Around the import of a package that only `what` (pictures and scores) needs: MedSteerError without it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MedSteerError(
            f"{package} is not installed; {what} it. Install it for the Python that runs ComfyUI: pip install {package}"
        ) from error
