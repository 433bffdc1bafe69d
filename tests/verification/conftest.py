"""The tiny language model, trained once for all tests of this folder."""

from pathlib import Path

import pytest

from rootward.subject.subject import Subject
from tests.verification import toy


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``base`` and ``trained``; read only."""
    folder = tmp_path_factory.mktemp("toy world")  # with a space, as people have them
    toy.trained(folder)
    return folder


@pytest.fixture
def subject(world: Path) -> Subject:
    """The language model that Rootward trained."""
    return Subject.load(world / "trained", toy.rows())
