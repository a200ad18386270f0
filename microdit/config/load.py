"""Loading of recipes: YAML files and `a.b=c` overrides, checked field by field and as a whole."""

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml

from microdit.config.recipes import find_recipe
from microdit.config.schema import DataRecipe, DiffusionRecipe, EngineRecipe, ModelRecipe, PhaseRecipe, Recipe
from microdit.devices import KNOWN_DEVICES, is_device_name
from microdit.diffusion.edm import EDM
from microdit.errors import UserError
from microdit.io.strict_yaml import Tree, override, parse_yaml, read_as, read_yaml
from microdit.models.routing import GRID_RATIOS, METHODS

PRECISIONS = ("auto", "float32", "bfloat16")
NO_FLOAT16 = "float16 needs losses that are scaled, which microdit does not do in training: take bfloat16, or float32."


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, apply `a.b=c` overrides, check types and values. Raises UserError naming file, key and fix.

    `path` is a file, or the name of a recipe that comes with microdit.

    >>> recipe = load_recipe("emoji-fast", ["phases.0.steps=100", "seed=1"])
    >>> recipe.name, recipe.seed, recipe.phases[0].steps
    ('emoji-fast', 1, 100)
    """
    path = find_recipe(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name one of its recipes, such as {min(path.glob('*.yaml'))}.")
    return _checked(read_yaml(path), str(path), overrides or [])


def recipe_of_text(text: str, where: str) -> Recipe:
    """Load a recipe from the text of a YAML file, as `load_recipe` does. `where` names the text in error messages."""
    return _checked(parse_yaml(text, where), where, [])


def load_recipes(path: Path, overrides: list[str] | None = None) -> dict[str, Recipe]:
    """Load the recipes of a folder, or the one of a file, by the stem of their file names. Raises UserError."""
    path = find_recipe(path)
    return load_recipe_folder(path, overrides) if path.is_dir() else {path.stem: load_recipe(path, overrides)}


def load_recipe_folder(folder: Path, overrides: list[str] | None = None) -> dict[str, Recipe]:
    """Load a folder of recipes, which are trained in the order of their names, by the stem of their file names.

    Overrides apply to all of them. Raises UserError if there is none, or if one starts from weights of a later one (`init_from`).
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise UserError(f"There is no recipe (*.yaml) in {folder}.")
    recipes = {path.stem: load_recipe(path, overrides) for path in paths}
    for index, (name, recipe) in enumerate(recipes.items()):
        if recipe.init_from in recipes and recipe.init_from not in list(recipes)[:index]:
            raise UserError(f"{folder}/{name}.yaml starts from {recipe.init_from}, which is trained after it: rename the files.")
    return recipes


