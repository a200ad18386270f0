"""Image generators for evaluation, a MicroDiT model or any text-to-image pipeline of diffusers, behind one interface.

`draw_pictures` writes the images of many prompts, one file each. It resumes, and the images do not depend on the number of processes.
"""

import inspect
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from PIL import Image

from microdit.diffusion.samplers import Solver
from microdit.distributed import World
from microdit.encoders.model_files import dtype_argument, is_place, lasting_name, loading
from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.io.locks import sole_writer
from microdit.io.untrusted_text import decode_text, parse_json
from microdit.pipelines.open_model import OpenedModel, is_our_pipeline, open_model
from microdit.pipelines.origin import find_origin
from microdit.pipelines.pipeline import BATCH
from microdit.pipelines.sampling import seeded
from microdit.pipelines.settings import SamplerSettings, suited_to
from microdit.reports.grids import picture_name
from microdit.reports.run_folder import is_run

FOREIGN_BATCH = 8  # images that a pipeline of unknown size generates at a time
SETTINGS = "settings.json"


@dataclass(frozen=True)
class DrawSettings:
    """Sampling settings of an evaluation. Image number i starts from the noise of `seed` + i."""

    num_inference_steps: int = 18
    guidance_scale: float = 2.0
    seed: int = 0
    weights: str | None = None  # those of a run: model, ema, or ema-DECAY
    solver: Solver = "heun"

    @classmethod
    def suited_to(cls, place: str, steps: int | None, guidance: float | None, seed: int, weights: str | None = None) -> Self:
        """Return the settings for the model at `place`, in which None stands for what suits it."""
        usual = cls().sampler
        with suppress(UserError):  # of a pipeline of another kind, or a run without a checkpoint yet
            usual = suited_to(find_origin(place).objective, usual)
        return cls(
            usual.num_inference_steps if steps is None else steps,
            usual.guidance_scale if guidance is None else guidance,
            seed,
            weights,
            usual.solver,
        )

    @property
    def sampler(self) -> SamplerSettings:
        """The settings of a MicroDiT model's sampler."""
        return SamplerSettings(self.num_inference_steps, self.guidance_scale, self.solver)


@dataclass(frozen=True)
class Compute:
    """Device, precision and batch size of generation. They change images by rounding errors only."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int | None = None  # None: 64, or 8 for pipelines that are not MicroDiT

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


ON_CPU = Compute()


class ImageGenerator(Protocol):
    """Generates images from prompts. `about` identifies the model in settings.json; `batch` is the number of images per call."""

    about: dict[str, Any]
    batch: int

    def __call__(self, prompts: list[str], seed: int, on_step: Callable[[int], None] | None = None) -> list[Image.Image]:
        """Return one RGB image per prompt. The first starts from the noise of `seed`, the next from that of `seed` + 1.

        `on_step(n)` is called after n more image-steps.
        """
        ...


def open_generator(place: str, settings: DrawSettings, warn: Callable[[str], None], compute: Compute = ON_CPU) -> ImageGenerator:
    """Load a generator from a run folder, a diffusers pipeline's folder, or a hub id. Raises UserError if `place` is none of these."""
    if is_run(Path(place)) or is_our_pipeline(place):
        return RunGenerator(open_model(place, warn, settings.weights), settings, warn, compute)
    if (Path(place) / "model_index.json").is_file() or (not Path(place).exists() and is_place(place)):
        return DiffusersGenerator(place, settings, compute)
    raise UserError(
        f"{place} is neither a run folder (it has no recipe.yaml) nor a diffusers pipeline (it has no model_index.json): name a folder "
        "that 'microdit train' wrote, or the folder or hub id of a pipeline."
    )


class RunGenerator:
    """A MicroDiT model: a run's checkpoint or an exported model."""

    def __init__(self, opened: OpenedModel, settings: DrawSettings, warn: Callable[[str], None], compute: Compute):
        self.about = {**opened.about, "dtype": compute.dtype_name}
        self.batch = compute.batch_size or BATCH
        self._pipeline, self._settings, self._warn = opened.pipeline.to(compute.device, compute.dtype), settings, warn

    def __call__(self, prompts: list[str], seed: int, on_step: Callable[[int], None] | None = None) -> list[Image.Image]:
        return self._pipeline.generate(prompts, self._settings.sampler, seed, on_step, warn=self._warn, batch_size=self.batch)


class DiffusersGenerator:
    """A text-to-image pipeline of diffusers, loaded from safetensors only."""

    def __init__(self, place: str, settings: DrawSettings, compute: Compute):
        """Load the pipeline. Raises UserError if that fails, or if it takes no prompt, steps, guidance scale or generator."""
        from diffusers import DiffusionPipeline  # slow to import

        if settings.weights is not None:
            raise UserError(f"--weights {settings.weights} selects weights of a run, but {place} is a diffusers pipeline: omit the option.")
        with loading(Path(place)):
            self._pipeline = DiffusionPipeline.from_pretrained(place, use_safetensors=True, **dtype_argument(compute.dtype))
        self._pipeline.to(compute.device)
        needed = {"prompt", "num_inference_steps", "guidance_scale", "generator"}
        missing = sorted(needed - set(inspect.signature(self._pipeline.__call__).parameters))
        if missing:
            raise UserError(f"{place} is a {type(self._pipeline).__name__}, which takes no {', '.join(missing)} and cannot be evaluated.")
        self._pipeline.set_progress_bar_config(disable=True)
        self._settings = settings
        self.batch = compute.batch_size or FOREIGN_BATCH
        self.about = {"pipeline": lasting_name(place), "class": type(self._pipeline).__name__, "dtype": compute.dtype_name}

    def __call__(self, prompts: list[str], seed: int, on_step: Callable[[int], None] | None = None) -> list[Image.Image]:
        settings = self._settings
        images: list[Image.Image] = []
        for start in range(0, len(prompts), self.batch):
            group = prompts[start : start + self.batch]
            generators = [seeded(seed + start + i) for i in range(len(group))]
            images += self._pipeline(
                prompt=group,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                generator=generators,
            ).images
            if on_step:
                on_step(len(group) * settings.num_inference_steps)
        return [image.convert("RGB") for image in images]


