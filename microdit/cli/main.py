"""The command line: its application, and how errors end it. The commands are in the other files of this folder."""

import errno
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import microdit
from microdit.cli.benchmarks import dpg, geneval
from microdit.cli.data import data_app
from microdit.cli.evaluate import compare, draw, evaluate, prefer
from microdit.cli.export import export, import_minit2i, import_official
from microdit.cli.lab import lab_app
from microdit.cli.plan import bench, budget, doctor
from microdit.cli.recipes import new, recipes
from microdit.cli.sample import explain, grid, sample
from microdit.cli.serve import app as web_page
from microdit.cli.terminal import console, print_traceback, take_logs
from microdit.cli.train import report, runs, train, train_autoencoder
from microdit.errors import StoppedError, UserError
from microdit.io.console import PlainConsole, joined, styled
from microdit.io.near_names import did_you_mean
from microdit.process_limits import raise_limit

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the machine's, not the program's
PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM)  # of what was named
OLDEST_TORCH = (2, 9)  # as pyproject.toml says


class Commands(TyperGroup):
    """All commands. The error for an unknown name suggests the nearest one, or for that of a subcommand its full name."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is None and not ctx.resilient_parsing:  # that is how a shell completes names
            groups = ((name, group) for name, group in self.commands.items() if isinstance(group, TyperGroup))
            within = next((f" Did you mean {name} {cmd_name}?" for name, group in groups if cmd_name in group.commands), None)
            near = within or did_you_mean(cmd_name, self.commands)
            raise UserError(f"There is no command '{cmd_name}'.{near} 'microdit --help' lists them.")
        return command


class Command(TyperCommand):
    """A command. If it takes a recipe's settings, the error for an unknown option of such a name says how they are written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # click's class, which some versions of typer hold a copy of
            if type(error).__name__ == "NoSuchOption" and any(parameter.name == "overrides" for parameter in self.params):
                _explain_settings(error.option_name)  # type: ignore[attr-defined]
            raise


def _explain_settings(option: str) -> None:
    """Raise UserError if a recipe has a setting of the name of this option."""
    from microdit.config.schema import Recipe
    from microdit.io.strict_yaml import known_keys

    name = option.lstrip("-").replace("-", "_")
    settings = [f"{key}=..." for key in known_keys(Recipe) if key.rpartition(".")[2] == name]
    if settings:
        raise UserError(f"There is no option {option}. Settings of a recipe are written without dashes: {' or '.join(settings)}")


app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, help=(
    "Train text-to-image diffusion transformers from scratch on a micro-budget.\n\n"
    "The usual order: [bold]new[/] writes a recipe for your pictures and prints the commands that follow: [bold]data encode[/] them once, "
    "[bold]train[/] the recipe, [bold]sample[/] pictures, [bold]evaluate[/] the run."
))  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"microdit {microdit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)] = False,
) -> None:
    """Options of microdit itself, without a command."""


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
        if isinstance(error, OSError) and error.errno in (*DISK_ERRORS, *PATH_ERRORS):
            where = f" ({error.filename!s:.300})" if error.filename else ""
            fix = "make room there, or choose another place" if error.errno in DISK_ERRORS else "choose another path, or correct this one"
            sentence = f" {error.strerror}{where}: {fix}, and start the command again."
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


# In the order of use. Typer lists commands first and groups after them, but panels in the order in which it meets them.
PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Data": {"new": new, "train-autoencoder": train_autoencoder},
    "Train": {"recipes": recipes, "train": train, "runs": runs, "report": report},
    "Draw": {"sample": sample, "grid": grid, "explain": explain, "app": web_page},
    "Measure": {"evaluate": evaluate, "compare": compare, "geneval": geneval, "dpg": dpg, "draw": draw, "prefer": prefer},
    "Share": {"export": export, "import-official": import_official, "import-minit2i": import_minit2i},
    "Plan": {"budget": budget, "bench": bench, "doctor": doctor},
}
for panel, commands in PANELS.items():
    for name, command in commands.items():
        app.command(name, cls=Command, rich_help_panel=panel, no_args_is_help=command is sample)(command)
app.add_typer(data_app, name="data", rich_help_panel="Data")
app.add_typer(lab_app, name="lab", rich_help_panel="Measure")


if __name__ == "__main__":
    main()
