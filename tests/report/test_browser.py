"""The page as Chromium shows it: opened from disk, driven by its own script, never by the network."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rootward.report import build
from tests.report.fixture import make_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> str:
    named = [
        os.environ.get("ROOTWARD_CHROMIUM"),
        "/usr/bin/chromium",
        shutil.which("chromium"),
        shutil.which("google-chrome"),
    ]
    for path in named:
        if path and Path(path).exists():
            return path
    pytest.skip(
        "BROWSER TESTS NOT RUN: no chromium at /usr/bin/chromium or on the path; set ROOTWARD_CHROMIUM to where it is"
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(make_run(tmp_path_factory.mktemp("browser"), n_documents=150, nasty=True))


def start(chromium: str, profile: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium in a new profile; what it logs comes on stderr."""
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=5000",
        *options,
        url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def dom(chromium: str, profile: Path, page: Path, fragment: str = "") -> str:
    done = start(chromium, profile, f"{page.as_uri()}{fragment}", "--dump-dom")
    logged = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert logged == [], "the page logged an error or broke its own policy"
    assert 'data-ready="true"' in done.stdout[:300], "the script did not reach its end"
    return re.sub(r"<script[^>]*>.*?</script>", "", done.stdout, flags=re.DOTALL)


def ids(shown: str) -> list[str]:
    return re.findall(r'<tr[^>]* data-doc="([0-9a-f]+)"', shown)


def test_the_page_draws_every_part(chromium: str, page: Path, tmp_path: Path):
    shown = dom(chromium, tmp_path, page)
    for section in ("verdict", "documents", "methods", "record", "reading"):
        assert re.search(rf'<section id="{section}"[^>]*>', shown)
        assert not re.search(rf'<section id="{section}"[^>]*hidden', shown), section
    assert shown.count('class="arm ') + shown.count('class="arm"') == 7  # six arms and the axis
    assert len(ids(shown)) == 25
    assert "tests the claim" in shown
    assert shown.count('class="example"') == 4
    assert "<title>agreeing with wrong claims – Rootward</title>" in shown


def test_an_address_opens_a_document_with_its_heatmap(chromium: str, page: Path, tmp_path: Path):
    first = ids(dom(chromium, tmp_path / "a", page))[0]
    shown = dom(chromium, tmp_path / "b", page, f"#doc={first}")
    assert 'aria-current="true"' in shown
    assert re.search(r'<h3 id="doc-title"[^>]*>Rank 1<', shown)
    tokens = re.findall(
        r'<span class="token[^>]*background-color: rgb\((\d+), (\d+), (\d+)\); color: (rgb\([^)]*\)|#\w+)', shown
    )
    assert len(tokens) > 5
    for red, green, blue, front in tokens:
        assert contrast((int(red), int(green), int(blue)), "255" in front or "fff" in front) >= 4.5
    assert "add up to" in shown
    assert "the score of the document" in shown


def contrast(back: tuple[int, int, int], white: bool) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in back]
    level = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 1.05 / (level + 0.05) if white else (level + 0.05) / 0.05


def test_the_address_restores_filters_methods_and_order(chromium: str, page: Path, tmp_path: Path):
    shown = dom(chromium, tmp_path, page, "#method=bm25&view=all&s=capital&f.kind=planted&sort=loss&q=2")
    assert "Scores by BM25, claim 3; unit: BM25" in shown
    losses = [float(value) for value in re.findall(r'<td class="num wide">([\d.]+)</td></tr>', shown)]
    assert losses
    assert losses == sorted(losses, reverse=True)
    assert shown.count("◆ planted") >= len(losses)


def test_hostile_text_is_shown_and_does_nothing(chromium: str, page: Path, tmp_path: Path):
    shown = dom(chromium, tmp_path / "a", page, "#view=all&s=onerror")
    assert "<title>agreeing with wrong claims – Rootward</title>" in shown
    assert "<img" not in shown
    assert "&lt;/script&gt;&lt;script&gt;document.title" in shown
    marked = unescape(dom(chromium, tmp_path / "b", page, "#view=all&s=evil"))
    assert "[U+202E]evil[U+202C]" in marked
    assert "\u202e" not in marked
    found = ids(dom(chromium, tmp_path / "c", page, "#view=all&s=xxxxxxxx"))
    assert len(found) == 1
    long = dom(chromium, tmp_path / "d", page, f"#view=all&doc={found[0]}")
    assert "Show all 20,000 characters" in long
    assert "first 20,000 of 1,000,000 characters" in long


def test_a_document_that_is_not_there_is_said_to_be_missing(chromium: str, page: Path, tmp_path: Path):
    assert "No such document" in dom(chromium, tmp_path, page, "#doc=ffffffffffffffff")


