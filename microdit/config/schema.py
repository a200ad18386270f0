"""Everything a recipe may say, each value with its type and its range. `recipe_file.py` reads one."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

import yaml

from microdit.models.config import Size, resolve
from microdit.models.microdit import ModelConfig
from microdit.models.routing import Pattern
from microdit.ranges import Range

LEAST_QUALITY_SAMPLES = 16
MOST_STEPS = 10**9
LAST_SEED = 2**53 - 1  # the largest that every JSON reader counts exactly

FilePath = Annotated[str, Range(1, 4096)]
Name = Annotated[str, Range(1, 200)]
Prompts = Annotated[list[Annotated[str, Range(0, 2000)]], Range(0, 1000)]
Seed = Annotated[int, Range(0, LAST_SEED)]
Every = Annotated[int, Range(1, MOST_STEPS)]  # so many steps
Batch = Annotated[int, Range(1, 65_536)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]
Factor = Annotated[float, Range(0, 1000, above=True)]
Points = Annotated[list[tuple[Share, ShareBelow1]], Range(1, 1000)]
Weight = Annotated[float, Range(0, 10**9)]


@dataclass(frozen=True)
class SetRecipe:
    """One of several encoded data sets. `repeat`: how often an epoch holds each of its samples, where a phase gives no weights."""

    path: FilePath
    repeat: Annotated[int, Range(0, 10**6)] = 1


@dataclass(frozen=True)
class DataRecipe:
    """The encoded data to learn from (made by `microdit data encode`): one set's `path`, or several `sets` by name.

    `autoencoder` and `text_encoder`, if given, must be those that the sets were encoded with.
    """

    path: FilePath | None = None
    sets: Annotated[dict[str, SetRecipe], Range(0, 1000)] = field(default_factory=dict)
    resolution: Annotated[int, Range(1, 16_384)] | None = None  # pixels; needed where a set holds several
    horizontal_flip: bool = False  # of half of the latents: exact for pixels, nearly so for autoencoders; the paper does without
    on_damage: Literal["stop", "skip"] = "stop"  # what to do about a row whose checksum differs
    autoencoder: FilePath | None = None
    text_encoder: FilePath | None = None
    held_out: FilePath | None = None  # an encoded set that is never learnt from: the loss on it is recorded
    read_timeout: Annotated[float, Range(0, 10**6, above=True)] = (
        300.0  # seconds without a batch after which a run stops, and says what it was reading
    )

    @property
    def named_sets(self) -> dict[str, SetRecipe]:
        return {"data": SetRecipe(self.path)} if self.path is not None else self.sets


@dataclass(frozen=True)
class ModelRecipe(Size):
    """The denoiser. The other fields are those of `Size`; channels and caption width come from the data set."""

    patch_size: Annotated[int, Range(1, 64)] = 2
    expert_capacity: Factor = 2.0
    bias: bool = False
    position_scale: Factor = 1.0
    init_scale: Factor = 1.0  # times the paper's initial weights, which are for widths of about 1,000; 3 suits 128
    # Captions' padding is attended by nobody. False suits captions stored in full (--store-captions full), as the authors' are.
    mask_padding: bool = True


def architecture(model: ModelRecipe, in_channels: int, caption_channels: int) -> ModelConfig:
    """Return the architecture of a recipe's model for latents of `in_channels` channels and caption tokens of width `caption_channels`."""
    return resolve(
        model,
        patch_size=model.patch_size,
        in_channels=in_channels,
        caption_channels=caption_channels,
        expert_capacity=model.expert_capacity,
        bias=model.bias,
        position_scale=model.position_scale,
    )


@dataclass(frozen=True)
class DiffusionRecipe:
    """The EDM noise levels met in training."""

    sigma_data: Factor = 0.9
    P_mean: Annotated[float, Range(-20, 20)] = -0.6
    P_std: Annotated[float, Range(0, 20, above=True)] = 1.2
    caption_dropout: ShareBelow1 = 0.1  # share of captions replaced by zeros, for guidance


