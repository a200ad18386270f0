"""The command that lays runs beside published figures: microdit compare."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from microdit.errors import UserError
from microdit.terminal import console


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    table: Annotated[Literal["main", "geneval", "ablations"], typer.Option(help="Which published figures.")] = "main",
    geneval: Annotated[list[Path] | None, typer.Option(help="Folder of 'microdit geneval --out'; once for each run, in order.")] = None,
) -> None:
    """Lay runs beside what others have published, and say what may be compared and what not.

    Example: microdit compare runs/emoji runs/emoji-long

    Example: microdit compare runs/xl --table geneval --geneval geneval
    """
    from microdit.evaluation.comparison import comparison_table, comparison_words
    from microdit.evaluation.published import load_published
    from microdit.evaluation.run_results import read_run

    if geneval and len(geneval) != len(runs):
        raise UserError(f"--geneval was given {len(geneval)} times for {len(runs)} runs: give it once for each run, in order.")
    published = load_published()
    results = [read_run(run, geneval[number] if geneval else None) for number, run in enumerate(runs)]
    console.print(comparison_table(published, table, results))
    for result in results:
        for line in comparison_words(published, table, result):
            console.print(line, soft_wrap=True)
    console.print("How each figure was measured, and who says so: python -m microdit.evaluation.published")
