"""The real command line in real processes, forked from one that has imported everything: seconds saved at each start."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

RECIPE = Path(__file__).parent / "recipe.yaml"

_context = multiprocessing.get_context("forkserver")
PRELOADED = "tests.training.preloaded"
_context.set_forkserver_preload([PRELOADED])
HANG = 600.0  # seconds after which a test says that something hangs: many times what anything takes, on a busy machine too


@dataclass
class Running:
    """Processes of one command, one a rank."""

    processes: list
    logs: list[Path]

    def wait(self, seconds: float = HANG) -> list[int]:
        """Exit codes, by rank."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode is not None, self.output
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    @property
    def output(self) -> str:
        """What all of them printed, lines joined; of very much the end."""
        return " ".join(" ".join(log.read_text() for log in self.logs).split())[-5000:]


def start(
    log_folder: Path, arguments: list[object], ranks: int = 1, cores: int = 1, file_size: int | None = None, cwd: Path = RECIPE.parents[2]
) -> Running:
    """`microdit ARGUMENTS`. `file_size`: bytes after which the system refuses to write on, as it does when a disk is full."""
    log_folder.mkdir(parents=True, exist_ok=True)
    number = len(list(log_folder.iterdir()))
    logs = [log_folder / f"{number}-{rank}.log" for rank in range(ranks)]
    port = free_port()
    processes = []
    for rank, log in enumerate(logs):
        log.touch()
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in world.items()} if ranks > 1 else {}
        environment |= {key: value for key, value in os.environ.items() if key.startswith("AWS_")}  # the fork server may have others
        process = _context.Process(target=_main, args=(log, [str(a) for a in arguments], environment, cores, file_size, cwd))
        process.start()
        processes.append(process)
    return Running(processes, logs)


def together(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns in each of `ranks` real processes, by rank. A UserError that it raises is returned."""
    results, port = _context.Queue(), free_port()
    processes = [_context.Process(target=_one_of_them, args=(results, rank, ranks, port, function, arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=HANG) for _ in processes)
    for process in processes:
        process.join(HANG)
    return [found[rank] for rank in range(ranks)]


def bytes_read() -> int:
    """By this process, as it asked for them: from the disk or from the system's memory, but not what it has mapped."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def on_each(work: Callable[..., None], ranks: int, machine: int, log_folder: Path, *arguments: object, threads: int = 1) -> Running:
    """Call a module's function in as many processes, `machine` of them on each pretended machine."""
    log_folder.mkdir(parents=True)
    port, logs, processes = free_port(), [log_folder / f"{rank}.log" for rank in range(ranks)], []
    for rank, log in enumerate(logs):
        log.touch()
        world = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": machine, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in world.items()}
        process = _context.Process(target=_call, args=(log, environment, threads, work, arguments))
        process.start()
        processes.append(process)
    return Running(processes, logs)


def train(run: Path, data: Path, *more: object, ranks: int = 1) -> Running:
    """Begin `microdit train` with the tests' recipe."""
    return start(run.parent / "logs", ["train", RECIPE, f"data.path={data}", "--out", run, *more], ranks)


def recorded(run: Path, key: str) -> dict[int, float]:
    """A metric by step; each step is recorded once."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}\n")]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})
    return {r["step"]: r[key] for r in records}


def losses(run: Path) -> dict[int, float]:
    return recorded(run, "loss")


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All that a checkpoint holds, whole: `model/NAME`, `ema/NAME`, `optimizer/NAME/exp_avg` and so on."""
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)  # by their first row
    for path in (run / "checkpoints" / f"step-{step:08d}" / "shards").iterdir():
        with safe_open(path, "pt") as shard:
            for name, about in json.loads(shard.metadata()["DCP_SHARDING_INFO"]).items():
                pieces[name][next(iter(about["saved_offsets"]), 0)] = shard.get_tensor(name)
    return {name: torch.cat([of[row] for row in sorted(of)]) if len(of) > 1 else of.popitem()[1] for name, of in pieces.items()}


def wait_for(condition, running: Running, seconds: float = HANG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert running.alive, running.output
        assert time.monotonic() < deadline, running.output
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _one_of_them(results: Any, rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from microdit.distributed import start_world, stop_world
    from microdit.errors import UserError

    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in world.items()})
    torch.set_num_threads(1)
    try:
        found = function(start_world("cpu", timedelta(seconds=HANG)), *arguments)
    except UserError as error:
        found = error
    except Exception as error:
        found = AssertionError(repr(error))
    results.put((rank, found))
    stop_world()


def _call(log: Path, environment: dict[str, str], threads: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    _print_to(log)
    torch.set_num_threads(threads)
    work(*arguments)


def _print_to(log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)


def _main(log: Path, arguments: list[str], environment: dict[str, str], cores: int, file_size: int | None, cwd: Path) -> None:
    import resource

    from microdit.cli import main as cli
    from microdit.cli import terminal

    assert PRELOADED in sys.modules  # the fork server is silent about what it cannot import: run the tests from the repository's folder
    os.environ.update(environment, XDG_CACHE_HOME=str(log.parent / "cache"))  # not the user's own
    os.chdir(cwd)
    _print_to(log)
    terminal.console.file = sys.stdout
    torch.set_num_threads(cores)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    sys.argv = ["microdit", *arguments]
    cli.main()
