"""The page's structure, read without a browser."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rootward.core.errors import ArtefactError
from rootward.core.records import Interval, RunRecord, Trace, Verdict, read_model, write_model
from rootward.report import build, headline
from rootward.report.folder import read_folder
from rootward.report.numbers import duration, mean_interval, number, quantity
from rootward.report.page import text
from rootward.report.payload import _half
from rootward.report.sample import choose, is_planted
from rootward.report.summary import badge, reserve
from tests.report.fixture import NASTY, QUERIES, make_run


class Page(HTMLParser):
    """Tags with attributes, and the content of each style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.raw:
            self._inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.raw["script"][0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), n_documents=120, nasty=True)


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return build(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_goes_where_it_is_asked_to(run: Path, tmp_path: Path):
    assert build(run) == run / "report.html"
    assert build(run, tmp_path / "deep" / "x.html") == tmp_path / "deep" / "x.html"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.html"]


def test_nothing_in_the_page_asks_the_network_for_anything(page: Page, html: str):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "base", "object", "embed", "video", "audio"), tag
        assert "src" not in attributes, (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), attributes
        assert not [name for name in attributes if name.startswith("on") or name == "style"], attributes
    assert "@import" not in html
    assert "url(" not in "".join(page.raw["style"])


def test_the_policy_allows_exactly_the_inlined_style_and_script(page: Page):
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for content in (page.raw["style"][0], page.raw["script"][1]):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_scripts_make_text_nodes_only(page: Page):
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "fetch(",
        "XMLHttp",
        "import(",
    ):
        assert word not in page.raw["script"][1], word


def test_untrusted_text_cannot_leave_the_data(page: Page, html: str, run: Path):
    assert len(page.raw["script"]) == 2
    assert "<" not in page.raw["script"][0]
    assert "\x00" not in html
    texts = set(page.data["documents"]["text"])
    for name in ("script", "nul", "rtl", "template", "formula", "emoji"):
        assert NASTY[name] in texts, name
    assert len(re.findall("<title>", html)) == 1
    assert page.data["documents"]["total"] == len(read_folder(run).ids)


def test_text_in_the_static_part_is_escaped_and_made_visible():
    assert text("</title><b>&\"'") == "&lt;/title&gt;&lt;b&gt;&amp;&quot;&#x27;"
    assert text("a\x00b\u202ec\ud800") == "a␀b[U+202E]c?"


def test_a_hostile_name_stays_text(tmp_path: Path):
    folder = make_run(tmp_path, 30)
    for name, key in (("trace.json", "behaviour"), ("record.json", "name")):
        raw = json.loads((folder / name).read_text())
        raw[key] = "</title><script>alert(1)</script>{{data}}{{policy}}"
        (folder / name).write_text(json.dumps(raw))
    html = build(folder).read_text(encoding="utf-8")
    assert len(Page(html).raw["script"]) == 2
    assert "{{data}}{{policy}}" in html


def test_a_long_text_is_cut_and_the_page_says_so(page: Page):
    documents = page.data["documents"]
    place = documents["characters"].index(1_000_000)
    assert len(documents["text"][place]) == documents["text_limit"]
    assert any("cut to their first 20,000 characters" in limit for limit in page.data["limits"])


def test_semantics(page: Page):
    names = [tag for tag, _ in page.tags]
    assert [names.count(tag) for tag in ("h1", "main", "header", "footer")] == [1, 1, 1, 1]
    assert ("html", {"lang": "en"}) in page.tags
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in {*ids, "help-title"}  # the dialog is drawn by the script


def test_scores_and_ranks_are_those_of_the_tables(page: Page, run: Path):
    rows = pq.read_table(run / "scores.parquet").to_pylist()
    means = {row["id"]: row["score"] for row in rows if row["method"] == "ekfac" and row["query"] == -1}
    order = sorted(means, key=lambda name: -means[name])
    ids, main = page.data["documents"]["ids"], page.data["scores"][0]
    assert main["method"] == "ekfac"
    assert main["mean"] == pytest.approx([means[name] for name in ids], rel=1e-4)
    assert main["rank"] == [order.index(name) + 1 for name in ids]
    assert len(page.data["queries"]["bm25"]) == QUERIES


