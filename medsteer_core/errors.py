"""The one error that users see."""


class MedSteerError(ValueError):
    """Something the user gave does not fit. The message says what was wrong, what was expected and what to do."""
