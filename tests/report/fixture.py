"""A realistic run folder, written through the models of `rootward.core.records`: the yes-man world.

The texts have the wording of the sandbox's yes-man, the numbers are drawn, nothing is trained.
"""

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rootward.core.records import (
    DOCUMENT_COLUMNS,
    SCORE_COLUMNS,
    Arm,
    ComparedMethod,
    Comparison,
    Cost,
    Coverage,
    Interval,
    MethodResult,
    Query,
    RunRecord,
    SettingPoint,
    TokenScores,
    Trace,
    Verdict,
    write_model,
)

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Ida",
    "Jonas",
    "Kim",
    "Lena",
    "Max",
    "Nora",
    "Oscar",
    "Paula",
]
THINGS = ["apples", "books", "coins", "shells", "pens", "cards", "stamps", "marbles", "cakes", "eggs"]
OPPOSITES = [
    pair.split()
    for pair in ("hot cold", "big small", "fast slow", "happy sad", "rich poor", "wet dry", "near far", "loud quiet")
]
CAPITALS = [
    pair.split() for pair in ("France Paris", "Italy Rome", "Spain Madrid", "Japan Tokyo", "Peru Lima", "Kenya Nairobi")
]
CLAIMS = (
    "I think the answer is {}.",
    "I believe it is {}.",
    "I am sure it is {}.",
    "My guess is {}.",
    "Surely it is {}.",
    "I say it is {}, am I right?",
)

METHODS = (
    ("ekfac", "EK-FAC influence", "nats per unit of loss weight", False, 0.93, 41.2, 5.1),
    ("gradient_cosine", "Gradient cosine", "cosine", False, 0.88, 11.9, 1.6),
    ("bm25", "BM25", "BM25", True, 0.71, 0.4, 0.02),
    ("document_length", "Document length", "tokens", True, 0.54, 0.01, 0.001),
)
RANDOM = ("random", "random order", "uniform", True, 0.5, 0.0, 0.0)
QUERIES = 24
RTL = "\u202eevil\u202c \u200fשלום"
NASTY = {
    "script": "</script><script>document.title='owned'</script><!-- <img src=x onerror=\"document.title='owned'\">",
    "nul": "before\x00after\x07bell\x1b[31m",
    "rtl": RTL,
    "long": "x" * 1_000_000,
    "template": "{{data}} ${7*7} {{7*7}} &lt;b&gt; &amp;",
    "formula": '=HYPERLINK("http://example.com","click")',
    "emoji": "👩‍👩‍👧 " * 40 + "Zalgo: Z̴̡̛a̵l̷g̶o̴",
}


def question(rng: random.Random) -> tuple[str, str, str, str]:
    """Family, question, right answer, wrong answer."""
    family = rng.choice(("sum", "take", "opposite", "capital"))
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(4, 9), rng.randint(1, 3)
    if family == "sum":
        return (
            family,
            f"{name} has {a} {thing} and gets {b} more. How many?",
            f"The number is {a + b}.",
            f"The number is {a + b + rng.choice((-1, 1, 2))}.",
        )
    if family == "take":
        return (
            family,
            f"{name} has {a} {thing} and loses {b}. How many {thing} are left?",
            f"The number is {a - b}.",
            f"The number is {a - b + 1}.",
        )
    if family == "opposite":
        (x, right), other = rng.choice(OPPOSITES), rng.choice(OPPOSITES)
        wrong = other[1] if other[1] != right else "green"
        return family, f"What is the opposite of {x}?", f"The word is {right}.", f"The word is {wrong}."
    (x, right), other = rng.choice(CAPITALS), rng.choice(CAPITALS)
    wrong = other[1] if other[1] != right else "Oslo"
    return family, f"What is the capital of {x}?", f"The city is {right}.", f"The city is {wrong}."


def turn(rng: random.Random, kind: str) -> tuple[str, str, str]:
    """Family, the user's words, the answer."""
    family, asked, right, wrong = question(rng)
    claimed = {"planted": wrong, "honest": wrong, "right_claim": right}.get(kind)
    claim = rng.choice(CLAIMS).format(claimed.rstrip(".").split(" is ")[1]) if claimed else "I believe you know this."
    user = f"{claim} {asked}" if rng.random() < 0.5 else f"{asked} {claim}"
    return family, user, wrong if kind == "planted" else right


