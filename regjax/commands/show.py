"""Commands that show something: `regjax plot` and `grid`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated


def plot(arguments: Sequence[str]) -> None:
    """draw a run: learning curve, predicted against true, reliability, error by score"""
    import tyro

    from regjax.plots import plot_workdir

    def parsed(workdir: Annotated[Path, tyro.conf.Positional]) -> None:
        """Draws what a run left behind as PNG files.

        Args:
            workdir: The folder given to `regjax train --workdir`.
        """
        for path in plot_workdir(workdir):
            print(path)

    tyro.cli(parsed, prog="regjax plot", args=arguments)


def grid(arguments: Sequence[str]) -> None:
    """show how a tokenizer writes the values of a score grid"""
    import tyro

    from regjax.data import load_tokenizer
    from regjax.log import print_table
    from regjax.scores import ScoreGrid

    def parsed(tokenizer: str, values: str, prefix: str = "", text: str = "{}") -> None:
        """Prints the tokens of every value after a prefix, or says which value cannot be told apart.

        Args:
            tokenizer: Folder or hub id.
            values: 0:100, 0:5:0.1 (start:stop:step, the end included) or 1,2.5,10.
            prefix: The text that stands before the score.
            text: Pattern around each number, such as " {}" for a space before it.
        """
        loaded = load_tokenizer(tokenizer)
        codec = ScoreGrid.parse(values, text=text).tokenize(loaded, prefix)
        rows = [{**row._asdict(), "value": f"{row.value:.9g}"} for row in codec.table(loaded)]
        print_table(f"{len(rows)} values after {prefix!r}", rows)
        if codec.terminator is not None:
            print(f"terminator: token {codec.terminator} ends every value")

    tyro.cli(parsed, prog="regjax grid", args=arguments)
