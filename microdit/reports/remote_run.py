"""Run folders in object stores: what lies there, and copies of it on this machine.

    PLACE/recipe.yaml  run.json  status.json  metrics.jsonl  samples/  tensorboard/
    PLACE/checkpoints/step-00000500/     the files of a local checkpoint; it counts once its state.json is there, which is written last

`training/run_store.py` writes them. A copy here is compared with the SHA-256 that state.json holds for each file.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microdit.checkpoint import FOLDER, STATE, Checkpoint
from microdit.errors import UserError
from microdit.io.files import cache_folder, from_checked_json, sha256_of, write_aside
from microdit.io.places import MissingObject, Place, WrongBytes, location
from microdit.reports.run_folder import METRICS, RECIPE, RUN

STATUS = "status.json"
REMEDY = "Make room there, or name another cache in XDG_CACHE_HOME."
RECORD = re.compile(rf"([^/.][^/]*/)?({RECIPE}|{RUN}|{STATUS}|{METRICS}|metrics\.json|samples/step-\d+\.png)")
SUMMARY = re.compile(rf"([^/.][^/]*/){{0,3}}({RECIPE}|{RUN}|{STATUS})")  # what a table of runs shows, of the runs below a folder
_IN_CHECKPOINT = re.compile(rf"{FOLDER}/(step-\d{{8}})/(.+)")

Warn = Callable[[str], None]


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A whole checkpoint in a store. `content` is its state.json, and `sizes` are those of its files in bytes."""

    place: Place
    content: bytes
    state: dict[str, Any]
    sizes: dict[str, int]

    @property
    def shards(self) -> list[str]:
        return Checkpoint(Path(self.place.name), self.state["step"], self.state).shards

    def files_of(self, weights: str | None) -> list[str]:
        """Return the file of these weights (by default the first average, else the model), or all shards if that does not exist."""
        whole = [name for name in self.state["files"] if "/" not in name]
        wanted = [f"{weights}.safetensors"] if weights else ["ema.safetensors", "model.safetensors"]
        return next(([name] for name in wanted if name in whole), whole or self.shards)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy files to `folder`, each compared with its SHA-256; those that are there already are not copied again.

        Raises MissingObject or WrongBytes if the checkpoint is damaged.
        """
        for name in names:
            checksum, path = self.state["files"][name], folder / name
            if not (path.is_file() and sha256_of(path) == checksum):
                if name not in self.sizes:
                    raise MissingObject(f"{self.place / name} is missing.")
                (self.place / name).download(path, self.sizes[name], checksum, listed=True)


def checkpoint_files(run: Place) -> dict[str, dict[str, int]]:
    """Return the sizes of the files of each checkpoint of a run by name, newest first, including those that are not whole."""
    found: dict[str, dict[str, int]] = {}
    for name, size in (run / FOLDER).list().items():
        if match := _IN_CHECKPOINT.fullmatch(f"{FOLDER}/{name}"):
            found.setdefault(match[1], {})[match[2]] = size
    return dict(sorted(found.items(), reverse=True))


def open_remote(run: Place, name: str, sizes: dict[str, int]) -> RemoteCheckpoint:
    """Open a checkpoint by reading its state.json. Raises MissingObject or WrongBytes if that is damaged."""
    place = run / FOLDER / name
    try:
        content = (place / STATE).read(listed=True)
        state = from_checked_json(content)
        if not isinstance(state["files"], dict) or f"step-{state['step']:08d}" != name:
            raise ValueError("it is of another checkpoint")
    except (ValueError, KeyError, TypeError) as error:
        raise WrongBytes(f"{place / STATE} is damaged ({error}).") from error
    return RemoteCheckpoint(place, content, state, sizes)


def local_folder(run: Place, purpose: str) -> Path:
    """Return the folder of this machine for a copy of a run; runs of the same parent lie beside each other."""
    return cache_folder() / purpose / hashlib.sha256(str(run.parent).encode()).hexdigest()[:16] / run.name


def fetched_record(run: str, which: re.Pattern[str] = RECORD) -> Path:
    """Return `run` as a folder; if it is in a store, one that holds a copy of its record: recipe, metrics, status and pictures.

    The phases of a training may lie directly below it. Raises UserError if there is nothing of that kind in the store.
    """
    place = location(run)
    if isinstance(place, Path):
        return place
    folder = local_folder(place, "fetched-runs")
    names = {name: size for name, size in place.list().items() if which.fullmatch(name)}
    if not any(Path(name).name == RECIPE for name in names):
        raise UserError(f"{place} holds no run: there is no {RECIPE} below it. Name the --out of a training, or a folder of them.")
    with disk_errors_explained(folder, REMEDY):
        for name, size in names.items():
            path = folder / name
            if not (path.suffix == ".png" and path.is_file() and path.stat().st_size == size):
                write_aside(path, (place / name).read(listed=True))
    return folder


def fetched_weights(run: str, warn: Warn, weights: str | None = None, required: bool = True) -> Path:
    """Return `run` as a folder; if it is a run in a store, one with copies of its record and of the newest whole `weights`.

    Damaged checkpoints are named and passed over. Raises UserError if there is none, unless it is not `required`.
    """
    place, folder = location(run), fetched_record(run)
    if isinstance(place, Path):
        return place
    for name, sizes in checkpoint_files(place).items():
        target = folder / FOLDER / name
        if STATE not in sizes:
            continue
        try:
            with disk_errors_explained(folder, REMEDY):
                checkpoint = open_remote(place, name, sizes)
                checkpoint.fetch(checkpoint.files_of(weights), target)
                write_aside(target / STATE, checkpoint.content)  # last, since it makes the copy count
        except (MissingObject, WrongBytes) as error:
            warn(f"{place / FOLDER / name} is damaged, and passed over: {error}")
            continue
        for other in (folder / FOLDER).iterdir():
            if other != target:
                shutil.rmtree(other)
        return folder
    if required:
        raise UserError(f"There is no whole checkpoint in {place}: train on with --resume.")
    return folder


@contextmanager
def disk_errors_explained(folder: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError of this machine's disk into a UserError that ends with the sentence `remedy`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot hold the copy of a run: {error}. {remedy}") from error
