"""The story of a run in plain words: what was asked, what was found, was it the cause?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rootward.core.records import Arm, Comparison, Interval, MethodResult, RunRecord, Trace, Verdict
from rootward.report.numbers import count, duration, is_share, mean_interval, number, quantity

Badge = Literal[
    "verified by retraining", "measured by retraining", "estimated", "not confirmed", "cannot tell", "too few to decide"
]
FAR = 0.2
"""A baseline whose AUROC is higher by this much does "far better"."""
LOW = 0.25
"""Below this AUROC the planted documents are "at the bottom"."""


@dataclass(frozen=True)
class Part:
    """One question of the story: the figure that a reader remembers, what it is, and the sentences that say it."""

    question: str
    figure: str
    caption: str
    sentences: tuple[str, ...]


def headline(
    record: RunRecord,
    trace: Trace | None = None,
    verdict: Verdict | None = None,
    comparison: Comparison | None = None,
) -> list[str]:
    """The run in a few plain sentences with numbers, in the order of the story.

    Args:
        record: who ran what on which inputs.
        trace: the ranking of documents, if one was made.
        verdict: the retraining that tested it, if it was done.
        comparison: methods held against retraining, if they were.

    Returns:
        Sentences for a terminal or a page: text without markup.
    """
    return [sentence for part in story(record, trace, verdict, comparison) for sentence in part.sentences]


def story(
    record: RunRecord, trace: Trace | None, verdict: Verdict | None, comparison: Comparison | None = None
) -> list[Part]:
    """The three parts that stand at the top of the page; of a run without a trace they are about its comparison."""
    if trace is None and comparison is not None:
        return [_compared(comparison), _best(comparison), _price(comparison, record)]
    return [_asked(record, trace), _found(record, trace), _cause(trace, verdict)]


def badge(verdict: Verdict | None, comparison: Comparison | None = None) -> Badge:
    """How far the run went: a ranking alone is an estimate."""
    if verdict is None and comparison is not None:
        if comparison.recommended is None:
            return "cannot tell"
        return "too few to decide" if comparison.few else "measured by retraining"
    if verdict is None:
        return "estimated"
    return "verified by retraining" if verdict.holds else "not confirmed"


def main_method(trace: Trace) -> MethodResult | None:
    """The result of the method that the run trusts, if it is among the results."""
    return next((result for result in trace.methods if result.method == trace.main_method), None)


def main_arm(verdict: Verdict) -> Arm | None:
    """The retrainings that test the claim."""
    named = [arm for arm in verdict.arms if arm.name == verdict.main]
    return (named or [arm for arm in verdict.arms if arm.kind == "method"] or [None])[0]


def _capital(text: str) -> str:
    """The first letter of a sentence."""
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _compared(found: Comparison) -> Part:
    seeds = f"{len(found.seeds)} seeds each" if len(found.seeds) > 1 else "one seed each"
    said = [
        f"Which of {len(found.methods)} methods finds the training documents that make the model do this: "
        f"{found.behaviour}?"
    ]
    if found.description:
        said.append(_sentence(found.description))
    said.append(
        f"The model was trained again on {count(found.subsets)} random subsets of {count(found.subset_documents)} of "
        f"{count(found.documents)} documents ({seeds}), and measured on {count(found.queries)} queries: "
        f"{found.measurement}."
    )
    return Part("What was asked", count(found.subsets), "retrained subsets", tuple(said))


def _best(found: Comparison) -> Part:
    question = "Which method to take"
    if found.recommended is None:
        return Part(question, "Cannot tell", "nothing beats a random order", (found.summary,))
    if found.few:
        return Part(question, f"Highest so far: {found.recommended}", "too few subsets to decide", (found.summary,))
    return Part(question, found.recommended, "predicts the retrainings best", (found.summary,))


def _price(found: Comparison, record: RunRecord) -> Part:
    trained = duration(found.retraining_seconds)
    said = [f"The retrainings that tell this took {trained} of computing."]
    scoring = [record.timings[one.method] for one in found.methods if one.method in record.timings]
    if len(scoring) == len(found.methods):
        tried = ", with every setting that was tried," if any(len(one.curve) > 1 for one in found.methods) else ""
        said.append(f"Scoring by all {len(scoring)} methods{tried} took {duration(sum(scoring))}.")
    best = next((one for one in found.methods if one.method == found.recommended), None)
    if best is None:
        return Part("What it costs", trained, "of retraining", tuple(said))
    said.insert(0, f"{_capital(best.label)} took {duration(best.cost.seconds)} here.")
    if best.cost.ratio is None:
        return Part("What it costs", duration(best.cost.seconds), "for its scores", tuple(said))
    said.insert(1, "A plain pass is one forward and backward pass over the same documents, as in an epoch of training.")
    return Part("What it costs", f"{number(best.cost.ratio)} ×", "one plain pass over the documents", tuple(said))


def _asked(record: RunRecord, trace: Trace | None) -> Part:
    question = "What was asked"
    documents = record.coverage.documents if record.coverage else None
    figure = count(documents) if documents is not None else "–"
    caption = "training documents" if documents is not None else "number of documents not recorded"
    of = f"{count(documents)} training documents" if documents is not None else "the training documents"
    if trace is None:
        return Part(
            question, figure, caption, (f"This run ({record.kind}) holds no trace yet: no behaviour was asked about.",)
        )
    about = [f"Which of {of} make the model do this: {trace.behaviour}?"]
    if trace.description:
        about.append(_sentence(trace.description))
    queries = f"{len(trace.queries)} {'query' if len(trace.queries) == 1 else 'queries'}"
    about.append(_sentence(f"It is measured as {trace.measurement}, on {queries}"))
    return Part(question, figure, caption, tuple(about))


def _found(record: RunRecord, trace: Trace | None) -> Part:
    question = "What was found"
    main = main_method(trace) if trace else None
    if trace is None or main is None:
        return Part(question, "–", "no ranking", ("No ranking of documents is in this run folder.",))
    cost = duration(main.cost.seconds)
    if main.cost.ratio is not None:
        cost += f", {number(main.cost.ratio)} times one plain pass over the documents"
    if main.auroc is None:
        used = record.coverage.used if record.coverage else None
        scored = f"{count(used)} documents" if used is not None else "every document"
        figure, caption = (
            (count(used), "documents ranked") if used is not None else (duration(main.cost.seconds), "for the ranking")
        )
        said = [f"{_capital(main.label)} gave {scored} a score ({cost})."]
        said.append("No planted truth is known here, so a ranking alone stays an estimate.")
        return Part(question, figure, caption, (*said, *_baseline_sentence(trace, main), *trace.notes))
    said = [
        f"{_capital(main.label)} ({cost}) puts a planted document above another one "
        f"{100 * main.auroc.value:.1f} % of the time"
        f" (95 % interval {100 * main.auroc.low:.1f} to {100 * main.auroc.high:.1f} %; chance is 50 %)."
    ]
    if main.precision_at_planted is not None:
        said.append(
            f"Of as many documents from the top as were planted, {100 * main.precision_at_planted:.0f} % are planted."
        )
    return Part(
        question,
        f"{100 * main.auroc.value:.1f} %",
        "of pairs ranked rightly (AUROC)",
        (*said, *_baseline_sentence(trace, main), *trace.notes),
    )


class Reserve(NamedTuple):
    """Why the main method's ranking is not to be relied on, as it stands beside the baselines."""

    lead: str
    rest: str


