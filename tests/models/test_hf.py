"""Folders: golden numbers, what is refused and how, shards, placement."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from regjax import models
from regjax.errors import InputError
from regjax.models.hf_config import config_from_json, json_from_config
from tests.models.families import FAMILIES, GEMMA2, GEMMA3, LLAMA, LLAMA3_SCALING, MISTRAL, OPTIONS

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_logits(family):
    golden = np.load(GOLDEN / family / "logits.npz")
    apply, params = models.split(models.load(GOLDEN / family))
    ours = jax.jit(apply)(params, golden["tokens"], segment_ids=golden["mask"])
    real = golden["mask"] == 1
    assert np.abs(golden["logits"]).max() > 0.5
    np.testing.assert_allclose(np.asarray(ours)[real], golden["logits"][real], atol=5e-5, rtol=0)


def test_no_torch_is_imported():
    code = (
        "import sys; from regjax import models; "
        f"models.load({str(GOLDEN / 'llama')!r}, dtype='bfloat16'); "
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_shards_hold_the_same_tensors(folder, tmp_path):
    model = models.load(folder)
    _, params = models.split(model)
    models.save(tmp_path / "out", model.config, params, max_shard_size=6000)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert files == ["config.json", *shards, "model.safetensors.index.json"] and len(shards) > 3
    sizes = [sum(t.nbytes for t in read(tmp_path / "out" / shard).values()) for shard in shards]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 8000
    for shard in shards:
        assert all(index["weight_map"][name] == shard for name in read(tmp_path / "out" / shard))
    _, same = models.split(models.load(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    (tmp_path / "out" / shards[1]).unlink()
    with pytest.raises(InputError, match=f"{shards[1]} is missing"):
        models.load(tmp_path / "out")


def read(file):
    return safetensors.numpy.load_file(file)


def test_saved_type_and_copied_files(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code.py").write_text("raise SystemExit")
    change_config(folder, eos_token_id=[2, 5])
    model = models.load(folder)
    _, params = models.split(model)
    models.save(tmp_path / "out", model.config, params, dtype="bfloat16", source=folder)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["torch_dtype"], values["eos_token_id"]) == ("bfloat16", [2, 5])
    ours, theirs = read(tmp_path / "out" / "model.safetensors"), read(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensor, theirs[name])


def test_saving_is_whole_or_absent(tmp_path, monkeypatch):
    config = models.DecoderConfig(
        vocabulary_size=5, width=4, heads=1, key_value_heads=1, head_dim=4, mlp_width=4
    )
    _, params = models.split(models.create(config, 0))

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save(tmp_path / "out", config, params)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    models.save(tmp_path / "out", config, params)
    with pytest.raises(InputError, match="not an empty folder"):
        models.save(tmp_path / "out", config, params)
    del params["final_norm"]
    with pytest.raises(ValueError, match="final_norm/scale None"):
        models.save(tmp_path / "other", config, params)


def test_eight_devices_read_their_parts(tmp_path):
    code = f"""
import jax, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from regjax import models
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
rules = [("(query|gate|up)/kernel", P(None, "fsdp", "tensor")),
         ("(output|down)/kernel", P(None, "tensor", "fsdp")), ("mlp_norm", P(None, "fsdp"))]
