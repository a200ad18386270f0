"""Write checkpoints while training goes on, and read them back on any number of processes.

The loop waits only until the tensors are copied. Then a thread of each process writes its part to a shard; the first process adds whole
weights, checksums and the state, and renames the folder once everything is on disk. If the run is in an object store, each process then
copies there the files that it wrote, and after all of them the first one the state (`run_store.py`).

Each process works out its part alone: the rows that it holds, and of rows that several processes hold, those assigned to it. So a save does
not cost the loop more with more processes, except for the arrays of metadata that they exchange at the end.
"""

import heapq
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from microdit.checkpoint import FOLDER, SHARDS, STATE, Checkpoint, checkpoint_folders, open_checkpoint, step_of
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.files import sha256_of, to_checked_json, write_aside
from microdit.io.tensor_files import NO_PIECES, Pieces, Rows, fill, pieces_of, read_header, within, write_rows
from microdit.training.parallel import copies_of, local, rows_of
from microdit.training.run_store import RunStore

T = TypeVar("T")
Tensors = dict[str, Tensor]
"""All of a training's tensors, each named PART/NAME: `model/...`, `ema/...`, `optimizer/...`."""


class Written(NamedTuple):
    """The files that one process wrote: checksums by file, and the places of the rows that are exported as full tensors."""

    checksums: dict[str, str]
    pieces: dict[str, Pieces]


class _SaveFailedError(Exception):
    """A save failed on some process; the message says why."""