def test_a_bare_record_makes_a_page_too(chromium: str, tmp_path: Path):
    page = build(make_run(tmp_path / "run", 20, verdict=False, trace=False, tables=False))
    shown = dom(chromium, tmp_path / "profile", page)
    assert "A run without a trace" in shown
    assert re.search(r'<section id="documents"[^>]*hidden', shown)


def test_a_comparison_is_drawn_with_its_chart_and_tables(chromium: str, tmp_path: Path):
    page = build(make_run(tmp_path / "run", 30, nasty=False, verdict=False, trace=False, compare=True))
    shown = dom(chromium, tmp_path / "profile", page)
    section = shown[shown.index('<section id="comparison"') : shown.index('<section id="documents"')]
    assert "hidden" not in section.split(">")[0]
    assert section.count('class="arm ') + section.count('class="arm"') == 6  # five methods and the axis
    assert section.count('class="ceiling"') == 6  # and the legend
    assert "Take ekfac: LDS 0.41; bm25 does as well." in section
    assert "not told from it, cheaper" in section
    assert "◆ 0.40 → 0.41" in section
    assert "−0.40" in section  # without the top, less the random ones
    assert "Leave-one-out, Spearman [95 %]" in section and "One step on its top 3 (nats)" in section
    assert re.search(r">0.31<span[^>]*> \[0.21 to 0.41\]", section)  # left out: ekfac
    assert re.search(r">0.231<span[^>]*> \[0.131 to 0.331\]", section)  # stepped on
    assert "over 7 documents (4 drawn at random, 3 from both ends of the rankings)" in section
    assert "the noise ceiling 0.62" in section
    assert "The step is adamw’s, with learning rate 0.005, from the final model." in section
    assert ">to take<" in section and "highest so far" not in section
    assert section.count("<td") > 25 + 5 * 13
    assert "ekfac: 0.41, 0.31 to 0.51" in section  # in words, for those who do not see the chart
    assert "&lt;/script&gt;" in section
    assert "Which method?</a>" in shown
    assert "◆ planted" in shown
    assert "7 documents were left out one by one, the others were not tested alone" in shown


def test_a_comparison_of_few_subsets_names_no_method_to_take(chromium: str, tmp_path: Path):
    folder = make_run(tmp_path / "run", 30, nasty=False, verdict=False, trace=False, compare=True)
    found = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps({**found, "few": True}))
    shown = dom(chromium, tmp_path / "profile", build(folder))
    section = shown[shown.index('<section id="comparison"') : shown.index('<section id="documents"')]
    assert ">highest so far<" in section and "to take<" not in section
    assert "to take ·" not in section


def test_a_picker_that_is_off_says_why_and_a_method_s_notes_are_folded_under_it(chromium: str, tmp_path: Path):
    folder = make_run(tmp_path / "run", 30, nasty=False, verdict=False)
    table = pq.read_table(folder / "scores.parquet").to_pylist()
    left = [row for row in table if row["method"] not in ("ekfac", "document_length") or row["query"] == -1]
    pq.write_table(pa.Table.from_pylist(left), folder / "scores.parquet")
    page = build(folder)
    shown = unescape(dom(chromium, tmp_path / "a", page))
    why = 'This method scored the mean of the queries (option queries = "each": scores for each one).'
    assert shown.count(f'title="{why}"') == 2  # the control and its label
    assert re.search(r'<select id="query"[^>]* disabled', shown)
    methods = shown[shown.index('<section id="methods"') : shown.index('<section id="record"')]
    assert methods.count('class="note-row"') == 1  # of the one method that has any
    assert re.search(r"<td colspan=\"8\"><details><summary>1 note<", methods)
    assert "<li>damping 0.1 of the mean eigenvalue</li>" in methods
    other = dom(chromium, tmp_path / "b", page, "#method=document_length")
    assert 'title="This baseline gives one ranking for all queries."' in other
    each = dom(chromium, tmp_path / "c", page, "#method=bm25")
    assert not re.search(r'<select id="query"[^>]* disabled', each)
    assert "scored the mean" not in each and "one ranking for all" not in each


def test_truths_that_were_not_asked_for_have_no_column(chromium: str, tmp_path: Path):
    page = build(make_run(tmp_path / "run", 30, nasty=False, verdict=False, trace=False, compare=False))
    shown = dom(chromium, tmp_path / "profile", page)
    section = shown[shown.index('<section id="comparison"') : shown.index('<section id="documents"')]
    assert "LDS [95 %]" in section
    assert "no single document was tested" in shown
    assert "single documents" not in section and "Leave-one-out" not in section and "step" not in section


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_drawn_in_both_themes_at_both_widths(
    chromium: str, page: Path, tmp_path: Path, width: int, theme: str
):
    picture = tmp_path / "page.png"
    start(
        chromium,
        tmp_path / "profile",
        f"{page.as_uri()}#theme={theme}",
        f"--screenshot={picture}",
        f"--window-size={width},1000",
    )
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000, "the picture is all but empty"