def with_todays_defaults(kept: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that an earlier version wrote, with keys that were added since then at their defaults, which keep the old behaviour.

    A recipe with a key or value that is no longer known is returned unchanged: no recipe of today means the same.
    """
    try:
        recipe = cast(Recipe, read_as(Recipe, parse_yaml(yaml.safe_dump(kept), "recipe"), "recipe"))
        return cast(dict[str, Any], yaml.safe_load(recipe.to_yaml()))
    except UserError:
        return kept


def _checked(tree: Tree, where: str, overrides: list[str]) -> Recipe:
    if not isinstance(tree, dict):
        raise UserError(f"{where} must hold keys and values, such as 'name: my-run'.")
    for said in overrides:
        override(tree, said)
    recipe = cast(Recipe, read_as(Recipe, tree, where))
    problems = _problems(recipe)
    if problems:
        raise UserError(f"{where} asks for what cannot be:\n  - " + "\n  - ".join(problems))
    return recipe


def _problems(recipe: Recipe) -> list[str]:
    """Return one sentence for each setting that lies in its range but does not fit the other settings."""
    found = []
    model = recipe.model

    def need(condition: bool, sentence: str) -> None:
        if not condition:
            found.append(sentence)

    for name in ("dim", "mixer_dim"):
        width = getattr(model, name)
        near = max(1, round(width / model.head_dim)) * model.head_dim
        need(width % model.head_dim == 0, f"model.{name} ({width}) is not divisible by model.head_dim ({model.head_dim}): try {near}.")
    need(model.dim % 4 == 0, f"model.dim ({model.dim}) must be divisible by 4, for positions in two dimensions.")
    need(
        model.positions == "sincos" or model.head_dim % 4 == 0,
        f"model.head_dim ({model.head_dim}) must be divisible by 4, for rotary positions in two dimensions.",
    )
    need(
        model.mask_padding or model.caption_length is None,
        "model.caption_length puts a learnt token in the place of padding, so model.mask_padding cannot be false: leave one of them out.",
    )
    need(
        not model.unread_text or model.attention == "joint",
        "model.unread_text is for model.attention joint: cross-attention never changes the caption's tokens.",
    )
    if recipe.alignment is not None:
        block, depth = recipe.alignment.block, model.depth
        need(block <= depth, f"alignment.block is {block}, and the backbone has {depth} blocks (model.depth): take one of 1 to {depth}.")
    found += _distillation_problems(recipe)
    found += _routing_problems(model)
    found += _diffusion_problems(recipe.diffusion)
    need(len({ema.decay for ema in recipe.ema}) == len(recipe.ema), "ema names a decay twice.")
    found += engine_problems(recipe.engine)
    need(
        not recipe.engine.release_gradients or recipe.engine.sharding not in ("fsdp", "hybrid"),
        "engine.release_gradients is for a process that holds the model whole, and engine.sharding is "
        f"{recipe.engine.sharding}: leave one of them out.",
    )
    need(
        recipe.optimizer.moments == "float32" or recipe.optimizer.method == "adamw",
        "optimizer.moments int8 is for optimizer.method adamw: muon has one moment, in float32.",
    )
    need(
        recipe.init_weights == "model" or recipe.init_from is not None,
        f"init_weights {recipe.init_weights} chooses among the weights of init_from, which names no run: name one, or leave it out.",
    )
    need(
        recipe.record.fid_every is None or recipe.record.fid_reference is not None,
        "record.fid_every measures a distance to record.fid_reference, which names no set: name one, such as coco2014:PATH.",
    )
    data = recipe.data
    need((data.path is None) != (not data.sets), "data needs either a path or sets, such as data.path=data/emoji.")
    need(not data.sets or any(item.repeat for item in data.sets.values()), "data.sets: at least one must have a repeat above 0.")
    for name, item in data.sets.items():
        need((item.path is None) != (item.source is None), f"data.sets.{name} needs either a path or a source, such as my-pictures.")
    for index, phase in enumerate(recipe.phases):
        problems = _mask_problems(phase, model) + _weight_problems(phase, data)
        found += [f"phases.{index}.{problem}" for problem in problems]
    return found


def _distillation_problems(recipe: Recipe) -> list[str]:
    settings = recipe.distillation
    if settings is None:
        return []
    few, many = settings.steps, settings.teacher_steps
    checks = [
        (recipe.init_from is not None, "distillation needs a trained model to start from: name it in init_from."),
        (
            many % few == 0 and many > few,
            f"distillation.teacher_steps is {many}, and must be a multiple of distillation.steps, {few}: try "
            f"{few * max(2, round(many / few))}.",
        ),
        (recipe.alignment is None, "distillation has targets of its own: leave alignment out."),
    ]
    return [sentence for fine, sentence in checks if not fine]


def engine_problems(engine: EngineRecipe) -> list[str]:
    """Return one sentence for each unknown device or precision."""
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
            not method.decoder or model.mixer_dim % 4 == 0,
            f"model.mixer_dim ({model.mixer_dim}) must be divisible by 4, for positions in two dimensions: the decoder is as wide.",
        ),
    ]
    return [sentence for ok, sentence in checks if not ok]


_EDM_FIELDS = ("sigma_data", "P_mean", "P_std")
_FLOW_FIELDS = ("t_mean", "t_std", "shift", "noise_scale", "training_floor", "sampling_floor")
_PREDICTIONS = {"edm": ("denoised",), "flow": ("velocity", "image", "noise")}


def _diffusion_problems(diffusion: DiffusionRecipe) -> list[str]:
    """Return one sentence for each setting that belongs to the other objective."""
    objective, default = diffusion.objective, DiffusionRecipe()
    other, fields = ("edm", _EDM_FIELDS) if objective == "flow" else ("flow", _FLOW_FIELDS)
    found = [
        f"diffusion.{name} is a setting of diffusion.objective {other}, and the objective is {objective}: leave it out."
        for name in fields
        # Recipes that earlier versions wrote out also name EDM's default sigma_data.
        if getattr(diffusion, name) not in (getattr(default, name), getattr(EDM, name, None))
    ]
    if diffusion.prediction not in (None, *_PREDICTIONS[objective]):
        found.append(
            f"diffusion.prediction is {diffusion.prediction}, and with diffusion.objective {objective} the network predicts "
            f"{' or '.join(_PREDICTIONS[objective])}: take that, or leave it out."
        )
    return found


def _mask_problems(phase: PhaseRecipe, model: ModelRecipe) -> list[str]:
    checks = [
        (phase.mask_schedule is None or phase.mask_ratio == 0, "mask_schedule takes the place of mask_ratio: give one of them."),
        (
            phase.mask_schedule is None or _is_schedule(phase.mask_schedule),
            "mask_schedule must be points [progress, ratio], progress growing from 0 to 1, such as [[0, 0.75], [1, 0]].",
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


def _is_schedule(points: list[tuple[float, float]]) -> bool:
    places = [progress for progress, _ in points]
    return places[0] == 0 and places[-1] == 1 and all(a < b for a, b in pairwise(places))


def _weight_problems(phase: PhaseRecipe, data: DataRecipe) -> list[str]:
    if phase.weights is None:
        return []
    unknown = sorted(set(phase.weights) - set(data.named_sets))
    problems = [f"weights names {', '.join(unknown)}, and data.sets only {', '.join(data.named_sets)}."] if unknown else []
    if sum(phase.weights.values()) <= 0:
        problems.append("weights are all 0: at least one set must be learnt from.")
    return problems
