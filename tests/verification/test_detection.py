"""Detection of known documents: perfect, reversed, by chance."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rootward.core.errors import InputError
from rootward.core.records import read_model, write_model
from rootward.core.scores import Scores
from rootward.verification.detection import Detection, detect

IDS = tuple(f"d{n}" for n in range(60))
KNOWN = IDS[:6]


def scores(values: np.ndarray, ids: tuple[str, ...] = IDS) -> Scores:
    return Scores(values.reshape(1, -1).astype(np.float32), ("all",), ids, "m", "1")


def test_a_perfect_ranking_a_reversed_one_and_a_random_one(tmp_path: Path) -> None:
    values = np.arange(60, 0, -1.0)
    perfect = detect(scores(values), KNOWN, counts=(3, 6, 12))
    assert (perfect.auroc.value, perfect.average_precision) == (1, pytest.approx(1))
    assert perfect.precision == {3: 1.0, 6: 1.0, 12: 0.5}
    assert perfect.chance == pytest.approx(0.1)
    assert perfect.null.low < 0.5 < perfect.null.high < 1
    reverse = detect(scores(-values), KNOWN)
    assert (reverse.auroc.value, reverse.precision) == (0, {6: 0.0})
    random = detect(scores(np.random.default_rng(0).normal(size=60)), KNOWN)
    assert random.auroc.low < 0.5 < random.auroc.high
    write_model(tmp_path / "detection.json", perfect)
    assert read_model(Detection, tmp_path / "detection.json") == perfect


def test_it_is_the_share_of_pairs_in_the_right_order() -> None:
    values = np.random.default_rng(1).integers(0, 9, size=60).astype(float)
    values[:6] += 2
    pairs = [(a > b) + 0.5 * (a == b) for a in values[:6] for b in values[6:]]
    assert detect(scores(values), KNOWN).auroc.value == pytest.approx(np.mean(pairs))


def test_the_order_of_documents_changes_nothing_and_copies_all_count() -> None:
    values, order = np.random.default_rng(2).normal(size=60), np.random.default_rng(3).permutation(60)
    turned = scores(values[order], tuple(IDS[n] for n in order))
    assert detect(turned, reversed_known()).auroc.value == detect(scores(values), KNOWN).auroc.value
    copies = scores(np.append(values, values[0]), (*IDS, IDS[0]))
    assert detect(copies, KNOWN).known == 7


def reversed_known() -> list[str]:
    return list(reversed(KNOWN))


def test_the_top_of_a_goal_of_less_is_the_other_end() -> None:
    values = np.arange(60, 0, -1.0)
    assert detect(replace(scores(-values), goal="lower"), KNOWN).auroc.value == 1


def test_what_cannot_be_done_is_refused() -> None:
    table = scores(np.arange(60.0))
    with pytest.raises(InputError, match="no score for 1 of 2 known ids, first 'unknown'"):
        detect(table, ["d1", "unknown"])
    with pytest.raises(InputError, match="documents of both kinds"):
        detect(table, [])
    with pytest.raises(InputError, match="documents of both kinds"):
        detect(table, IDS)
    with pytest.raises(InputError, match="1 to 60 documents, got 61"):
        detect(table, KNOWN, counts=(61,))
    with pytest.raises(InputError, match="got a text"):
        detect(table, "d1")
