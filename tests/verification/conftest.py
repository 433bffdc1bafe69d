"""The tiny language model, trained once for all tests of this folder."""

from pathlib import Path

import pytest

from rootward.subject.subject import Subject
from rootward.verification.subsets import Retrained, draw_subsets, retrain_subsets
from tests.verification import convex, toy


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


@pytest.fixture(scope="session")
def line() -> Subject:
    """Linear regression trained to its minimum."""
    return convex.subject()


@pytest.fixture(scope="session")
def line_truth(line: Subject, tmp_path_factory: pytest.TempPathFactory) -> Retrained:
    """It, retrained on 128 random halves of its documents."""
    cache = tmp_path_factory.mktemp("subsets")
    return retrain_subsets(line, draw_subsets(line, 128), convex.behaviour(), cache=cache)
