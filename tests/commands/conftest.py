"""What the tests of the encode command share."""

import pytest

from tests.support import encoded_digits


@pytest.fixture(scope="session")
def digits_folder():
    """The first digits as PNG files."""
    return encoded_digits.digits_folder()


@pytest.fixture(scope="session")
def expected():
    """Their codes and labels."""
    return encoded_digits.digits_codes()
