"""Choice of device and dtype, shared by all commands.

`auto` takes a GPU if there is one (cuda for NVIDIA and AMD, mps for Apple), and bfloat16 on a GPU that supports it.
"""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from microdit.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = (torch.bfloat16, torch.float16)
KNOWN_DEVICES = "auto, cpu, cuda, cuda:N (number N of several), mps"

_OUT_OF_MEMORY = ("out of memory", "alloc_failed")  # messages of CUDA, cuBLAS, cuDNN and Apple's GPUs


def is_device_name(name: str) -> bool:
    """Return whether `choose_device` knows the name; the device itself may not exist."""
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name) is not None


def choose_device(name: str = "auto") -> torch.device:
    """Return the device that `name` means on this machine. Raises UserError for an unknown name or a device that does not exist."""
    if not is_device_name(name):
        raise UserError(f"There is no device '{name[:40]}'. Known: {KNOWN_DEVICES}.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("The device is to be mps, and PyTorch sees no Apple GPU here: take auto, or cpu.")
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(f"The device is to be {name}, and PyTorch sees no GPU: install a CUDA or ROCm build of torch, or take cpu.")
    number, gpus = int(name.partition(":")[2] or torch.cuda.current_device()), torch.cuda.device_count()
    if number >= gpus:
        there = "there is one GPU, cuda:0" if gpus == 1 else f"there are {gpus} GPUs, cuda:0 to cuda:{gpus - 1}"
        raise UserError(f"The device is to be {name}, and {there}.")
    return torch.device("cuda", number)


def choose_own_device(name: str = "auto") -> torch.device:
    """Choose a device for a process that shares no work: under torchrun, the GPUs of a machine are assigned in turn."""
    device = choose_device(name)
    if device.type != "cuda" or name not in ("auto", "cuda") or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products. Raises UserError for an unknown name, and for a dtype that the device lacks."""
    bfloat16 = device.type in ("cpu", "meta") or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if name == "auto":
        return torch.bfloat16 if bfloat16 and device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"There is no dtype '{name[:40]}'. Known: auto, {', '.join(DTYPES)}.")
    dtype = DTYPES[name]
    if device.type == "cpu" and dtype == torch.float16:
        raise UserError("float16 is slow and narrow on a CPU: take float32, or bfloat16.")
    if device.type == "mps" and dtype != torch.float32:
        raise UserError(f"On Apple's GPUs microdit computes in float32, not in {name}: take auto, or float32.")
    if dtype == torch.bfloat16 and not bfloat16:
        raise UserError(f"{device_name(device)} has no bfloat16: take float32, or for drawing float16.")
    return dtype


def device_name(device: torch.device) -> str:
    """Return a readable name: "NVIDIA H100 80GB HBM3", "Apple GPU", "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """Return the processor's name, such as "AMD EPYC 7B13": what tells two machines apart that have as many cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory; without a GPU the machine's, or the limit of its container if that is lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return installed
    return min(installed, int(limit)) if limit.isdigit() else installed


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """Describe a device and dtype in one line: "on NVIDIA H100 80GB HBM3, bfloat16"."""
    return f"on {device_name(device)}, {str(dtype).removeprefix('torch.')}"


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a tensor to `device` without waiting for the work queued there."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


@contextmanager
def device_errors_explained(fix: str) -> Iterator[None]:
    """Turn a device error into a UserError. `fix` says what to do to need less memory, such as "take a smaller --batch-size".

    Raises UserError if memory is exhausted, or for an operation that Apple's GPUs lack. Other errors pass unchanged.
    """
    try:
        yield
    except (RuntimeError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise UserError(f"The GPU's memory does not suffice{_sizes(str(error))}: {fix}.") from error
        if re.search(r"\bMPS\b", str(error)) and isinstance(error, NotImplementedError | TypeError):
            raise UserError(f"PyTorch lacks an operation on Apple's GPUs ({first_line[:120]}): take --device cpu.") from error
        raise


def _sizes(message: str) -> str:
    """Return the requested and total memory from a message of torch, or an empty string."""
    asked, capacity = (re.search(pattern, message) for pattern in (r"[Tt]ried to allocate ([\d.]+ \w+)", r"capacity of ([\d.]+ \w+)"))
    if asked is None or capacity is None:
        return ""
    return f" ({asked[1]} more were asked for, of {capacity[1]} in all)"
