"""Adapters against torch with the formula by hand, against merged kernels, and what is never computed."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from regjax import models, paths
from regjax.errors import InputError
from regjax.models.lora import Lora, adapter_shapes, create_lora, merge_lora, unmerge_lora
from regjax.models.lora import with_lora as adapted
from tests import tiny
from tests.models.families import FAMILIES

TOKENS = np.random.default_rng(0).integers(1, 60, (2, 12))
LORA = Lora(rank=3, alpha=4.5)
MODULES = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def random_adapters(lora, params, seed=0):
    """Adapters whose B is not 0 either."""
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(
        lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape),
        create_lora(lora, params, jax.random.key(seed)),
    )


def small(**changes):
    return models.split(models.create(dataclasses.replace(tiny.CONFIG, **changes), 0))


@pytest.fixture(scope="module")
def case():
    model, params = tiny.decoder()
    return model, {**params, "lora": random_adapters(LORA, params)}


def test_new_adapters_change_no_bit_and_are_as_published():
    model, params = tiny.decoder()
    lora = Lora(rank=64)
    new = create_lora(lora, params, jax.random.key(3))
    ours = jax.jit(adapted(model, lora))({**params, "lora": new}, TOKENS)
    assert (np.asarray(ours) == jax.jit(model)(params, TOKENS)).all()
    flat = paths.flatten(new)
    assert len(flat) == 14
    for path, leaf in flat.items():
        assert leaf.dtype == np.float32
        if path.endswith("/b"):
            assert not leaf.any()
            continue
        bound = leaf.shape[1] ** -0.5
        assert 0.99 * bound < np.abs(leaf).max() <= bound
        # The standard deviation of a uniform draw.
        np.testing.assert_allclose(leaf.std(), bound / np.sqrt(3), rtol=0.05)
    assert not np.array_equal(flat["layers/mlp/gate/a"], flat["layers/mlp/up/a"])
    again = create_lora(lora, params, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, new, again)


def test_scale():
    assert Lora(rank=16, alpha=8.0).scale == 0.5
    assert Lora(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_logits_and_gradients_are_those_of_the_formula_in_torch(family, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.models import torch_models

    reference = torch_models.random_model(FAMILIES[family]).requires_grad_(False)
    torch_models.write_folder(reference, FAMILIES[family], tmp_path / "folder")
    model, params = models.split(models.load(tmp_path / "folder"))
    adapters = random_adapters(LORA, params)

    class LowRank(torch.nn.Module):
        def __init__(self, base, a, b):
            super().__init__()
            self.base, self.scaling = base, 4.5 / 3
            self.lora_a = torch.nn.Parameter(torch.tensor(np.asarray(a).T.copy()))
            self.lora_b = torch.nn.Parameter(torch.tensor(np.asarray(b).T.copy()))

        def forward(self, x):
            low = torch.nn.functional.linear(x, self.lora_a)
            return self.base(x) + torch.nn.functional.linear(low, self.lora_b) * self.scaling

    wrapped = {}
    for index, layer in enumerate(reference.model.layers):
        for ours, theirs in MODULES.items():
            block, kind = ours.split("/")
            pair = adapters["layers"][block][kind]
            parent = layer.get_submodule(theirs.split(".")[0])
            name = theirs.split(".")[1]
            low = LowRank(getattr(parent, name), pair["a"][index], pair["b"][index])
            setattr(parent, name, low)
            wrapped[ours, index] = low

    weights = np.random.default_rng(2).normal(size=(*TOKENS.shape, 61)).astype(np.float32)
    theirs = reference(torch.tensor(TOKENS), use_cache=False).logits
    (theirs * torch.tensor(weights)).sum().backward()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients_and_logits(adapters):
        logits = adapted(model, LORA)({**params, "lora": adapters}, TOKENS)
        return (logits * weights).sum(), logits

    gradients, logits = gradients_and_logits(adapters)
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=1e-4)
    for (ours, index), low in wrapped.items():
        block, kind = ours.split("/")
        for name, factor in (("a", low.lora_a), ("b", low.lora_b)):
            found = np.asarray(gradients["layers"][block][kind][name][index])
            wanted = factor.grad.numpy().T
            assert np.abs(wanted).max() > 1e-3
            np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_merged_model_is_the_adapted_one_and_unmerging_gives_it_back(case):
    model, params = case
    merged = merge_lora(params, LORA)
    before = {name: value for name, value in params.items() if name != "lora"}
    assert jax.tree.structure(merged) == jax.tree.structure(before)
    run = jax.jit(model)
    ours = jax.jit(adapted(model, LORA))(params, TOKENS)
    assert np.abs(ours - run(before, TOKENS)).max() > 1
    np.testing.assert_allclose(run(merged, TOKENS), ours, atol=1e-5)
    again = unmerge_lora(merged, params["lora"], LORA)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for path, leaf in paths.flatten(again).items():
        original = paths.flatten(params)[path]
        np.testing.assert_allclose(leaf, original, rtol=0, atol=2.0**-22, err_msg=path)


def test_merging_is_the_formula_in_float64(case):
    _, params = case
    pair = params["lora"]["layers"]["mlp"]["down"]
    change = np.einsum("nir,nro->nio", *(np.asarray(pair[n], np.float64) for n in "ab"))
    expected = np.asarray(params["layers"]["mlp"]["down"]["kernel"]) + 1.5 * change
    merged = merge_lora(params, LORA)["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(merged, expected, atol=1e-6)


def test_merged_kernels_are_rounded_once(case):
    _, params = case
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params) | {"lora": params["lora"]}
    found = merge_lora(half, LORA)["layers"]["mlp"]["up"]["kernel"]
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    wanted = merge_lora(exact, LORA)["layers"]["mlp"]["up"]["kernel"].astype(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"rematerialisation": "full"}])
def test_layers_one_by_one_or_computed_again_are_the_same(case, changes):
    _, params = case

    def value_and_gradient(model):
        def loss(adapters):
            return (adapted(model, LORA)({**params, "lora": adapters}, TOKENS) ** 2).mean()

        return jax.jit(jax.value_and_grad(loss))(params["lora"])

    expected, found = (value_and_gradient(model) for model in (small()[0], small(**changes)[0]))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max() + 1e-7),
        found[1],
        expected[1],
    )


def test_products_have_the_compute_type(case):
    _, params = case
    model, _ = small(dtype="bfloat16")
    text = str(jax.make_jaxpr(adapted(model, LORA))(params, TOKENS))
    widest = re.findall(r"(\w+)\[(?:\d+,)+3\] = dot_general", text)
    assert widest
    assert set(widest) == {"bf16"}
    ours = adapted(model, LORA)(params, TOKENS)
    exact = adapted(small()[0], LORA)(params, TOKENS)
    assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()


def test_cached_decoding_equals_the_whole_row(case):
    model, params = case
    model = adapted(model, LORA)
    whole = model.hidden(params, TOKENS)
    states, cache = model.prefill(params, TOKENS[:, :-1], room=1)
    last, _ = model.step(params, TOKENS[:, -1], cache)
    np.testing.assert_allclose(states, whole[:, :-1], atol=1e-5)
    np.testing.assert_allclose(last, whole[:, -1], atol=1e-5)


def test_soft_prompts_go_around_it(case):
    model, params = case
    prompt = jax.random.normal(jax.random.key(0), (4, tiny.CONFIG.width))
    both = {**params, "soft_prompt": {"main": prompt}}
    merged = {**merge_lora(params, LORA), "soft_prompt": {"main": prompt}}
    ours = models.with_prompts(adapted(model, LORA), ["main"])(both, TOKENS)
    np.testing.assert_allclose(
        ours, models.with_prompts(model, ["main"])(merged, TOKENS), atol=1e-5
    )
    gradients = jax.grad(
        lambda both: (models.with_prompts(adapted(model, LORA), ["main"])(both, TOKENS) ** 2).sum()
    )(both)
    assert np.abs(gradients["soft_prompt"]["main"]).max() > 1e-3
    assert np.abs(gradients["lora"]["layers"]["mlp"]["up"]["a"]).max() > 1e-3


# Sizes of which no two are alike, so that a shape tells whose it is.
DISTINCT = {"width": 24, "heads": 5, "head_dim": 8, "key_value_heads": 1, "mlp_width": 56}


@pytest.mark.parametrize("scan", [True, False])
def test_no_gradient_of_a_kernel_is_computed(scan):
    model, params = small(**DISTINCT, scan_layers=scan)
    kernels = {
        leaf.shape[1:]
        for path, leaf in paths.flatten(params["layers"]).items()
        if path.endswith("/kernel")
    }
    assert len(kernels) == 5
    params = {**params, "lora": random_adapters(LORA, params)}
    tokens = np.arange(33).reshape(3, 11)

    def loss(adapters, params):
        return (adapted(model, LORA)({**params, "lora": adapters}, tokens) ** 2).mean()

    def products(function, *arguments):
        """Shapes of matrix products, either way round."""
        text = str(jax.make_jaxpr(function)(*arguments))
        found = re.findall(r"\[([\d,]+)\] = dot_general", text)
        shapes = {tuple(map(int, shape.split(","))) for shape in found}
        return shapes | {shape[::-1] for shape in shapes}

    frozen = products(jax.grad(loss), params["lora"], params)
    assert {(24, 3), (40, 3), (56, 3)} < frozen
    assert not frozen & kernels
    # What the check says of a step that trains the kernels as well.
    assert kernels <= products(jax.grad(lambda params: loss(params["lora"], params)), params)


class Perceptron(nnx.Module):
    """A model of a user's own, with a list of layers and one layer used twice."""

    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (60, 8)))
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.third = self.layers[0]
        self.out = nnx.Linear(8, 60, rngs=rngs)

    def hidden(self, tokens, *, embeddings=None, positions=None, segment_ids=None):
        states = self.table[...][tokens]
        for layer in (*self.layers, self.third):
            states = jnp.tanh(layer(states))
        return states

    def head(self, states):
        # Reads what it could call, as a loss does that never holds the logits.
        return states @ self.out.kernel[...] + self.out.bias[...]


