"""The recipe: every setting of a training run, with its type, range and default. `load.py` reads recipes from YAML."""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.diffusion.objective import Objective
from microdit.errors import UserError
from microdit.io.places import Place, location
from microdit.models.alignment import ProjectorKind, ProjectorShape
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
Every = Annotated[int, Range(1, MOST_STEPS)]  # an interval in steps
Batch = Annotated[int, Range(1, 65_536)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]
Factor = Annotated[float, Range(0, 1000, above=True)]
Points = Annotated[list[tuple[Share, ShareBelow1]], Range(1, 1000)]
Weight = Annotated[float, Range(0, 10**9)]


@dataclass(frozen=True)
class SetRecipe:
    """One of several data sets: the `path` of an encoded one, or a `source` that is encoded into a cache when training begins.

    `repeat` is how often an epoch contains each sample, in phases without `weights`. The cache holds what `microdit data encode` would have
    made of the source with `resolution`, `autoencoder` and `text_encoder` of `DataRecipe`.
    """

    path: FilePath | None = None
    source: FilePath | None = None
    repeat: Annotated[int, Range(0, 10**6)] = 1

    @property
    def folder(self) -> Path | Place:
        """Where the encoded set is. Raises UserError for a source that was not encoded yet."""
        if self.path is None:
            raise UserError(f"The source {self.source} of data.sets is encoded by 'microdit train' only: encode it, and name it by path.")
        return location(self.path)


@dataclass(frozen=True)
class CacheRecipe:
    """Local copies of shards that are read from an object store: their folder, which all processes of a machine share, and its size.

    With the order `blocks`, samples are shuffled within a quarter of `gigabytes` (of 10^9 bytes).
    """

    folder: FilePath | None = None  # by default in the user's cache folder
    gigabytes: Annotated[float, Range(0, 10**6, above=True)] = 10.0


