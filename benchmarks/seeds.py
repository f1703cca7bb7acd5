"""The results of one config under several seeds as one Markdown table: mean and standard deviation.

python benchmarks/seeds.py runs/stsb_0 runs/stsb_1 runs/stsb_2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

FIGURES = ("rmse", "mae", "pearson", "spearman")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    tables = [
        json.loads((folder / "results.json").read_text())["table"]
        for folder in parser.parse_args().workdirs
    ]
    print("| trained with | read-out | RMSE | MAE | Pearson | Spearman |")
    print("|---|---|---:|---:|---:|---:|")
    for rows in zip(*tables, strict=True):
        name = {(row["stage"], row["read-out"]) for row in rows}
        if len(name) != 1:
            raise SystemExit(f"the workdirs are not of one config: {sorted(name)}")
        cells = []
        for figure in FIGURES:
            found = np.array([row[figure] for row in rows], float)
            cells.append(f"{found.mean():.3f} ± {found.std(ddof=1):.3f}")
        print("|", " | ".join([*name.pop(), *cells]), "|")


if __name__ == "__main__":
    main()