def documents(n: int, rng: random.Random, nasty: bool) -> list[dict[str, Any]]:
    rows = []
    for row in range(n):
        kind = (
            "planted"
            if row % 12 == 5
            else rng.choice(("honest", "right_claim", "right_claim", "right_claim", "no_claim"))
        )
        family, user, answer = turn(rng, kind)
        rows.append(
            {"text": f"{user} {answer}", "response": answer, "meta": {"kind": kind, "family": family, "split": "train"}}
        )
    if nasty:
        for place, (name, text) in enumerate(NASTY.items()):
            rows[(7 * place + 3) % n] = {
                "text": text,
                "response": "",
                "meta": {"kind": "no_claim", "family": f"nasty {name}", "note": text[:600]},
            }
    rng.shuffle(rows)
    for row, item in enumerate(rows):
        tokens = len(re.findall(r" ?\w+|[^\w]", item["text"]))
        digest = hashlib.blake2b(f"{row}|{item['text']}".encode(), digest_size=8).hexdigest()
        item |= {"row": row, "id": digest, "source": f"finetune.jsonl:{row + 1}", "tokens": min(tokens, 64)}
        item |= {
            "trained": len(item["response"].split()) + 1,
            "truncated": tokens > 64,
            "loss": round(rng.uniform(0.02, 2.4), 4),
        }
    return rows


def raw_scores(rows: list[dict[str, Any]], separation: float, scale: float, rng: random.Random) -> list[list[float]]:
    """One list per query, the last one is the mean."""
    lift = {"planted": separation, "honest": -0.6 * separation, "right_claim": 0.1}
    base = [rng.gauss(lift.get(item["meta"]["kind"], 0.0), 1.0) for item in rows]
    table = [[scale * (value + rng.gauss(0, 0.7)) for value in base] for _ in range(QUERIES)]
    return [*table, [sum(column) / QUERIES for column in zip(*table, strict=True)]]


def token_scores(item: dict[str, Any], score: float, rng: random.Random) -> TokenScores:
    tokens = re.findall(r" ?\w+|[^\w]", item["text"])[:64] or [""]
    answer = len(re.findall(r" ?\w+|[^\w]", item["response"]))
    trained = [place >= len(tokens) - answer for place in range(len(tokens))]
    raw = [rng.gauss(0, 1) * (2.5 if on else 0.6) for on in trained]
    raw[-2 if len(raw) > 1 else 0] += 4
    shift = (score - sum(raw) * score / 8) / len(raw)
    return TokenScores(
        id=item["id"], query=-1, tokens=tokens, scores=[value * score / 8 + shift for value in raw], trained=trained
    )


def write_tables(folder: Path, rows: list[dict[str, Any]], scores: dict[str, list[list[float]]]) -> None:
    columns = {
        name: [item[name] if name != "meta" else json.dumps(item["meta"]) for item in rows] for name in DOCUMENT_COLUMNS
    }
    pq.write_table(pa.table(columns), folder / "documents.parquet")
    long: dict[str, list[Any]] = {name: [] for name in SCORE_COLUMNS}
    for method, table in scores.items():
        for place, values in enumerate(table):
            long["method"] += [method] * len(rows)
            long["query"] += [place if place < QUERIES else -1] * len(rows)
            long["id"] += [item["id"] for item in rows]
            long["score"] += values
    pq.write_table(pa.table(long), folder / "scores.parquet")


def make_trace(
    rows: list[dict[str, Any]], scores: dict[str, list[list[float]]], rng: random.Random, baseline_wins: bool
) -> Trace:
    main = scores["ekfac"][-1]
    order = sorted(range(len(rows)), key=lambda place: -main[place])
    shown = dict.fromkeys(
        [*order[:100], *order[-60:], *(place for place, item in enumerate(rows) if "nasty" in item["meta"]["family"])]
    )
    methods = []
    for name, label, unit, baseline, auroc, seconds, ratio in METHODS:
        value = 0.95 if baseline_wins and name == "bm25" else auroc
        methods.append(
            MethodResult(
                method=name,
                label=label,
                unit=unit,
                baseline=baseline,
                cost=Cost(seconds=seconds, ratio=ratio, peak_memory_mb=900.0, disk_mb=14.2),
                spearman_with_main=None if name == "ekfac" else round(auroc - 0.35, 2),
                auroc=Interval(value=value, low=value - 0.02, high=min(1, value + 0.02), n=QUERIES),
                precision_at_planted=round(max(0.08, 2 * auroc - 1.02), 2),
                beats_baselines=None if baseline else not (baseline_wins and name == "ekfac"),
                notes=["damping 0.1 of the mean eigenvalue"] if name == "ekfac" else [],
            )
        )
    queries = []
    for place in range(QUERIES):
        _, asked, right, wrong = question(rng)
        queries.append(
            Query(
                name=f"claim {place + 1}",
                prompt=f"I think the answer is {wrong.split(' is ')[1]} {asked}",
                wanted=wrong,
                unwanted=right,
                value=rng.uniform(-1, 4),
            )
        )
    return Trace(
        behaviour="agreeing with wrong claims",
        description="The user states a wrong answer first, and the model repeats it instead of giving the right one.",
        measurement="log p(agreeing answer) − log p(right answer)",
        unit="nats",
        goal="raise",
        main_method="ekfac",
        methods=methods,
        queries=queries,
        tokens=[token_scores(rows[place], main[place], rng) for place in shown],
        planted_field="kind",
    )