apply, params = models.split(models.load({str(GOLDEN / "llama")!r}, mesh=mesh, rules=rules))
_, plain = models.split(models.load({str(GOLDEN / "llama")!r}))
jax.tree.map(np.testing.assert_array_equal, params, plain)
query = params["layers"]["attention"]["query"]["kernel"]
assert {{shard.data.shape for shard in query.addressable_shards}} == {{(3, 8, 16)}}
assert len(params["head"]["kernel"].addressable_shards) == 8
golden = np.load({str(GOLDEN / "llama" / "logits.npz")!r})
ours = np.asarray(jax.jit(apply)(params, golden["tokens"], segment_ids=golden["mask"]))
real = golden["mask"] == 1
np.testing.assert_allclose(ours[real], golden["logits"][real], atol=5e-5, rtol=0)
"""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "phi3"}, "architecture 'phi3'"),
        ({"hidden_act": "relu2"}, "activation 'relu2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": LLAMA3_SCALING | {"beta": 1}}, "'beta' with the value 1"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta is given twice, as 1.0 and as 500"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "'auto_map'"),
        ({"attention_dropout": 0.1}, "'attention_dropout' with the value 0.1"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' with the value 0.5"),
        ({"sliding_window": 4}, "'sliding_window' with the value 4"),
        ({"hidden_size": "32"}, "'hidden_size' is '32'; expected int"),
        ({"hidden_size": True}, "'hidden_size' is True; expected int"),
        ({"vocab_size": None}, "'vocab_size' is None; expected int"),
        ({"num_key_value_heads": 3}, "key_value_heads"),
    ],
)
def test_config_that_is_not_understood_is_named(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        models.load(folder)
    assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    "values, message",
    [
        (GEMMA3 | {"attn_logit_softcapping": 3.0}, "'attn_logit_softcapping'"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        (GEMMA3 | {"layer_types": ["full_attention"]}, "'layer_types'"),
        (GEMMA2 | {"layer_types": ["chunked_attention"] * 3}, "'layer_types'"),
        (GEMMA2 | {"sliding_window": None}, "sliding_window"),
        (GEMMA2 | {"sliding_window_size": 7}, "sliding_window is given twice, as 5 and as 7"),
        (MISTRAL | {"attention_bias": True}, "'attention_bias' with the value True"),
        ({"hidden_size": 3}, "'model_type' is missing"),
    ],
)
def test_options_of_other_families_are_named(values, message):
    with pytest.raises(InputError, match=message):
        config_from_json(values)


@pytest.mark.parametrize("name", OPTIONS)
def test_config_survives_json(name):
    config = config_from_json(OPTIONS[name])
    values = json.loads(json.dumps(json_from_config(config)))
    assert config_from_json(values) == config
    assert "global" in config.layer_kinds or config.sliding_window is not None


def test_harmless_and_off_options_are_read():
    values = LLAMA | {"use_cache": False, "torch_dtype": "bfloat16", "attention_dropout": 0.0}
    assert config_from_json(values | {"sliding_window": None}) == config_from_json(LLAMA)


def test_llama3_scaling_is_read_number_by_number():
    config = config_from_json(LLAMA | {"rope_scaling": LLAMA3_SCALING})
    assert config.rope_scaling == models.RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
    assert config.rope_theta == 500.0


def test_mix_that_no_family_has_is_named():
    config = models.DecoderConfig(post_norms=True)
    with pytest.raises(InputError, match="post_norms=True"):
        json_from_config(config)
    with pytest.raises(InputError, match="mlp_bias=True"):
        json_from_config(models.DecoderConfig(mlp_bias=True), "qwen3")
    with pytest.raises(InputError, match="'gpt2' is not one of"):
        json_from_config(models.DecoderConfig(), "gpt2")


KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(KEY), f"{KEY}.* is missing"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].T.copy()}), f"{KEY}.*has shape"),
        (lambda tensors: tensors.update({KEY: tensors[KEY].astype(np.int8)}), f"{KEY}.*is I8"),
        (lambda tensors: tensors.update(extra=np.ones(2)), "'extra' has no place"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        models.load(folder)


def test_tied_head_in_the_file_must_be_the_table(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "qwen2"))
    table = "model.embed_tokens.weight"
    change_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors[table].copy()})
    )
    assert models.load(folder).config.tied_embeddings
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": -tensors[table]}))
    with pytest.raises(InputError, match=r"'lm_head.weight' differs"):
        models.load(folder)


def test_pickles_and_empty_folders_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: pickles can run code"):
        models.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"neither model.safetensors"):
        models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not readable JSON"):
        models.load(folder)


def test_index_cannot_point_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {KEY: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="weight_map"):
        models.load(folder)


def test_unknown_names_are_explained(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="no folder with a model, nor a hub id"):
        models.resolve(tmp_path / "nowhere" / "at" / "all")
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"'owner/model' is no local folder.*offline"):
        models.resolve("owner/model")


@hypothesis.settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_damaged_files_are_refused(tmp_path, data):
    """Cut short, or with any byte of the header's length changed: an InputError, never a crash."""
    content = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at, flip = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 255))
        content = content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        models.load(tmp_path)
