"""The processes of a run: one alone, or those that torchrun started, on one machine or several."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from microdit.devices import choose_device
from microdit.errors import StoppedError, UserError
from microdit.process_limits import check_file_limit

T = TypeVar("T")
TIMEOUT = timedelta(minutes=20)  # in training
GLOO_GROUPS = 2  # one open file per other process in each group, and one more for the store
SPARE_FILES = 512  # for everything else that a process opens: shards, checkpoints, pipes, NCCL
ANSWER = 15.0  # seconds within which a live process answers after a message has failed


@dataclass(frozen=True)
class World:
    """This process among `size`.

    Small messages go over gloo: those of the training loop in the default group, which no other thread may use, and those of the thread
    that saves checkpoints in the group `saving`.
    """

    rank: int
    size: int
    device: torch.device
    saving: dist.ProcessGroup
    store: Store | None = None  # the rendezvous store
    processes: tuple[str, ...] = ()  # readable names: rank, host and process id

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Number of processes on this machine, as torchrun says; without torchrun, all."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    @property
    def local_rank(self) -> int:
        """Number of this process among those on its machine; torchrun numbers them machine by machine."""
        return self.rank % self.local_size

    @property
    def leads_machine(self) -> bool:
        """Whether this is the first process on its machine."""
        return self.local_rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def share(self, value: T, group: dist.ProcessGroup | None = None) -> T:
        """Return the first process's value on all processes."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=group)
        return box[0]

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Return every process's value on all processes, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=group)
        return values

    def look(self, look: Callable[[], T]) -> T:
        """Call `look` on the first process, and return its result, or raise its UserError, on all. So all act alike."""
        found: tuple[T | None, str | None] = None, None
        if self.is_main:
            try:
                found = look(), None
            except UserError as error:
                if self.size == 1:
                    raise
                found = None, str(error)
        value, problem = self.share(found)
        if problem is not None:
            raise UserError(problem)
        return value  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise UserError on all processes if one raises it within the block, naming that process. All processes must enter the block."""
        problem: str | None = None
        try:
            yield
        except UserError as error:
            if self.size == 1 or isinstance(error, StoppedError):
                raise
            problem = str(error)
        problems = self.gather(problem)
        ranks = [rank for rank, found in enumerate(problems) if found]
        if ranks:
            where = "" if len(ranks) == self.size else f"{self._names(ranks)}: "
            raise UserError(f"{where}{problems[ranks[0]]}")

    def check_same_folder(self, seen: str, what: str) -> None:
        """Raise UserError on all processes if they have `seen` different contents of the folder `what`.

        The message names up to three processes that differ.
        """
        everywhere = self.gather(seen)
        others = [rank for rank, found in enumerate(everywhere) if found != everywhere[0]]
        if others:
            raise UserError(
                f"{what} is another folder to {self._names(others)} than to {self._names([0])}: all processes must see the same files. "
                "Use a file system that all machines share, mounted at the same place."
            )

    def _names(self, ranks: list[int]) -> str:
        names = [self.processes[rank] if self.processes else f"process {rank}" for rank in ranks]
        return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Turn a message that failed because a process died or hung into a UserError that names the process."""
        try:
            yield
        except RuntimeError as error:
            lost = self.lost(ANSWER) if _is_failed_message(error) else []
            if not lost:
                raise
            is_one = "process does" if len(lost) == 1 else "processes do"
            raise UserError(
                f"The processes of this run wait for each other in vain: {'; '.join(lost)}. That {is_one} not answer, hanging or dead: "
                f"look there, and start again with --resume. ({str(error).splitlines()[0]})"
            ) from error

    def lost(self, patience: float) -> list[str]:
        """Return those of `processes` that do not also call this within `patience` seconds. For use after a message has failed."""
        answered: set[int] = {self.rank}
        asking = threading.Thread(target=self._ask, args=(answered, time.monotonic() + patience), daemon=True)
        asking.start()
        asking.join(patience + 1)  # the process that hosts the store may hang
        return [name for rank, name in enumerate(self.processes) if rank not in answered]

    def _ask(self, answered: set[int], deadline: float) -> None:
        """Add to `answered` the ranks of processes that answer."""
        if self.store is None:  # alone
            return
        for rank in range(self.size):
            try:
                self.store.set(f"here/{self.rank}", "")
                self.store.wait([f"here/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
                answered.add(rank)
            except dist.DistError:  # too late, or the process that hosts the store died
                continue

    def wait_for_all(self) -> None:
        self.gather(None)  # a barrier on the default group would use NCCL


def start_world(device: str = "auto", timeout: timedelta = TIMEOUT) -> World:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK); without torchrun, return a world of one process.

    `device` is a name that `choose_device` knows; auto and cuda give each process a GPU of its own. After `timeout`, a silent process
    counts as dead. Raises UserError if the device does not exist, or if so many processes need more open files than allowed.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device)
    store: Store | None = None
    if size > 1:
        check_file_limit((GLOO_GROUPS + 1) * (size - 1) + SPARE_FILES, f"{size} processes")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = _meeting_place(size)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    world = World(rank, size, chosen, dist.new_group(backend="gloo", timeout=timeout), store)
    return world if store is None else _introduced(world)


def _introduced(world: World) -> World:
    """Return the world with a name for each process, so that errors can name one that stops answering."""
    name = f"process {world.rank} on {socket.gethostname()} (process id {os.getpid()})"
    return replace(world, processes=tuple(world.gather(name)))


def _is_failed_message(error: RuntimeError) -> bool:
    """Return whether the error is a failed message; gloo says so only in its text."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("/gloo/", "pair closure", "Connection closed by peer"))


def stop_world() -> None:
    """Leave the process group. Not called after an error, since other processes may never answer."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _meeting_place(size: int) -> Store:
    """Return the store through which processes find each other.

    torchrun keeps one store across restarts, which still holds the addresses of dead processes, so each start gets its own prefix. The
    number of starts can differ between machines, so with several machines each start needs a new store (examples/launch).
    """
    if size == 1:
        return HashStore()
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))  # type: ignore[attr-defined]
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _device(name: str) -> torch.device:
    """Return the device that `name` means to this process: under torchrun, auto and cuda are the GPU of its LOCAL_RANK."""
    together, local_rank = int(os.environ.get("WORLD_SIZE", "1")) > 1, int(os.environ.get("LOCAL_RANK", "0"))
    if together and name == "auto" and not torch.cuda.is_available():
        name = "cpu"  # Apple's GPU serves one process
    chosen = choose_device(name)
    if together and (chosen.type == "mps" or ":" in name):
        raise UserError(f"The device is to be {name}, which is a single one, and torchrun started several processes: take cuda, or cpu.")
    if chosen.type != "cuda":
        return chosen
    if ":" not in name:
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"torchrun started {local_rank + 1} or more processes here, and there are {gpus} GPUs: use --nproc-per-node {gpus}."
            )
        chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen
