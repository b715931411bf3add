"""One data set with one registered model for all tests of this folder: making them takes longer than most tests."""

from __future__ import annotations

import pytest
from tests.serving.parts import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Tests add to its runs; what is there they leave as it is."""
    return make_world(tmp_path_factory.mktemp("serving"))
