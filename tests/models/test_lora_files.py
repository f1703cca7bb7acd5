"""Folders of adapters: bit-exact there and back, in PEFT's layout, and a reason for every one refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from regjax import models, paths
from regjax.errors import InputError
from regjax.models.lora import Lora
from regjax.models.lora_files import CONFIG, TENSORS, LoraOrigin, load_lora, save_lora
from tests import tiny
from tests.models.test_lora import random_adapters

LORA = Lora(rank=3, alpha=4.5, patterns=("attention/(query|value)/kernel$", "^head/kernel$"))
ORIGIN = LoraOrigin(model="owner/model", checksum=2**32 - 1)
OF_PEFT = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "owner/model",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 4.5,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 3,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["lm_head", "q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
"""What version 0.21.2 writes."""
QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def params():
    return tiny.decoder()[1]


@pytest.fixture(scope="module")
def adapters(params):
    return random_adapters(LORA, params)


def peft_folder(folder, config=OF_PEFT, change=lambda tensors: None, dtype=np.float32):
    """As PEFT writes it, of the matrices `matrices()`."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {name: matrix.astype(dtype) for name, matrix in matrices().items()}
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return folder


def matrices():
    """By PEFT's names: of the queries and values `[r, in]` and `[out, r]` of two layers, and the head."""
    random = np.random.default_rng(5)
    sizes = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16)}
    found = {}
    for layer in range(2):
        for module, (inputs, outputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = random.normal(size=(3, inputs))
            found[f"{name}.lora_B.weight"] = random.normal(size=(outputs, 3))
    found["base_model.model.lm_head.lora_A.weight"] = random.normal(size=(3, 32))
    found["base_model.model.lm_head.lora_B.weight"] = random.normal(size=(64, 3))
    return found


def test_round_trip_is_exact(tmp_path, params, adapters):
    for lora in (LORA, dataclasses.replace(LORA, rank_stabilised=True)):
        save_lora(tmp_path / "a" / "adapters", adapters, lora, tiny.CONFIG, ORIGIN)
        found, again, origin = load_lora(tmp_path / "a" / "adapters", tiny.CONFIG, params, ORIGIN)
        assert (again, origin) == (lora, ORIGIN)
        assert jax.tree.structure(found) == jax.tree.structure(adapters)
        for path, leaf in paths.flatten(found).items():
            assert leaf.dtype == np.float32
            assert np.asarray(leaf).tobytes() == np.asarray(paths.flatten(adapters)[path]).tobytes()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert load_lora(tmp_path / "a" / "adapters", tiny.CONFIG, shapes)[2] == ORIGIN


def test_the_folder_is_small_and_in_pefts_layout(tmp_path, adapters):
    save_lora(tmp_path / "p", adapters, LORA, tiny.CONFIG, ORIGIN)
    assert {file.name for file in (tmp_path / "p").iterdir()} == {CONFIG, TENSORS}
    tensors = load_file(tmp_path / "p" / TENSORS)
    assert {name: array.shape for name, array in tensors.items()} == {
        name: array.shape for name, array in matrices().items()
    }
    np.testing.assert_array_equal(
        tensors[QUERY], adapters["layers"]["attention"]["query"]["a"][1].T
    )
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(adapters))
    assert size < (tmp_path / "p" / TENSORS).stat().st_size < size + 2000
    config = json.loads((tmp_path / "p" / CONFIG).read_text())
    assert config == {name: OF_PEFT[name] for name in config}
    wanted = {name for name, value in OF_PEFT.items() if value}
    # What PEFT takes for granted.
    known = {"init_lora_weights", "megatron_core", "peft_version", "qalora_group_size"}
    assert wanted - known <= config.keys()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_what_peft_writes_is_read(tmp_path, params, dtype):
    found, lora, origin = load_lora(
        peft_folder(tmp_path / "p", dtype=dtype), tiny.CONFIG, params, ORIGIN
    )
    assert lora == Lora(
        3,
        4.5,
        ("^head/kernel$", "^layers/attention/query/kernel$", "^layers/attention/value/kernel$"),
    )
    assert origin == LoraOrigin()
    merged = models.merge_lora({**params, "lora": found}, lora)
    tensors = {name: matrix.astype(dtype).astype(np.float64) for name, matrix in matrices().items()}
    for place, name in (
        (lambda tree: tree["layers"]["attention"]["value"]["kernel"][0], "model.layers.0.self_attn.v_proj"),
        (lambda tree: tree["head"]["kernel"], "lm_head"),
    ):  # fmt: skip
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        # PEFT: weight + (lora_B @ lora_A) * lora_alpha / r, of a weight [out, in].
        expected = np.asarray(place(params)).T + (b @ a) * 4.5 / 3
        np.testing.assert_allclose(place(merged).T, expected, atol=2e-5)


