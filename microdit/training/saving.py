"""Writing checkpoints while training goes on, and reading them back on any number of processes.

A save copies the tensors (that is all the loop waits for); a thread of each process then writes its share by torch.distributed.checkpoint,
and the first process puts whole weights, checksums and the state beside them, and renames the folder once everything is on the disk.
"""

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from microdit.checkpoint import FOLDER, SHARDS, STATE, Checkpoint, assembled, checkpoint_folders, open_checkpoint, step_of
from microdit.distributed import World
from microdit.errors import UserError
from microdit.files import sha256_of, to_checked_json, write_aside

Tensors = dict[str, Tensor]
"""All of a training's tensors, each named PART/NAME: `model/...`, `ema/...`, `optimizer/...`."""


class Saver:
    """Saves one checkpoint at a time; a second save waits for the first."""

    def __init__(self, run: Path, world: World, keep: int, keep_every: int | None, warn: Callable[[str], None]):
        self.run, self.world, self.keep, self.keep_every, self.warn = run, world, keep, keep_every, warn
        self.failed = 0
        self.last_saved: int | None = None
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._step = 0
        if world.is_main:
            for stale in (run / FOLDER).glob(".step-*.part"):
                shutil.rmtree(stale)

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], exports: list[str]) -> None:
        """Begin to save. `exports`: the parts that shall also lie there whole, such as `model` and `ema`."""
        self.finish()
        aside = self.run / FOLDER / f".step-{step:08d}.part"
        self._problem, self._step = self._prepare(aside), step
        if self._problem is None:
            arguments = (aside, step, _begin(aside / SHARDS, tensors, self.world), state, exports)
            self._thread = threading.Thread(target=self._complete, args=arguments, name="checkpoint-writer", daemon=True)
            self._thread.start()

    def finish(self) -> bool:
        """Wait for the save that is under way. False, after a warning, if it failed; older checkpoints are intact then."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._problem is None:
            return True
        self.failed += 1
        self.warn(
            f"The checkpoint of step {self._step} could not be written to {self.run / FOLDER}: {self._problem}. "
            "Training goes on, earlier checkpoints are intact: make room on the disk."
        )
        self._problem = None
        return False

    def check(self) -> None:
        """Tell of a failed save as soon as it is known, without waiting for one that is under way."""
        if self._thread is None or not self._thread.is_alive():
            self.finish()

    def _prepare(self, aside: Path) -> str | None:
        """An empty folder to write to; what is wrong, if there can be none."""
        problem = None
        if self.world.is_main:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                (aside / SHARDS).mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        return self.world.share(problem)

    def _complete(self, aside: Path, step: int, written: "Future[Any]", state: dict[str, Any], exports: list[str]) -> None:
        problem: str | None = None
        checksums: dict[str, str] = {}
        try:
            written.result()
            mine = (aside / SHARDS).glob(f"shard-{self.world.rank + 1:05d}-*")
            checksums = {f"{SHARDS}/{path.name}": _flushed_checksum(path) for path in mine}
        except (Exception, CheckpointException) as error:  # whatever a write can raise, on any process: kept, and told by `finish`
            problem = _root_cause(error)
        try:
            answers = self.world.gather((problem, checksums), self.world.saving)
            problem = next((found for found, _ in answers if found), None)
            if self.world.is_main:
                problem = problem or self._try_to_publish(
                    aside, step, state, exports, {k: v for _, part in answers for k, v in part.items()}
                )
                if problem:
                    shutil.rmtree(aside, ignore_errors=True)
            self._problem = self.world.share(problem, self.world.saving)
        except RuntimeError as error:  # another process died; the loop ends for the same reason
            self._problem = f"the processes lost each other ({error})"
        if self._problem is None:
            self.last_saved = step

    def _try_to_publish(self, aside: Path, step: int, state: dict[str, Any], exports: list[str], checksums: dict[str, str]) -> str | None:
        """What went wrong, if anything did."""
        try:
            self._publish(aside, step, state, exports, checksums)
            self._prune()
        except (Exception, CheckpointException) as error:
            return _root_cause(error)
        return None

    def _publish(self, aside: Path, step: int, state: dict[str, Any], exports: list[str], checksums: dict[str, str]) -> None:
        """Whole weights, checksums, state; then the name."""
        for part in exports:
            path = aside / f"{part}.safetensors"
            save_file(assembled(aside / SHARDS, part), path)
            checksums[path.name] = _flushed_checksum(path)
        files = dict(sorted(checksums.items()))
        write_aside(aside / STATE, to_checked_json({"step": step, "files": files, **state}))
        target = self.run / FOLDER / f"step-{step:08d}"
        if target.is_dir():
            _delete(target)
        aside.rename(target)

    def _prune(self) -> None:
        for old in checkpoint_folders(self.run)[self.keep :]:
            if not self.keep_every or step_of(old) % self.keep_every:
                _delete(old)


def newest_whole(run: Path, world: World, warn: Callable[[str], None], skip: int = 0) -> Checkpoint | None:
    """The newest checkpoint of which every byte is what was written, or the one `skip` before it; None if there are none at all.

    The first process looks, and all share the reading. Damaged ones are passed over, each with a sentence to `warn`. Raises UserError if
    there are checkpoints and all are damaged: starting anew silently would lose a run.
    """
    folders = world.look(lambda: checkpoint_folders(run))
    whole = 0
    for folder in folders:
        try:
            checkpoint, strange = world.look(partial(_open_with_strangers, folder))
        except UserError as error:
            warn(str(error))
            continue
        if damaged := checkpoint.damage(sorted(checkpoint.state["files"]), world) + strange:
            warn(f"{folder} is damaged ({', '.join(damaged)}: not what was written).")
        elif whole == skip:
            return checkpoint
        else:
            whole += 1
    if folders and not whole:
        raise UserError(f"Every checkpoint in {run / FOLDER} is damaged. Delete the folder to start anew.")
    return None


def _open_with_strangers(folder: Path) -> tuple[Checkpoint, list[str]]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, checkpoint.strange_shards


def load_into(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Fill `tensors` in place, each process its share. Raises UserError if the checkpoint holds others."""
    try:
        load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint.folder / SHARDS)))
    except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{checkpoint.folder} does not hold what this recipe's training needs: {_root_cause(error)}") from error


def _delete(checkpoint: Path) -> None:
    """Take the name away first: others see the checkpoint whole or not at all, and what a kill leaves is cleared away at the next start."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old.part")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def _begin(folder: Path, tensors: Tensors, world: World) -> "Future[Any]":
    """Copy the tensors and start writing them. Tensors that every process holds whole are written once."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return async_save(_detached(tensors), storage_writer=writer, process_group=world.saving)  # type: ignore[return-value]


def _detached(tensors: Tensors) -> dict[str, Any]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _flushed_checksum(path: Path) -> str:
    """Once the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def _root_cause(error: BaseException) -> str:
    """The sentence inside what torch wraps around it."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {inner}"
    return str(error)
