import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax import models, paths
from regjax.errors import InputError

TREE = {"embedding": {"table": 1}, "layers": {"mlp": {"kernel": 2, "bias": 3}}, "scale": 4}
FLAT = {"embedding/table": 1, "layers/mlp/kernel": 2, "layers/mlp/bias": 3, "scale": 4}

names = st.text("abc_0", min_size=1, max_size=3)
trees = st.dictionaries(
    names,
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1), max_leaves=8
    ),
)


def test_a_path_joins_the_keys():
    assert paths.flatten(TREE) == FLAT
    assert paths.unflatten(FLAT) == TREE
    assert paths.flatten(FLAT) == FLAT


@settings(deadline=None, max_examples=50)
@given(trees)
def test_unflatten_inverts_flatten(tree):
    assert paths.unflatten(paths.flatten(tree)) == tree


@settings(deadline=None, max_examples=50)
@given(trees, st.lists(st.sampled_from(["a", "^b", "c$", "a/.*b", "."]), max_size=3))
def test_a_split_deals_out_every_leaf_once(tree, patterns):
    flat = paths.flatten(tree)
    if not all(any(paths.matches(path, [pattern]) for path in flat) for pattern in patterns):
        return
    chosen, others = paths.split_by_patterns(tree, patterns)
    assert {**chosen, **others} == flat and not chosen.keys() & others.keys()
    assert all(paths.matches(path, patterns) for path in chosen)
    assert not any(paths.matches(path, patterns) for path in others)


def test_patterns_are_searched_unless_anchored():
    chosen, others = paths.split_by_patterns(TREE, ["scale", "^layers/.*kernel$"])
    assert list(chosen) == ["layers/mlp/kernel", "scale"]
    assert list(others) == ["embedding/table", "layers/mlp/bias"]
    assert paths.split_by_patterns(TREE, []) == ({}, FLAT)
    with pytest.raises(InputError, match=r"'\^mlp' matches no parameter; .*embedding/table, lay"):
        paths.split_by_patterns(TREE, ["scale", "^mlp"])
    with pytest.raises(InputError, match=r"'\(' is not a regular expression"):
        paths.split_by_patterns(TREE, ["("])


def test_a_list_of_modules_survives_the_way_through_paths():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.parts = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])

        def hidden(self, tokens, **_):
            return self.parts[1](self.parts[0](tokens))

        def head(self, hidden):
            return hidden

    apply, params = models.split(Two(nnx.Rngs(0)))
    flat = paths.flatten(params)
    assert "parts/1/kernel" in flat
    inputs = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(
        apply.hidden(paths.unflatten(flat), inputs), apply.hidden(params, inputs)
    )
