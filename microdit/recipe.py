"""Everything a recipe may say, typed. `recipe_file.py` reads one."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import yaml
from omegaconf import MISSING

from microdit.model.routing import Pattern
from microdit.model.sizes import Size

LEAST_QUALITY_SAMPLES = 16


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
    held_out: str | None = None  # an encoded set that is never learnt from: the loss on it is recorded
    read_timeout: float = 300.0  # seconds without a batch after which a run stops, and says what it was reading

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
    init_scale: float = 1.0  # times the paper's initial weights, which are for widths of about 1,000; 3 suits 128
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
    mask_schedule: list[list[float]] | None = None  # instead: [progress, ratio] points, straight lines between, as [[0, 0.75], [1, 0]]
    mask_pattern: Pattern = "random"  # grid: as many out of each 2 x 2 of patches; for ratios 0.25, 0.5, 0.75
    warmup_steps: int = 0
    final_learning_rate: float = 1.0  # of learning_rate, reached by a cosine at the phase's end; 1 keeps it constant
    grad_clip: float = 0.25
    weights: dict[str, float] | None = None  # shares of data.sets in this phase's samples; without, each set has its size

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
    """AdamW, or Muon for most matrices and AdamW for the rest. Experts learn at a rate of their own; only matrices decay."""

    method: Literal["adamw", "muon"] = "adamw"
    moments: Literal["float32", "int8"] = "float32"  # AdamW's two, in 4 bytes a number each or in 1 (training/adamw8.py)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    expert_learning_rate: float = 0.5  # of learning_rate (2407.15811, appendix; the released code misses it)


@dataclass(frozen=True)
class EMARecipe:
    """An average of the weights. With a `start` later than 0 it begins there as a copy of them."""

    decay: float = MISSING
    start: int = 0


@dataclass(frozen=True)
class EngineRecipe:
    """How the work is done; the result is the same, up to rounding."""

    device: str = "auto"  # auto (the GPU, where there is one), cpu, cuda, cuda:N, mps
    precision: str = "auto"  # of products: auto (by the device), float32, bfloat16; weights and moments stay float32
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"  # over several processes. auto: fsdp from 500 M parameters
    micro_batch: int | None = None  # samples that a process takes at a time; without, its whole share of the batch
    compile: bool = False  # torch.compile for what lies between matrix products: seconds at the start, faster steps on a GPU
    cuda_graphs: bool = True  # one NVIDIA GPU that holds the model whole: record a micro-batch's kernels, and replay them by one call
    activation_checkpointing: bool | int | float = False  # compute blocks twice, keep less: all, or the first share of them, as 0.5
    averages_on_cpu: bool = False  # keep the averages in the machine's memory, and not in the GPU's
    release_gradients: bool = False  # one process that holds the model whole: keep a gradient no longer than it is needed (gradients.py)


@dataclass(frozen=True)
class GuardRecipe:
    """When a step is not taken, and when to go back to a checkpoint."""

    loss_jump: float = 10.0  # a loss above this many times the median of the last 64 is not learnt from
    rollback_after: int = 5  # such steps in a row


@dataclass(frozen=True)
class RecordRecipe:
    """What is written while training, and how often (in steps)."""

    metrics_every: int = 20
    samples_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2  # the newest
    keep_every: int | None = None  # and those of every n-th step, for ever
    held_out_every: int = 500
    held_out_samples: int = 256
    quality_every: int | None = None  # draw stored captions and compare the pictures with their own; without, never
    quality_samples: int = 64  # of them: from 16 to the rows of the set
    sample_prompts: list[str] = field(default_factory=list)
    sample_steps: int = 18
    guidance_scale: float = 2.0
    wandb_project: str | None = None  # also send the metrics to Weights & Biases


@dataclass(frozen=True)
class Recipe:
    """A whole training run."""

    name: str = MISSING
    seed: int = 0
    init_from: str | None = None  # begin with the weights of another run: one beside this one's folder, or a path
    init_weights: str = "model"  # which of them: model, or an average: ema (the first), ema-DECAY
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = MISSING
    diffusion: DiffusionRecipe = field(default_factory=DiffusionRecipe)
    phases: list[PhaseRecipe] = MISSING
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema: list[EMARecipe] = field(default_factory=lambda: [EMARecipe(0.999)])  # pictures are made with the first; may be empty
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
