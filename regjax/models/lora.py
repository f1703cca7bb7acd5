"""Low-rank adapters: what a model learns beside kernels that stay as they are (Hu et al., 2021, LoRA)."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from regjax import paths
from regjax.errors import InputError
from regjax.models.apply import Apply, ModuleMethod, Params
from regjax.models.linear import AdaptedLinear, shifted

LORA = "lora"
"""`params["lora"]` holds the adapters: those of the kernel `PATH/kernel` (or of a leaf `PATH` of another
name) are `lora/PATH/a` and `lora/PATH/b`."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which kernels `W [in, out]` have adapters `A [in, r]`, `B [r, out]`, and how much these count:

        x W + scale (x A) B,    scale = alpha / r    (alpha / sqrt(r) with `rank_stabilised`)

    A begins uniform in `[-1 / sqrt(in), 1 / sqrt(in)]`, as in the released code and in PEFT (the paper
    says Gaussian), and B at 0: a model with new adapters is the model. There is no dropout.

    Raises:
        InputError: for values out of range; the message names the field.
    """

    rank: int = 8
    """r."""

    alpha: float = 16.0
    """How much the adapters count, see above."""

    patterns: tuple[str, ...] = (
        "attention/(query|key|value|output)/kernel$",
        "mlp/(gate|up|down)/kernel$",
    )
    """Regular expressions of the paths of the kernels. The default is every linear layer of a decoder but
    the head. A leaf of three dimensions `[N, in, out]` is a stack of N kernels, as scanned layers have."""

    rank_stabilised: bool = False
    """Divide alpha by the square root of the rank (Kalajdzievski, 2023, rsLoRA)."""

    path: str = ""
    """A folder as `save_lora` or PEFT writes, of adapters to begin with in place of new ones; of the same
    rank, alpha and kernels."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"Lora.rank is {self.rank}; expected at least 1.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"Lora.alpha is {self.alpha}; expected a positive number.")
        if isinstance(self.patterns, str) or not self.patterns:
            raise InputError(
                f"Lora.patterns is {self.patterns!r}; expected a tuple of regular expressions."
            )

    @property
    def scale(self) -> float:
        """What `A B` is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def adapter_shapes(lora: Lora, params: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the adapters of a model's parameters (arrays or their shapes), by path; all float32.

    >>> shapes = {"layers": {"up": {"kernel": jax.ShapeDtypeStruct((3, 4, 6), "bfloat16")}}}
    >>> found = adapter_shapes(Lora(rank=2, patterns=("kernel$",)), shapes)
    >>> {path: leaf.shape for path, leaf in found.items()}
    {'lora/layers/up/a': (3, 4, 2), 'lora/layers/up/b': (3, 2, 6)}

    Raises:
        InputError: for a pattern that is no regular expression, matches nothing, or matches a parameter
            that is no kernel: a bias, a scale, or one that has not two or three dimensions.
    """
    found = {}
    for path, leaf in paths.split_by_patterns(without_lora(params), lora.patterns)[0].items():
        module, _, name = path.rpartition("/")
        is_kernel = len(leaf.shape) in (2, 3) and jnp.issubdtype(leaf.dtype, jnp.floating)
        if name in ("bias", "scale") or not is_kernel:
            raise InputError(
                f"Lora.patterns matches {path}, {leaf.dtype} {list(leaf.shape)}, which is no kernel: "
                "expected [in, out], or [N, in, out] for a stack of layers. End the pattern in "
                "'/kernel$' or the like."
            )
        *stack, inputs, outputs = leaf.shape
        place = f"{LORA}/{module if module and name == 'kernel' else path}"
        found[f"{place}/a"] = jax.ShapeDtypeStruct((*stack, inputs, lora.rank), jnp.float32)
        found[f"{place}/b"] = jax.ShapeDtypeStruct((*stack, lora.rank, outputs), jnp.float32)
    return found


def create_lora(lora: Lora, params: Mapping[str, Any], key: Array) -> Params:
    """New adapters, the nested dict that goes to `params["lora"]`: a function of shapes and key alone.

    Raises:
        InputError: as `adapter_shapes`; a `path`: those are read, not made (`load_lora`).
    """
    if lora.path:
        raise InputError(
            f"Lora.path is {lora.path!r}: adapters from a file are read, not made; call load_lora."
        )
    found = {}
    for path, leaf in adapter_shapes(lora, params).items():
        if path.endswith("/b"):
            found[path] = jnp.zeros(leaf.shape, leaf.dtype)
            continue
        bound = leaf.shape[-2] ** -0.5
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        found[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, minval=-bound, maxval=bound)
    return paths.unflatten(found)[LORA]


def without_lora(params: Mapping[str, Any]) -> Params:
    """`params` less the adapters: those of the model itself."""
    return {name: value for name, value in params.items() if name != LORA}


