"""How a YAML file and `a.b=c` overrides become a recipe, and what is wrong with it, in words."""

import difflib
import math
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from microdit.devices import KNOWN_DEVICES, is_device_name
from microdit.errors import UserError
from microdit.model.routing import GRID_RATIOS, METHODS
from microdit.recipe import LEAST_QUALITY_SAMPLES, DataRecipe, EMARecipe, EngineRecipe, ModelRecipe, PhaseRecipe, Recipe

PRECISIONS = ("auto", "float32", "bfloat16")
NO_FLOAT16 = "float16 needs losses that are scaled, which microdit does not do in training: take bfloat16, or float32."


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


def with_todays_defaults(kept: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version wrote, with the keys that are new since then at their defaults: a default is what was done before.

    As it is, if it has a key that is no more known, since then it asks for something else than any recipe of today.
    """
    try:
        return cast(dict[str, Any], yaml.safe_load(_to_recipe(OmegaConf.create(kept), "").to_yaml()))
    except UserError:
        return kept


def _apply_override(raw: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is not an override: write key=value, for example phases.0.steps=100.")
    try:
        OmegaConf.update(raw, key, yaml.safe_load(value), merge=False, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"The override '{override}' does not fit the recipe: {_first_line(error)}.") from error


def _to_recipe(raw: DictConfig, where: str) -> Recipe:
    for name, cls in (("phases", PhaseRecipe), ("ema", EMARecipe)):
        items = raw.get(name)
        if isinstance(items, ListConfig):  # one by one first: inside a list OmegaConf does not say which
            for index, item in enumerate(items):
                _convert(cls, item, where, f"{name}.{index}.")
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
        inner = {"phases": PhaseRecipe, "model": ModelRecipe, "ema": EMARecipe}.get(item.name, item.type)
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
    found += _routing_problems(model)
    need(model.position_scale > 0, "model.position_scale must be above 0.")
    need(0 < model.init_scale < math.inf, f"model.init_scale is {model.init_scale}, and must be above 0.")
    need(model.mixer_depth >= 0 and model.num_experts >= 0, "model.mixer_depth and model.num_experts cannot be negative.")
    need(model.num_experts == 0 or model.expert_capacity > 0, "model.expert_capacity must be above 0.")
    need(recipe.diffusion.sigma_data > 0 and recipe.diffusion.P_std > 0, "diffusion.sigma_data and P_std must be above 0.")
    need(0 <= recipe.diffusion.caption_dropout < 1, "diffusion.caption_dropout must lie in [0, 1).")
    for index, ema in enumerate(recipe.ema):
        need(0 <= ema.decay < 1, f"ema.{index}.decay is {ema.decay}, and must lie in [0, 1), for example 0.999.")
        need(ema.start >= 0, f"ema.{index}.start is {ema.start}, and cannot be negative.")
    need(len({ema.decay for ema in recipe.ema}) == len(recipe.ema), "ema names a decay twice.")
    found += engine_problems(recipe.engine)
    need(recipe.engine.micro_batch is None or recipe.engine.micro_batch >= 1, "engine.micro_batch must be at least 1.")
    share = recipe.engine.activation_checkpointing
    need(0 <= share <= 1, f"engine.activation_checkpointing is {share}, and must be true, false, or a share of the blocks from 0 to 1.")
    need(
        not recipe.engine.release_gradients or recipe.engine.sharding != "fsdp",
        "engine.release_gradients is for a process that holds the model whole, and engine.sharding is fsdp: leave one of them out.",
    )
    need(
        recipe.optimizer.moments == "float32" or recipe.optimizer.method == "adamw",
        "optimizer.moments int8 is for optimizer.method adamw: muon has one moment, in float32.",
    )
    need(
        recipe.init_weights == "model" or recipe.init_from is not None,
        f"init_weights {recipe.init_weights} chooses among the weights of init_from, which names no run: name one, or leave it out.",
    )
    need(recipe.guard.loss_jump > 1 and recipe.guard.rollback_after >= 1, "guard.loss_jump must be above 1, rollback_after at least 1.")
    need(bool(recipe.phases), "phases is empty: a run needs at least one.")
    data = recipe.data
    need((data.path is None) != (not data.sets), "data needs either a path or sets, such as data.path=data/emoji.")
    need(data.read_timeout > 0, "data.read_timeout must be above 0 (seconds).")
    need(all(item.repeat >= 0 for item in data.sets.values()), "data.sets: repeat cannot be negative.")
    need(not data.sets or any(item.repeat for item in data.sets.values()), "data.sets: at least one must have a repeat above 0.")
    for index, phase in enumerate(recipe.phases):
        problems = _phase_problems(phase) + _mask_problems(phase, model) + _weight_problems(phase, data)
        found += [f"phases.{index}.{problem}" for problem in problems]
    need(all(0 <= beta < 1 for beta in recipe.optimizer.betas), "optimizer.betas must lie in [0, 1).")
    need(recipe.optimizer.eps > 0, "optimizer.eps must be above 0.")
    for name in (
        "metrics_every",
        "samples_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "held_out_every",
        "held_out_samples",
        "quality_every",
    ):
        value = getattr(recipe.record, name)
        need(value is None or value >= 1, f"record.{name} must be at least 1.")
    few = f"record.quality_samples is {recipe.record.quality_samples}, and must be at least {LEAST_QUALITY_SAMPLES}: fewer say nothing."
    need(recipe.record.quality_samples >= LEAST_QUALITY_SAMPLES, few)
    need(recipe.record.sample_steps >= 2, "record.sample_steps must be at least 2.")
    return found


def engine_problems(engine: EngineRecipe) -> list[str]:
    """What is no device or no precision, one sentence each."""
    found = []
    if not is_device_name(engine.device):
        found.append(f"engine.device is {engine.device}, and must be one of {KNOWN_DEVICES}.")
    if engine.precision == "float16":
        found.append(f"engine.precision: {NO_FLOAT16}")
    elif engine.precision not in PRECISIONS:
        found.append(f"engine.precision is {engine.precision}, and must be one of {', '.join(PRECISIONS)}.")
    return found


def _routing_problems(model: ModelRecipe) -> list[str]:
    method = METHODS[model.routing]
    first, last = method.dense_blocks if model.dense_blocks is None else model.dense_blocks
    checks = [
        (
            model.dense_blocks is None or method.drop == "blocks",
            f"model.dense_blocks is for model.routing tread and sprint, and not for {model.routing}: leave it out.",
        ),
        (first >= 0 and last >= 0, f"model.dense_blocks is [{first}, {last}], and cannot be negative."),
        (
            first + last < model.depth or method.drop != "blocks",
            f"model.depth is {model.depth}, and routing {model.routing} has {first} dense blocks before its sparse ones and {last} after "
            f"them: it needs at least {first + last + 1}, or fewer model.dense_blocks, such as [{(model.depth - 1) // 2}, "
            f"{(model.depth - 1) // 2}].",
        ),
        (
            model.decoder_depth is None or method.decoder > 0,
            f"model.decoder_depth is for model.routing maskdit, and not for {model.routing}: leave it out.",
        ),
        (
            not method.decoder or model.decoder_depth is None or model.decoder_depth >= 1,
            f"model.decoder_depth is {model.decoder_depth}, and must be at least 1.",
        ),
        (
            not method.decoder or model.mixer_dim % 4 == 0,
            f"model.mixer_dim ({model.mixer_dim}) must be divisible by 4, for positions in two dimensions: the decoder is as wide.",
        ),
    ]
    return [sentence for ok, sentence in checks if not ok]


def _phase_problems(phase: PhaseRecipe) -> list[str]:
    checks = [
        (phase.steps >= 1, f"steps is {phase.steps}, and must be at least 1."),
        (phase.batch_size >= 1, f"batch_size is {phase.batch_size}, and must be at least 1."),
        (phase.learning_rate > 0 and math.isfinite(phase.learning_rate), f"learning_rate is {phase.learning_rate}, and must be above 0."),
        (phase.warmup_steps >= 0, f"warmup_steps is {phase.warmup_steps}, and cannot be negative."),
        (0 <= phase.final_learning_rate <= 1, "final_learning_rate is a share of learning_rate, and must lie in [0, 1]."),
        (phase.grad_clip > 0, "grad_clip must be above 0."),
    ]
    return [sentence for ok, sentence in checks if not ok]


def _mask_problems(phase: PhaseRecipe, model: ModelRecipe) -> list[str]:
    checks = [
        (
            0 <= phase.mask_ratio < 1,
            f"mask_ratio is {phase.mask_ratio}, and must lie in [0, 1): at 1 no patch would be left to learn from; the paper uses 0.75.",
        ),
        (phase.mask_schedule is None or phase.mask_ratio == 0, "mask_schedule takes the place of mask_ratio: give one of them."),
        (
            phase.mask_schedule is None or _is_schedule(phase.mask_schedule),
            "mask_schedule must be points [progress, ratio], progress growing from 0 to 1, ratios in [0, 1), such as [[0, 0.75], [1, 0]].",
        ),
        (
            model.routing != "none" or (phase.mask_ratio == 0 and not phase.mask_schedule),
            "mask_ratio must be 0, since model.routing is none (or use model.routing deferred).",
        ),
        (
            phase.mask_pattern == "random" or (phase.mask_ratio in (0, *GRID_RATIOS) and not phase.mask_schedule),
            f"mask_pattern is grid, so mask_ratio must be one of {', '.join(map(str, GRID_RATIOS))}, without a mask_schedule.",
        ),
    ]
    return [sentence for ok, sentence in checks if not ok]


def _is_schedule(points: list[list[float]]) -> bool:
    if not points or any(len(point) != 2 for point in points):
        return False
    places = [progress for progress, _ in points]
    return places[0] == 0 and places[-1] == 1 and all(a < b for a, b in pairwise(places)) and all(0 <= ratio < 1 for _, ratio in points)


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
