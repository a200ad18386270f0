"""The processes of a run: one, or those that torchrun started, on one machine or many."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from microdit.devices import choose_device
from microdit.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=20)  # in training
ANSWER = 15.0  # seconds in which a process that lives answers once a message has failed: all have waited for it as long


@dataclass(frozen=True)
class World:
    """This process among `size`. Small messages go by gloo in groups of their own: one for the loop, one for the thread that saves."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    store: Store | None = None  # where the processes found each other
    processes: tuple[str, ...] = ()  # each by its number, host and process id, for people

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """How many of them run on this machine, as torchrun says; without it all."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def sum(self, tensor: Tensor) -> None:
        """In place, over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def share(self, value: T, group: dist.ProcessGroup | None = None) -> T:
        """The first process's value, on all."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=group or self.control)
        return box[0]

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every process's value, on all, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=group or self.control)
        return values

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Turn a message that failed, since a process died or hung for longer than the time-out, into a UserError that names it."""
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
        """Those of `processes` that do not call this too within `patience` seconds. For a time when no other message arrives."""
        answered: set[int] = {self.rank}
        asking = threading.Thread(target=self._ask, args=(answered, time.monotonic() + patience), daemon=True)
        asking.start()
        asking.join(patience + 1)  # the store itself may lie in a process that hangs
        return [name for rank, name in enumerate(self.processes) if rank not in answered]

    def _ask(self, answered: set[int], deadline: float) -> None:
        """Add to `answered` whoever does."""
        if self.store is None:  # alone
            return
        for rank in range(self.size):
            try:
                self.store.set(f"here/{self.rank}", "")
                self.store.wait([f"here/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
                answered.add(rank)
            except dist.DistError:  # not in time, or the store was in a process that died
                continue

    def wait_for_all(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


def start_world(device: str = "auto", timeout: timedelta = TIMEOUT) -> World:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be alone.

    `device`: a name that `choose_device` knows; auto and cuda give each process a GPU of its own. `timeout`: after which a process takes
    the others for dead. Raises UserError for a device that is not there.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device)
    store: Store | None = None
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = _meeting_place(size)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    groups = dist.new_group(backend="gloo", timeout=timeout), dist.new_group(backend="gloo", timeout=timeout)
    world = World(rank, size, chosen, *groups, store)
    return world if store is None else _introduced(world)


def _introduced(world: World) -> World:
    """With a name for each process, so that one that falls silent can be named."""
    name = f"process {world.rank} on {socket.gethostname()} (process id {os.getpid()})"
    return replace(world, processes=tuple(world.gather(name)))


def _is_failed_message(error: RuntimeError) -> bool:
    """gloo says in words alone that a message failed."""
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("/gloo/", "pair closure", "Connection closed by peer"))


def stop_world() -> None:
    """Leave in good order. Not called after an error: other processes may never answer."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _meeting_place(size: int) -> Store:
    """Where processes find each other.

    torchrun keeps one store over restarts, in which addresses of processes that died would be found again: each start gets a place of
    its own. With several machines the number of starts is not the same on all, so there it needs a store a start (examples/launch).
    """
    if size == 1:
        return HashStore()
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))  # type: ignore[attr-defined]
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _device(name: str) -> torch.device:
    """The device that `name` means to this process: under torchrun, auto and cuda are the GPU of its LOCAL_RANK."""
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