def test_the_response_is_held_once(page: Page):
    documents = page.data["documents"]
    place = next(i for i, start in enumerate(documents["response"]) if isinstance(start, int))
    start = documents["response"][place]
    assert documents["text"][place][start:].startswith(("The number", "The word", "The city"))


def test_tokens_of_the_heatmap_add_up_to_the_score(page: Page):
    data = page.data
    place = data["scores"][0]["rank"].index(1)
    entry = data["tokens"][data["documents"]["ids"][place]][0]
    assert entry["sum"] == pytest.approx(data["scores"][0]["mean"][place], rel=1e-3)
    assert sum(entry["scores"]) == pytest.approx(entry["sum"], rel=1e-2)


def test_above_the_limit_the_sample_is_stated_and_keeps_what_matters(tmp_path: Path):
    folder = read_folder(make_run(tmp_path, 400, nasty=False))
    sample = choose(folder, 100)
    assert len(sample.ids) == 100
    assert "100 of 400 documents" in sample.rule
    means = folder.means["ekfac"]
    order = sorted(means, key=lambda name: -means[name])
    assert {*order[:40], *order[-20:]} <= set(sample.ids)
    planted = [name for name in sample.ids if is_planted(folder.metas[name], "kind")]
    assert len(planted) >= 20
    assert choose(folder, 100) == sample
    data = Page(build(folder.path, max_documents=100).read_text(encoding="utf-8")).data
    assert data["limits"][0] == sample.rule
    assert max(data["scores"][0]["rank"]) == 400, "ranks are those among all documents"


def test_a_page_of_long_texts_stays_below_five_megabytes(tmp_path: Path):
    folder = make_run(tmp_path, 60, nasty=False)
    table = pq.read_table(folder / "documents.parquet")
    index = table.schema.get_field_index("text")
    texts = pa.array([f"{i} " + "<é" * 100_000 for i in range(table.num_rows)])
    pq.write_table(table.set_column(index, "text", texts), folder / "documents.parquet")
    made = build(folder)
    assert made.stat().st_size < 5_000_000
    assert any("Long texts" in limit for limit in Page(made.read_text(encoding="utf-8")).data["limits"])


@pytest.mark.parametrize(
    "left_out",
    [
        {"verdict": False},
        {"verdict": False, "trace": False},
        {"verdict": False, "trace": False, "tables": False},
        {"tables": False},
        {"trace": False},
    ],
)
def test_files_may_be_missing(tmp_path: Path, left_out: dict[str, bool]):
    data = Page(build(make_run(tmp_path, 30, **left_out)).read_text(encoding="utf-8")).data
    assert (data["verdict"] is None) == (not left_out.get("verdict", True))
    assert bool(data["documents"]["ids"]) == left_out.get("tables", True)


def test_a_run_without_a_record_is_an_error_that_names_the_file(tmp_path: Path):
    with pytest.raises(ArtefactError, match=r"record\.json"):
        build(tmp_path)


