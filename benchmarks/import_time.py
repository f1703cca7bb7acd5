"""How long `import regjax` takes beside `import jax, flax.nnx, optax`.

    python benchmarks/import_time.py

Interleaved runs in fresh processes; prints both medians and their ratio, which is to stay below 1.5.
"""

import statistics
import subprocess
import sys
import time

RUNS = 5
IMPORTS = {"jax, flax.nnx, optax": [], "regjax": []}


def seconds(modules: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    for modules in IMPORTS:
        seconds(modules)  # reads the files once
    for _ in range(RUNS):
        for modules, times in IMPORTS.items():
            times.append(seconds(modules))
    medians = {modules: statistics.median(times) for modules, times in IMPORTS.items()}
    for modules, median in medians.items():
        print(f"import {modules}: {median:.2f} s (median of {RUNS})")
    base, ours = medians.values()
    print(f"ratio: {ours / base:.2f}")


if __name__ == "__main__":
    main()
