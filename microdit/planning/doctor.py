"""`microdit doctor`: what this machine has and lacks for microdit. People paste it into bug reports, so it holds no names and no keys."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from huggingface_hub import constants

import microdit
from microdit.config.load import load_recipe
from microdit.devices import choose_device, device_name, memory_of
from microdit.errors import UserError
from microdit.io.files import cache_folder
from microdit.planning.hardware import find_chip, measurements_file, read_measurements
from microdit.planning.memory import PhaseMemory
from microdit.planning.workload import shapes_of
from microdit.process_limits import ENOUGH, raise_limit

LIBRARIES = ("diffusers", "transformers", "datasets", "numpy", "safetensors", "fsspec")
# Recipes that a machine may train, small to large.
TRIED = ("emoji-fast", "photographs", "microdit-tiny/1-256-masked", "microdit-xl/1-256-masked")
SCARCE_DISK = 10e9  # bytes; an encoded set and a few checkpoints take more
GIGABYTE = 1e9


@dataclass(frozen=True)
class Finding:
    """A fact about this machine, and what to do about it if it is a problem."""

    topic: str
    fact: str
    advice: str = ""


def examine(folder: Path) -> list[Finding]:
    """Return what microdit needs to know of this machine, in order of reading. `folder` is where data and runs are to lie."""
    return [
        *_software(),
        *_gpus(),
        Finding("processors", f"{_cores()} cores, {platform.machine()}, {memory_of(torch.device('cpu')) / GIGABYTE:.0f} GB of memory"),
        *_extras(),
        *_disks(folder),
        _file_limit(),
        *_trainable(),
    ]


def _software() -> Iterator[Finding]:
    yield Finding("microdit", microdit.__version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.release()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    yield Finding("torch", f"{torch.__version__}, built for {build}, {torch.get_num_threads()} threads")
    yield Finding("libraries", ", ".join(f"{name} {version(name)}" for name in LIBRARIES))


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            yield Finding("GPU", "Apple GPU")
        elif driver := _nvidia_driver():
            how = (
                "torch is a build without CUDA" if torch.version.cuda is None else f"its build for CUDA {torch.version.cuda} may be too new"
            )
            yield Finding(
                "GPU",
                f"NVIDIA's driver {driver} is there, but torch sees no GPU",
                f"{how}: choose the command for your driver at pytorch.org/get-started/locally, and run microdit doctor again.",
            )
        else:
            yield Finding("GPU", "none, as far as torch sees: everything runs on the CPU")
        return
    driver = f", driver {_nvidia_driver()}" if _nvidia_driver() else ""
    for number in range(torch.cuda.device_count()):
        properties, (free, total) = torch.cuda.get_device_properties(number), torch.cuda.mem_get_info(number)
        bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        fact = f"{properties.name}, {free / GIGABYTE:.0f} of {total / GIGABYTE:.0f} GB free, {bfloat16}" + (
            f", driver {driver}" if driver else ""
        )
        busy = "another program holds its memory: nvidia-smi lists it." if free < total / 2 else ""
        yield Finding(f"GPU {number}", fact, busy)


def _nvidia_driver() -> str:
    """Return the version of NVIDIA's driver on Linux; empty if there is none, or elsewhere."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[0] if found else ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _extras() -> Iterator[Finding]:
    packages: dict[str, list[str]] = {}
    for requirement in requires("microdit") or []:
        if found := re.search(r"extra == ['\"](\w+)['\"]", requirement):
            packages.setdefault(found[1], []).append(re.split(r"[\s;<>=\[\]!~]", requirement)[0])
    missing = {name: [package for package in needed if not _is_installed(package)] for name, needed in packages.items() if name != "dev"}
    yield Finding("extras", ", ".join(name for name, absent in missing.items() if not absent) or "none")
    lacking = [f"{name} ({', '.join(absent)})" for name, absent in missing.items() if absent]
    if lacking:
        yield Finding("not installed", f'{", ".join(lacking)}; pip install "microdit[NAME]" if you need one')


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _disks(folder: Path) -> Iterator[Finding]:
    for topic, place in (("disk here", folder), ("disk of caches", _existing(cache_folder()))):
        usage = shutil.disk_usage(place)
        low = "little for data and checkpoints: name another folder with --out, or clear this one." if usage.free < SCARCE_DISK else ""
        yield Finding(topic, f"{usage.free / GIGABYTE:,.0f} of {usage.total / GIGABYTE:,.0f} GB free", low)
    sizes = {"microdit": cache_folder(), "Hugging Face": Path(constants.HF_HOME)}
    yield Finding("caches", ", ".join(f"{name} {_size(place) / GIGABYTE:.1f} GB" for name, place in sizes.items()))


def _existing(place: Path) -> Path:
    """Return the first folder above `place` that exists."""
    return next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())


def _size(folder: Path) -> int:
    sizes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink() and path.is_file():
                sizes += path.stat().st_size
    return sizes


def _file_limit() -> Finding:
    limit = raise_limit()
    return Finding("open files", f"{limit:,} in each process", "" if limit >= ENOUGH else _MORE_FILES)


_MORE_FILES = f"sets of thousands of shards are opened piece by piece; ulimit -n {ENOUGH} before you start avoids that."


def _trainable() -> Iterator[Finding]:
    """Yield which of the recipes `TRIED` fit into the memory of the device that training would choose."""
    device = choose_device()
    memory = memory_of(device)
    fitting = []
    for name in TRIED:
        recipe = load_recipe(name)
        if device.type != "cuda":
            recipe = replace(recipe, engine=replace(recipe.engine, precision="float32"))
        plan = PhaseMemory(recipe, recipe.phases[0], shapes_of(recipe), 1).best_plan(memory / GIGABYTE)
        if plan is not None:
            fitting.append(f"{name} ({plan.micro_batch} at a time, {plan.gigabytes:.1f} GB)")
    slow = "" if device.type != "cpu" else "on a CPU, emoji-fast takes minutes, photographs hours, and the others far too long."
    yield Finding("fits into memory", "; ".join(fitting) or f"none of {', '.join(TRIED)}", slow)
    chip = find_chip(device_name(device))
    try:
        measured = read_measurements(measurements_file()).get(chip.name if chip is not None else device_name(device))
    except UserError as error:
        yield Finding("measured speed", "unreadable", str(error))
        return
    yield Finding(
        "measured speed",
        "not yet: microdit bench measures it, and microdit budget then uses it"
        if measured is None
        else f"{measured.images_per_second:,.1f} images/s of {measured.model}, {measured.utilisation:.0%} of the peak, on {measured.date}",
    )
