"""Everything a recipe may say, typed; how a YAML file and `a.b=c` overrides become one; and what is wrong with it, in words."""

import difflib
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from microdit.errors import UserError
from microdit.model.sizes import Size


@dataclass(frozen=True)
class SetRecipe:
    """One of several encoded data sets. `repeat`: how often an epoch holds each of its samples, where a phase gives no weights."""

    path: str = MISSING
    repeat: int = 1


@dataclass(frozen=True)
class DataRecipe:
    """The encoded data to learn from (made by `microdit data encode`): one set's `path`, or several `sets` by name.

    `autoencoder` and `text_encoder`, if given, must be those that the sets were encoded with.
    """

    path: str | None = None
    sets: dict[str, SetRecipe] = field(default_factory=dict)
    resolution: int | None = None  # pixels; needed where a set holds several
    horizontal_flip: bool = False  # of half of the latents: exact for pixels, nearly so for autoencoders; the paper does without
    on_damage: Literal["stop", "skip"] = "stop"  # what to do about a row whose checksum differs
    autoencoder: str | None = None
    text_encoder: str | None = None

    @property
    def named_sets(self) -> dict[str, SetRecipe]:
        return {"data": SetRecipe(self.path)} if self.path is not None else self.sets


@dataclass(frozen=True)
class ModelRecipe(Size):
    """The denoiser. The other fields are those of `Size`; channels and caption width come from the data set."""

    patch_size: int = 2
    expert_capacity: float = 2.0
    bias: bool = False
    position_scale: float = 1.0
    mask_padding: bool = True  # captions' padding is attended by nobody; False is what the authors do


@dataclass(frozen=True)
class DiffusionRecipe:
    """The EDM noise levels met in training."""

    sigma_data: float = 0.9
    P_mean: float = -0.6
    P_std: float = 1.2
    caption_dropout: float = 0.1  # share of captions replaced by zeros, for guidance


@dataclass(frozen=True)
class PhaseRecipe:
    """A stretch of training with one mask ratio and one learning-rate schedule."""

    name: str = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    learning_rate: float = MISSING
    mask_ratio: float = 0.0
    routing: Literal["none", "naive", "deferred"] = "deferred"
    warmup_steps: int = 0
    final_learning_rate: float = 1.0  # of learning_rate, reached by a cosine at the phase's end; 1 keeps it constant
    grad_clip: float = 0.25
    weights: dict[str, float] | None = None  # shares of data.sets in this phase's samples; without, each set has its size


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW. The experts learn at a rate of their own; decay is on matrices only."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    expert_learning_rate: float = 0.5  # of learning_rate (2407.15811, appendix; the released code misses it)


@dataclass(frozen=True)
class RecordRecipe:
    """What is written while training, and how often (in steps)."""

    metrics_every: int = 20
    samples_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_prompts: list[str] = field(default_factory=list)
    sample_steps: int = 18
    guidance_scale: float = 2.0


@dataclass(frozen=True)
class Recipe:
    """A whole training run."""

    name: str = MISSING
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = MISSING
    diffusion: DiffusionRecipe = field(default_factory=DiffusionRecipe)
    phases: list[PhaseRecipe] = MISSING
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema_decay: float = 0.999
    record: RecordRecipe = field(default_factory=RecordRecipe)

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[PhaseRecipe, int]:
        """The phase that step number `step` (from 0) belongs to, and the step's number inside it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError("step lies behind the last phase")

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, apply `a.b=c` overrides, check types and values. Raises UserError naming file, key and fix."""
    if not path.is_file():
        raise UserError(f"There is no recipe at {path}. The ones that come with microdit are in the folder recipes/.")
    try:
        raw = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, DictConfig):
        raise UserError(f"{path} must hold keys and values, such as 'name: my-run'.")
    for override in overrides or []:
        _apply_override(raw, override)
    recipe = _to_recipe(raw, str(path))
    problems = _problems(recipe)
    if problems:
        raise UserError(f"{path} asks for what cannot be:\n  - " + "\n  - ".join(problems))
    return recipe


