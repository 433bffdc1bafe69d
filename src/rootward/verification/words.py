"""A verdict in words: the summary, the measure and what has to be said beside the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rootward.core.records import Arm, ComparedMethod, Interval
from rootward.core.registry import Method, MethodConfig
from rootward.subject.behaviour import Behaviour
from rootward.subject.subject import Subject
from rootward.verification.predictions import Prediction, gained
from rootward.verification.stats import interval, spearman

OPPOSITE = -0.5
"""At most this correlation over methods, and of at least `LEAST_ORDERED` methods, is called the opposite order."""
LEAST_ORDERED = 4


def measure_text(measure: str, probes: Behaviour) -> str:
    """What a value is, in words."""
    if measure == "rate":
        return "share of probes where the wanted answer is likelier than the unwanted one"
    if probes.kind == "contrast":
        return "mean log p(wanted) - log p(unwanted)"
    return "mean loss of the wanted answers" if probes.kind == "loss" else "mean value of the probes"


def quantity(value: float, unit: str) -> str:
    """0.412 of unit "share" is "41.2 %"."""
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3g} {unit}"


def change(found: Interval, unit: str) -> str:
    """A change with its interval: "-38.2 points, 95 % interval -41.0 to -35.4"."""
    share = unit == "share"
    scale, form, name = (100, "+.1f", "points") if share else (1, "+.3g", unit)
    numbers = (found.value, found.low, found.high)
    value, low, high = (format(scale * number, form).replace("-", "\u2212") for number in numbers)
    if found.n < 2:
        return f"{value} {name}, one seed, so no interval"
    return f"{value} {name}, 95 % interval {low} to {high}"


def summary(name: str, arms: Sequence[Arm], main: Arm, control: Arm, unit: str, total: int, holds: bool) -> str:
    """One plain sentence with the numbers."""
    full = next(arm for arm in arms if arm.kind == "full")
    before, after, beside = (interval(arm.values).value for arm in (full, main, control))
    only = main.action == "keep"
    verb = "fell" if after < before else "rose"
    moved = f"{verb} from {quantity(before, unit)} to {quantity(after, unit)}"
    if before == after:
        moved = f"stayed at {quantity(after, unit)}"
    what = "rate of " if unit == "share" else "mean of "
    cut = f"; {100 * main.cut.value:.0f} % of it went away" if main.cut is not None and main.cut.value > 0 else ""
    n = len(main.values)
    seeds = f"{n} seeds" if n > 1 else "one seed"
    effect = change(main.effect, unit) if main.effect is not None else ""
    how = ("on " if only else "") + main.label[0].lower() + main.label[1:]
    verdict = "so they are a cause" if holds else "so they are not shown to be the cause"
    return (
        f"Trained again {how} of {total:,}, the {what}“{name}” {moved} over {seeds} ({effect}{cut}), and "
        f"{'on only' if only else 'without'} {control.documents:,} random documents it was "
        f"{quantity(beside, unit)}, {verdict}."
    )


def seed_notes(seeds: int) -> list[str]:
    """What few seeds mean."""
    if seeds == 1:
        return ["One seed gives no interval, so nothing can be told from chance and the verdict cannot hold."]
    if seeds == 2:
        return ["Two seeds give very wide intervals (t with 1 degree of freedom); look at the values of each seed."]
    wide = "; with few seeds they are wide, so look at the values of each seed too" if seeds < 6 else ""
    return [f"Intervals are over {seeds} seeds of training, on the same probes{wide}."]


def repeat_notes(subject: Subject, results: Any) -> list[str]:
    """Whether the full set's retraining gave the subject's own model back."""
    record = subject.record
    if record is None or record.documents_hash != subject.documents.hash or ("full", record.recipe.seed) not in results:
        return []
    if results["full", record.recipe.seed].final_hash == record.final_hash:
        return ["Retraining on the full set with the recorded seed gave the same model back, bit for bit."]
    return [
        "Retraining on the full set with the recorded seed gave another model than the recorded one: another machine "
        "or other versions than it was trained with, or weights that were changed since."
    ]


def command_notes(subject: Subject) -> list[str]:
    """What a command that takes no seed means; nothing where there is none or it takes one."""
    if subject.retrain_command is None or "{seed}" in subject.retrain_command:
        return []
    return [
        "The retrain command takes no {seed}, so every repetition would be the same and only one is made; "
        "without repetitions there is no interval and the verdict cannot hold."
    ]


def arm_notes(arms: Sequence[Arm], full: Sequence[float], prediction: Prediction, probes: Behaviour) -> list[str]:
    """What is missing from the arms and why."""
    notes: list[str] = []
    if all(arm.kind != "base" for arm in arms):
        notes.append("The model before training is not known, so there is no prediction and no value of it.")
    elif prediction.start is not None and not gained(prediction.full, prediction.start, probes.goal):
        notes.append(
            f"Training did not make more of the behaviour ({prediction.start:.4g} before, {prediction.full:.4g} after, "
            f"and {'less' if probes.goal == 'lower' else 'more'} is more of it), so there is nothing to divide among "
            "the documents and no prediction."
        )
    elif all(arm.predicted is None for arm in arms):
        notes.append("No document has a score towards the behaviour, so there is no prediction.")
    if any(value <= 0 for value in full):
        notes.append("The full set's value is not above 0 for every seed, so no share of it can be said to have gone.")
    return notes


def final_weights_notes(subject: Subject, chosen: Mapping[str, tuple[Method, MethodConfig]]) -> list[str]:
    """That the main method took gradients at the final weights only, where the training kept checkpoints.

    Args:
        subject: knows its checkpoints.
        chosen: the methods asked for with their configs, the main one first.
    """
    kept = len(subject.checkpoints)
    main, *others = chosen
    if not kept or "gradients" not in chosen[main][0].card.needs or _during_training(*chosen[main]):
        return []
    during = [name for name in others if _during_training(*chosen[name])]
    beside = f"{' or '.join(during)}, also in this run" if during else "--method tracin_cp or ekfac_checkpoints"
    return [
        f"{main} looks at the final weights only, and {kept} checkpoint{'s were' if kept > 1 else ' was'} kept: what a "
        f"document taught is often learnt by the end, and then hardly shows there; compare with {beside}."
    ]


def _during_training(method: Method, config: MethodConfig) -> bool:
    """Whether it looks at other weights than the final ones."""
    default = "all" if "training" in method.card.needs else "final"
    return getattr(config, "checkpoints", default) != "final"


def opposite_notes(methods: Sequence[ComparedMethod]) -> list[str]:
    """That LDS and tail patch order the methods oppositely, where they do, and which one the recommendation is by."""
    both = [(one.lds.value, one.tail_patch_beyond_random.value) for one in methods if one.tail_patch_beyond_random]
    if len(both) < LEAST_ORDERED:
        return []
    found = spearman(*zip(*both, strict=True))
    if found is None or found > OPPOSITE:
        return []
    return [
        f"LDS and tail patch order the {len(both)} methods oppositely (Spearman \u2212{-found:.2f}): what a document "
        "did in training is not what one more step on it does to the final model. The recommendation is by LDS."
    ]