def reserve(trace: Trace) -> Reserve | None:
    """The ranking is the wrong way round, or a baseline does better or as well; None: neither is known."""
    main, best = main_method(trace), _best_baseline(trace)
    if main is None:
        return None
    better = ""
    if best is not None and best.auroc and main.auroc and best.auroc.low > main.auroc.high:
        far = "far" if best.auroc.value - main.auroc.value >= FAR else "clearly"
        better = f"{best.label} does {far} better ({100 * best.auroc.value:.1f} %)."
    if main.auroc and main.auroc.high < 0.5:
        place = "at the bottom" if main.auroc.value < LOW else "below the middle"
        return Reserve(f"Ranked the wrong way round: the planted documents are {place}.", better)
    if better:
        return Reserve(better, "On this run its ranking is the one to read.")
    if best is None or not _as_good(main, best):
        return None
    value = f" ({100 * best.auroc.value:.1f} %)" if best.auroc else ""
    return Reserve(f"A baseline does as well: {best.label}{value}.", "The ranking says no more than that.")


def _as_good(main: MethodResult, best: MethodResult) -> bool:
    higher = best.auroc is not None and main.auroc is not None and best.auroc.value >= main.auroc.value
    return higher or main.beats_baselines is False


def _best_baseline(trace: Trace) -> MethodResult | None:
    baselines = [result for result in trace.methods if result.baseline and result.method != trace.main_method]
    return max(baselines, key=lambda result: result.auroc.value if result.auroc else -1.0, default=None)


