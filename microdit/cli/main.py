"""The command line: its application, and how errors end it. The commands are in the other files of this folder."""

import errno
import os
import re
import sys
from importlib.metadata import version

import typer

from microdit.cli.data import data_app
from microdit.cli.evaluate import compare, draw, evaluate, geneval, prefer
from microdit.cli.export import export, import_minit2i, import_official
from microdit.cli.lab import lab_app
from microdit.cli.plan import bench, budget
from microdit.cli.recipes import new, recipes
from microdit.cli.sample import grid, sample
from microdit.cli.serve import app as web_page
from microdit.cli.terminal import print_traceback, take_logs
from microdit.cli.train import report, runs, train, train_autoencoder
from microdit.errors import StoppedError, UserError
from microdit.io.console import PlainConsole, joined, styled
from microdit.process_limits import raise_limit

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the machine's, not the program's
OLDEST_TORCH = (2, 9)  # as pyproject.toml says

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, help=(
    "Train text-to-image diffusion transformers from scratch on a micro-budget.\n\n"
    "The usual order: [bold]new[/] writes a recipe for your pictures and prints the commands that follow: [bold]data encode[/] them once, "
    "[bold]train[/] the recipe, [bold]sample[/] pictures, [bold]evaluate[/] the run."
))  # fmt: skip
app.add_typer(data_app, name="data")
app.add_typer(lab_app, name="lab")


def main() -> None:
    """Run a command. A `UserError` ends it with one sentence and exit code 1, instead of a traceback."""
    take_logs()
    raise_limit()
    try:
        _check_torch_version()
        app(args=_repeat_option(sys.argv[1:], "--resolutions"))
    except UserError as error:
        rank = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        title = styled("Stopped:", "yellow") if isinstance(error, StoppedError) else styled("Error:", "bold red")
        PlainConsole(stderr=True).print(joined(title, f"{rank} {error}"), soft_wrap=True)
        code = error.exit_code if isinstance(error, StoppedError) else 1
        # End at once, without waiting for threads that hang or for other processes that may never answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = f" ({error.filename})" if error.filename else ""
            sentence = f" {error.strerror}{where}: make room there, or choose another place, and start the command again."
            PlainConsole(stderr=True).print(joined(styled("Error:", "bold red"), sentence), soft_wrap=True)
        else:
            print_traceback()
        sys.exit(1)


def _check_torch_version() -> None:
    """Raise UserError if torch is too old, before its import fails with a traceback."""
    found = version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"microdit needs torch {oldest} or newer, and {found} is installed: pip install --upgrade torch.")


def _repeat_option(arguments: list[str], option: str) -> list[str]:
    """Rewrite `--resolutions 256 512` as `--resolutions 256 --resolutions 512`, the only form that click understands."""
    spread: list[str] = []
    for argument in arguments:
        if argument.isdigit() and len(spread) >= 2 and spread[-2] == option and spread[-1].isdigit():
            spread.append(option)
        spread.append(argument)
    return spread


for command in (new, train, report, runs, recipes, grid, budget, bench, evaluate, draw, prefer, geneval, compare, export):
    app.command()(command)
app.command(no_args_is_help=True)(sample)
app.command("train-autoencoder")(train_autoencoder)
app.command("app")(web_page)
app.command("import-official")(import_official)
app.command("import-minit2i")(import_minit2i)


if __name__ == "__main__":
    main()
