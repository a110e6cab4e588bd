import pytest

from medsteer_core.errors import MedSteerError


def test_a_medsteer_error_is_a_value_error_with_its_message():
    with pytest.raises(ValueError, match="strength"):
        raise MedSteerError("strength is NaN")