def with_lora(model: Apply, lora: Lora) -> Apply:
    """The model with the adapters `params["lora"]` on its kernels; they decide which.

    In an NNX module every `nnx.Linear` computes `x W + scale (x A) B`, of the type that `x W` has, so
    that neither `W + scale A B` nor a gradient of W's shape exists when adapters alone are
    differentiated. Other kernels, and all of a model that is a bare function, are replaced by
    `W + scale A B` (`merge_lora`): right for any use of them, but a copy of those kernels, and of their
    gradient, is held meanwhile.

    Soft prompts go around it: `with_prompts(with_lora(model, lora), names)`.

    Raises (from the functions returned):
        ValueError: parameters without adapters, or adapters of a kernel that is not there.

    >>> from regjax.models import from_function
    >>> model = with_lora(from_function(lambda params, x: x @ params["w"]), Lora(rank=1, alpha=1.0))
    >>> a, b = jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 5.0]])
    >>> model({"w": jnp.eye(2), "lora": {"w": {"a": a, "b": b}}}, jnp.array([[1.0, 2.0]]))
    Array([[1., 7.]], dtype=float32)
    """
    functions: dict[str, Any] = {
        field.name: _Adapted(value, lora.scale)
        for field in dataclasses.fields(model)
        if callable(value := getattr(model, field.name))
    }
    return dataclasses.replace(model, **functions)


def merge_lora(params: Mapping[str, Any], lora: Lora) -> Params:
    """The parameters of the model itself, `W + scale A B` in place of every kernel with adapters.

    Computed in float32 and rounded to the kernel's type.

    Raises:
        ValueError: as `with_lora`.
    """
    return _shifted(without_lora(params), _pairs(_adapters_of(params)), lora.scale)


def unmerge_lora(params: Mapping[str, Any], adapters: Params, lora: Lora) -> Params:
    """What `merge_lora` was given, up to the rounding of two sums: kernels less `scale A B`, and adapters.

    Raises:
        ValueError: adapters of a kernel that is not there.
    """
    return {**_shifted(params, _pairs(adapters), -lora.scale), LORA: adapters}


Pairs = dict[str, tuple[Array, Array]]
"""A and B by what stands between `lora/` and `/a`."""


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """A function of the model's parameters, given the adapters too."""

    function: Callable[..., Any]
    scale: float

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        own, pairs = without_lora(params), _pairs(_adapters_of(params))
        if not isinstance(self.function, ModuleMethod):
            return self.function(_shifted(own, pairs, self.scale), *args, **kwargs)
        module = self.function.module(own)
        others = {
            place: pair
            for place, pair in pairs.items()
            if not isinstance(_find(module, place), nnx.Linear)
        }
        if others:
            module = self.function.module(_shifted(own, others, self.scale))
        layers = {place: _find(module, place) for place in pairs.keys() - others.keys()}
        _replace(
            module,
            {
                id(layer): AdaptedLinear(layer, *pairs[place], self.scale)
                for place, layer in layers.items()
            },
        )
        return getattr(module, self.function.name)(*args, **kwargs)


def _find(module: nnx.Module, place: str) -> Any:
    """What is at a path of a module: a module or a parameter."""
    found: Any = module
    for name in place.split("/"):
        found = getattr(found, name, None)
        if found is None:
            raise _unknown(place)
    return found


def _replace(module: nnx.Module, new: Mapping[int, nnx.Module]) -> None:
    """Puts modules in the place of others, known by their `id`, wherever these are used."""
    for _, node in list(nnx.iter_modules(module)):
        for name, child in list(vars(node).items()):
            if id(child) in new:
                setattr(node, name, new[id(child)])


def _adapters_of(params: Mapping[str, Any]) -> Params:
    if LORA not in params:
        raise ValueError(
            f"the parameters have no adapters, {LORA!r}; the names there are: {', '.join(params)}"
        )
    return params[LORA]


def _pairs(adapters: Params) -> Pairs:
    flat = paths.flatten(adapters)
    places = [path.removesuffix("/a") for path in flat if path.endswith("/a")]
    return {place: (flat[f"{place}/a"], flat[f"{place}/b"]) for place in places}


def _shifted(params: Mapping[str, Any], pairs: Pairs, scale: float) -> Params:
    """`params`, with `scale A B` added to the kernels of the pairs."""
    flat = paths.flatten(params)
    for place, (a, b) in pairs.items():
        path = next((p for p in (f"{place}/kernel", place) if p in flat), None)
        if path is None:
            raise _unknown(place)
        flat[path] = shifted(flat[path], a, b, scale)
    return paths.unflatten(flat)


def _unknown(place: str) -> ValueError:
    return ValueError(f"there are adapters {LORA}/{place}, but the model has no such kernel")