def perceptron(params, tokens):
    """The same as a function."""
    states = params["table"][tokens]
    for name in ("0", "1", "0"):
        layer = params["layers"][name] if name in params["layers"] else params["layers"][int(name)]
        states = jnp.tanh(states @ layer["kernel"] + layer["bias"])
    return states @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize("patterns", [("kernel$",), ("kernel$", "table$")])
def test_models_of_a_user(patterns):
    """Low-rank factors beside the kernels, and the kernels that they make, are one model."""
    lora = Lora(rank=2, patterns=patterns)
    model, params = models.split(Perceptron(nnx.Rngs(0)))
    params = {**params, "lora": random_adapters(lora, params)}
    assert ("table" in params["lora"]) == (len(patterns) == 2)
    assert params["lora"]["layers"]["0"]["a"].shape == (8, 2)
    function = models.from_function(perceptron)
    expected = model(merge_lora(params, lora), TOKENS)
    assert np.abs(expected - model(models.lora.without_lora(params), TOKENS)).max() > 0.1
    for one in (model, function):
        np.testing.assert_allclose(adapted(one, lora)(params, TOKENS), expected, atol=2e-5)

    def gradients(model):
        def loss(adapters):
            return (adapted(model, lora)({**params, "lora": adapters}, TOKENS) ** 2).mean()

        return jax.grad(loss)(params["lora"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradients(model),
        gradients(function),
    )


def test_one_configuration_gives_equal_models():
    model, _ = tiny.decoder()
    assert adapted(model, LORA) == adapted(small()[0], Lora(rank=3, alpha=4.5))
    assert hash(adapted(model, LORA)) == hash(adapted(model, LORA))
    assert adapted(model, LORA) != adapted(model, Lora(rank=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "Lora.rank is 0"),
        ({"alpha": 0.0}, "Lora.alpha is 0.0"),
        ({"alpha": float("nan")}, "Lora.alpha is nan"),
        ({"patterns": "kernel$"}, "Lora.patterns is 'kernel\\$'"),
        ({"patterns": ()}, r"Lora.patterns is \(\)"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        Lora(**changes)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("dense/kernel", "'dense/kernel' matches no parameter; the paths are: embedding/table"),
        ("(", "is not a regular expression"),
        ("attention_norm", r"matches layers/attention_norm/scale, float32 \[2, 32\], which is no"),
        ("final_norm", r"matches final_norm/scale, float32 \[32\]"),
    ],
)
def test_patterns_that_match_no_kernel_are_named(pattern, message):
    with pytest.raises(InputError, match=message):
        adapter_shapes(Lora(patterns=(pattern,)), tiny.decoder()[1])


def test_adapters_that_are_missing_or_of_another_model_are_named(case):
    model, params = case
    with pytest.raises(ValueError, match="have no adapters, 'lora'; the names there are: table"):
        merge_lora({"table": jnp.zeros((2, 2))}, LORA)
    other = {**params, "lora": {"dense": {"a": jnp.zeros((8, 1)), "b": jnp.zeros((1, 8))}}}
    for function in (adapted(model, LORA), adapted(tiny.bigram(60)[0], LORA)):
        with pytest.raises(ValueError, match="adapters lora/dense, but the model has no such"):
            function(other, TOKENS)
