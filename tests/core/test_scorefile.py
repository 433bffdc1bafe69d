"""Scores come back from disk as they were, or not at all."""

from pathlib import Path

import numpy as np
import pytest

from rootward.core.errors import ArtefactError
from rootward.core.records import Cost, Coverage
from rootward.core.scorefile import read_scores, write_scores
from rootward.core.scores import Scores

COVERAGE = Coverage(parameters=9, covered=8, documents=3, used=3)


@pytest.mark.parametrize("rows", [(), (4, 0, 7)])
@pytest.mark.parametrize("coverage", [None, COVERAGE])
def test_scores_come_back_bit_for_bit(tmp_path: Path, rows: tuple[int, ...], coverage: Coverage | None):
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    made = Scores(
        values, ("one", "zwölf"), ("a", "b", "a"), "m", "nats", "b", Cost(seconds=1.5, ratio=2.0), coverage, rows,
        ("noted",), "lower",
    )  # fmt: skip
    write_scores(tmp_path / "deep" / "s.parquet", made)
    found = read_scores(tmp_path / "deep" / "s.parquet")
    assert found.values.tobytes() == made.values.tobytes()
    assert {**found.__dict__, "values": 0} == {**made.__dict__, "values": 0}


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "bad").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "foreign")
    for name in ("bad", "foreign", "missing"):
        with pytest.raises(ArtefactError, match=rf"{name} does not hold scores .*remove the file"):
            read_scores(tmp_path / name)