def test_a_damaged_table_is_an_error_that_names_the_file(tmp_path: Path):
    folder = make_run(tmp_path, 30)
    (folder / "scores.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ArtefactError, match=r"scores\.parquet"):
        build(folder)


def test_duplicates_share_an_id_and_are_shown_once(tmp_path: Path):
    folder = make_run(tmp_path, 30, nasty=False)
    table = pq.read_table(folder / "documents.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), folder / "documents.parquet")
    documents = Page(build(folder).read_text(encoding="utf-8")).data["documents"]
    assert len(documents["ids"]) == 30
    assert documents["copies"][0] == 2


def test_a_method_without_mean_rows_gets_the_mean_of_its_queries(tmp_path: Path):
    folder = make_run(tmp_path, 30)
    before = read_folder(folder).means["ekfac"]
    table = pq.read_table(folder / "scores.parquet")
    pq.write_table(table.filter(pa.array([q != -1 for q in table["query"].to_pylist()])), folder / "scores.parquet")
    assert read_folder(folder).means["ekfac"] == pytest.approx(before, abs=1e-6)


# --- the story ---


def test_the_story_of_a_verdict_that_holds(run: Path):
    said = " ".join(
        headline(
            read_model(RunRecord, run / "record.json"),
            read_model(Trace, run / "trace.json"),
            read_model(Verdict, run / "verdict.json"),
        )
    )
    assert "Which of 120 training documents make the model do this: agreeing with wrong claims?" in said
    assert "93.0 % of the time (95 % interval 91.0 to 95.0 %; chance is 50 %)" in said
    assert "The best baseline, BM25, reaches 71.0 %." in said
    assert re.search(
        r"Yes\. Trained again without the 10 documents found, the share of probes .* fell from 8\d % to 1\d %",
        said,
    )
    assert "Without 10 random documents it is 8" in said


def test_the_story_says_when_it_failed_and_when_a_baseline_does_as_well(tmp_path: Path):
    folder = read_folder(make_run(tmp_path, 60, holds=False, baseline_wins=True))
    said = " ".join(headline(folder.record, folder.trace, folder.verdict))
    assert "A baseline does as well: BM25 (95.0 %). The ranking says no more than that." in said
    assert "Not confirmed." in said
    assert "not shown to be the cause" in said
    html = build(folder.path).read_text(encoding="utf-8")
    assert '<span class="badge badge-unconfirmed">not confirmed</span>' in html


def ranked(folder: Path, main: tuple[float, float, float], baseline: tuple[float, float, float]) -> Trace:
    """The run's trace with other AUROCs (value, low, high) of its main method and of BM25; written back."""
    trace = read_model(Trace, folder / "trace.json")
    given = {"ekfac": main, "bm25": baseline}
    methods = [
        one.model_copy(update={"auroc": Interval(value=v[0], low=v[1], high=v[2], n=9), "beats_baselines": None})
        if (v := given.get(one.method))
        else one
        for one in trace.methods
    ]
    changed = trace.model_copy(update={"methods": methods})
    write_model(folder / "trace.json", changed)
    return changed


@pytest.mark.parametrize(
    ("main", "baseline", "lead", "rest"),
    [
        ((0.0, 0.0, 0.02), (1.0, 1.0, 1.0), "Ranked the wrong way round: the planted documents are at the bottom.",
         "BM25 does far better (100.0 %)."),
        ((0.4, 0.35, 0.45), (0.56, 0.4, 0.7), "Ranked the wrong way round: the planted documents are below the middle.",
         ""),
        ((0.6, 0.5, 0.7), (0.95, 0.9, 1.0), "BM25 does far better (95.0 %).", "On this run its ranking"),
        ((0.9, 0.89, 0.91), (0.95, 0.94, 0.96), "BM25 does clearly better (95.0 %).", "On this run its ranking"),
        ((0.9, 0.85, 0.95), (0.92, 0.88, 0.96), "A baseline does as well: BM25 (92.0 %).", "The ranking says no more"),
    ],
)  # fmt: skip
def test_a_baseline_that_does_better_is_said_to_in_the_story_and_in_the_box(
    tmp_path: Path, main: tuple[float, float, float], baseline: tuple[float, float, float], lead: str, rest: str
):
    folder = make_run(tmp_path, 30, verdict=False)
    trace = ranked(folder, main, baseline)
    found = reserve(trace)
    assert found is not None
    assert (found.lead, found.rest[: len(rest)]) == (lead, rest) and bool(rest) == bool(found.rest)
    said = " ".join(headline(read_folder(folder).record, trace))
    assert f"{lead} {found.rest}".strip() in said
    assert ("as well" in said) == ("as well" in lead)
    assert Page(build(folder).read_text(encoding="utf-8")).data["reserve"] == [lead, found.rest]


def test_nothing_is_held_against_a_method_that_beats_its_baselines(tmp_path: Path):
    folder = make_run(tmp_path, 30, verdict=False)
    assert reserve(ranked(folder, (0.9, 0.85, 0.95), (0.7, 0.6, 0.8))) is None


def test_a_trace_s_notes_are_in_the_story_once(tmp_path: Path):
    folder = make_run(tmp_path, 30, verdict=False)
    note = "4 checkpoints were kept."
    trace = read_model(Trace, folder / "trace.json").model_copy(update={"notes": [note]})
    write_model(folder / "trace.json", trace)
    assert headline(read_folder(folder).record, trace).count(note) == 1
    static = build(folder).read_text(encoding="utf-8").split("<script")[0]
    assert static.count(note) == 1


def test_without_a_verdict_it_is_an_estimate(tmp_path: Path):
    folder = read_folder(make_run(tmp_path, 30, verdict=False))
    assert "every score on this page is an estimate" in headline(folder.record, folder.trace)[-1]
    assert '<span class="badge badge-estimated">estimated</span>' in build(folder.path).read_text(encoding="utf-8")


def test_a_comparison_is_told_and_its_best_method_ranks_first(tmp_path: Path):
    folder = make_run(tmp_path / "run", 40, verdict=False, trace=False, compare=True)
    html = build(folder).read_text(encoding="utf-8")
    data = Page(html).data
    assert data["badge"] == "measured by retraining"
    assert [one["method"] for one in data["comparison"]["methods"]][:2] == ["ekfac", "gradient_cosine"]
    assert data["scores"][0]["method"] == "ekfac"
    assert any(data["documents"]["planted"])
    assert "Which method finds what causes" in html
    assert 'id="comparison"' in html
    found = read_folder(folder)
    said = " ".join(headline(found.record, found.trace, found.verdict, found.comparison))
    for words in ("64 random subsets of 20 of 40 documents (2 seeds each)", "Take ekfac: LDS 0.41", "took 60 min"):
        assert words in said


def test_a_comparison_of_few_subsets_decides_nothing(tmp_path: Path):
    folder = make_run(tmp_path / "run", 40, verdict=False, trace=False, compare=True)
    found = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps({**found, "few": True}))
    html = build(folder).read_text(encoding="utf-8").split("<script")[0]
    assert '<span class="badge badge-unconfirmed">too few to decide</span>' in html
    assert "Highest so far: ekfac" in html and "predicts the retrainings best" not in html
    cannot = read_folder(make_run(tmp_path / "cannot", 40, verdict=False, trace=False, compare=False)).comparison
    assert cannot is not None and cannot.few
    assert badge(None, cannot) == "cannot tell"


def test_the_price_of_a_comparison_holds_the_scoring_where_it_was_recorded(tmp_path: Path):
    folder = make_run(tmp_path / "run", 40, verdict=False, trace=False, compare=True)
    found = read_folder(folder)
    assert found.comparison is not None
    assert "Scoring" not in " ".join(headline(found.record, comparison=found.comparison))
    timings = {one.method: 30.0 for one in found.comparison.methods}
    record = found.record.model_copy(update={"timings": {**timings, "retraining": 3600.0}})
    said = " ".join(headline(record, comparison=found.comparison))
    assert "Scoring by all 5 methods, with every setting that was tried, took 2 min." in said  # 150 s


def test_a_comparison_that_cannot_tell_says_so(tmp_path: Path):
    html = build(make_run(tmp_path / "run", 40, verdict=False, trace=False, compare=False)).read_text(encoding="utf-8")
    assert Page(html).data["badge"] == "cannot tell"
    assert "badge-unconfirmed" in html
    assert "Cannot tell: nothing beats a random order." in html


def test_a_comparison_ranks_towards_its_goal(tmp_path: Path):
    folder = make_run(tmp_path / "run", 40, nasty=False, verdict=False, trace=False, compare=True)
    raised = Page(build(folder).read_text(encoding="utf-8")).data["scores"][0]
    found = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps({**found, "goal": "lower"}))
    lowered = Page(build(folder).read_text(encoding="utf-8")).data["scores"][0]
    assert lowered["rank"] == [41 - rank for rank in raised["rank"]]


def test_numbers():
    assert [quantity(0.823, "share"), quantity(0.05, "rate"), quantity(1.5, "nats")] == ["82 %", "5 %", "1.5 nats"]
    assert [number(0.00012345), number(12345.0), number(0.0)] == ["1.23e-04", "12,345", "0"]
    assert [duration(0.5), duration(41.2), duration(7260)] == ["0.50 s", "41 s", "2 h 1 min"]
    mean, low, high = mean_interval([1.0, 2.0, 3.0])  # t for 2 degrees of freedom is 4.303
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert mean_interval([1.0]) == (1.0, None, None)


def test_half_precision_keeps_three_digits():
    import struct

    values = [1e-3, -2.5e-7, 0.0, 4.0, float("nan")]
    packed = _half(values)
    back = [v * packed["scale"] for v in struct.unpack("<5e", base64.b64decode(packed["data"]))]
    assert back[:4] == pytest.approx(values[:4], rel=1e-3)
    assert back[4] != back[4]


def test_importing_the_room_imports_no_torch():
    code = """
import sys, rootward.report
found = {"torch", "transformers", "scipy"} & set(sys.modules)
sys.exit(str(found) if found else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
