"""Commands for a trained model: `regjax eval`, `predict` and `export`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from regjax.errors import InputError


def evaluate(arguments: Sequence[str]) -> None:
    """score a file with known scores and report every metric"""
    import tyro

    from regjax.evaluate import evaluate as run
    from regjax.evaluation import READ_OUTS, to_json
    from regjax.files import write_json
    from regjax.log import print_table

    def parsed(
        model: str,
        input: str,
        score_field: str = "score",
        columns: tuple[str, ...] = (),
        on_bad_record: Literal["stop", "skip"] = "stop",
        output: Path | None = None,
        batch_size: int = 64,
    ) -> None:
        """Scores records whose true score is known, and reports the metrics of every read-out.

        Args:
            model: A workdir, a stage's model folder, or an exported one.
            input: Records: .jsonl, .csv, .tsv (or .gz of one), or tfds:NAME:SPLIT.
            score_field: Field that holds the true score.
            columns: Names of the columns of a CSV or TSV without a header.
            on_bad_record: Records that cannot be used: stop, or skip and count them.
            output: Where to write the report as JSON.
            batch_size: Rows scored at once, rounded up to what divides among the devices.
        """
        if output is not None and not output.parent.is_dir():
            raise InputError(f"{output.parent} is no folder: make it, or give another --output")
        report = run(
            model, input, score_field=score_field, columns=columns,
            on_bad_record=on_bad_record, batch_size=batch_size,
        ).report  # fmt: skip
        figures = {name: name for name in ("rmse", "mae", "pearson", "spearman", "kendall")}
        figures["within 0.5"] = "accuracy_within"
        rows = [
            {"read-out": read_out.replace("normalized_", "norm. ")}
            | {label: report[f"{read_out}/{name}"] for label, name in figures.items()}
            for read_out in READ_OUTS
        ]
        title = (
            f"{Path(input).name}: {report['count']:.0f} records, {report['skipped']:.0f} skipped\n"
            f"standard deviation of the true scores: {report['target_std']:.3f}"
        )
        print_table(title, rows)
        shared = [
            {
                "the distribution's": name,
                "value": report[name],
                "95 % from": report[f"{name}_low"],
                "to": report[f"{name}_high"],
            }
            for name in ("crps", "coverage_90", "grid_mass")
        ]
        print_table("", shared)
        if output is not None:
            write_json(output, to_json(report))

    tyro.cli(parsed, prog="regjax eval", args=arguments)


def predict(arguments: Sequence[str]) -> None:
    """add score, distribution and grid mass to every record of a JSONL file"""
    import jax
    import tyro

    from regjax.predict import predict as run

    def parsed(
        model: str,
        input: Path,
        output: Path,
        read_out: Literal["", "mean", "normalized_mean", "median", "mode"] = "",
        batch_size: int = 64,
        on_bad_record: Literal["stop", "skip"] = "stop",
        overwrite: bool = False,
    ) -> None:
        """Scores the records of a JSONL file; a stopped call goes on where it was.

        Args:
            model: A workdir, a stage's model folder, or an exported one.
            input: Records with the fields of the model's template: .jsonl or .jsonl.gz.
            output: The same records with predicted_score, distribution, grid_mass and line.
            read_out: How a score is read from the distribution; empty: the model's own.
            batch_size: Rows scored at once, rounded up to what divides among the devices.
            on_bad_record: Records that cannot be used: stop, or skip and list them.
            overwrite: Replace an output that exists.
        """
        count = run(
            model, input, output, read_out=read_out, batch_size=batch_size,
            on_bad_record=on_bad_record, overwrite=overwrite,
        )  # fmt: skip
        if jax.process_index() == 0:
            print(f"{count} records scored: {output}")

    tyro.cli(parsed, prog="regjax predict", args=arguments)


def export(arguments: Sequence[str]) -> None:
    """write a trained model as a folder that transformers and regjax load"""
    import tyro

    from regjax.reader import export as run

    def parsed(
        workdir: Path, output: Path, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        """Writes config.json, model.safetensors, the tokenizer and regjax.json.

        Args:
            workdir: A workdir (its last stage) or a stage's folder in it.
            output: The folder to write; must not exist.
            dtype: Type of the weights.
        """
        run(workdir, output, dtype=dtype)
        print(output)

    tyro.cli(parsed, prog="regjax export", args=arguments)