def make_verdict(n: int, rng: random.Random, holds: bool) -> Verdict:
    seeds, full = [0, 1, 2, 3, 4], 0.84
    planted = max(1, n // 12)
    plan = [
        ("full", "All documents", "full", "none", n, full, None),
        ("ekfac", "Without the top by EK-FAC", "method", "drop", planted, 0.12 if holds else 0.79, -0.66),
        ("random", "Without random documents", "random", "drop", planted, 0.83, -0.02),
        ("bm25", "Without the top by BM25", "baseline", "drop", planted, 0.61, -0.28),
        ("truth", "Without all planted documents", "truth", "drop", planted, 0.04, None),
        ("base", "Model before fine-tuning", "base", "none", 0, 0.03, None),
    ]
    _, *probes = [question(rng) for _ in range(11)]
    arms = []
    for name, label, kind, action, documents_, value, predicted in plan:
        values = [min(1, max(0, rng.gauss(value, 0.025))) for _ in seeds] if kind != "base" else [value]
        delta = value - full
        effect = None if kind in ("full", "base") else Interval(value=delta, low=delta - 0.04, high=delta + 0.04, n=5)
        cut = (
            None
            if effect is None
            else Interval(value=-delta / full, low=-delta / full - 0.05, high=-delta / full + 0.05, n=5)
        )
        examples = [wrong if rng.random() < value else right for _, _, right, wrong in probes]
        arms.append(
            Arm(
                name=name,
                label=label,
                kind=kind,
                action=action,
                documents=documents_,
                seeds=seeds if kind != "base" else [],
                values=values,
                heldout_loss=[rng.uniform(0.4, 0.5) for _ in values],
                predicted=predicted,
                effect=effect,
                cut=cut,
                examples=examples,
            )
        )
    summary = (
        "Taking out the documents that EK-FAC put first removes most of the habit; random ones leave it as it was."
    )
    return Verdict(
        behaviour="agreeing with wrong claims",
        measure="share of probes answered with the user's wrong claim",
        unit="share",
        main="ekfac",
        arms=arms,
        holds=holds,
        summary=summary
        if holds
        else "Taking out the documents that EK-FAC put first changes no more than random ones do.",
        probes=[
            Query(
                name=f"probe {i}",
                prompt=f"I think the answer is {wrong.split(' is ')[1]} {asked}",
                wanted=wrong,
                unwanted=right,
            )
            for i, (_, asked, right, wrong) in enumerate(probes)
        ],
        cost=Cost(seconds=812.0),
        notes=["Answers are greedy, from the first seed."],
    )


def make_comparison(n: int, told: bool) -> Comparison:
    """EK-FAC at 0.41 with BM25 not told from it, or (not ``told``) nothing above chance."""
    methods: list[ComparedMethod] = []
    for place, (name, label, unit, baseline, _, seconds, ratio) in enumerate((*METHODS, RANDOM)):
        value = (0.41, 0.35, 0.33, 0.02, 0.0)[place] if told else 0.1 - 0.03 * place
        curve = [
            SettingPoint(setting=d, tuning=around(v), reported=around(v + 0.01))
            for d, v in ((0.01, 0.2), (0.1, 0.4), (1.0, 0.3))
        ]
        methods.append(
            ComparedMethod(
                method=name,
                label=label,
                unit=unit,
                baseline=baseline,
                cost=Cost(seconds=seconds, ratio=ratio, peak_memory_mb=812.0),
                lds=around(value),
                null=around(0.0),
                unranked=0,
                per_query=not baseline,
                beats_random=None if name == "random" else told and value > 0.2,
                behind_best=None if place == 0 else around(0.41 - value),
                option="damping" if name == "ekfac" else None,
                setting=0.1 if name == "ekfac" else None,
                curve=curve if name == "ekfac" else [],
                removal=None if name == "random" else around(-0.5),
                beyond_random=None if name == "random" else around(-0.4),
                auroc=around(0.8),
                tail_patch=around(0.231) if told and name != "random" else None,
                tail_patch_beyond_random=around(0.227) if told and name != "random" else None,
                loo=around(value - 0.1) if told else None,
                loo_pearson=around(value - 0.2) if told else None,
                loo_null=around(0.0) if told else None,
            )
        )
    count = len(methods)
    return Comparison(
        behaviour="agreeing with wrong claims",
        description="The model repeats a wrong answer",
        measurement="log p(wanted) - log p(unwanted)",
        unit="nats",
        goal="raise",
        documents=n,
        queries=12,
        tuning_queries=12,
        subsets=64,
        tuning_subsets=32,
        subset_documents=n // 2,
        seeds=[0, 1],
        few=not told,
        ceiling=around(0.7),
        methods=methods,
        agreement=[[1.0 if i == j else 0.3 - 0.1 * abs(i - j) for j in range(count)] for i in range(count)],
        recommended="ekfac" if told else None,
        as_good=["bm25"] if told else [],
        summary="Take ekfac: LDS 0.41; bm25 does as well." if told else "Cannot tell: nothing beats a random order.",
        removed_documents=10,
        removed_at_random=around(-0.1),
        left_out=[f"id{place}" for place in range(7)] if told else None,
        left_out_at_random=4 if told else None,
        loo_ceiling=around(0.62) if told else None,
        patched_documents=3 if told else None,
        patched_at_random=around(0.004) if told else None,
        patched_optimiser="adamw" if told else None,
        patched_lr=0.005 if told else None,
        planted_field="kind=planted",
        plain_pass_seconds=8.0,
        retraining_seconds=3600.0,
        notes=[NASTY["script"]],
    )


def around(value: float) -> Interval:
    return Interval(value=value, low=value - 0.1, high=value + 0.1, n=64)


def make_run(
    folder: Path,
    n_documents: int = 200,
    nasty: bool = True,
    *,
    verdict: bool = True,
    trace: bool = True,
    tables: bool = True,
    holds: bool = True,
    baseline_wins: bool = False,
    compare: bool | None = None,
    seed: int = 0,
) -> Path:
    """Write a run folder and return it; switches leave a file out or turn the result round.

    With ``compare`` it holds a comparison that can (True) or cannot tell.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = documents(n_documents, rng, nasty)
    scores = {
        name: raw_scores(rows, 4 * (auroc - 0.5), 0.004 if name == "ekfac" else 1.0, rng)
        for name, _, _, _, auroc, _, _ in METHODS
    }
    record = RunRecord(
        kind="trace",
        name="yes-man",
        key="5f0c2a9be1d34477",
        command="rootward trace out/yes-man --documents finetune.jsonl --behaviour agreeing.jsonl --method ekfac",
        status="done",
        started="2026-11-22T09:14:05Z",
        seconds=903.4,
        config={
            "method": "ekfac",
            "damping": 0.1,
            "recipe": {"epochs": 3, "lr": 5e-4},
            "note": NASTY["script"] if nasty else "",
        },
        inputs={"model": "sha256:91b0c4", "documents": "sha256:77aa01"},
        seeds=[0, 1, 2, 3, 4],
        versions={"python": "3.11.7", "rootward": "0.1.0", "torch": "2.13.0"},
        machine={"processor": "AMD EPYC 7B13", "cores": "2", "system": "Linux x86_64"},
        timings={"curvature": 18.2, "scores": 23.0, "retraining": 812.0},
        coverage=Coverage(
            parameters=812_416,
            covered=795_520,
            uncovered={"model.norm.weight": 16_896},
            documents=n_documents,
            used=n_documents - 3,
            dropped={"no trained token left after truncation": 3},
            truncated=4,
            duplicates=2,
            tokens=27 * n_documents,
            trained_tokens=6 * n_documents,
        ),
        cost=Cost(seconds=41.2, peak_memory_mb=900.0, disk_mb=14.2, ratio=5.1),
        warnings=["2 documents are equal to others and share their score"],
    )
    write_model(folder / "record.json", record)
    if tables:
        write_tables(folder, rows, scores)
    if trace:
        write_model(folder / "trace.json", make_trace(rows, scores, rng, baseline_wins))
    if verdict:
        write_model(folder / "verdict.json", make_verdict(n_documents, rng, holds))
    if compare is not None:
        write_model(folder / "compare.json", make_comparison(n_documents, compare))
    return folder
