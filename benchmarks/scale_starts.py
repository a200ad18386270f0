"""The costs of a start as runs grow: resuming the last of four phases, loading `init_from`, opening a data set of many shards, sockets.

    python benchmarks/scale_starts.py

Real processes on this machine, which meet by gloo, on checkpoints that they write themselves. Bytes are counted twice: as the processes ask
for them (`rchar`, which leaves out mapped files) and as the disk gives them (`read_bytes`, all processes of the machine together), after
the files were dropped from the system's memory.
"""

import json
import multiprocessing
import os
import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from scale_row import RANKS, SHARDS, SIZES, Row

from microdit.checkpoint import deal, find_weights
from microdit.config.schema import DataRecipe, EMARecipe, EngineRecipe, ModelRecipe, PhaseRecipe, Recipe, architecture
from microdit.data.manifest import MANIFEST, open_manifest
from microdit.distributed import World, start_world, stop_world
from microdit.errors import UserError
from microdit.io.files import sha256_of, to_checked_json
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.pipelines.origin import origin_of_checkpoint
from microdit.process_limits import open_files
from microdit.training.checkpointing import CheckpointWriter, newest_intact
from microdit.training.init_from import InitialWeights
from microdit.training.setup import finished_checkpoint
from microdit.training.state import TrainingState

WEIGHTS, PAPER = 4.66e9, "paper"  # bytes of MicroDiT_XL_2's weights
WIDTHS = {"1 x": 64, "10 x": 192}  # of the models whose checkpoints are resumed: 5 and 33 MB of weights
ORIGINS = {"1 x": 192, "10 x": 512}  # of those that are begun from: 33 and 238 MB
PHASES, STEPS = ("1", "2", "3", "4"), 8
PROCESSES = 2
LIMIT = 1024  # what many systems allow by default
SLACK = 1.05
_context = multiprocessing.get_context("forkserver")


def rows(place: Path) -> list[Row]:
    _context.set_forkserver_preload(["microdit.training.multi_phase", "microdit.training.init_from"])
    return [*_resuming(place / "resume"), *_beginning(place / "begin"), _opening(place / "set"), *_sockets()]


def _resuming(place: Path) -> list[Row]:
    asked, given, busiest = {}, {}, 0.0
    for size, width in WIDTHS.items():
        counted = _together(PROCESSES, resume, place / str(width), width)
        total = counted[0]["size"]
        asked[size] = sum(one["asked"] for one in counted) / total
        given[size] = sum(one["given"] for one in counted) / total
        weights, files = counted[0]["weights"], counted[0]["files"]
        shutil.rmtree(place / str(width))
    at_scale = {name: int(bytes * WEIGHTS / weights) for name, bytes in _over(files, RANKS).items()}
    busiest = max(sum(at_scale[name] for name in hand) for hand in deal(at_scale, RANKS))
    paper = (
        f"-> {asked['10 x']:.2f} of {len(PHASES) * sum(at_scale.values()) / 1e9:.0f} GB, {busiest / 1e9:.1f} GB a phase on the busiest rank"
    )
    return [
        Row(
            "resuming phase 4 of four: bytes that all ranks read, of the checkpoints' bytes",
            {size: f"{share:.2f}" for size, share in asked.items()} | {PAPER: paper},
            "each byte once",
            all(share <= SLACK for share in asked.values()),
        ),
        Row(
            "the same, loading into each rank included: bytes that the disk gives to a machine",
            {size: f"{share:.2f}" for size, share in given.items()} | {PAPER: f"-> {given['10 x']:.2f}"},
            "each byte at most once",
            all(share <= SLACK for share in given.values()),
        ),
    ]


