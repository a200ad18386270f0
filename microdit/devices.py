"""Where a command computes, and in what numbers: one way to choose both, for all commands.

`auto` takes the GPU where there is one (NVIDIA's or AMD's as cuda, Apple's as mps), and bfloat16 products on a GPU that has them.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from microdit.errors import UserError

DEVICE_HELP = "auto, cpu, cuda, cuda:N or mps. auto: the GPU, where there is one."
DTYPE_HELP = "auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU that has it, else float32."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """The device that `name` means on this machine. Raises UserError for a name that is none, and for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("The device is to be mps, and PyTorch sees no Apple GPU here: take --device auto or cpu.")
        return torch.device("mps")
    if re.fullmatch(r"cuda(:\d{1,3})?", name) is None:
        raise UserError(f"There is no device '{name[:40]}'. Known: auto, cpu, cuda, cuda:N (number N of several), mps.")
    if not torch.cuda.is_available():
        raise UserError(f"The device is to be {name}, and PyTorch sees no GPU: install a CUDA or ROCm build of torch, or take cpu.")
    number = int(name.partition(":")[2] or torch.cuda.current_device())
    if number >= torch.cuda.device_count():
        raise UserError(f"The device is to be {name}, and there are {torch.cuda.device_count()} GPUs, numbered from 0.")
    return torch.device("cuda", number)


def choose_own_device(name: str = "auto") -> torch.device:
    """As `choose_device`, for processes that share no work: under torchrun those of one machine are dealt out to its GPUs in turn."""
    device = choose_device(name)
    if device.type != "cuda" or name not in ("auto", "cuda") or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What matrix products compute in. Raises UserError for a name that is none, and for numbers that the device does not have."""
    if name == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float32
    if name not in DTYPES:
        raise UserError(f"There is no dtype '{name[:40]}'. Known: auto, {', '.join(DTYPES)}.")
    dtype = DTYPES[name]
    if device.type == "cpu" and dtype == torch.float16:
        raise UserError("float16 is slow and narrow on a CPU: take --dtype float32, or bfloat16.")
    if device.type == "mps" and dtype != torch.float32:
        raise UserError(f"On Apple's GPUs microdit computes in float32, not in {name}: take --dtype auto.")
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{device_name(device)} has no bfloat16: take --dtype float16, or float32.")
    return dtype


def device_name(device: torch.device) -> str:
    """As people know it: "NVIDIA H100 80GB HBM3", "Apple GPU", "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else f"CPU, {torch.get_num_threads()} threads"


def in_words(device: torch.device, dtype: torch.dtype) -> str:
    """The one line that says what was chosen: "on NVIDIA H100 80GB HBM3, bfloat16"."""
    return f"on {device_name(device)}, {str(dtype).removeprefix('torch.')}"


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on `device`. A GPU fetches it when its turn comes, and nobody waits for what is queued there before."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


@contextmanager
def device_errors_explained(fix: str) -> Iterator[None]:
    """Turn what a device cannot do into one sentence. `fix` says what needs less memory, such as "take a smaller --batch-size".

    Raises UserError for memory that does not suffice, and for an operation that Apple's GPUs lack.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"The GPU's memory does not suffice{_sizes()}: {fix}.") from error
    except NotImplementedError as error:
        if "mps" not in str(error).lower():
            raise
        raise UserError(f"PyTorch lacks an operation on Apple's GPUs ({str(error).splitlines()[0][:120]}): take --device cpu.") from error


def _sizes() -> str:
    """How large this process's GPU is, and how much of it was free."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f" ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free)"
