"""Runs in object stores: a local working folder, copied to the store beside training and fetched from it at a resume.

Each machine has a working folder of its own, so none needs a disk in common with another one. A checkpoint counts in the store once its
state.json is there, which the first process writes after all processes have copied their files. The first process also copies the record
(metrics, pictures, status) every minute, and holds a lease, so that two programs never write one run.
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from microdit.checkpoint import FOLDER, STATE, checkpoint_folders, deal, step_of
from microdit.config.schema import Recipe
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.console import Reporter
from microdit.io.files import write_aside
from microdit.io.leases import Lease, leased
from microdit.io.locks import LOCK, sole_writer
from microdit.io.places import MissingObject, Place, WrongBytes
from microdit.reports.remote_run import RemoteCheckpoint, checkpoint_files, disk_errors_explained, local_folder, open_remote
from microdit.reports.run_folder import METRICS, RECIPE, RUN

REMEDY = "Make room there, or choose another --workspace."
OWNER = ".workspace-of"  # the place whose working files a workspace holds: what has no such file is never cleared
EVERY = 60.0  # seconds between two copies of the record
_RECORD = (METRICS, "metrics.json", "samples/*.png", "tensorboard/*", "*.damaged-*", RECIPE, RUN, "status.json")


class RunStore:
    """The run at `place`, whose files are written to the folder `workspace` first. `lease` is held by the first process."""

    def __init__(self, place: Place, workspace: Path, world: World, reporter: Reporter, lease: Lease | None):
        self.place, self.workspace, self.world, self.reporter, self.lease = place, workspace, world, reporter, lease
        self.record = RecordCopies(place, workspace, reporter.warn)

    @property
    def is_shared(self) -> bool:
        """Whether several machines, each with a folder of its own, write the run."""
        return self.world.local_size < self.world.size

    def begin(self, name: str) -> None:
        """Prepare the checkpoint `name`: if one of that name is there, it no longer counts. Raises UserError if the lease is lost."""
        assert self.lease is not None
        self.lease.check()
        (self.place / FOLDER / name / STATE).delete()

    def upload(self, name: str, files: list[str]) -> None:
        """Copy files of the checkpoint `name` to the store."""
        for file in files:
            (self.place / FOLDER / name / file).upload(self.workspace / FOLDER / name / file)

    def publish(self, name: str, keep: int, keep_every: int | None) -> None:
        """Make the checkpoint `name` count by its state.json, and delete those that are no longer kept, and halves of others.

        The metrics up to its step are copied before. Raises UserError if the lease is lost.
        """
        assert self.lease is not None
        self.record.copy()
        self.lease.check()
        (self.place / FOLDER / name / STATE).upload(self.workspace / FOLDER / name / STATE)
        there = checkpoint_files(self.place)
        whole = [other for other, sizes in there.items() if STATE in sizes or other == name]
        for other, sizes in there.items():
            step = step_of(Path(other))
            if other not in whole or (other in whole[keep:] and not (keep_every and step % keep_every == 0)):
                for file in sorted(sizes, key=lambda file: file != STATE):  # state.json first: from then on it does not count
                    (self.place / FOLDER / other / file).delete()

    def fetch(self, count: int = 1) -> None:
        """Copy the training state of the newest `count` whole checkpoints to each machine's workspace. All processes must call this.

        Damaged ones are named and passed over. Raises UserError if there are some and all are damaged.
        """
        found, there = 0, self.world.look(lambda: checkpoint_files(self.place))
        for name, sizes in there.items():
            if found < count and STATE in sizes:
                found += self._fetch(self.place, self.workspace, name, sizes)
        if any(STATE in sizes for sizes in there.values()) and not found:
            raise UserError(f"Every checkpoint in {self.place / FOLDER} is damaged. Delete them to start anew.")

    def _fetch(self, run: Place, folder: Path, name: str, sizes: dict[str, int], weights: str | None = None) -> bool:
        """Copy the training state of a checkpoint, or its `weights`, to the run folder `folder`; the processes of a machine share the work.

        Returns False, after a warning, if it is damaged.
        """
        problem: str | None = None
        checkpoint = self.world.look(partial(_open, run, name, sizes))
        with self.world.together(), disk_errors_explained(folder, REMEDY):
            if isinstance(checkpoint, RemoteCheckpoint):
                names = checkpoint.shards if weights is None else checkpoint.files_of(weights)
                mine = deal({name: sizes.get(name, 0) for name in names}, self.world.local_size)[self.world.local_rank]
                try:
                    checkpoint.fetch(mine, folder / FOLDER / name)
                except (MissingObject, WrongBytes) as error:
                    problem = str(error)
            else:
                problem = checkpoint
        problem = next((found for found in self.world.gather(problem) if found), None)
        with self.world.together(), disk_errors_explained(folder, REMEDY):
            if problem is None and isinstance(checkpoint, RemoteCheckpoint) and self.world.leads_machine:
                write_aside(folder / FOLDER / name / STATE, checkpoint.content)
        if problem:
            self.reporter.warn(f"{run / FOLDER / name} is damaged, and passed over: {problem}")
        return problem is None

    def restore(self, recipe: Recipe) -> None:
        """Bring the workspace to what the store holds: the record, and the newest whole checkpoint. All processes must call this.

        Without a checkpoint, the weights that the recipe starts from are fetched, if they are those of a run beside this one.
        """
        with self.world.together(), disk_errors_explained(self.workspace, REMEDY):
            if self.world.leads_machine:
                _clear(self.workspace, keep=set(checkpoint_files(self.place)))
                for name in (METRICS, RUN) if self.world.is_main else ():
                    if (self.place / name).exists():
                        write_aside(self.workspace / name, (self.place / name).read())
        self.fetch()
        initial = recipe.init_from
        if not initial or self.world.look(lambda: bool(checkpoint_folders(self.workspace))):
            return
        run, folder = self.place.parent / initial, self.workspace.parent / initial
        for name, sizes in self.world.look(lambda: checkpoint_files(run)).items():
            if STATE in sizes and self._fetch(run, folder, name, sizes, recipe.init_weights):
                return


@contextmanager
def opened_store(
    place: Place, workspace: Path | None, resume: bool, recipe: Recipe, world: World, reporter: Reporter
) -> Iterator[RunStore]:
    """Hold a run in a store until the block ends, with all that it holds copied there when it ends. All processes must enter the block.

    `workspace` is the local folder, by default one in the cache. Raises UserError if another program trains there, if there is a run and
    `resume` is not set, or if the record cannot be copied at the end.
    """
    workspace = workspace or local_folder(place, "runs")
    with ExitStack() as held:
        lease = None
        with world.together():
            if world.leads_machine:
                held.enter_context(sole_writer(workspace))
                _claim(workspace, place)
            if world.is_main:
                lease = held.enter_context(leased(place, resume, reporter.say, reporter.warn, partial(_stop, reporter)))
                if not resume and any(not name.startswith(".") for name in place.list()):
                    raise UserError(f"{place} holds a run already: continue with --resume, or choose another --out.")
        store = RunStore(place, workspace, world, reporter, lease)
        store.restore(recipe)
        if world.is_main:
            held.enter_context(_record_copied(store))
        yield store


def _stop(reporter: Reporter, sentence: str) -> None:
    """Stop the training, as a machine that is taken away does: another program has the run now."""
    reporter.warn(sentence)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _record_copied(store: RunStore) -> Iterator[None]:
    """Copy the record every minute, and once more at the end."""
    ended = threading.Event()

    def copy_on() -> None:
        while not ended.wait(EVERY):
            store.record.try_copy()

    thread = threading.Thread(target=copy_on, name="record-copies", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        store.record.try_copy()
        raise
    ended.set()
    thread.join()
    store.record.copy()


def _open(run: Place, name: str, sizes: dict[str, int]) -> RemoteCheckpoint | str:
    """Open a checkpoint. Returns what is wrong if it is damaged."""
    try:
        return open_remote(run, name, sizes)
    except (MissingObject, WrongBytes) as error:
        return str(error)


class RecordCopies:
    """Copies those files of the record that have changed since they were last copied."""

    def __init__(self, place: Place, workspace: Path, warn: Callable[[str], None]):
        self._place, self._workspace, self._warn = place, workspace, warn
        self._copied: dict[str, tuple[int, int]] = {}
        self._told = False
        self._copying = threading.Lock()

    def try_copy(self) -> None:
        """Copy; what fails is warned of once, and tried again by the next call."""
        try:
            self.copy()
            self._told = False
        except (UserError, OSError) as error:
            if not self._told:
                self._warn(f"The metrics and status of the run could not be copied to {self._place}: {error}")
            self._told = True

    def copy(self) -> None:
        """Copy. Raises UserError or OSError."""
        with self._copying:
            snapshot = self._workspace / ".copied.part"
            for path in (path for pattern in _RECORD for path in sorted(self._workspace.glob(pattern))):
                name, about = path.relative_to(self._workspace).as_posix(), path.stat()
                version = (about.st_mtime_ns, about.st_size)
                if self._copied.get(name) != version:
                    shutil.copyfile(path, snapshot)  # the original may grow while it is copied
                    (self._place / name).upload(snapshot)
                    self._copied[name] = version
            snapshot.unlink(missing_ok=True)


def _claim(workspace: Path, place: Place) -> None:
    """Mark an empty folder as the workspace of `place`. Raises UserError if it holds anything else, which would be lost."""
    owner = workspace / OWNER
    if owner.is_file() and owner.read_text() == str(place):
        return
    if owner.is_file() or any(path.name != LOCK for path in workspace.iterdir()):
        raise UserError(
            f"--workspace {workspace} holds other files, which a run in a store would delete: name an empty folder, or a new one."
        )
    write_aside(owner, str(place).encode())


def _clear(workspace: Path, keep: set[str]) -> None:
    """Delete whatever an earlier run left in the workspace, except for checkpoints of these names, whose files may be intact."""
    for path in workspace.iterdir():
        if path.name == FOLDER:
            for checkpoint in path.iterdir():
                (checkpoint / STATE).unlink(missing_ok=True)
                if checkpoint.name not in keep:
                    shutil.rmtree(checkpoint)
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, OWNER):
            path.unlink()
