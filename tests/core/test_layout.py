"""Laws of `ParamLayout`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootward.core.errors import LayoutMismatch
from rootward.core.layout import ParamLayout

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LAYOUTS = st.dictionaries(st.text(min_size=1, max_size=6), SHAPES, min_size=1, max_size=5).map(
    lambda found: ParamLayout(tuple(found), tuple(found.values()))
)


def tensors(layout: ParamLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in zip(layout.names, layout.shapes, strict=True)}


@given(LAYOUTS)
def test_flatten_and_unflatten_are_inverse_for_any_order_of_keys(layout: ParamLayout):
    named = tensors(layout)
    vector = layout.flatten(dict(reversed(list(named.items()))))
    assert vector.shape == (layout.size,)
    back = layout.unflatten(vector)
    assert list(back) == list(layout.names)
    assert all(torch.equal(back[name], named[name]) for name in named)
    for name, part in layout.slices.items():
        assert torch.equal(vector[part], named[name].reshape(-1))


@given(LAYOUTS)
def test_unflatten_keeps_leading_axes(layout: ParamLayout):
    rows = torch.stack([layout.flatten(tensors(layout, seed)) for seed in range(3)])
    back = layout.unflatten(rows)
    for seed in range(3):
        assert all(torch.equal(back[n][seed], value) for n, value in tensors(layout, seed).items())


@given(LAYOUTS, LAYOUTS)
def test_hash_is_equal_exactly_for_equal_layouts(a: ParamLayout, b: ParamLayout):
    assert (a.hash == b.hash) == (a == b)


def test_hash_depends_on_names_shapes_and_order():
    layout = ParamLayout(("a", "b"), ((2, 3), (4,)))
    others = [
        ParamLayout(("a", "c"), ((2, 3), (4,))),
        ParamLayout(("a", "b"), ((3, 2), (4,))),
        ParamLayout(("b", "a"), ((4,), (2, 3))),
        ParamLayout(("a",), ((2, 3),)),
    ]
    assert len({layout.hash, *(other.hash for other in others)}) == 5
    assert ParamLayout.of(tensors(layout)).hash == layout.hash


def test_unlike_layouts_never_combine_and_the_difference_is_named():
    layout = ParamLayout(("a", "b"), ((2, 3), (4,)))
    with pytest.raises(LayoutMismatch, match=r"merge: .*\n  b: \[4\] -> \[5\]$"):
        layout.require(ParamLayout(("a", "b"), ((2, 3), (5,))), "merge")
    with pytest.raises(LayoutMismatch, match=r"  b: \[4\] -> None\n  c: None -> \[4\]"):
        layout.require(ParamLayout(("a", "c"), ((2, 3), (4,))), "merge")
    with pytest.raises(LayoutMismatch, match="same parameters in another order"):
        layout.require(ParamLayout(("b", "a"), ((4,), (2, 3))), "merge")
    with pytest.raises(LayoutMismatch, match="flatten"):
        layout.flatten({"a": torch.zeros(2, 3)})
    with pytest.raises(LayoutMismatch, match="flatten"):
        layout.flatten({"a": torch.zeros(3, 2), "b": torch.zeros(4)})
    with pytest.raises(LayoutMismatch, match="10 entries, got 9"):
        layout.unflatten(torch.zeros(9))
    with pytest.raises(LayoutMismatch, match="'z'"):
        layout.shape("z")


def test_a_layout_needs_one_shape_per_name_and_unique_names():
    with pytest.raises(LayoutMismatch, match="2 names, 1 shapes"):
        ParamLayout(("a", "b"), ((1,),))
    with pytest.raises(LayoutMismatch, match="a more than once"):
        ParamLayout(("a", "a"), ((1,), (1,)))


def test_an_empty_layout_is_a_vector_of_nothing():
    assert ParamLayout((), ()).flatten({}).shape == (0,)
