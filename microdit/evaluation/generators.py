"""Whatever makes pictures of prompts: a run of ours, or any text-to-image pipeline of diffusers, behind one protocol.

Pictures of many prompts, one file each, for evaluations: the same whatever the number of processes, and resumable.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from microdit.distributed import World
from microdit.encoders.model_files import dtype_argument, is_place, lasting_name, loading
from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.io.locks import sole_writer
from microdit.io.text import parse_json
from microdit.pipelines.load import OpenedModel, is_our_pipeline, open_model
from microdit.pipelines.pipeline import BATCH
from microdit.pipelines.settings import SamplerSettings
from microdit.reports.run_folder import is_run

FOREIGN_BATCH = 8  # pictures that a pipeline of unknown size draws at a time


@dataclass(frozen=True)
class DrawSettings:
    """Picture number i starts from the noise of `seed` + i."""

    num_inference_steps: int = 18
    guidance_scale: float = 2.0
    seed: int = 0
    weights: str | None = None  # of a run: model, ema, or ema-DECAY

    @property
    def sampler(self) -> SamplerSettings:
        """Of a run."""
        return SamplerSettings(self.num_inference_steps, self.guidance_scale)


@dataclass(frozen=True)
class Compute:
    """Where pictures are drawn, in what numbers, and how many at a time: all of which changes them by rounding alone."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int | None = None  # None: 64, of other pipelines 8

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


ON_CPU = Compute()


class Painter(Protocol):
    """`about` tells its pictures from those of others; `batch` is how many it draws at a time."""

    about: dict[str, Any]
    batch: int

    def __call__(self, prompts: list[str], seed: int, on_step: Callable[[int], None] | None = None) -> list[Image.Image]:
        """One picture a prompt, RGB; the first starts from the noise of `seed`, the next of `seed` + 1.

        `on_step(n)`: after n more picture-steps.
        """
        ...


def open_painter(place: str, settings: DrawSettings, warn: Callable[[str], None], compute: Compute = ON_CPU) -> Painter:
    """`place`: a run folder, the folder of a diffusers pipeline, or its id of the hub. Raises UserError."""
    if is_run(Path(place)) or is_our_pipeline(place):
        return RunPainter(open_model(place, warn, settings.weights), settings, warn, compute)
    if (Path(place) / "model_index.json").is_file() or (not Path(place).exists() and is_place(place)):
        return DiffusersPainter(place, settings, compute)
    raise UserError(
        f"{place} is neither a run folder (no recipe.yaml in it) nor a diffusers pipeline (no model_index.json): name a folder that "
        "'microdit train' wrote, or a pipeline's folder or hub id."
    )


class RunPainter:
    """A model of ours: a run's checkpoint, or one that was exported."""

    def __init__(self, opened: OpenedModel, settings: DrawSettings, warn: Callable[[str], None], compute: Compute):
        self.about = {**opened.about, "dtype": compute.dtype_name}
        self.batch = compute.batch_size or BATCH
        self._pipeline, self._settings, self._warn = opened.pipeline.to(compute.device, compute.dtype), settings, warn

    def __call__(self, prompts: list[str], seed: int, on_step: Callable[[int], None] | None = None) -> list[Image.Image]:
        return self._pipeline.generate(prompts, self._settings.sampler, seed, on_step, warn=self._warn, batch_size=self.batch)


class DiffusersPainter:
    """A text-to-image pipeline of diffusers. Only safetensors are read."""

    def __init__(self, place: str, settings: DrawSettings, compute: Compute):
        """Raises UserError if it cannot be loaded, or does not take prompts, steps, a guidance scale and generators."""
        from diffusers import DiffusionPipeline  # slow to import

        if settings.weights is not None:
            raise UserError(f"--weights {settings.weights} chooses among the weights of a run, and {place} is a pipeline: leave it out.")
        with loading(Path(place)):
            self._pipeline = DiffusionPipeline.from_pretrained(place, use_safetensors=True, **dtype_argument(compute.dtype))
        self._pipeline.to(compute.device)
        wanted = {"prompt", "num_inference_steps", "guidance_scale", "generator"}
        missing = sorted(wanted - set(inspect.signature(self._pipeline.__call__).parameters))
        if missing:
            raise UserError(f"{place} is a {type(self._pipeline).__name__}, which takes no {', '.join(missing)}: it cannot be evaluated.")
        self._pipeline.set_progress_bar_config(disable=True)
        self._settings = settings
        self.batch = compute.batch_size or FOREIGN_BATCH
        self.about = {"pipeline": lasting_name(place), "class": type(self._pipeline).__name__, "dtype": compute.dtype_name}

    def __call__(self, prompts: list[str], seed: int, on_step: Callable[[int], None] | None = None) -> list[Image.Image]:
        settings = self._settings
        images: list[Image.Image] = []
        for start in range(0, len(prompts), self.batch):
            group = prompts[start : start + self.batch]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(group))]
            images += self._pipeline(
                prompt=group,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                generator=generators,
            ).images
            if on_step:
                on_step(len(group) * settings.num_inference_steps)
        return [image.convert("RGB") for image in images]


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
