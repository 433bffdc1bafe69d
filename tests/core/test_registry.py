"""Finding methods, and what the registry refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rootward.core import registry
from rootward.core.errors import DependencyError, InputError
from rootward.core.registry import Card, MethodConfig, Need, Tuned, Work, register

METHOD = """
from rootward.core.registry import Card, MethodConfig, register

class Config(MethodConfig):
    pass

@register(Card({key!r}, "a label", "attribution", "A Paper of Umbrellas", "arXiv:1234.56789", ("text",), "none", "1",
    aliases=("Umbrella",), presets={{"closed_umbrella": {{}}}}), Config)
def run(inputs, config):
    return "ran"
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry that forgets afterwards what a test adds."""
    registry.methods()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield
    registry._modules.cache_clear()


@pytest.fixture
def package(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts another package with an entry point on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(module: str, entry: str, text: str) -> None:
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rootward.methods]\n{entry} = {module}\n")
        registry._modules.cache_clear()

    return add


def card(**changes: Any) -> Card:
    fields: dict[str, Any] = {
        "key": "new", "label": "new", "question": "attribution", "paper": "P", "reference": "R", "needs": ("text",),
        "cost": "none", "unit": "1",
    }  # fmt: skip
    return Card(**(fields | changes))


def add(found: Card, module: str = "theirs.new") -> None:
    def run(inputs: Any, config: Any) -> None: ...

    run.__module__ = module
    register(found, MethodConfig)(run)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("2002.08484", "tracin_pruthi2020"),
        ("arXiv:2006.04528", "representation_cosine"),
        ("tracing gradient", "tracin_pruthi2020"),
        ("TREC-3", "bm25"),
        ("gradient_cosine", "tracin_pruthi2020"),
    ],
)
def test_find_by_paper_title_word_or_preset(words: str, key: str):
    assert key in [m.card.key for m in registry.find(words)]


def test_find_wants_every_word():
    assert registry.find("tracing nonsenseword") == []


@pytest.mark.parametrize("name", ["tracin_pruthi2020", "tracin", "TracIn", "gradient_dot", "TRACIN_PRUTHI2020"])
def test_get_by_key_and_alias(name: str):
    method, preset = registry.get(name)
    assert method.card.key == "tracin_pruthi2020"
    assert preset == {}


def test_get_by_preset_gives_its_options():
    assert registry.get("Gradient_Cosine")[1] == {"normalise": "both"}
    registry.get("gradient_cosine")[1]["normalise"] = "none"
    assert registry.get("gradient_cosine")[1] == {"normalise": "both"}


def test_an_unknown_name_is_answered_with_the_nearest_ones_alone():
    with pytest.raises(InputError, match=r"`rootward methods`, got 'TracIm'; did you mean 'tracin'[^?]*\?$"):
        registry.get("TracIm")
    with pytest.raises(InputError, match=r"from `rootward methods`, got 'nonsense'$"):
        registry.get("nonsense")
    with pytest.raises(InputError, match=r"got 'bm2'; did you mean 'bm25'\?$"):
        registry.load("bm2")


@pytest.mark.parametrize("name", [None, 3, ["ekfac", "trak"]])
def test_a_name_that_is_no_text_is_refused(name: Any):
    with pytest.raises(InputError, match=f"method: expected one name, .*got {re.escape(repr(name))}"):
        registry.get(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": "much"}, "damping: expected a number of at least 0 or 'recipe', got 'much'"),
        ({"damping": -1}, "damping: expected a number of at least 0 or 'recipe', got -1"),
        ({"damping": float("nan")}, "damping: expected a number of at least 0 or 'recipe', got nan"),
        ({"fit_labels": "x"}, "fit_labels: expected 'auto', 'data', 'sampled' or 'exact', got 'x'"),
        ({"rank": 1.5}, "rank: expected a whole number of at least 1 or None, got 1.5"),
        ({"curvature": "adam", "fit_draws": 2}, "curvature = 'adam' is not fitted, so fit_draws has no meaning"),
    ],
)
def test_a_wrong_option_says_what_was_expected_and_what_came_under_the_name_asked_for(
    options: dict[str, Any], message: str
):
    method, _ = registry.get("ekfac")
    with pytest.raises(InputError, match=f"^ekfac: {re.escape(message)}") as caught:
        method.configure(options, "ekfac")
    assert "options:" not in str(caught.value) and "Input should" not in str(caught.value)


def test_an_unknown_option_is_answered_with_the_nearest_one_and_the_list():
    method, _ = registry.get("bm25")
    with pytest.raises(InputError, match=r"^bm25: k2: unknown option; did you mean 'k1'\? \(options: k1, b\)$"):
        method.configure({"k2": 1})
    with pytest.raises(InputError, match=r"3: unknown option \(options: k1, b\)$"):
        method.configure({3: 1})  # pyright: ignore[reportArgumentType]


def test_a_config_is_frozen():
    config = registry.get("bm25")[0].configure({})
    with pytest.raises(ValueError, match="frozen"):
        setattr(config, "k1", 2.0)  # noqa: B010


def test_every_card_names_its_paper_and_no_name_stands_twice():
    names = [name.lower() for m in registry.methods() for name in m.card.names]
    assert len(names) == len(set(names))
    for method in registry.methods():
        assert method.card.paper
        assert set(method.card.needs) <= {"gradients", "activations", "text", "lengths", "nothing", "training"}
        for options in method.card.presets.values():
            method.configure(dict(options))


def test_badly_named_and_paperless_cards_are_refused(fresh: None):
    with pytest.raises(InputError, match="'new' differs from its file name 'other'"):
        add(card(), "rootward.methods.attribution.other")
    with pytest.raises(InputError, match="no paper"):
        add(card(paper=""))
    with pytest.raises(InputError, match="no paper or reference"):
        add(card(reference=""))


@pytest.mark.parametrize(
    "changes", [{"key": "bm25"}, {"aliases": ("Okapi",)}, {"presets": {"gradient_dot": {}}}, {"aliases": ("NEW",)}]
)
def test_a_name_is_given_once(fresh: None, changes: dict[str, Any]):
    with pytest.raises(InputError, match="is taken by|same name twice"):
        add(card(**changes))


def test_another_package_joins_by_entry_point(package: Callable[..., None]):
    package("their_umbrella", "theirs/umbrella", METHOD.format(key="theirs/umbrella"))
    assert registry.get("theirs/umbrella")[0].run(None, None) == "ran"
    assert registry.get("umbrella")[0].card.key == "theirs/umbrella"
    assert [m.card.key for m in registry.find("1234.56789")] == ["theirs/umbrella"]


def test_a_method_without_its_package_is_disabled_alone(package: Callable[..., None]):
    package("their_absent", "theirs/absent", "import absent_package_for_test.inner\n")
    with pytest.raises(DependencyError, match="theirs/absent needs .*pip install absent_package_for_test$"):
        registry.load("theirs/absent")
    assert registry.get("gradient_dot")[0].card.key == "tracin_pruthi2020"
    assert registry.find("okapi")[0].card.key == "bm25"
    assert "theirs/absent" not in [m.card.key for m in registry.methods()]
    assert list(registry.missing()) == ["theirs/absent"]
    with pytest.raises(InputError, match="not installed: method theirs/absent"):
        registry.get("nonsense")


def test_a_file_that_is_broken_itself_is_not_called_a_missing_package(package: Callable[..., None]):
    package("their_broken", "theirs/broken", "import their_broken.nothing\n")
    with pytest.raises(ImportError, match="their_broken"):
        registry.load("theirs/broken")


def test_an_entry_point_whose_card_has_another_key_is_refused(package: Callable[..., None]):
    package("their_wrong", "theirs/wrong", METHOD.format(key="theirs/right"))
    with pytest.raises(InputError, match="theirs/wrong: its module their_wrong registers no card"):
        registry.load("theirs/wrong")


def test_an_entry_point_cannot_take_a_method_s_place(package: Callable[..., None]):
    package("their_bm25", "bm25", METHOD.format(key="bm25"))
    with pytest.raises(InputError, match=re.escape("'bm25' (their_bm25)")):
        registry.methods()


def test_what_is_tuned_is_declared_wherever_there_is_a_damping_and_every_value_is_taken():
    for method in registry.methods():
        tuned = method.config.TUNED
        if tuned is None:
            assert "damping" not in method.config.model_fields, method.card.key
            continue
        assert len(tuned.values) > 1 and list(tuned.values) == sorted(set(tuned.values))
        for preset in ({}, *method.card.presets.values()):
            for value in tuned.values:
                config = method.configure({**preset, tuned.option: value})
                assert getattr(config, tuned.option) == value


def test_a_tuned_option_that_the_config_lacks_is_refused(fresh: None):
    class Config(MethodConfig):
        TUNED: ClassVar = Tuned("damping", (0.1, 1.0))

    def run(inputs: Any, config: Any) -> None: ...

    with pytest.raises(InputError, match="TUNED names 'damping', which is no option"):
        register(card(), Config)(run)


def test_a_method_that_does_not_say_takes_a_pass_for_each_checkpoint_it_looks_at(fresh: None):
    class Config(MethodConfig):
        checkpoints: str = "final"

    work = Work(documents=10, tokens=5.0, queries=2, parameters=7, checkpoints=3, start=True, training=1)

    def passes(needs: tuple[str, ...], config: type[MethodConfig] = MethodConfig, **options: Any) -> float:
        method = registry.Method(card(needs=needs), config, lambda inputs, config: None)
        return method.needed(config(**options), work).passes

    assert passes(("text",)) == 0
    assert passes(("gradients",)) == 1
    assert passes(("gradients", "training")) == 4
    assert passes(("gradients", "training"), Config) == 1
    assert passes(("gradients",), Config, checkpoints="all") == 4

    @register(card(), MethodConfig, needs=lambda config, work: Need(work.queries, at_most=True, memory_bytes=3))
    def run(inputs: Any, config: Any) -> None: ...

    assert registry._registered["new"].needed(MethodConfig(), work) == Need(2, True, 3)
