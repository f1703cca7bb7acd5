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


def options(mesh: Mesh) -> dict[str, str]:
    """The compiler's options for programs of image models.

    A CPU's compiler orders a program for as much to run at once as can. Sums over devices may then come in
    another order on each, and wait for each other for ever (jax 0.10.2); in the order of least memory they
    do not, and steps are faster.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


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