class CheckpointWriter:
    """Saves one checkpoint at a time; a second save waits for the first.

    `last_saved` is the step of the newest checkpoint in the run folder, and `last_kept` that of the newest one at the run's place, which
    differs for a run in a `store`.
    """

    def __init__(
        self, run: Path, world: World, keep: int, keep_every: int | None, warn: Callable[[str], None], store: RunStore | None = None
    ):
        self.run, self.world, self.keep, self.keep_every, self.warn, self.store = run, world, keep, keep_every, warn, store
        self.failed = 0
        self.last_saved: int | None = None
        self.last_kept: int | None = None
        self._leads = world.is_main if store is None else world.leads_machine
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._step = 0
        if self._leads:
            for stale in (run / FOLDER).glob(".step-*.part"):
                shutil.rmtree(stale)

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], exports: list[str]) -> None:
        """Start to save. `exports` are the parts that are also written whole, such as `model` and `ema`.

        Machines without a disk in common write none: whoever reads such a checkpoint assembles the weights from the shards.
        """
        self.finish()
        exports = [] if self.store is not None and self.store.is_shared else exports
        aside = self.run / FOLDER / f".step-{step:08d}.part"
        self._problem, self._step = self._prepare(aside), step
        if self._problem is None:
            arguments = (aside, step, share_of(tensors, self.world), state, {part: _parts(tensors, part) for part in exports})
            self._thread = threading.Thread(target=self._complete, args=arguments, name="checkpoint-writer", daemon=True)
            self._thread.start()

    def finish(self) -> bool:
        """Wait for a running save. Returns False, after a warning, if it failed; older checkpoints are intact then."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._problem is None:
            return True
        self.failed += 1
        if self.last_saved == self._step and self.store is not None:
            self.warn(
                f"The checkpoint of step {self._step} could not be copied to {self.store.place / FOLDER}: {self._problem} "
                "Training goes on, and earlier checkpoints there are intact."
            )
        else:
            self.warn(
                f"The checkpoint of step {self._step} could not be written to {self.run / FOLDER}: {self._problem}. "
                "Training goes on, earlier checkpoints are intact: make room on the disk."
            )
        self._problem = None
        return False

    def wait(self, seconds: float) -> None:
        """Wait for a running save, at most for `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def check(self) -> None:
        """Warn about a failed save as soon as it is known, without waiting for one that is running."""
        if self._thread is None or not self._thread.is_alive():
            self.finish()

    def _prepare(self, aside: Path) -> str | None:
        """Create an empty folder to write to. Returns what went wrong, or None."""
        problem = None
        if self._leads:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                (aside / SHARDS).mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        return next((found for found in self.world.gather(problem) if found), None)

    def _complete(self, aside: Path, step: int, share: dict[str, Rows], state: dict[str, Any], exported: dict[str, Tensors]) -> None:
        """Write and publish. `share` is this process's part; `exported` are the parts that are written whole, as meta tensors."""
        try:
            written = self._of_all(lambda: self._write(aside / SHARDS, share, exported))
            share.clear()  # its memory is as much as all that this process trains
            exports = self._of_all(lambda: self._export(aside, exported, written))
            checksums = {name: checksum for part in (*(its.checksums for its in written), *exports) for name, checksum in part.items()}
            content = {"step": step, "files": dict(sorted(checksums.items())), **state}
            [described, *_] = self._of_all(lambda: to_checked_json(content) if self.world.is_main else b"")
            self._of_all(lambda: self._publish(aside, step, described) if self._leads else None)
            self.last_saved = step
            if self.store is not None:
                mine = [*written[self.world.rank].checksums, *exports[self.world.rank]]
                self._copy(self.store, f"step-{step:08d}", mine)
            self.last_kept = step
        except _SaveFailedError as failed:
            self._problem = str(failed)
            if self._leads:
                shutil.rmtree(aside, ignore_errors=True)
        except RuntimeError as error:  # another process died; the loop ends for the same reason
            self._problem = f"the processes lost each other ({error})"

    def _copy(self, store: RunStore, name: str, mine: list[str]) -> None:
        """Copy the checkpoint to the run's store: each process its files, then the first one the state, which makes it count."""
        self._of_all(lambda: store.begin(name) if self.world.is_main else None)
        self._of_all(lambda: store.upload(name, mine))
        self._of_all(lambda: store.publish(name, self.keep, self.keep_every) if self.world.is_main else None)

    def _of_all(self, work: Callable[[], T]) -> list[T]:
        """Return the results of all processes' `work`. Raises _SaveFailedError on all of them if it fails on one, whatever it raises."""
        done: list[T] = []
        problem = None
        try:
            done.append(work())
        except Exception as error:  # kept, and told by `finish`
            problem = _describe(error)
        answers = self.world.gather((problem, done), self.world.saving)
        if problem := next((found for found, _ in answers if found), None):
            raise _SaveFailedError(problem)
        return [result for _, results in answers for result in results]

    def _write(self, folder: Path, share: dict[str, Rows], exported: dict[str, Tensors]) -> Written:
        path, rank = folder / shard_name(self.world.rank), self.world.rank
        header = write_rows(path, share) if share else {}
        pieces = {
            part: pieces_of(header, rank, {f"{part}/{name}": number for number, name in enumerate(tensors)})
            for part, tensors in exported.items()
        }
        return Written({f"{SHARDS}/{path.name}": _flushed_checksum(path)} if share else {}, pieces)

    def _export(self, aside: Path, exported: dict[str, Tensors], written: list[Written]) -> dict[str, str]:
        """Write whole weights, each part by one of the processes. Returns checksums by file."""
        files = [aside / SHARDS / shard_name(rank) for rank in range(self.world.size)]
        checksums = {}
        for part, tensors in list(exported.items())[self.world.rank :: self.world.size]:
            whole = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
            fill([Rows(0, tensor) for tensor in whole.values()], np.concatenate([its.pieces[part] for its in written]), files)
            path = aside / f"{part}.safetensors"
            save_file(whole, path)
            checksums[path.name] = _flushed_checksum(path)
        return checksums

    def _publish(self, aside: Path, step: int, state: bytes) -> None:
        """Write the content of state.json, rename the folder, and delete checkpoints that are no longer kept."""
        write_aside(aside / STATE, state)
        target = self.run / FOLDER / f"step-{step:08d}"
        if target.is_dir():
            _delete(target)
        aside.rename(target)
        self._prune()

    def _prune(self) -> None:
        for old in checkpoint_folders(self.run)[self.keep :]:
            if not self.keep_every or step_of(old) % self.keep_every:
                _delete(old)


def newest_intact(run: Path, world: World, warn: Callable[[str], None], skip: int = 0, store: RunStore | None = None) -> Checkpoint | None:
    """Return the newest checkpoint whose every byte matches its checksum, or the one `skip` before it; None if there are none at all.

    The processes share the reading. Of a run in a `store`, only the training state is compared, which `RunStore.fetch` has copied here.
    Damaged ones are skipped with a warning. Raises UserError if all of them are damaged, because starting anew silently would lose a run.
    """
    folders = world.look(lambda: checkpoint_folders(run))
    if store is not None:
        folders = [run / FOLDER / folder.name for folder in folders]  # machines may have other workspaces
    whole = 0
    for folder in folders:
        try:
            checkpoint, strange = world.look(partial(_open_with_strangers, folder))
        except UserError as error:
            warn(str(error))
            continue
        checkpoint = replace(checkpoint, folder=folder)
        needed = checkpoint.state["files"] if store is None else checkpoint.shards
        if damaged := checkpoint.damage(sorted(needed), world) + strange:
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


def load_into(checkpoint: Checkpoint, tensors: Tensors, world: World) -> None:
    """Fill `tensors` in place, each process its part. All processes must call this.

    Each header is read by one process, which tells the others where rows lie. Raises UserError if the checkpoint holds other tensors.
    """
    files = [checkpoint.folder / name for name in checkpoint.shards]
    spans = np.array([rows_of(tensor) for tensor in tensors.values()])
    try:
        found = _of_all(world, lambda: _read_headers(files, range(world.rank, len(files), world.size), tensors))
        _check_rows(tensors, found)
        own = [Rows(first, local(tensor)) for tensor, (first, _) in zip(tensors.values(), spans.tolist(), strict=True)]
        _of_all(world, lambda: fill(own, np.concatenate([within(pieces, spans) for pieces in found]), files))
    except ValueError as error:
        raise UserError(f"{checkpoint.folder} does not hold what this recipe's training needs: {error}.") from error


def _of_all(world: World, work: Callable[[], T]) -> list[T]:
    """Return the results of all processes' `work`. Raises ValueError on all of them if it fails on one."""
    done: list[T] = []
    problem = None
    try:
        done.append(work())
    except (OSError, ValueError) as error:
        problem = str(error)
    answers = world.gather((problem, done))
    for rank, (problem, _) in enumerate(answers):
        if problem:
            raise ValueError(problem if world.size == 1 else f"{problem} (process {rank})")
    return [result for _, results in answers for result in results]


def _read_headers(files: list[Path], numbers: range, tensors: Tensors) -> Pieces:
    """Return where these files hold rows of the tensors. Raises ValueError if dtypes or shapes differ."""
    by_name = {name: number for number, name in enumerate(tensors)}
    found = [NO_PIECES]
    for number in numbers:
        header = read_header(files[number])
        for name in header.keys() & by_name.keys():
            here, there = tensors[name], header[name]
            if (here.dtype, here.dim(), *here.shape[1:]) != (there.dtype, len(there.shape), *there.shape[1:]):
                shapes = f"{there.dtype} and rows of {list(there.shape[1:])} there, of {here.dtype} and {list(here.shape[1:])} here"
                raise ValueError(f"{name} is of {shapes}")
        found.append(pieces_of(header, number, by_name))
    return np.concatenate(found)


def _check_rows(tensors: Tensors, found: list[Pieces]) -> None:
    """Raise ValueError if any tensor has more or fewer rows there."""
    lengths = np.zeros(len(tensors), np.int64)
    for pieces in found:
        np.maximum.at(lengths, pieces["tensor"], pieces["first"].astype(np.int64) + pieces["rows"])
    for (name, tensor), rows in zip(tensors.items(), lengths.tolist(), strict=True):
        if not rows:
            raise ValueError(f"{name} is missing")
        if rows != (len(tensor) if tensor.dim() else 1):
            raise ValueError(f"{name} has {rows} rows there, {len(tensor)} here")


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint.

    It is renamed first, so that others see it whole or not at all; a killed deletion is completed at the next start.
    """
    aside = checkpoint.with_name(f".{checkpoint.name}.old.part")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def share_of(tensors: Tensors, world: World) -> dict[str, Rows]:
    """Return copies of the rows that this process writes. Rows that several hold are assigned to whoever has the least so far."""
    share: dict[str, Rows] = {}
    loads: dict[int, list[tuple[int, int]]] = {}
    for name, tensor in tensors.items():
        number, copies = copies_of(tensor, world)
        writer = 0  # of scalars, which all processes read: they lie in one file
        if tensor.dim():
            load = loads.setdefault(copies, [(0, copy) for copy in range(copies)])
            size, writer = load[0]
            heapq.heapreplace(load, (size + tensor.numel() * tensor.itemsize, writer))
        part = local(tensor.detach())
        if writer == number and part.numel():
            share[name] = Rows(rows_of(tensor)[0], part.to("cpu", copy=True, memory_format=torch.contiguous_format))
    return share


def _parts(tensors: Tensors, part: str) -> Tensors:
    """Return the tensors of one part by their own names, on the meta device."""
    own = {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in own.items()}


def shard_name(rank: int) -> str:
    return f"shard-{rank + 1:05d}.safetensors"


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of one that may be sharded. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _flushed_checksum(path: Path) -> str:
    """Flush the file to disk and return its checksum."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def _describe(error: Exception) -> str:
    """Return the error's message, or its type if that is empty."""
    return str(error) or type(error).__name__