@dataclass(frozen=True)
class PhaseRecipe:
    """A stretch of training with one mask ratio and one learning-rate schedule."""

    name: Name
    steps: Every
    batch_size: Batch
    learning_rate: Annotated[float, Range(0, 1e38, above=True)]
    mask_ratio: ShareBelow1 = 0.0
    mask_schedule: Points | None = None  # instead: [progress, ratio] points, straight lines between, as [[0, 0.75], [1, 0]]
    mask_pattern: Pattern = "random"  # grid: as many out of each 2 x 2 of patches; for ratios 0.25, 0.5, 0.75
    warmup_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    final_learning_rate: Share = 1.0  # of learning_rate, reached by a cosine at the phase's end; 1 keeps it constant
    grad_clip: Annotated[float, Range(0, 10**9, above=True)] = 0.25
    weights: Annotated[dict[str, Weight], Range(1, 1000)] | None = (
        None  # shares of data.sets in this phase's samples; without, each set has its size
    )

    def mask_ratio_at(self, step: int) -> float:
        """The share of dropped patches at step number `step` (from 0) of the phase."""
        if self.mask_schedule is None:
            return self.mask_ratio
        progress = step / max(1, self.steps - 1)
        points = self.mask_schedule
        for (left, low), (right, high) in pairwise(points):
            if progress <= right:
                return low + (high - low) * max(0.0, progress - left) / (right - left)
        return points[-1][1]


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW, or Muon for most matrices and AdamW for the rest. Experts learn at a rate of their own."""

    method: Literal["adamw", "muon"] = "adamw"
    moments: Literal["float32", "int8"] = "float32"  # AdamW's two, in 4 bytes a number each or in 1 (training/adamw8.py)
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-8
    weight_decay: Annotated[float, Range(0, 1000)] = 0.1
    decay: Literal["matrices", "all"] = "matrices"  # all: norms and biases too, as the released code does
    expert_learning_rate: Annotated[float, Range(0, 1000)] = 0.5  # of learning_rate (2407.15811, appendix; the released code misses it)


@dataclass(frozen=True)
class EMARecipe:
    """An average of the weights. With a `start` later than 0 it begins there as a copy of them."""

    decay: ShareBelow1
    start: Annotated[int, Range(0, MOST_STEPS)] = 0


@dataclass(frozen=True)
class EngineRecipe:
    """How the work is done; the result is the same, up to rounding."""

    device: Name = "auto"  # auto (the GPU, where there is one), cpu, cuda, cuda:N, mps
    precision: Name = "auto"  # of products: auto (by the device), float32, bfloat16; weights and moments stay float32
    # auto: ddp where each GPU holds all of it; else, from 500 M parameters, hybrid (fsdp in each of several machines) or fsdp over all
    sharding: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    micro_batch: Batch | None = None  # samples that a process takes at a time; without, its whole share of the batch
    compile: bool = False  # torch.compile for what lies between matrix products: seconds at the start, faster steps on a GPU
    cuda_graphs: bool = True  # one NVIDIA GPU that holds the model whole: record a micro-batch's kernels, and replay them by one call
    activation_checkpointing: bool | Share = False  # compute blocks twice, keep less: all, or the first share of them, as 0.5
    averages_on_cpu: bool = False  # keep the averages in the machine's memory, and not in the GPU's
    release_gradients: bool = False  # one process that holds the model whole: keep a gradient no longer than it is needed (gradients.py)


@dataclass(frozen=True)
class GuardRecipe:
    """When a step is not taken, and when to go back to a checkpoint."""

    loss_jump: Annotated[float, Range(1, 10**9, above=True)] = (
        10.0  # a loss above this many times the median of the last 64 is not learnt from
    )
    rollback_after: Annotated[int, Range(1, 10**6)] = 5  # such steps in a row


@dataclass(frozen=True)
class RecordRecipe:
    """What is written while training, and how often (in steps)."""

    metrics_every: Every = 20
    samples_every: Every = 1000
    checkpoint_every: Every = 500
    keep_checkpoints: Annotated[int, Range(1, 10**6)] = 2  # the newest
    keep_every: Every | None = None  # and those of every n-th step, for ever
    held_out_every: Every = 500
    held_out_samples: Annotated[int, Range(1, 10**6)] = 256
    quality_every: Every | None = None  # draw stored captions and compare the pictures with their own; without, never
    quality_samples: Annotated[int, Range(LEAST_QUALITY_SAMPLES, 10**6)] = 64  # of them: from 16 to the rows of the set
    sample_prompts: Prompts = field(default_factory=list)
    sample_steps: Annotated[int, Range(2, 1000)] = 18
    guidance_scale: Annotated[float, Range(-100, 100)] = 2.0
    wandb_project: Name | None = None  # also send the metrics to Weights & Biases


@dataclass(frozen=True)
class Recipe:
    """A whole training run.

    >>> from microdit import load_recipe
    >>> recipe = load_recipe("emoji-fast")
    >>> recipe.model.dim, recipe.total_steps
    (128, 800)
    """

    name: Name
    seed: Seed = 0
    init_from: FilePath | None = None  # begin with the weights of another run: one beside this one's folder, or a path
    init_weights: Name = "model"  # which of them: model, or an average: ema (the first), ema-DECAY
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(kw_only=True)
    diffusion: DiffusionRecipe = field(default_factory=DiffusionRecipe)
    phases: Annotated[list[PhaseRecipe], Range(1, 100)] = field(kw_only=True)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema: Annotated[list[EMARecipe], Range(0, 16)] = field(
        default_factory=lambda: [EMARecipe(0.999)]
    )  # pictures are made with the first; may be empty
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    guard: GuardRecipe = field(default_factory=GuardRecipe)
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

    def samples_before(self, step: int) -> int:
        """How many samples all batches before this step hold."""
        seen = 0
        for phase in self.phases:
            seen += min(step, phase.steps) * phase.batch_size
            step -= min(step, phase.steps)
        return seen

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Tuples to lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
