"""The processes of a run: one, or those that torchrun started, on one machine or many."""

import os
from dataclasses import dataclass
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


@dataclass(frozen=True)
class World:
    """This process among `size`. Small messages go by gloo in groups of their own: one for the loop, one for the thread that saves."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    saving: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=_meeting_place(size), rank=rank, world_size=size)
    return World(rank, size, chosen, dist.new_group(backend="gloo", timeout=timeout), dist.new_group(backend="gloo", timeout=timeout))


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