def _baseline_sentence(trace: Trace, main: MethodResult) -> tuple[str, ...]:
    best, found = _best_baseline(trace), reserve(trace)
    beside = () if best is not None else ("No baseline was run beside it.",)
    if found is not None:
        return (*(words for words in found if words), *beside)
    if best is None:
        return beside
    if best.auroc is not None and main.auroc is not None:
        return (f"The best baseline, {best.label}, reaches {100 * best.auroc.value:.1f} %.",)
    if main.beats_baselines:
        return ("It does better than every baseline beside it.",)
    return ()


def _cause(trace: Trace | None, verdict: Verdict | None) -> Part:
    question = "Was it the cause?"
    if verdict is None:
        said = "No model was trained again without the documents found, so every score on this page is an estimate."
        return Part(question, "Not tested", "no retraining yet", (said,))
    full = next((arm for arm in verdict.arms if arm.kind == "full" and arm.values), None)
    main = main_arm(verdict)
    if full is None or main is None or not main.values:
        answer = "Yes" if verdict.holds else "Not confirmed"
        return Part(question, answer, "see the retrainings below", (_sentence(verdict.summary),))
    before, after = mean_interval(full.values)[0], mean_interval(main.values)[0]
    figure = f"{quantity(before, verdict.unit)} → {quantity(after, verdict.unit)}"
    if is_share(verdict.unit):
        figure = f"{figure.split(' %')[0]} → {quantity(after, verdict.unit)}"
    answer = "Yes." if verdict.holds else "Not confirmed."
    told = [
        f"{answer} Trained again {_change(main)}, the {_measure(verdict)}"
        f" {_moved(before, after, verdict.unit)}{_seeds(main)}."
    ]
    if main.effect is not None:
        told.append(f"Paired by seed the change is {_interval(main.effect, verdict.unit)}.")
    told.extend(_controls(verdict, main))
    if not verdict.holds:
        told.append(
            "The change cannot be told from that of the random controls, so the ranking is not shown to be the cause."
        )
    return Part(question, figure, verdict.measure, tuple(told))


def _controls(verdict: Verdict, main: Arm) -> list[str]:
    told: list[str] = []
    for arm in verdict.arms:
        if arm is main or not arm.values or arm.kind not in ("random", "baseline"):
            continue
        value = quantity(mean_interval(arm.values)[0], verdict.unit)
        word = {"drop": "Without", "keep": "On only", "none": "On"}[arm.action]
        what = (
            f"{word} {count(arm.documents)} random documents"
            if arm.kind == "random"
            else f"For the baseline “{arm.label}”"
        )
        told.append(f"{what} it is {value}.")
    return told


def _change(arm: Arm) -> str:
    word = {"drop": "without", "keep": "on only", "none": "on"}[arm.action]
    return f"{word} the {count(arm.documents)} documents found"


def _measure(verdict: Verdict) -> str:
    return verdict.measure.strip().removeprefix("the ").removeprefix("The ")


def _moved(before: float, after: float, unit: str) -> str:
    word = "fell" if after < before else "rose" if after > before else "stayed"
    if word == "stayed":
        return f"stayed at {quantity(before, unit)}"
    return f"{word} from {quantity(before, unit)} to {quantity(after, unit)}"


def _seeds(arm: Arm) -> str:
    n = len(arm.values)
    return f" (mean of {n} seeds)" if n > 1 else " (one seed, so no interval)"


def _interval(interval: Interval, unit: str) -> str:
    value, low, high = interval.value, interval.low, interval.high
    if is_share(unit):
        return f"{100 * value:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    return f"{value:+.3g} {unit} (95 % interval {low:+.3g} to {high:+.3g})"