@dataclass(frozen=True)
class DataRecipe:
    """The encoded data to train on (made by `microdit data encode`): the `path` of one set, or several `sets` by name.

    Paths are folders, or places in object stores such as s3://bucket/folder, whose shards are copied into `cache` as they are needed.
    `autoencoder` and `text_encoder`, if given, must be the ones that the sets were encoded with.
    """

    path: FilePath | None = None
    sets: Annotated[dict[str, SetRecipe], Range(0, 1000)] = field(default_factory=dict)
    resolution: Annotated[int, Range(1, 16_384)] | None = None  # pixels; required if a set holds several resolutions
    horizontal_flip: bool = False  # of half of the latents: exact for pixels, nearly so for autoencoders; not in the paper
    # share in which its first sentence takes the place of a caption of several, for sets encoded with --first-sentences
    first_sentence: Share = 0.0
    # full: each epoch is a permutation of all samples; blocks: of shards, and of the samples of a few shards at a time
    order: Literal["full", "blocks"] | None = None  # by default full, or blocks if a set is in an object store
    cache: CacheRecipe = field(default_factory=CacheRecipe)
    on_damage: Literal["stop", "skip"] = "stop"  # on a row that does not match its checksum
    autoencoder: FilePath | None = None
    text_encoder: FilePath | None = None
    held_out: FilePath | None = None  # an encoded set that is not trained on: the loss on it is recorded
    read_timeout: Annotated[float, Range(0, 10**6, above=True)] = (
        300.0  # seconds without a batch after which a run stops and reports what it was reading
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
    init_scale: Factor = 1.0  # multiplies the paper's initial weights, which suit widths near 1,000; 3 suits a width of 128
    # Exclude caption padding from attention. False is for captions stored in full (--store-captions full), like the authors'.
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
    """The objective, the distribution of its noise levels in training, and caption dropout.

    `sigma_data`, `P_mean` and `P_std` are settings of EDM (2206.00364, table 1); those from `t_mean` to `sampling_floor` belong to flow
    matching and are described at `Flow`.
    """

    sigma_data: Factor | None = None  # by default the standard deviation of the data's latents, or 0.9 if that was not measured
    P_mean: Annotated[float, Range(-20, 20)] = -0.6
    P_std: Annotated[float, Range(0, 20, above=True)] = 1.2
    caption_dropout: ShareBelow1 = 0.1  # share of captions replaced by zeros, for classifier-free guidance
    objective: Literal["edm", "flow"] = "edm"
    # what the network predicts: denoised (EDM's preconditioned output) with edm; velocity (the default), image or noise with flow
    prediction: Literal["denoised", "velocity", "image", "noise"] | None = None
    t_mean: Annotated[float, Range(-20, 20)] = 0.0
    t_std: Annotated[float, Range(0, 20, above=True)] = 1.0
    shift: Factor = 1.0
    noise_scale: Factor = 1.0
    training_floor: Annotated[float, Range(0, 1, above=True)] = 0.01
    sampling_floor: Annotated[float, Range(0, 1, above=True)] = 0.05


def objective_of(diffusion: DiffusionRecipe) -> EDM | Flow:
    """Return the objective of a recipe whose settings fit each other."""
    if diffusion.objective == "edm":
        sigma_data = EDM.sigma_data if diffusion.sigma_data is None else diffusion.sigma_data
        return EDM(sigma_data, diffusion.P_mean, diffusion.P_std)
    prediction = diffusion.prediction or "velocity"
    assert prediction != "denoised", "checked when the recipe is loaded"
    return Flow(
        prediction,
        diffusion.t_mean,
        diffusion.t_std,
        diffusion.shift,
        diffusion.noise_scale,
        diffusion.training_floor,
        diffusion.sampling_floor,
    )


@dataclass(frozen=True)
class PhaseRecipe:
    """A stretch of training with one mask ratio and one learning-rate schedule."""

    name: Name
    steps: Every
    batch_size: Batch
    learning_rate: Annotated[float, Range(0, 1e38, above=True)]
    mask_ratio: ShareBelow1 = 0.0
    mask_schedule: Points | None = None  # instead of mask_ratio: [progress, ratio] points, linear in between, such as [[0, 0.75], [1, 0]]
    mask_pattern: Pattern = "random"  # grid: the same number from each 2 x 2 cell of patches; for ratios 0.25, 0.5, 0.75
    warmup_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    final_learning_rate: Share = 1.0  # fraction of learning_rate at the end of the phase, reached by a cosine; 1 keeps it constant
    grad_clip: Annotated[float, Range(0, 10**9, above=True)] = 0.25
    weights: Annotated[dict[str, Weight], Range(1, 1000)] | None = (
        None  # share of each of data.sets in this phase's samples; by default proportional to their sizes
    )

    def mask_ratio_at(self, step: int) -> float:
        """Return the share of dropped patches at step number `step` (from 0) of the phase."""
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
    """AdamW, or Muon for most matrices and AdamW for the rest. Experts have their own learning rate."""

    method: Literal["adamw", "muon"] = "adamw"
    moments: Literal["float32", "int8"] = "float32"  # of AdamW's two moments: 4 bytes per number, or 1 (training/adamw8.py)
    betas: tuple[ShareBelow1, ShareBelow1] = (0.9, 0.999)
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-8
    weight_decay: Annotated[float, Range(0, 1000)] = 0.1
    decay: Literal["matrices", "all"] = "matrices"  # which weights decay; all includes norms and biases, as in the released code
    expert_learning_rate: Annotated[float, Range(0, 1000)] = (
        0.5  # fraction of learning_rate (2407.15811, appendix; missing from the released code)
    )


@dataclass(frozen=True)
class EMARecipe:
    """An exponential moving average of the weights. It begins at step `start` as a copy of them."""

    decay: ShareBelow1
    start: Annotated[int, Range(0, MOST_STEPS)] = 0


@dataclass(frozen=True)
class EngineRecipe:
    """Settings of the execution: device, precision, parallelism, memory. They change the result only by rounding."""

    device: Name = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:N, mps
    precision: Name = "auto"  # of matrix products: auto (by the device), float32, bfloat16; weights and moments stay float32
    # auto: ddp if each GPU holds the training state; else, from 500 M parameters, hybrid (fsdp within each of several machines) or fsdp
    sharding: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    micro_batch: Batch | None = None  # samples that a process computes at a time; by default its share of the batch
    compile: bool = False  # torch.compile the operations between matrix products: seconds at the start, faster steps on a GPU
    cuda_graphs: bool = True  # on one NVIDIA GPU without sharding: record a micro-batch's kernels, and replay them by one call
    activation_checkpointing: bool | Share = False  # recompute blocks in the backward pass: all, or the first share of them, such as 0.5
    averages_on_cpu: bool = False  # keep the EMA weights in the machine's memory instead of the GPU's
    release_gradients: bool = False  # on one process without sharding: free each gradient as soon as it is used (gradients.py)


@dataclass(frozen=True)
class GuardRecipe:
    """Thresholds for skipping a step and for rolling back to a checkpoint."""

    loss_jump: Annotated[float, Range(1, 10**9, above=True)] = (
        10.0  # skip a step whose loss exceeds this many times the median of the last 64
    )
    rollback_after: Annotated[int, Range(1, 10**6)] = 5  # skipped steps in a row


@dataclass(frozen=True)
class RecordRecipe:
    """Outputs during training, and their intervals in steps."""

    metrics_every: Every = 20
    samples_every: Every = 1000
    checkpoint_every: Every = 500
    keep_checkpoints: Annotated[int, Range(1, 10**6)] = 2  # number of the newest to keep
    keep_every: Every | None = None  # also keep those of every n-th step for good
    held_out_every: Every = 500
    held_out_samples: Annotated[int, Range(1, 10**6)] = 256
    quality_every: Every | None = None  # generate stored captions and compare with their images; by default never
    quality_samples: Annotated[int, Range(LEAST_QUALITY_SAMPLES, 10**6)] = 64  # number of captions: from 16 to the rows of the set
    fid_every: Every | None = None  # draw captions of a reference set and measure the Frechet distance to its images; by default never
    fid_reference: FilePath | None = None  # the set, as for `microdit evaluate --reference`
    fid_samples: Annotated[int, Range(2, 10**6)] = 1000  # number of captions; only distances of equal numbers may be compared
    fid_network: Annotated[str, Range(1, 4096)] = "efficientnet"  # or inception:FILE, for the FID of papers
    sample_prompts: Prompts = field(default_factory=list)
    sample_steps: Annotated[int, Range(2, 1000)] = 18
    guidance_scale: Annotated[float, Range(-100, 100)] = 2.0
    wandb_project: Name | None = None  # also send the metrics to Weights & Biases


@dataclass(frozen=True)
class AlignmentRecipe:
    """Representation alignment (REPA, 2410.06940): tokens of a block are drawn towards the features of a frozen vision encoder.

    The features come with the data: `microdit data encode --features ENCODER`. Defaults are the paper's where it has one.
    """

    encoder: FilePath  # as for --features
    block: Annotated[int, Range(1, 1000)]  # number of the backbone's block whose tokens are aligned, from 1; the mixer's do not count
    weight: Annotated[float, Range(0, 1000, above=True)] = 0.5  # of the negative mean cosine similarity, beside the denoising loss
    until: Annotated[float, Range(0, 1, above=True)] = 1.0  # share of the run's steps after which the loss ends (HASTE, 2505.16792)
    projector: ProjectorKind = "mlp"  # conv: a 3 x 3 convolution (iREPA, 2512.10794)
    width: Annotated[int, Range(1, 32_768)] = 2048  # of the MLP's two hidden layers
    spatial_norm: bool = False  # standardise each channel of the features over the image (iREPA)


def projector_of(alignment: AlignmentRecipe, dim: int, channels: int) -> ProjectorShape:
    """Return the shape of a recipe's projector, from tokens of width `dim` to features of `channels`."""
    return ProjectorShape(alignment.projector, dim, alignment.width, channels)


@dataclass(frozen=True)
class DistillationRecipe:
    """Distillation of the model that training starts from (`init_from`) to few steps (diffusion/distillation.py)."""

    steps: Annotated[int, Range(2, 1000)] = 4  # that the trained model draws with, by Euler's method and without guidance
    teacher_steps: Annotated[int, Range(2, 1000)] = 12  # in whose place they come, by Heun's method: a multiple of `steps`
    guidance_scale: Annotated[float, Range(-100, 100)] = 2.0  # of the teacher


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run.

    >>> from microdit import load_recipe
    >>> recipe = load_recipe("emoji-fast")
    >>> recipe.model.dim, recipe.total_steps
    (128, 800)
    """

    name: Name
    seed: Seed = 0
    # start from the weights of another run (a sibling folder of this run by name, or a path), of an exported or imported folder, or demo
    init_from: FilePath | None = None
    init_weights: Name = "model"  # model, or an average: ema (the first), ema-DECAY
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(kw_only=True)
    diffusion: DiffusionRecipe = field(default_factory=DiffusionRecipe)
    phases: Annotated[list[PhaseRecipe], Range(1, 100)] = field(kw_only=True)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema: Annotated[list[EMARecipe], Range(0, 16)] = field(
        default_factory=lambda: [EMARecipe(0.999)]
    )  # images are generated with the first; may be empty
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    guard: GuardRecipe = field(default_factory=GuardRecipe)
    record: RecordRecipe = field(default_factory=RecordRecipe)
    alignment: AlignmentRecipe | None = None
    distillation: DistillationRecipe | None = None

    @property
    def objective(self) -> Objective:
        """The training objective, and the settings with which the model is sampled."""
        objective, few = objective_of(self.diffusion), self.distillation
        return objective if few is None else replace(objective, student_steps=few.steps, teacher_steps=few.teacher_steps)

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[PhaseRecipe, int]:
        """Return the phase that step number `step` (from 0) belongs to, and the step's number within it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError("step lies behind the last phase")

    @property
    def aligned_steps(self) -> int:
        """The number of steps, from the first on, that have an alignment loss."""
        return 0 if self.alignment is None else round(self.alignment.until * self.total_steps)

    def aligned_at(self, step: int) -> bool:
        """Return whether step number `step` (from 0) has an alignment loss."""
        return step < self.aligned_steps

    def alone(self, phase: PhaseRecipe) -> "Recipe":
        """Return the recipe with this one of its phases only, aligned in as many steps as in the whole run."""
        if self.alignment is None:
            return replace(self, phases=[phase])
        number = next(number for number, one in enumerate(self.phases) if one is phase)
        before = sum(earlier.steps for earlier in self.phases[:number])
        aligned = min(phase.steps, max(0, self.aligned_steps - before))
        return replace(self, phases=[phase], alignment=replace(self.alignment, until=aligned / phase.steps) if aligned else None)

    def samples_before(self, step: int) -> int:
        """Return the number of samples in all batches before this step."""
        seen = 0
        for phase in self.phases:
            seen += min(step, phase.steps) * phase.batch_size
            step -= min(step, phase.steps)
        return seen

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Replace tuples by lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def short_yaml(settings: Any) -> str:
    """Return a dataclass of settings as YAML, without what is as by default."""
    return yaml.safe_dump(_without_defaults(settings), sort_keys=False, width=140, allow_unicode=True)


def _without_defaults(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _without_defaults(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_without_defaults(part) for part in item]
    if not is_dataclass(item):
        return item
    found: dict[str, Any] = {}
    for one in fields(item):
        value, default = getattr(item, one.name), one.default if one.default_factory is MISSING else one.default_factory()
        if value != default:
            found[one.name] = _without_defaults(value)
    return found
