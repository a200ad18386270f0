"""Checkpoints on disk: folders that are either complete or absent.

    checkpoints/step-00000500/
      shards/*.safetensors        the training state, as each process held it (`io/tensor_files.py`); not needed for inference
      model.safetensors           the full weights; absent if the checkpoint was saved in haste before preemption: then weights
                                  and averages are assembled from the shards
      ema.safetensors             the full EMA weights; ema-DECAY.safetensors for further averages
      state.json                  checksums of all files and of itself, the step, and everything needed to generate images

`training/checkpointing.py` writes them. They contain no pickles, and nothing is used before its checksum was verified; only the state.json
of earlier versions has no checksum.
"""

import heapq
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.files import from_checked_json, read_regular, sha256_of
from microdit.io.places import Place
from microdit.io.tensor_files import assembled, read_header
from microdit.io.untrusted_text import one_line
from microdit.models.blocks import BlockShape
from microdit.models.microdit import ModelConfig

T = TypeVar("T")
STATE = "state.json"
FOLDER = "checkpoints"
SHARDS = "shards"
_NAME = re.compile(r"step-\d{8}")
_SHARD = re.compile(rf"{SHARDS}/[^/]+\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder. `state` is the content of state.json."""

    folder: Path
    step: int
    state: dict[str, Any]
    _compared: set[str] = field(default_factory=set, compare=False, repr=False)  # verified files, which are not read again

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the weights called `name`, from NAME.safetensors or assembled from the shards.

        Raises UserError if they do not match their checksum, cannot be read (training deletes old checkpoints), or are not finite.
        """
        if damaged := self.damage_of(name):
            raise UserError(f"{self.folder} is damaged ({', '.join(damaged)}: not what was written, or gone).")
        try:
            files = [self.folder / shard for shard in self.shards]
            whole = load_file(self.folder / f"{name}.safetensors") if self._whole else assembled(files, name)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"The weights {name} of {self.folder} cannot be read: {error}.") from error
        check_finite(whole, f"The weights {name} of {self.folder}")
        return whole

    @property
    def weights(self) -> list[str]:
        """Return the names of the weights: model, and one for each average. Raises UserError if they are in damaged shards."""
        if self._whole:
            return sorted(name.removesuffix(".safetensors") for name in self._whole)
        try:
            parts = {tensor.partition("/")[0] for name in self.shards for tensor in read_header(self.folder / name)}
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} is damaged ({error}).") from error
        return sorted(parts - {"optimizer"})

    def damage_of(self, name: str, world: World | None = None) -> list[str]:
        """Return the files of the weights called `name` (their own file, or else all shards) that do not match their checksums.

        The processes of `world` share the reading, as in `damage`.
        """
        if self._whole:
            return self.damage([file for file in self._whole if file == f"{name}.safetensors"], world)
        return self.damage(self.shards, world) + first_looks(world, lambda: self.strange_shards)

    def path_of(self, name: str) -> Path | None:
        """Return the file of the weights called `name`; None if they are in shards."""
        return self.folder / f"{name}.safetensors" if self._whole else None

    @property
    def _whole(self) -> list[str]:
        return [name for name in self.state["files"] if "/" not in name]

    @property
    def shards(self) -> list[str]:
        return [name for name in self.state["files"] if _SHARD.fullmatch(name)]

    def damage(self, names: list[str], world: World | None = None) -> list[str]:
        """Return those of the files that do not match their checksums or cannot be read. Verified files are not read again.

        The processes of `world`, which must all call this, share the reading: each file is read by one of them.
        """
        unread = [name for name in names if name not in self._compared]
        mine = unread if world is None else world.look(lambda: deal(self._sizes(unread), world.size))[world.rank]
        files = self.state["files"]
        found = [name for name in mine if _checksum(self.folder / name) != files[name]]
        damaged = set(found if world is None else chain.from_iterable(world.gather(found)))
        self._compared.update(set(unread) - damaged)
        return [name for name in names if name in damaged]

    def _sizes(self, names: list[str]) -> dict[str, int]:
        paths = {name: self.folder / name for name in names}
        return {name: path.stat().st_size if path.is_file() else 0 for name, path in paths.items()}

    @property
    def strange_shards(self) -> list[str]:
        """Return shards that state.json does not name, which would be read too, as after copying another checkpoint over this one."""
        found = (f"{SHARDS}/{path.name}" for path in (self.folder / SHARDS).glob("*.safetensors"))
        return sorted(name for name in found if name not in self.state["files"])

    @property
    def model_config(self) -> ModelConfig:
        """The architecture. Raises UserError if state.json describes none, as that of another version or from elsewhere may not."""
        try:
            return config_of_fields(self.state["model"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.folder / STATE} describes no model that this version knows: {one_line(repr(error), 300)}.") from error


def deal(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Divide names among `ranks` evenly by size: largest first, each to the rank with the fewest bytes."""
    hands: list[list[str]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heap[0]
        hands[rank].append(name)
        heapq.heapreplace(heap, (load + sizes[name], rank))
    return hands


def first_looks(world: World | None, look: Callable[[], T]) -> T:
    """Return `look()`, called by the first process only if there are several."""
    return look() if world is None else world.look(look)


def config_of_fields(saved: Mapping[str, Any]) -> ModelConfig:
    """Return the architecture from its JSON fields. Raises TypeError or ValueError if they are invalid."""
    fields = dict(saved)
    for stack in ("blocks", "mixer", "decoder", "preamble"):
        fields[stack] = tuple(BlockShape(**shape) for shape in fields.get(stack, ()))
    if "dense_blocks" in fields:
        fields["dense_blocks"] = tuple(fields["dense_blocks"])
    return ModelConfig(**fields)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint by reading state.json only. Raises UserError if that is damaged or its step differs from the folder's name."""
    try:
        state = from_checked_json(read_regular(folder / STATE))
        if not isinstance(state["files"], dict):
            raise ValueError("it names no files")
        if _NAME.fullmatch(folder.name) and state["step"] != step_of(folder):
            raise ValueError(f"its state is of step {state['step']}")
        return Checkpoint(folder, state["step"], state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({error}).") from error


def find_weights(run: Path, warn: Callable[[str], None], weights: str | None = None, world: World | None = None) -> Checkpoint | None:
    """Return the newest checkpoint whose `weights` (by default the first average, else the model) are intact; None if there is none at all.

    Damaged checkpoints are skipped with a warning. The processes of `world` share the reading. Raises UserError if all are damaged, or if
    the newest intact one lacks these weights.
    """
    folders = first_looks(world, lambda: checkpoint_folders(run))
    for folder in folders:
        try:
            checkpoint, known = first_looks(world, partial(_open_with_names, folder))
        except UserError as error:
            warn(str(error))
            continue
        name = weights or ("ema" if "ema" in known else "model")
        damaged = checkpoint.damage_of(name, world)
        if damaged or not known:
            warn(f"{folder} is damaged ({', '.join(damaged) or 'weights'}: not what was written).")
        elif name not in known:
            raise UserError(f"{folder} holds no weights named {name}, only {', '.join(known)}.")
        else:
            return checkpoint
    if folders:
        raise UserError(f"No checkpoint in {run / FOLDER} holds whole weights: they are damaged. Train on with --resume.")
    return None


def _open_with_names(folder: Path) -> tuple[Checkpoint, list[str]]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, checkpoint.weights


def check_finite(weights: Mapping[str, Tensor], what: str, fix: str = "take another checkpoint, or train anew") -> None:
    """Raise UserError if any weight is infinite or NaN."""
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise UserError(f"{what} are not finite in {len(bad)} of {len(weights)} tensors ({_short(', '.join(bad))}): {fix}.")


def default_weights(checkpoint: Checkpoint) -> str:
    return "ema" if "ema" in checkpoint.weights else "model"


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the run's checkpoint folders, newest first."""
    folder = run / FOLDER
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def check_architecture(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise UserError, naming the differences, if the checkpoint's architecture is not the recipe's."""
    saved, wanted = asdict(checkpoint.model_config), asdict(config)
    different = [
        f"{key}: {_short(saved[key])} in the checkpoint, {_short(wanted[key])} in the recipe" for key in wanted if saved[key] != wanted[key]
    ]
    if different:
        raise UserError(
            f"{checkpoint.folder} is of another architecture than the recipe asks for:\n  - "
            + "\n  - ".join(different)
            + "\nGo back to the recipe that made it, or start a new run with another --out."
        )


def check_encoders(checkpoint: Checkpoint, manifest: dict[str, Any], data: Path | Place) -> None:
    """Raise UserError if the checkpoint was trained with other encoders than those in the `manifest` of the encoded set `data`."""
    for key in ("autoencoder", "text_encoder"):
        then, now = checkpoint.state["data"][key], manifest[key]
        if then["fingerprint"] != now["fingerprint"]:
            raise UserError(
                f"{checkpoint.folder} was trained on data of the {key} {then['name']} ({then['fingerprint']}), and {data} is of "
                f"{now['name']} ({now['fingerprint']}): train anew with another --out, or encode with the old one."
            )


def _checksum(path: Path) -> str | None:
    """Return the checksum of a file; None if it cannot be read or does not exist."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
