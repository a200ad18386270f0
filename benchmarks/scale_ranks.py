"""What checkpoints cost as processes become many: the state of MicroDiT_XL_2 (weights, average, two moments) over 8 and 64, and
reckoned for 1,024 along the line through 64 and 256: what grows does so with the number of files.

    python benchmarks/scale_ranks.py

All rows of all tensors are there, one number wide: plans and headers grow with the number of tensors and processes, not with bytes. Our own
code saves and loads as the first of the processes, whose others are pretended: their files lie there, and what they would tell it is
unpickled, as gloo's messages are. One run is real: four processes on two pretended machines.
"""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scale_row import SIZES, Row
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from microdit.checkpoint import FOLDER, SHARDS, open_checkpoint
from microdit.config.schema import EngineRecipe
from microdit.distributed import World, start_world, stop_world
from microdit.io.tensor_files import Rows, pieces_of, write_rows
from microdit.models.config import SIZES as MODELS
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.training.checkpointing import CheckpointWriter, Tensors, Written, load_into, shard_name
from microdit.training.parallel import local, mesh_of, prepare_blocks

RANKS = dict(zip(SIZES, (8, 64, 1024), strict=True))
MEASURED = (8, 64, 256)
MOST_HELD, MOST_HEADERS, MOST_MEMORY = 2.0, 10.0, 200e6  # seconds, seconds, bytes: the bars
PARTS = ("model/{}", "ema/{}", "optimizer/{}/exp_avg", "optimizer/{}/exp_avg_sq")


@dataclass(frozen=True)
class Pretended(World):
    """The first process. `told`: what the others say, pickled, one list for each time that all say something."""

    told: list[list[bytes]] = field(default_factory=list)
    files: Path = Path()  # of the others, which appear in `target` once there is such a folder
    target: Path = Path()

    def share(self, value: Any, group: dist.ProcessGroup | None = None) -> Any:
        for path in self.files.glob("*") if self.target.is_dir() else ():
            path.rename(self.target / path.name)
        return value

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        return [value, *map(pickle.loads, self.told.pop(0))]


@dataclass(frozen=True)
class Cost:
    """On the first process: processor seconds in the loop and in all, which are at most those with the interpreter's lock; bytes."""

    loop: float
    saving: float
    headers: float
    memory: int
    right: bool


def rows(place: Path) -> list[Row]:
    simulated(place / "first", RANKS["1 x"])  # what a process meets for the first time costs more, and does not grow
    few, more, most = (simulated(place / str(ranks), ranks) for ranks in MEASURED)
    costs = {"1 x": few, "10 x": more, "paper": reckoned(more, most)}
    paper = costs["paper"]
    begin = {"1 x": "", "10 x": "", "paper": "-> "}
    real, right = four_processes(place / "four")
    return [
        Row(
            "a save by many ranks, fsdp: processor time on rank 0, of it in the loop",
            {size: f"{begin[size]}{RANKS[size]:,} ranks: {cost.saving:.2f} s, {cost.loop:.2f} s" for size, cost in costs.items()},
            f"{MOST_HELD:g} s at 1,024 ranks",
            paper.saving < MOST_HELD and all(cost.right for cost in costs.values()),
        ),
        Row(
            "plans and headers at loading, on each rank",
            {size: f"{begin[size]}{RANKS[size]:,} ranks: {cost.headers:.2f} s, {cost.memory / 1e6:.0f} MB" for size, cost in costs.items()},
            f"{MOST_HEADERS:g} s and {MOST_MEMORY / 1e6:.0f} MB at 1,024 ranks",
            paper.headers < MOST_HEADERS and paper.memory < MOST_MEMORY,
        ),
        Row("4 gloo processes, hybrid 2 x 2: a save", {"1 x": real, "10 x": "", "paper": ""}, "each row once, and read back", right),
    ]


def reckoned(few: Cost, more: Cost) -> Cost:
    """Along a straight line through two measured ones."""
    factor = (RANKS["paper"] - MEASURED[2]) / (MEASURED[2] - MEASURED[1])

    def on(a: float, b: float) -> float:
        return max(b, b + (b - a) * factor)

    memory = int(on(few.memory, more.memory))
    return Cost(on(few.loop, more.loop), on(few.saving, more.saving), on(few.headers, more.headers), memory, few.right and more.right)