def _apply_override(raw: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is not an override: write key=value, for example phases.0.steps=100.")
    try:
        OmegaConf.update(raw, key, yaml.safe_load(value), merge=False, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"The override '{override}' does not fit the recipe: {_first_line(error)}.") from error


def _to_recipe(raw: DictConfig, where: str) -> Recipe:
    phases = raw.get("phases")
    if isinstance(phases, ListConfig):  # one by one first: inside a list OmegaConf does not say which
        for index, phase in enumerate(phases):
            _convert(PhaseRecipe, phase, where, f"phases.{index}.")
    return cast(Recipe, _convert(Recipe, raw, where, ""))


def _convert(cls: type, raw: Any, where: str, prefix: str) -> Any:
    """`raw` as a `cls`, types checked. Raises UserError with the key, `prefix` before it."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), raw))
    except ConfigKeyError as error:
        raise UserError(_unknown_key(where, f"{prefix}{error.full_key or error.key}")) from error
    except MissingMandatoryValue as error:
        raise UserError(f"{where}: {prefix}{error.full_key} is missing, and has no default.") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = f"{prefix}{getattr(error, 'full_key', None) or ''}".rstrip(".")
        raise UserError(f"{where}: {key}{': ' if key else ''}{_first_line(error)}.") from error


def _unknown_key(where: str, full_key: str) -> str:
    names = sorted(_all_keys(Recipe))
    last = full_key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(last, {name.rsplit(".", 1)[-1] for name in names}, n=1)
    paths = [name for name in names if near and name.rsplit(".", 1)[-1] == near[0]]
    hint = f"did you mean {' or '.join(paths)}?" if paths else f"known keys: {', '.join(names)}."
    return f"{where}: unknown key {full_key}; {hint}"


def _all_keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(cls):
        inner = {"phases": PhaseRecipe, "model": ModelRecipe}.get(item.name, item.type)
        name = f"{prefix}{item.name}"
        keys += _all_keys(inner, f"{name}.") if is_dataclass(inner) else [name]
    return keys


def _problems(recipe: Recipe) -> list[str]:
    """Every value that has the right type and still cannot be, one sentence each."""
    found = []
    model = recipe.model

    def need(condition: bool, sentence: str) -> None:
        if not condition:
            found.append(sentence)

    for name in ("dim", "depth", "head_dim", "patch_size", "round_ffn_to", "experts_every", "mixer_dim"):
        need(getattr(model, name) >= 1, f"model.{name} is {getattr(model, name)}, and must be at least 1.")
    if found:
        return found
    for name in ("dim", "mixer_dim"):
        width = getattr(model, name)
        near = max(1, round(width / model.head_dim)) * model.head_dim
        need(width % model.head_dim == 0, f"model.{name} ({width}) is not divisible by model.head_dim ({model.head_dim}): try {near}.")
    need(model.dim % 4 == 0, f"model.dim ({model.dim}) must be divisible by 4, for positions in two dimensions.")
    for name in ("attention_range", "ffn_range"):
        need(min(getattr(model, name)) > 0, f"model.{name} must hold ratios above 0.")
    need(model.position_scale > 0, "model.position_scale must be above 0.")
    need(model.mixer_depth >= 0 and model.num_experts >= 0, "model.mixer_depth and model.num_experts cannot be negative.")
    need(model.num_experts == 0 or model.expert_capacity > 0, "model.expert_capacity must be above 0.")
    need(recipe.diffusion.sigma_data > 0 and recipe.diffusion.P_std > 0, "diffusion.sigma_data and P_std must be above 0.")
    need(0 <= recipe.diffusion.caption_dropout < 1, "diffusion.caption_dropout must lie in [0, 1).")
    need(0 <= recipe.ema_decay < 1, f"ema_decay is {recipe.ema_decay}, and must lie in [0, 1), for example 0.999.")
    need(bool(recipe.phases), "phases is empty: a run needs at least one.")
    data = recipe.data
    need((data.path is None) != (not data.sets), "data needs either a path or sets, such as data.path=data/emoji.")
    need(all(item.repeat >= 0 for item in data.sets.values()), "data.sets: repeat cannot be negative.")
    need(not data.sets or any(item.repeat for item in data.sets.values()), "data.sets: at least one must have a repeat above 0.")
    for index, phase in enumerate(recipe.phases):
        found += [f"phases.{index}.{problem}" for problem in _phase_problems(phase) + _weight_problems(phase, data)]
    need(all(0 <= beta < 1 for beta in recipe.optimizer.betas), "optimizer.betas must lie in [0, 1).")
    need(recipe.optimizer.eps > 0, "optimizer.eps must be above 0.")
    for name in ("metrics_every", "samples_every", "checkpoint_every", "keep_checkpoints"):
        need(getattr(recipe.record, name) >= 1, f"record.{name} must be at least 1.")
    need(recipe.record.sample_steps >= 2, "record.sample_steps must be at least 2.")
    return found


def _phase_problems(phase: PhaseRecipe) -> list[str]:
    checks = [
        (phase.steps >= 1, f"steps is {phase.steps}, and must be at least 1."),
        (phase.batch_size >= 1, f"batch_size is {phase.batch_size}, and must be at least 1."),
        (phase.learning_rate > 0 and math.isfinite(phase.learning_rate), f"learning_rate is {phase.learning_rate}, and must be above 0."),
        (
            0 <= phase.mask_ratio < 1,
            f"mask_ratio is {phase.mask_ratio}, and must lie in [0, 1): at 1 no patch would be left to learn from; the paper uses 0.75.",
        ),
        (phase.routing != "none" or phase.mask_ratio == 0, "routing is none, so mask_ratio must be 0 (or use routing deferred)."),
        (phase.warmup_steps >= 0, f"warmup_steps is {phase.warmup_steps}, and cannot be negative."),
        (0 <= phase.final_learning_rate <= 1, "final_learning_rate is a share of learning_rate, and must lie in [0, 1]."),
        (phase.grad_clip > 0, "grad_clip must be above 0."),
    ]
    return [sentence for ok, sentence in checks if not ok]


def _weight_problems(phase: PhaseRecipe, data: DataRecipe) -> list[str]:
    if phase.weights is None:
        return []
    unknown = sorted(set(phase.weights) - set(data.named_sets))
    problems = [f"weights names {', '.join(unknown)}, and data.sets only {', '.join(data.named_sets)}."] if unknown else []
    values = list(phase.weights.values())
    if not all(math.isfinite(value) and value >= 0 for value in values) or sum(values) <= 0:
        problems.append("weights must be 0 or more, and not all 0.")
    return problems


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].rstrip(".")


def _plain(value: Any) -> Any:
    """Tuples to lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
