"""The interpreter as the lane has it."""

from collections.abc import Iterator

import pytest

from trysquare_conformance.interpreter import without_repetition


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    with without_repetition():
        yield
