"""What is decided by the platform, and what is refused."""

import dataclasses

import pytest

from regjax.errors import InputError
from regjax.models import DecoderConfig, Execution, resolve_execution

SMALL = DecoderConfig(layers=2)


def chosen(platform, execution=Execution(), config=SMALL):
    resolved = resolve_execution(config, execution, platform)
    config = resolved.config
    return (
        config.dtype,
        resolved.frozen_dtype,
        config.attention,
        config.rematerialisation,
        config.scan_layers,
    )


def test_each_platform_has_its_defaults():
    assert chosen("cpu") == ("float32", "float32", "xla", "none", False)
    assert chosen("gpu") == ("bfloat16", "bfloat16", "cudnn", "full", True)
    assert chosen("tpu") == ("bfloat16", "bfloat16", "splash", "full", True)
    assert chosen("cpu", config=DecoderConfig(layers=32))[-1]


def test_what_is_said_is_kept_and_nothing_of_the_model_changes():
    said = Execution("float32", "bfloat16", "xla", "dots", "loop")
    for platform in ("cpu", "gpu", "tpu"):
        assert chosen(platform, said) == ("float32", "bfloat16", "xla", "dots", False)
    assert chosen("cpu", Execution("bfloat16", layers="scan"))[:2] == ("bfloat16", "bfloat16")
    assert chosen("cpu", Execution(layers="scan"))[-1]
    resolved = resolve_execution(SMALL, Execution(), "tpu").config
    execution = ("dtype", "attention", "rematerialisation", "scan_layers")
    same = {name: getattr(SMALL, name) for name in execution}
    assert dataclasses.replace(resolved, **same) == SMALL


@pytest.mark.parametrize(
    "changes, execution, obstacle",
    [
        ({"attention_soft_cap": 50.0}, Execution(), "attention_soft_cap"),
        ({"head_dim": 36}, Execution(), "head_dim"),
        ({"head_dim": 256}, Execution(), "head_dim"),
        ({}, Execution(dtype="float32"), "dtype 'float32'"),
    ],
)
def test_cudnn_is_chosen_where_it_can_and_refused_by_name_where_not(changes, execution, obstacle):
    config = dataclasses.replace(SMALL, **changes)
    assert chosen("gpu", execution, config)[2] == "xla"
    asked = dataclasses.replace(execution, attention="cudnn")
    with pytest.raises(InputError, match=obstacle):
        resolve_execution(config, asked, "gpu")


@pytest.mark.parametrize(
    "platform, kernel", [("cpu", "splash"), ("cpu", "cudnn"), ("gpu", "splash"), ("tpu", "cudnn")]
)
def test_a_kernel_of_another_platform_is_refused(platform, kernel):
    with pytest.raises(InputError, match=f"{kernel}.*{platform}.*xla"):
        resolve_execution(SMALL, Execution(attention=kernel), platform)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Execution)])
def test_unknown_choices_are_named(field):
    with pytest.raises(InputError, match=field):
        Execution(**{field: "fast"})
    with pytest.raises(InputError, match="cuda"):
        resolve_execution(SMALL, Execution(), "cuda")
