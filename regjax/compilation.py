"""Compiled programs kept between runs."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh


def enable_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless jax has been told where (or told not to).

    The folder is `$XDG_CACHE_HOME/regjax/xla`, by default `~/.cache/regjax/xla`;
    `JAX_COMPILATION_CACHE_DIR` takes precedence, and `JAX_ENABLE_COMPILATION_CACHE=0` turns it off.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "regjax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def kept_for(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Programs of image models for this mesh go to jax's cache, but for several devices of a CPU.

    Read back from it, such a program's sums over devices wait for each other for ever (jax 0.10.2, eight
    devices); as it was compiled it runs.
    """
    several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return not_kept() if several else contextlib.nullcontext()


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Nothing goes to jax's cache: what is compiled for devices that are not here cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)