def draw_pictures(
    generator: ImageGenerator,
    prompts: list[str],
    folder: Path,
    settings: DrawSettings,
    world: World,
    name: Callable[[int], str] = picture_name,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Generate an image for each prompt as `folder`/`name(i)`, and keep those that exist. Returns when all processes are done.

    Every process must call this. Images are generated in fixed groups, so that they do not depend on the number of processes.
    `on_step(n)` is called after n more image-steps of this process's share (see `steps_to_draw`). Raises UserError if the folder holds
    images of other settings, or another program is writing there.
    """
    with sole_writer(folder, world):
        problem = world.share(_check_settings(folder, generator, prompts, settings) if world.is_main else None)
        if problem:
            raise UserError(problem)
        for start in _starts(len(prompts), generator.batch, world):
            numbers = range(start, min(start + generator.batch, len(prompts)))
            missing = [number for number in numbers if not (folder / name(number)).is_file()]
            if not missing:
                if on_step:
                    on_step(len(numbers) * settings.num_inference_steps)
                continue
            images = generator([prompts[number] for number in numbers], settings.seed + start, on_step)
            for number in missing:
                png = BytesIO()
                images[number - start].save(png, "PNG")
                write_aside(folder / name(number), png.getvalue())
        world.wait_for_all()


def steps_to_draw(count: int, generator: ImageGenerator, settings: DrawSettings, world: World) -> int:
    """Return the number of image-steps in this process's share of `count` images."""
    return settings.num_inference_steps * sum(min(generator.batch, count - start) for start in _starts(count, generator.batch, world))


def read_prompt_file(path: Path) -> list[str]:
    """Read one prompt per line: a JSON object with a key `prompt`, or plain text. A JSON list of strings or of such objects is read too.

    Raises UserError if the file cannot be read, a line is malformed, or there is no prompt.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".parquet", ".gz"):
        raise UserError(f"{path} is no file of prompts: write one prompt per line in a .txt file, or JSON objects in a .jsonl file.")
    try:
        text = decode_text(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Save it as UTF-8.") from error
    lines = {number: line.strip() for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()}  # no other line ends
    as_json = suffix in (".json", ".jsonl", ".ndjson")
    listed = _prompts_listed(text) if as_json or text.lstrip().startswith("[") else None
    if listed is not None:
        prompts = [_prompt_of(item, f"item {number} of {path}") for number, item in enumerate(listed, 1)]
    elif as_json or _is_object(next(iter(lines.values()), "")):
        prompts = [_prompt_of(_parsed(line), f"line {number} of {path}") for number, line in lines.items()]
    else:
        prompts = list(lines.values())
    if not prompts:
        raise UserError(f"{path} contains no prompts: write one per line.")
    return prompts


def _prompts_listed(text: str) -> list[Any] | None:
    """Return the items of a file that is one JSON list, else None."""
    items = _parsed(text)
    return items if isinstance(items, list) else None


def _is_object(line: str) -> bool:
    return isinstance(_parsed(line), dict)


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _prompt_of(item: Any, where: str) -> str:
    """Return the prompt in an item of a list, or in a line. Raises UserError if there is none."""
    prompt = item.get("prompt") if isinstance(item, dict) else item
    if isinstance(prompt, str) and prompt.strip():
        return prompt.strip()
    raise UserError(f'The {where} must be a JSON object with a key "prompt", which holds text.')


def _starts(count: int, batch: int, world: World) -> range:
    return range(world.rank * batch, count, world.size * batch)


def _check_settings(folder: Path, generator: ImageGenerator, prompts: list[str], settings: DrawSettings) -> str | None:
    """Record in `folder` how its images are generated. Return a sentence if it already records something else."""
    about = {**generator.about, "prompts": prompts, **asdict(settings)}
    path = folder / SETTINGS
    if path.is_file():
        try:
            before = {"dtype": "float32", "solver": "heun", **parse_json(path.read_bytes())}  # earlier versions knew no other
        except (OSError, ValueError, TypeError):
            return f"{path} is damaged, so it is unknown how the images beside it were generated: choose another --out, or delete them."
        changed = [key for key in about if before.get(key) != about[key]]
        return (
            f"{folder} holds images generated with another {', '.join(changed)}: choose another --out, or delete it." if changed else None
        )
    write_aside(folder / "prompts.jsonl", "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode())
    write_aside(path, json.dumps(about, indent=1).encode())
    return None
