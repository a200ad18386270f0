"""Which device a name means is asked of torch; here torch says what machines with and without GPUs would say."""

import pytest
import torch

from microdit.devices import (
    choose_device,
    choose_dtype,
    choose_own_device,
    describe_device,
    device_errors_explained,
    device_name,
    is_device_name,
)
from microdit.errors import UserError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, as torch describes it."""

    def describe(gpus: int = 0, *, apple: bool = False, bfloat16: bool = True, current: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)

    return describe


@pytest.mark.parametrize(
    ("there", "name", "device"),
    [
        ({}, "auto", "cpu"),
        ({}, "cpu", "cpu"),
        ({"gpus": 1}, "auto", "cuda:0"),
        ({"gpus": 1}, "cpu", "cpu"),
        ({"gpus": 2}, "cuda", "cuda:0"),
        ({"gpus": 2, "current": 1}, "cuda", "cuda:1"),
        ({"gpus": 2}, "cuda:1", "cuda:1"),
        ({"apple": True}, "auto", "mps"),
        ({"apple": True}, "mps", "mps"),
        ({"apple": True}, "cpu", "cpu"),
    ],
)
def test_a_name_means_a_device_of_this_machine(machine, there, name, device):
    machine(**there)
    assert choose_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("there", "name", "sentence"),
    [
        ({}, "cuda", "The device is to be cuda, and PyTorch sees no GPU: install a CUDA or ROCm build of torch, or take cpu."),
        ({}, "cuda:3", "The device is to be cuda:3, and PyTorch sees no GPU"),
        ({"gpus": 1}, "mps", "PyTorch sees no Apple GPU here: take auto, or cpu."),
        ({"gpus": 1}, "cuda:1", "The device is to be cuda:1, and there is one GPU, cuda:0."),
        ({"gpus": 4}, "cuda:4", "The device is to be cuda:4, and there are 4 GPUs, cuda:0 to cuda:3."),
        ({"gpus": 1}, "gpu", "There is no device 'gpu'. Known: auto, cpu, cuda, cuda:N (number N of several), mps."),
        ({"gpus": 1}, "cuda:x", "There is no device 'cuda:x'."),
        ({"gpus": 1}, "cuda:-1", "There is no device 'cuda:-1'."),
        ({"gpus": 1}, "CPU", "There is no device 'CPU'."),
        ({"gpus": 1}, "cpu\n", "There is no device 'cpu\n'."),
        ({}, "", "There is no device ''."),
        ({}, "x" * 1000, f"There is no device '{'x' * 40}'."),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_a_sentence(machine, there, name, sentence):
    machine(**there)
    with pytest.raises(UserError) as error:
        choose_device(name)
    assert sentence in str(error.value)


def test_names_are_known_without_the_device(machine):
    machine()
    assert all(is_device_name(name) for name in ("auto", "cpu", "cuda", "cuda:12", "mps"))
    assert not any(is_device_name(name) for name in ("", "gpu", "cuda:", "cuda:1234", "mps:0", "xla"))


@pytest.mark.parametrize(
    ("bfloat16", "device", "name", "dtype"),
    [
        (True, CPU, "auto", torch.float32),
        (True, CUDA, "auto", torch.bfloat16),
        (False, CUDA, "auto", torch.float32),
        (True, MPS, "auto", torch.float32),
        (True, CPU, "bfloat16", torch.bfloat16),
        (False, CPU, "bfloat16", torch.bfloat16),
        (True, CUDA, "float32", torch.float32),
        (False, CUDA, "float16", torch.float16),
        (True, MPS, "float32", torch.float32),
    ],
)
def test_a_dtype_is_what_the_device_has(machine, bfloat16, device, name, dtype):
    machine(1, bfloat16=bfloat16)
    assert choose_dtype(name, device) == dtype


@pytest.mark.parametrize(
    ("device", "name", "sentence"),
    [
        (CPU, "float16", "float16 is slow and narrow on a CPU: take float32, or bfloat16."),
        (MPS, "bfloat16", "On Apple's GPUs microdit computes in float32, not in bfloat16"),
        (MPS, "float16", "On Apple's GPUs microdit computes in float32, not in float16"),
        (CUDA, "bfloat16", f"{H100} has no bfloat16: take float32, or for drawing float16."),
        (CUDA, "float64", "There is no dtype 'float64'. Known: auto, float32, bfloat16, float16."),
        (CPU, "", "There is no dtype ''."),
    ],
)
def test_a_dtype_that_the_device_lacks_is_refused_in_a_sentence(machine, device, name, sentence):
    machine(1, bfloat16=False)
    with pytest.raises(UserError) as error:
        choose_dtype(name, device)
    assert sentence in str(error.value)


def test_what_was_chosen_is_said_in_one_line(machine):
    machine(1)
    assert describe_device(CUDA, torch.bfloat16) == f"on {H100}, bfloat16"
    assert describe_device(MPS, torch.float32) == "on Apple GPU, float32"
    assert describe_device(CPU, torch.float32) == f"on CPU, {torch.get_num_threads()} threads, float32"
    assert device_name(CPU).startswith("CPU")


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.75 GiB of which 1.12 GiB is free. "
    "Including non-PyTorch memory, this process has 10.60 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), "does not suffice (2.00 GiB more were asked for, of 11.75 GiB in all): take less."),
        (torch.OutOfMemoryError("other words"), "The GPU's memory does not suffice: take less."),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "does not suffice: take less."),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "does not suffice: take less."),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.96 GB, max allowed: 6.80 GB)."), "does not suffice: take less."),
        (
            NotImplementedError("The operator 'aten::_linalg_svd.U' is not currently implemented for the MPS device.\nMore lines"),
            "PyTorch lacks an operation on Apple's GPUs (The operator 'aten::_linalg_svd.U' is not currently implemented for the MPS "
            "device.): take --device cpu.",
        ),
        (
            TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."),
            "PyTorch lacks an operation on Apple's GPUs (Cannot convert a MPS Tensor to float64",
        ),
    ],
)
def test_what_a_device_cannot_do_becomes_one_sentence(error, sentence):
    with pytest.raises(UserError) as told, device_errors_explained("take less"):
        raise error
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [NotImplementedError("a method of ours"), RuntimeError("shapes"), TypeError("a call"), UserError("Ours.")]
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as told, device_errors_explained("take less"):
        raise error
    assert told.value is error


def test_processes_that_share_no_work_are_dealt_out_to_the_gpus(machine, monkeypatch):
    machine(2)
    assert choose_own_device("auto") == CUDA
    for local_rank, number in ((0, 0), (1, 1), (2, 0), (5, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert choose_own_device("auto") == choose_own_device("cuda") == torch.device("cuda", number)
        assert choose_own_device("cuda:0") == CUDA
        assert choose_own_device("cpu") == CPU
    machine(0)
    assert choose_own_device("auto") == CPU
