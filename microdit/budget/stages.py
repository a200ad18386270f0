"""The paper's four phases as a table, and a recipe of each for any size, batch and number of steps."""

from dataclasses import asdict, dataclass

from microdit.budget.bill import phase_flops
from microdit.budget.scaling import PATCHES
from microdit.budget.shapes import Shapes, assumed_shapes
from microdit.model.sizes import Size
from microdit.recipe import (
    DataRecipe,
    DiffusionRecipe,
    EMARecipe,
    EngineRecipe,
    ModelRecipe,
    OptimizerRecipe,
    PhaseRecipe,
    Recipe,
    RecordRecipe,
)

PROMPTS = ["a red apple on a table", "a cat on a sofa", "a mountain lake", "a street at night"]


@dataclass(frozen=True)
class Stage:
    """`steps` and `ema_start` are the paper's (2407.15811); warm-up is a hundredth of the steps, as there."""

    name: str
    resolution: int
    mask_ratio: float
    steps: int
    learning_rate: float
    final_learning_rate: float
    warm_up: bool
    grad_clip: float
    ema_decay: float | None
    ema_start: int


STAGES = (
    Stage("256-masked", 256, 0.75, 250_000, 2.4e-4, 0.33, True, 0.25, None, 0),
    Stage("256-full", 256, 0.0, 30_000, 8e-5, 1.0, False, 0.25, None, 0),
    Stage("512-masked", 512, 0.75, 50_000, 8e-5, 1.0, True, 0.5, 0.99975, 25_000),
    Stage("512-full", 512, 0.0, 5_000, 8e-5, 1.0, False, 0.5, 0.9975, 1_000),
)
AT_256 = STAGES[:2]
BATCH = 2048  # the paper's


def stage_recipe(
    stage: Stage,
    size: Size,
    steps: int,
    batch_size: int,
    data: str = "data/mine",
    engine: EngineRecipe = EngineRecipe(),  # noqa: B008 (frozen)
    last: bool = False,
    optimizer: OptimizerRecipe = OptimizerRecipe(),  # noqa: B008 (frozen)
) -> Recipe:
    """`last`: of its run, which has an average in any case."""
    number = STAGES.index(stage)
    decay, start = (stage.ema_decay, steps * stage.ema_start // stage.steps) if stage.ema_decay else (0.999, steps // 5)
    phase = PhaseRecipe(
        stage.name,
        steps,
        batch_size,
        stage.learning_rate,
        stage.mask_ratio,
        warmup_steps=steps // 100 if stage.warm_up else 0,
        final_learning_rate=stage.final_learning_rate,
        grad_clip=stage.grad_clip,
    )
    at_512 = stage.resolution == 512
    return Recipe(
        f"microdit-{size.dim}-{stage.name}",
        init_from=file_stem(STAGES[number - 1]) if number else None,
        data=DataRecipe(data, resolution=stage.resolution, autoencoder="sdxl", text_encoder="dfn-clip-h"),
        model=ModelRecipe(**asdict(size), position_scale=2.0 if at_512 else 1.0),
        diffusion=DiffusionRecipe(P_mean=0.0, P_std=0.6) if at_512 else DiffusionRecipe(),
        phases=[phase],
        optimizer=optimizer,
        ema=[EMARecipe(decay, start)] if stage.ema_decay or last else [],
        engine=engine,
        record=RecordRecipe(checkpoint_every=1000, samples_every=5000, sample_prompts=PROMPTS, sample_steps=30, guidance_scale=5.0),
    )


def file_stem(stage: Stage) -> str:
    return f"{STAGES.index(stage) + 1}-{stage.name}"


def stage_flops(stage: Stage, size: Size, shapes: Shapes) -> float:
    """Of one sample."""
    recipe = stage_recipe(stage, size, steps=1, batch_size=1)
    return phase_flops(recipe, recipe.phases[0], shapes)


def equivalent_size(size: Size) -> float:
    """Parameters of a dense transformer that costs as much (see scaling.py)."""
    return _published_flops(STAGES[1], size) / (6 * PATCHES)


def paper_flops(size: Size) -> float:
    """Of the published run, were it done with `size`."""
    return sum(stage.steps * BATCH * _published_flops(stage, size) for stage in STAGES)


def _published_flops(stage: Stage, size: Size) -> float:
    """Of one sample of the paper's latents and captions."""
    return stage_flops(stage, size, assumed_shapes(stage_recipe(stage, size, steps=1, batch_size=1)))