def _over(files: dict[str, int], ranks: int) -> dict[str, int]:
    """The files of a checkpoint as so many processes write it: their shards are as many."""
    sharded = sum(size for name, size in files.items() if "/" in name)
    whole = {name: size for name, size in files.items() if "/" not in name}
    return whole | {f"shards/{rank}": sharded // ranks for rank in range(ranks)}


def _beginning(place: Path) -> list[Row]:
    shares, weights = {}, 0
    for size, width in ORIGINS.items():
        folder = place / str(width)
        _write_weights(folder, width)
        weights = (folder / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").stat().st_size
        shares[size] = max(_together(PROCESSES, begin, folder, width)) / weights
        shutil.rmtree(folder)
    more = max(0.0, shares["10 x"] - 1 / PROCESSES) * weights  # which does not grow with the weights: the largest of them, and code
    return [
        Row(
            f"init_from with FSDP: memory that a rank needs, of the weights' bytes ({PROCESSES} ranks)",
            {size: f"{share:.2f}" for size, share in shares.items()} | {PAPER: f"-> {(WEIGHTS / RANKS + more) / 1e9:.2f} of 4.66 GB"},
            f"1/{PROCESSES} + 0.1 at 10 x",
            shares["10 x"] <= 1 / PROCESSES + 0.1,
        )
    ]


def _opening(place: Path) -> Row:
    figures, holds = {}, True
    for size, share in SIZES.items():
        shards = round(SHARDS * share)
        counted = _together(PROCESSES, opening, _write_manifest(place / str(shards), shards))
        looks = sum(looks for looks, _ in counted)
        figures[size] = f"{looks:,} looks at {shards:,} shards, {max(seconds for _, seconds in counted):.2f} s"
        holds &= looks <= shards + 10 * PROCESSES  # and some at the folder and its manifest
        shutil.rmtree(place)
    return Row("opening a set: looks at its shards, all ranks", figures, "one rank looks", holds)


def _sockets() -> list[Row]:
    few, some, many = [max(_together(ranks, opened)) for ranks in (2, 4, 8)]
    a_peer = (many - few) / 6
    told = _together(1, refused)[0]
    needed = {ranks: round(many + (ranks - 8) * a_peer) for ranks in (RANKS, 16 * RANKS)}
    figures = {
        "1 x": f"{many} for 8 ranks ({few} for 2, {some} for 4: {a_peer:.1f} a peer)",
        "10 x": f"-> {needed[RANKS]} for {RANKS}",
        PAPER: f"-> {needed[16 * RANKS]:,} for {16 * RANKS:,}",
    }
    says = isinstance(told, UserError) and "ulimit -n" in str(told)
    bar = f"under {LIMIT:,} for {RANKS} ranks; a limit that is too low is a sentence"
    return [Row("open files of the first rank, once all have met", figures, bar, needed[RANKS] < LIMIT and says)]


def resume(world: World, place: Path, width: int) -> dict[str, Any]:
    """Write four phases, all but the last finished, and resume the last one: bytes read, and those of the checkpoints."""
    recipes = {name: _recipe(width, ema=name > "2") for name in PHASES}
    config = architecture(recipes["4"].model, 4, 64)
    for name, recipe in recipes.items():
        step = STEPS if name < PHASES[-1] else STEPS // 2
        _save(world, recipe, config, place / name, step)
    files = [path for path in place.rglob("*.safetensors") if "/checkpoints/step-" in str(path)]
    if world.is_main:
        _drop_from_memory(files)
    world.wait_for_all()
    before = _counted()
    for name in PHASES[:-1]:
        assert finished_checkpoint(place / name, recipes[name], world), name
    checkpoint = newest_intact(place / PHASES[-1], world, print)
    assert checkpoint is not None
    asked = _counted()
    TrainingState(recipes["4"], config, world, None, fresh=False).load(checkpoint)
    after = _counted()
    last = {path.relative_to(checkpoint.folder).as_posix(): path.stat().st_size for path in files if checkpoint.folder in path.parents}
    return {
        "asked": asked["rchar"] - before["rchar"],
        "given": after["read_bytes"] - before["read_bytes"],
        "size": sum(path.stat().st_size for path in files),
        "weights": last["model.safetensors"],
        "files": last,
    }


def begin(world: World, place: Path, width: int) -> int:
    """Begin with the weights that lie in `place`, sharded: by how much this process's own memory grew while they came, at its highest."""
    recipe = replace(_recipe(width, ema=False), engine=EngineRecipe(sharding="fsdp", precision="float32"))
    checkpoint = find_weights(place, print, "model", world)
    assert checkpoint is not None
    small = replace(recipe, model=_recipe(32, ema=False).model)
    TrainingState(small, architecture(small.model, 4, 64), world, None, fresh=True)
    with Highest() as memory:  # of which code that was not loaded yet is no part
        grown = [0]

        def fill(model: MicroDiT) -> None:
            InitialWeights(origin_of_checkpoint(checkpoint), "model", checkpoint).fill(model, world)
            grown[0] = memory.grown()

        TrainingState(recipe, checkpoint.model_config, world, fill, fresh=True)
    return grown[0]


def opening(world: World, folder: Path) -> tuple[int, float]:
    """How often this process asks the file system about a file while it opens the set, and how long that takes."""
    looks, stat, started = 0, os.stat, time.perf_counter()

    def counted(*arguments: Any, **more: Any) -> os.stat_result:
        nonlocal looks
        looks += 1
        return stat(*arguments, **more)

    os.stat = counted
    try:
        open_manifest(folder, world)
    finally:
        os.stat = stat
    return looks, time.perf_counter() - started


def opened(world: World) -> int:
    world.wait_for_all()
    return open_files()


def refused(world: World) -> None:
    """One of 1,024 processes, on a machine that allows as many open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    os.environ["WORLD_SIZE"] = str(16 * RANKS)
    start_world("cpu")


class Highest:
    """The most memory of its own (not of mapped files) that this process had since the block began, by looking again and again."""

    def __enter__(self) -> "Highest":
        self._first = self._highest = _own_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def grown(self) -> int:
        return max(self._highest, _own_memory()) - self._first

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, _own_memory())


def _own_memory() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def _counted() -> dict[str, int]:
    return {key: int(number) for key, number in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}


def _drop_from_memory(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _recipe(width: int, ema: bool) -> Recipe:
    return Recipe(
        "scale",
        data=DataRecipe("nowhere"),
        model=ModelRecipe(width, 6, 32, width, 2, num_experts=4),
        phases=[PhaseRecipe("all", STEPS, 8, 1e-3)],
        ema=[EMARecipe(0.99)] if ema else [],
        engine=EngineRecipe(sharding="fsdp"),
    )


def _save(world: World, recipe: Recipe, config: ModelConfig, run: Path, step: int) -> None:
    saver = CheckpointWriter(run, world, keep=1, keep_every=None, warn=print)
    state = TrainingState(recipe, config, world, None, fresh=True)
    saver.save(step, state.tensors(), _description(recipe, config), ["model", *state.averages])
    assert saver.finish()


def _description(recipe: Recipe, config: ModelConfig) -> dict[str, Any]:
    data = {"resolution": 64, "autoencoder": {"name": "icon"}, "text_encoder": {"name": "minilm"}}
    return {"model": asdict(config), "recipe": yaml.safe_load(recipe.to_yaml()), "data": data, "sets": {}}


def _write_weights(run: Path, width: int) -> None:
    """A checkpoint of nothing but weights."""
    recipe = _recipe(width, ema=False)
    config = architecture(recipe.model, 4, 64)
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    folder.mkdir(parents=True)
    save_file({name: weight.detach() for name, weight in MicroDiT(config).named_parameters()}, folder / "model.safetensors")
    files = {"model.safetensors": sha256_of(folder / "model.safetensors")}
    (folder / "state.json").write_bytes(to_checked_json({"step": STEPS, "files": files, **_description(recipe, config)}))


def _write_manifest(folder: Path, shards: int) -> Path:
    """Write the manifest of a data set of `shards` shards, and files with their names and sizes."""
    folder.mkdir(parents=True)
    names = [f"shard-{number:05d}.arrow" for number in range(shards)]
    for name in names:
        (folder / name).write_bytes(b"1234")
    keys = ("rows", "sizes", "settings", "autoencoder", "text_encoder", "text_channels", "downsampling")
    entries = [{"name": name, "bytes": 4, "sha256": "0" * 64} for name in names]
    (folder / MANIFEST).write_bytes(to_checked_json({"format": 3, **dict.fromkeys(keys, 1), "shards": entries}))
    return folder


def _together(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns in each of so many processes; a UserError that it raises is returned."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = _context.SimpleQueue()
    processes = [_context.Process(target=_one, args=(results, rank, ranks, port, function, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of {function.__name__} ended with {process.exitcode}")
    return [found for _, found in sorted((results.get() for _ in processes), key=lambda pair: pair[0])]


def _one(results: Any, rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in world.items()})
    try:
        found = function(start_world("cpu"), *arguments)
    except UserError as error:
        found = error
    results.put((rank, found))
    stop_world()


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for row in rows(Path(place)):
            print(json.dumps(row._asdict(), indent=1))


if __name__ == "__main__":
    main()