def test_earlier_adapters_are_replaced_and_nothing_else_is(tmp_path, params, adapters):
    save_lora(tmp_path / "p", adapters, LORA, tiny.CONFIG)
    other = random_adapters(LORA, params, seed=1)
    save_lora(tmp_path / "p", other, LORA, tiny.CONFIG)
    found, _, _ = load_lora(tmp_path / "p", tiny.CONFIG, params)
    jax.tree.map(np.testing.assert_array_equal, found, other)
    (tmp_path / "p" / "model.safetensors").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("p", "file"):
        with pytest.raises(InputError, match="something other than adapters"):
            save_lora(tmp_path / name, adapters, LORA, tiny.CONFIG)
    assert (tmp_path / "p" / "model.safetensors").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; expected 'CAUSAL_LM'"),
        ({"use_dora": True}, "use_dora is True, which is not implemented"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, which is not"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not"),
        ({"bias": "all"}, "bias is 'all'; only 'none'"),
        ({"r": 0}, "r is 0; expected a positive whole number"),
        ({"r": "3"}, "r is '3'; expected a positive whole number"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a positive number"),
        ({"r": 4}, r"lm_head.lora_A.weight' has shape \[3, 32\]; .* it is \[4, 32\]"),
    ],
)
def test_configs_of_other_adapters_are_refused(tmp_path, params, changes, message):
    folder = peft_folder(tmp_path / "p", OF_PEFT | changes)
    with pytest.raises(InputError, match=message):
        load_lora(folder, tiny.CONFIG, params)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(QUERY), f"'{QUERY}' is missing; the adapters of a module are"),
        (put("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", np.zeros((3, 32))),
         "layers.2.self_attn.q_proj.lora_A.weight' is no adapter of a kernel of this model"),
        (put(QUERY, np.zeros((3, 31))), rf"'{QUERY}' has shape \[3, 31\]; .* it is \[3, 32\]"),
        (put(QUERY, np.full((3, 32), np.nan)), f"'{QUERY}' has entries that are not finite"),
        (put(QUERY, np.zeros((3, 32), np.int32)), f"'{QUERY}' is I32; expected one of F64, F32"),
    ],
)  # fmt: skip
def test_tensors_of_another_model_are_refused(tmp_path, params, change, message):
    folder = peft_folder(tmp_path / "p", change=change)
    with pytest.raises(InputError, match=message):
        load_lora(folder, tiny.CONFIG, params)


def test_a_model_of_another_width_or_depth_is_named(tmp_path, adapters):
    save_lora(tmp_path / "p", adapters, LORA, tiny.CONFIG)
    for changes, message in (
        ({"width": 48}, r"has shape \[3, 32\]; for this model and the rank in .* it is \[3, 48\]"),
        ({"layers": 1}, "layers.1.self_attn.* is no adapter of a kernel of this model"),
        ({"layers": 3}, "layers.2.self_attn.q_proj.lora_A.weight' is missing"),
        ({"tied_embeddings": True}, "lm_head.* is no adapter of a kernel of this model"),
    ):
        config = dataclasses.replace(tiny.CONFIG, **changes)
        shapes = jax.eval_shape(lambda config=config: models.split(models.create(config, 0))[1])
        with pytest.raises(InputError, match=message):
            load_lora(tmp_path / "p", config, shapes)


def test_another_model_of_the_same_sizes_is_named(tmp_path, params, adapters):
    save_lora(tmp_path / "p", adapters, LORA, tiny.CONFIG, ORIGIN)
    with pytest.raises(
        InputError, match=r"those of owner/model \(checksum 4294967295; here it is 7"
    ):
        load_lora(tmp_path / "p", tiny.CONFIG, params, LoraOrigin(checksum=7))


def test_files_that_are_missing_or_damaged_are_named(tmp_path, params, adapters):
    with pytest.raises(InputError, match=f"has no {CONFIG}; expected a folder of adapters"):
        load_lora(tmp_path, tiny.CONFIG, params)
    save_lora(tmp_path / "p", adapters, LORA, tiny.CONFIG, ORIGIN)
    whole = (tmp_path / "p" / TENSORS).read_bytes()
    (tmp_path / "p" / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"{TENSORS} is damaged"):
        load_lora(tmp_path / "p", tiny.CONFIG, params)
    (tmp_path / "p" / TENSORS).unlink()
    with pytest.raises(InputError, match=f"has no {TENSORS}; pickled adapters are never loaded"):
        load_lora(tmp_path / "p", tiny.CONFIG, params)
    for header, message in (
        ("[", "'regjax' in its header is not readable"),
        (json.dumps({"patterns": ["kernel$"], "other": 1}), "'regjax' in its header is not"),
        (json.dumps({"patterns": ["mlp/up/kernel$"]}), "by the patterns .'mlp/up/kernel.'"),
    ):
        tensors = {name: matrix.astype(np.float32) for name, matrix in matrices().items()}
        save_file(tensors, tmp_path / "p" / TENSORS, metadata={"regjax": header})
        with pytest.raises(InputError, match=message):
            load_lora(tmp_path / "p", tiny.CONFIG, params)