def simulated(place: Path, ranks: int) -> Cost:
    """A save and a load, as the first of so many processes."""
    others, run = place / "others", place / "run"
    others.mkdir(parents=True)
    whole = state()
    numbers = {name: number for number, name in enumerate(whole)}
    told: list[list[bytes]] = [[], [], [], [], []]  # in a save: what was written, put together, published; then headers, and what was read
    for rank in range(1, ranks):
        header = write_rows(others / shard_name(rank), dealt(whole, rank, ranks))
        pieces = {part: pieces_of(header, rank, of_part(whole, part)) for part in ("model", "ema")}
        written = Written({f"{SHARDS}/{shard_name(rank)}": "0" * 64}, pieces)
        say: tuple[Any, ...] = (written, {}, None, pieces_of(header, rank, numbers), None)
        for message, said in zip(told, say, strict=True):
            message.append(pickle.dumps((None, [said])))
    with first_of(ranks) as (process, sharded):
        aside = run / FOLDER / ".step-00000001.part" / SHARDS
        world = Pretended(**process, told=told[:3], files=others, target=aside)
        saver = CheckpointWriter(run, world, 1, None, print)
        tensors = sharded(whole)
        started = time.process_time()
        saver.save(1, tensors, {}, ["model", "ema"])
        loop = time.process_time() - started
        saved = saver.finish()
        saving = time.process_time() - started
        checkpoint = open_checkpoint(run / FOLDER / "step-00000001")
        into = sharded({name: torch.zeros_like(tensor) for name, tensor in whole.items()})
        started = time.process_time()
        load_into(checkpoint, into, Pretended(**process, told=told[3:]))
        headers = time.process_time() - started
        tracemalloc.start()
        load_into(checkpoint, into, Pretended(**process, told=told[3:]))
        memory = tracemalloc.get_traced_memory()[1] + sum(map(len, told[3]))
        tracemalloc.stop()
        right = saved and all(local(into[name]).equal(local(tensor)) for name, tensor in tensors.items())
        right &= all(tensor.equal(whole[f"model/{name}"]) for name, tensor in checkpoint.tensors("model").items())  # the second has `ema`
    shutil.rmtree(place)
    return Cost(loop, saving, headers, memory, right)


def state() -> Tensors:
    """As many tensors as XL_2 trains, of as many rows, each of one number."""
    with torch.device("meta"):
        model = MicroDiT(resolve(MODELS["MicroDiT_XL_2"]))
    torch.manual_seed(0)
    return {part.format(name): torch.randn(len(weight), 1) for part in PARTS for name, weight in model.named_parameters()}


def of_part(tensors: Tensors, part: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(name for name in tensors if name.startswith(f"{part}/"))}


def dealt(whole: Tensors, rank: int, ranks: int) -> dict[str, Rows]:
    """The rows that FSDP gives to a process."""
    share = {}
    for name, tensor in whole.items():
        size = -(-len(tensor) // ranks)
        if rank * size < len(tensor):
            share[name] = Rows(rank * size, tensor[rank * size : (rank + 1) * size])
    return share


@contextmanager
def first_of(ranks: int) -> Iterator[Any]:
    """The first process's part in a world, and a function that shards tensors over it. No other process is started."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    nobody: Any = None

    def sharded(whole: Tensors) -> Tensors:
        return {
            name: DTensor.from_local(
                tensor[: -(-len(tensor) // ranks)].clone(), mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
            for name, tensor in whole.items()
        }

    try:
        yield {"rank": 0, "size": ranks, "device": torch.device("cpu"), "saving": nobody}, sharded
    finally:
        dist.destroy_process_group()


def four_processes(place: Path) -> tuple[str, bool]:
    """What they say, and whether what lies on the disk is each row once, and the weights."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--process", str(place)]
    processes = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True) for rank in range(4)]
    said = [process.communicate()[0] for process in processes]
    checkpoint = open_checkpoint(place / FOLDER / "step-00000001")
    model = small_model()
    weights = sum(weight.nbytes for weight in model.parameters())
    written = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.shards)
    read = checkpoint.tensors("model")
    right = all(weight.equal(read[name]) for name, weight in model.named_parameters()) and weights < written < 1.1 * weights
    shutil.rmtree(place)
    return f"{said[0].strip()}, {written / weights:.3f} x the weights on the disk", right and not any(p.returncode for p in processes)


def one_of_four(place: Path) -> None:
    world = start_world("cpu")
    model, mesh = small_model(), mesh_of("hybrid", world)
    prepare_blocks(model, EngineRecipe(), mesh, world.device)
    tensors: dict[str, Tensor] = {f"model/{name}": weight.detach() for name, weight in model.named_parameters()}
    saver = CheckpointWriter(place, world, 1, None, print)
    started = time.monotonic()
    saver.save(1, tensors, {}, ["model"])
    waited = time.monotonic() - started
    saver.finish()
    if world.is_main:
        print(f"{time.monotonic() - started:.2f} s, {waited:.2f} s in the loop")
    stop_world()


def small_model() -> MicroDiT:
    torch.manual_seed(0)
    return MicroDiT(resolve(Size(dim=256, depth=4, head_dim=32, mixer_dim=128, mixer_depth=2, num_experts=4)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        one_of_four(Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(Path(folder)):
                print(row)
