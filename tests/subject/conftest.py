from __future__ import annotations

from pathlib import Path

import pytest

from tests.subject.small import save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model and its tokenizer; tests do not write into it."""
    return save_base(tmp_path_factory.mktemp("base") / "model")
