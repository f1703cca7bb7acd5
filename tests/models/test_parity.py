"""Against transformers on torch: random weights, every family, every option that matters."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from regjax import models
from tests.models.families import FAMILIES, OPTIONS

pytest.importorskip("torch")

from tests.models import torch_models

TOLERANCE = 5e-5
LENGTH = 24


@pytest.fixture(scope="module", params=OPTIONS)
def case(request, tmp_path_factory):
    """A transformers model, the folder it was saved to, and our `(config, apply, params)`."""
    values = OPTIONS[request.param]
    reference = torch_models.random_model(values)
    folder = tmp_path_factory.mktemp(request.param)
    torch_models.write_folder(reference, values, folder)
    model = models.load(folder)
    apply, params = models.split(model)
    return reference, folder, model.config, jax.jit(apply), params


@pytest.fixture
def tokens():
    return np.random.default_rng(1).integers(1, 61, (2, LENGTH))


def difference(ours, theirs):
    assert np.abs(theirs).max() > 0.5, "a reference of zeros shows nothing"
    return np.abs(np.asarray(ours) - theirs).max()


def test_logits(case, tokens):
    reference, _, _, apply, params = case
    ours = apply(params, tokens, segment_ids=np.ones_like(tokens))
    assert ours.dtype == np.float32
    assert difference(ours, torch_models.logits(reference, tokens)) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(case, tokens, side):
    reference, _, _, apply, params = case
    mask = np.ones_like(tokens)
    mask[0, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    ours = np.asarray(apply(params, tokens, segment_ids=mask))
    theirs = torch_models.logits(reference, tokens, mask=mask)
    assert difference(ours[mask == 1], theirs[mask == 1]) < TOLERANCE


def test_packed_segments_equal_each_alone(case, tokens):
    reference, _, _, apply, params = case
    segment_ids = np.stack([np.repeat([1, 2, 3, 0], (6, 11, 5, 2)), np.repeat([1, 2], (3, 21))])
    ours = np.asarray(apply(params, tokens, segment_ids=segment_ids))
    for row, segments in ((0, (1, 2, 3)), (1, (1, 2))):
        for segment in segments:
            inside = segment_ids[row] == segment
            theirs = torch_models.logits(reference, tokens[row : row + 1, inside])
            assert difference(ours[row : row + 1, inside], theirs) < TOLERANCE


def test_saved_folder_is_read_by_transformers_and_by_us(case, tokens, tmp_path):
    reference, folder, config, _, params = case
    models.save(tmp_path / "out", config, params, source=folder)
    again = torch_models.read_folder(tmp_path / "out")
    np.testing.assert_array_equal(
        torch_models.logits(again, tokens), torch_models.logits(reference, tokens)
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, name) == getattr(reference.config, name)
    reloaded = models.load(tmp_path / "out")
    assert reloaded.config == config
    same_apply, same_params = models.split(reloaded)
    assert same_apply == models.split(models.load(folder))[0]
    jax.tree.map(np.testing.assert_array_equal, same_params, params)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_in(name, tmp_path, tokens):
    reference = torch_models.random_model(FAMILIES[name])
    torch_models.write_folder(reference, FAMILIES[name], tmp_path)
    apply, params = models.split(models.load(tmp_path))
    embeddings = np.random.default_rng(2).normal(size=(2, LENGTH, 32)).astype(np.float32)
    run = jax.jit(lambda params, embeddings: apply(params, embeddings=embeddings))
    theirs = torch_models.logits(reference, embeddings=embeddings)
    assert difference(run(params, embeddings), theirs) < TOLERANCE
    looked_up = apply.embed(params, tokens)
    assert difference(run(params, looked_up), torch_models.logits(reference, tokens)) < TOLERANCE


def test_family_is_kept_when_asked_for(tmp_path, tokens):
    values = OPTIONS["mistral-no-window"]
    reference = torch_models.random_model(values)
    torch_models.write_folder(reference, values, tmp_path / "in")
    model = models.load(tmp_path / "in")
    _, params = models.split(model)
    models.save(tmp_path / "out", model.config, params, model_type="mistral")
    again = torch_models.read_folder(tmp_path / "out")
    assert type(again) is type(reference)
    np.testing.assert_array_equal(
        torch_models.logits(again, tokens), torch_models.logits(reference, tokens)
    )


def test_bfloat16_folder_and_compute(tmp_path, tokens):
    import torch

    values = OPTIONS["gemma2"]
    reference = torch_models.random_model(values)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.bfloat16())
    exact = torch_models.logits(reference, tokens)
    torch_models.write_folder(copy.deepcopy(reference).to(torch.bfloat16), values, tmp_path)
    apply, params = models.split(models.load(tmp_path))
    assert difference(jax.jit(apply)(params, tokens), exact) < TOLERANCE
    apply, params = models.split(models.load(tmp_path, dtype="bfloat16"))
    assert all(leaf.dtype == jax.numpy.bfloat16 for leaf in jax.tree.leaves(params))
    theirs = torch_models.logits(torch_models.read_folder(tmp_path), tokens)
    ours = np.asarray(jax.jit(apply)(params, tokens))
    # Two bfloat16 computations differ as much as each does from the float32 one.
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


def test_trained_from_scratch_config_reaches_transformers(tmp_path, tokens):
    config = models.DecoderConfig(
        vocabulary_size=61,
        width=32,
        heads=2,
        key_value_heads=2,
        head_dim=16,
        mlp_width=24,
        initializer_scale=0.2,
    )
    for changes in (
        {},
        {"rope_scaling": models.RopeScaling("linear", factor=2.0), "tied_embeddings": True},
        {"attention_pattern": ("local",), "sliding_window": 3},
        {"attention_bias": True, "attention_pattern": ("global", "local"), "sliding_window": 3},
        {"query_key_norm": True, "key_value_heads": 1},
    ):
        changed = dataclasses.replace(config, **changes)
        apply, params = models.split(models.create(changed, 3))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        models.save(folder, changed, params)
        theirs = torch_models.logits(torch_models.read_folder(folder), tokens)
        assert difference(jax.jit(apply)(params, tokens), theirs) < TOLERANCE
