"""Pictures of many prompts, one file each, for evaluations: the same whatever the number of processes, and resumable."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

from microdit.errors import UserError
from microdit.files import write_aside
from microdit.pipeline import BATCH, Pipeline

SETTINGS = "settings.json"


@dataclass(frozen=True)
class DrawSettings:
    """Picture number i starts from the noise of `seed` + i."""

    num_inference_steps: int = 18
    guidance_scale: float = 2.0
    seed: int = 0
    weights: str | None = None


def draw_pictures(
    run: Path,
    prompts: list[str],
    folder: Path,
    settings: DrawSettings,
    warn: Callable[[str], None],
    name: Callable[[int], str] = "{:04}.png".format,
    share: tuple[int, int] = (0, 1),
    on_step: Callable[[int], None] | None = None,
) -> None:
    """`folder`/`name(i)` for each prompt; those that are there already are kept. `share`: this process's number and their count.

    Pictures are drawn in fixed groups, so that each is the same for any number of processes. `on_step(n)`: after n more picture-steps.
    Raises UserError if the folder holds pictures of another run, checkpoint, prompts or settings.
    """
    pipeline, checkpoint = Pipeline.from_run(run, warn, settings.weights)
    about = {"run": str(run), "step": checkpoint.step, "prompts": prompts, **asdict(settings)}
    _claim(folder, about)
    rank, world = share
    for start in range(0, len(prompts), BATCH)[rank::world]:
        numbers = range(start, min(start + BATCH, len(prompts)))
        missing = [number for number in numbers if not (folder / name(number)).is_file()]
        if not missing:
            continue
        group = [prompts[number] for number in numbers]
        images = pipeline(group, settings.num_inference_steps, settings.guidance_scale, settings.seed + start, on_step)
        for number in missing:
            png = BytesIO()
            images[number - start].save(png, "PNG")
            write_aside(folder / name(number), png.getvalue())


def read_prompt_file(path: Path) -> list[str]:
    """One prompt a line: JSON with a key `prompt` (.jsonl), or plain text. Raises UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] if path.suffix == ".jsonl" else line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} must hold one JSON object with a key "prompt" in each line ({error}).') from error
    if not prompts:
        raise UserError(f"There is no prompt in {path}: write one in each line.")
    return prompts


def _claim(folder: Path, about: dict[str, object]) -> None:
    path = folder / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [key for key in about if before.get(key) != about[key]]
        if changed:
            raise UserError(f"{folder} holds pictures made with another {', '.join(changed)}: choose another --out, or delete it.")
        return
    write_aside(path, json.dumps(about, indent=1).encode())
    prompts = about["prompts"]
    assert isinstance(prompts, list)
    write_aside(folder / "prompts.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode())
