"""Pictures of many prompts, one file each, for evaluations: the same whatever the number of processes, and resumable."""

import json
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.painters import DrawSettings, Painter
from microdit.files import write_aside
from microdit.folder_lock import sole_writer
from microdit.foreign_json import parse_json

SETTINGS = "settings.json"


def picture_name(number: int) -> str:
    return f"{number:04}.png"


def draw_pictures(
    painter: Painter,
    prompts: list[str],
    folder: Path,
    settings: DrawSettings,
    world: World,
    name: Callable[[int], str] = picture_name,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """`folder`/`name(i)` for each prompt; those that are there already are kept. Every process must call this; all are drawn when it ends.

    Pictures are drawn in fixed groups, so that each is the same for any number of processes. `on_step(n)`: after n more picture-steps,
    of this process's share (see `steps_to_draw`). Raises UserError if the folder holds pictures made otherwise, or another program draws
    there.
    """
    with sole_writer(folder, world):
        objection = world.share(_claim(folder, painter, prompts, settings) if world.is_main else None)
        if objection:
            raise UserError(objection)
        for start in _starts(len(prompts), painter.batch, world):
            numbers = range(start, min(start + painter.batch, len(prompts)))
            missing = [number for number in numbers if not (folder / name(number)).is_file()]
            if not missing:
                if on_step:
                    on_step(len(numbers) * settings.num_inference_steps)
                continue
            images = painter([prompts[number] for number in numbers], settings.seed + start, on_step)
            for number in missing:
                png = BytesIO()
                images[number - start].save(png, "PNG")
                write_aside(folder / name(number), png.getvalue())
        world.wait_for_all()


def steps_to_draw(count: int, painter: Painter, settings: DrawSettings, world: World) -> int:
    """Picture-steps of this process's share of `count` pictures."""
    return settings.num_inference_steps * sum(min(painter.batch, count - start) for start in _starts(count, painter.batch, world))


def read_prompt_file(path: Path) -> list[str]:
    """One prompt a line: JSON with a key `prompt` (.jsonl), or plain text. Raises UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [parse_json(line)["prompt"] if path.suffix == ".jsonl" else line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} must hold one JSON object with a key "prompt" in each line ({error}).') from error
    if not prompts:
        raise UserError(f"There is no prompt in {path}: write one in each line.")
    return prompts


def _starts(count: int, batch: int, world: World) -> range:
    return range(world.rank * batch, count, world.size * batch)


def _claim(folder: Path, painter: Painter, prompts: list[str], settings: DrawSettings) -> str | None:
    """Write down what is drawn here; a sentence if it is something else already."""
    about = {**painter.about, "prompts": prompts, **asdict(settings)}
    path = folder / SETTINGS
    if path.is_file():
        try:
            before = {"dtype": "float32", **parse_json(path.read_bytes())}  # earlier versions drew in no other
        except (OSError, ValueError, TypeError):
            return f"{path} is damaged, and nothing else says how the pictures beside it were made: choose another --out, or delete them."
        changed = [key for key in about if before.get(key) != about[key]]
        return f"{folder} holds pictures made with another {', '.join(changed)}: choose another --out, or delete it." if changed else None
    write_aside(folder / "prompts.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode())
    write_aside(path, json.dumps(about, indent=1).encode())
    return None
