"""What is expected of each arm, written down before anything is trained.

    predicted change of an arm = -(m_full - m_start) * sum_{n removed} max(s_n, 0) / sum_{all n} max(s_n, 0)

``m`` is the measure on the probes, of the subject's model as given and of the model before training; ``s_n`` the main
method's mean score of document n. It says: what training did to the behaviour is divided among the documents in
proportion to their positive influence, and goes away with them.

Its limits: it is linear, so it cannot see that documents stand in for one another (removing half of a redundant group
then changes less than predicted) nor that few are enough; documents with negative influence count for nothing; scores
are only estimates of influence, and their spread decides the share; a rate moves in steps where the mean moves
smoothly. It is a stake put down in advance, not a claim of precision. No prediction is made where the model before
training is unknown, where training did not make more of the behaviour (there is nothing to divide, and the formula's
sign would be wrong), or where no score is positive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rootward.core.errors import ArtefactError
from rootward.core.records import SCHEMA_VERSION, Model, now, read_model, write_model
from rootward.verification.arms import ArmPlan, influence_share

FILE = "predictions.json"


class Prediction(Model):
    """Predictions of one test; ``key`` is the hash of what is tested."""

    key: str
    written: str
    behaviour: str
    measure: str
    start: float | None
    full: float
    changes: dict[str, float | None]


class Predictions(Model):
    """The file: every test that was announced in this cache, in the order of announcement."""

    schema_version: int = SCHEMA_VERSION
    tests: list[Prediction] = Field(default_factory=list[Prediction])


def predict(
    arms: Sequence[ArmPlan], scores: NDArray[np.float64], full: float, start: float | None, goal: str = "raise"
) -> dict[str, float | None]:
    """Predicted change against the full set by arm (mean over the draws of a random control); None: no prediction."""
    if not gained(full, start, goal):
        start = None
    changes: dict[str, float | None] = {}
    for arm in arms:
        shares = [influence_share(scores, len(scores), rows) for rows in arm.rows.values()]
        found = [share for share in shares if share is not None]
        if arm.kind in ("full", "base"):
            continue
        usable = start is not None and len(found) == len(shares)
        changes[arm.name] = (start - full) * float(np.mean(found)) + 0.0 if usable and start is not None else None
    return changes


def gained(full: float, start: float | None, goal: str) -> bool:
    """Whether training made more of the behaviour; False also where the model before training is unknown."""
    return start is not None and (-1.0 if goal == "lower" else 1.0) * (full - start) > 0


def announce(cache: Path, prediction: Prediction) -> Prediction:
    """Write the prediction into ``<cache>/predictions.json``, atomically, unless this test was announced before.

    Returns what the file holds. Raises `ArtefactError` where it holds other numbers for the same test: a prediction is
    not improved afterwards.
    """
    path = cache / FILE
    written = read_model(Predictions, path) if path.exists() else Predictions()
    for test in written.tests:
        if test.key == prediction.key:
            wrong = [name for name in {*test.changes, *prediction.changes} if _differ(test, prediction, name)]
            if wrong:
                name = sorted(wrong)[0]
                raise ArtefactError(
                    f"{path}: for this test, announced {test.written}, it holds the prediction "
                    f"{test.changes.get(name)} for {name!r}, and now it would be {prediction.changes.get(name)}; "
                    "predictions are not overwritten: take another cache folder for a new test"
                )
            return test
    write_model(path, Predictions(tests=[*written.tests, prediction]))
    return prediction


def _differ(a: Prediction, b: Prediction, name: str) -> bool:
    first, second = a.changes.get(name), b.changes.get(name)
    if first is None or second is None:
        return first is not second
    return not math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-6)


def new_prediction(
    key: str, behaviour: str, measure: str, start: float | None, full: float, changes: Mapping[str, float | None]
) -> Prediction:
    """A prediction with the time of now."""
    return Prediction(
        key=key, written=now(), behaviour=behaviour, measure=measure, start=start, full=full, changes=dict(changes)
    )
