"""The commands that give recipes: microdit new for your own pictures, microdit recipes for the bundled ones."""

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from microdit.cli.terminal import SOURCE_HELP, console, warn
from microdit.config.recipes import find_recipe, list_recipes
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.io.strict_yaml import read_yaml

if TYPE_CHECKING:
    from microdit.config.schema import Recipe

MEASURED_SECONDS = 3.0


def new(
    source: Annotated[str, typer.Argument(help=f"Pictures, or a set that is encoded already. {SOURCE_HELP}")],
    out: Annotated[Path | None, typer.Option(help="The recipe to write. (default: NAME.yaml)")] = None,
    data: Annotated[str | None, typer.Option(help="Where the pictures are to be encoded. (default: data/NAME)")] = None,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side in pixels. (default: by the autoencoder and the pictures)")] = None,
    autoencoder: Annotated[str, typer.Option(help="As for data encode.")] = "icon",
    text_encoder: Annotated[str, typer.Option(help="As for data encode.")] = "minilm",
    hold_out: Annotated[
        str | None, typer.Option(help="Share (5%) or number (500) of pictures to hold out. (default: 5% of 100 pictures or more)")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option("--from", help="Start from the weights of a run, an exported or imported model, or demo: the recipe fits them."),
    ] = None,
    chip: Annotated[
        str | None, typer.Option(help="Estimate cost and memory on this GPU, such as rtx4090. (default: measure this machine)")
    ] = None,
) -> None:
    """Look at your pictures and write a recipe for them; then print what it costs and the commands to run next.

    The recipe says how large the model is, how many steps it takes, on batches of how many pictures, which prompts show its progress
    (captions of yours), and which pictures are held out. Every line may be edited: docs/training.md explains them. Nothing is encoded
    or trained yet.

    Example: microdit new my-pictures

    Example: microdit new my-pictures --from demo

    Example: microdit new data/mine --out mine.yaml --chip rtx4090

    Example: microdit new photos --autoencoder sdxl --text-encoder dfn-clip-h --hold-out 500 --chip h100
    """
    from microdit.data.sources.subsets import HoldOut
    from microdit.io.files import write_aside
    from microdit.planning.new_recipe import Choices, new_recipe, recipe_file

    held_out = HoldOut.parse(hold_out) if hold_out else None
    found = new_recipe(source, Choices(data, autoencoder, text_encoder, resolution, held_out, init_from))
    place = out or Path(f"{found.recipe.name}.yaml")
    if place.exists():
        raise UserError(f"{place} exists already: name another file with --out, or delete it.")
    place.parent.mkdir(parents=True, exist_ok=True)
    write_aside(place, recipe_file(found, source).encode())
    console.print(joined("Written: ", styled(place)))
    for note in found.notes:
        warn(note)
    _print_bill(found.recipe, found.images, chip)
    console.print(styled("Next:"))
    run = f"runs/{found.recipe.name}"
    commands = [["data", "encode", *found.encode]] if found.encode else []
    for command in [*commands, ["train", str(place)], ["sample", run, *found.recipe.record.sample_prompts[:2]], ["evaluate", run]]:
        console.print(f"  microdit {shlex.join(command)}", soft_wrap=True)


def _print_bill(recipe: "Recipe", images: int, chip: str | None) -> None:
    """Print what the recipe costs on a chip of the table, or how long it takes on this machine."""
    from microdit.distributed import start_world, stop_world
    from microdit.planning.estimate import estimate
    from microdit.planning.estimate_tables import print_estimate
    from microdit.planning.hardware import find_machine, measurements_file
    from microdit.planning.workload import shapes_of
    from microdit.reports.formats import duration
    from microdit.training.benchmark import training_hours

    if chip:
        machine = find_machine(chip, 1, None, None, None, measurements_file())
        print_estimate(estimate({recipe.name: recipe}, machine, images=images), console)
        return
    world = start_world(recipe.engine.device)
    hours, measured = training_hours(recipe, shapes_of(recipe), world, MEASURED_SECONDS)
    stop_world()
    seen = sum(phase.steps * phase.batch_size for phase in recipe.phases)
    console.print(
        f"Training sees {seen:,} pictures and takes about {duration(3600 * hours)} on this machine: {measured.images_per_second:,.4g} "
        f"pictures a second, measured for {MEASURED_SECONDS:g} seconds on {measured.chip}. --chip NAME estimates another machine.",
        soft_wrap=True,
    )


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, such as emoji-fast or lab/masking.")] = None,
    copy: Annotated[Path | None, typer.Option(help="Copy it to this path, to edit it there.")] = None,
) -> None:
    """List the recipes that come with microdit, print one, or copy one to edit it.

    Example: microdit recipes emoji-fast --copy my.yaml
    """
    if name is None:
        if copy is not None:
            raise UserError("--copy needs the name of a recipe: `microdit recipes` lists them.")
        _show("microdit train NAME", "", list_recipes())
        _show("microdit lab run NAME", "lab/", list_recipes("lab"))
        return
    found = find_recipe(name)
    if copy is not None:
        _copy(found, copy)
        return
    for path in sorted(found.glob("*.yaml")) if found.is_dir() else [found]:
        for line in path.read_text().splitlines():
            console.print(line, soft_wrap=True)


def _show(command: str, prefix: str, summaries: dict[str, str]) -> None:
    console.print(styled(command, "bold"))
    for name, summary in summaries.items():
        console.print(joined("  ", styled(f"{prefix}{name:<18}", "cyan"), summary), soft_wrap=True)


def _copy(found: Path, to: Path) -> None:
    """Copy a recipe, a folder of them, or a study together with the recipe that it starts from."""
    copies = {found: to}
    if found.is_file() and "question" in (study := read_yaml(found)):
        base = "".join(study.get("base", "base.yaml"))  # a plain str: paths take no subclass
        copies[found.with_name(base)] = to.with_name(base)
    for target in copies.values():
        if target.exists():
            raise UserError(f"{target} exists already: choose another name.")
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    command = "lab run" if len(copies) > 1 else "train"
    console.print(f"Written: {', '.join(map(str, copies.values()))}. Use it with: microdit {command} {to}", soft_wrap=True)
