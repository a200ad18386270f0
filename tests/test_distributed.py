"""Which device a process of torchrun takes; here torch says what machines with and without GPUs would say."""

import os
import re
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from microdit.distributed import World, start_world, stop_world
from microdit.errors import UserError
from tests.training.processes import together


@pytest.fixture
def machine(monkeypatch):
    """A process of torchrun on a machine with so many GPUs. Returns the list of those that it makes its own."""
    taken: list[torch.device] = []

    def describe(gpus: int, local_rank: int = 0, size: int = 1, *, apple: bool = False) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        return taken

    return describe


def test_a_process_alone_is_a_world_on_the_cpu(machine):
    machine(0)
    world = start_world("auto")
    assert (world.device, world.size, world.is_main) == (torch.device("cpu"), 1, True)
    stop_world()


@pytest.mark.parametrize(
    ("name", "gpus", "local_rank", "size", "device"),
    [
        ("auto", 1, 0, 1, "cuda:0"),
        ("auto", 8, 5, 8, "cuda:5"),
        ("cuda", 8, 7, 16, "cuda:7"),
        ("cuda:3", 8, 0, 1, "cuda:3"),
    ],
)
def test_under_torchrun_each_process_has_a_gpu_of_its_own(machine, monkeypatch, name, gpus, local_rank, size, device):
    taken = machine(gpus, local_rank, size)
    assert _device_of(monkeypatch, name) == torch.device(device)
    assert taken == [torch.device(device)]


@pytest.mark.parametrize(("name", "apple"), [("auto", True), ("auto", False), ("cpu", True)])
def test_several_processes_without_cuda_share_the_cpu(machine, monkeypatch, name, apple):
    machine(0, 1, 2, apple=apple)
    assert _device_of(monkeypatch, name) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "there", "sentence"),
    [
        ("auto", (2, 2, 4), "torchrun started 3 or more processes here, and there are 2 GPUs: use --nproc-per-node 2."),
        ("cuda:1", (2, 0, 2), "The device is to be cuda:1, which is a single one, and torchrun started several processes: take cuda"),
        ("cuda", (0, 0, 1), "PyTorch sees no GPU: install a CUDA or ROCm build of torch, or take cpu."),
        ("tpu", (0, 0, 1), "There is no device 'tpu'."),
    ],
)
def test_a_device_that_a_process_cannot_have_is_refused_in_a_sentence(machine, name, there, sentence):
    machine(*there)
    with pytest.raises(UserError) as error:
        start_world(name)
    assert sentence in str(error.value)


def test_apples_gpu_serves_one_process(machine):
    machine(0, 0, 2, apple=True)
    with pytest.raises(UserError, match="The device is to be mps, which is a single one"):
        start_world("mps")


def _device_of(monkeypatch, name: str) -> torch.device:
    """What `start_world` chooses, without meeting the other processes."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    return start_world(name).device


def three(store: HashStore, rank: int) -> World:
    names = ("process 0 on here (process id 7)", "process 1 on there (process id 8)", "process 2 on there (process id 9)")
    return World(rank, 3, torch.device("cpu"), None, store, names)


def test_a_process_that_does_not_answer_is_named():
    """Process 0 and 2 have waited for the time-out; process 1 hangs."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=600))
    assert three(store, 2).lost(0.1) == list(three(store, 2).processes[:2])
    assert three(store, 0).lost(0.1) == ["process 1 on there (process id 8)"]
    assert three(store, 1).lost(0.1) == []


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete\nmore",
        "Application timeout caused pair closure",
    ],
)
def test_a_message_that_failed_becomes_a_sentence_with_the_lost_ones(message, monkeypatch):
    monkeypatch.setattr("microdit.distributed.ANSWER", 0.1)
    world = three(HashStore(), 0)
    with (
        pytest.raises(UserError, match=r"process 1 on there \(process id 8\); process 2 on there .*do not answer.*--resume") as caught,
        world.naming_the_lost(),
    ):
        raise RuntimeError(message)
    assert message.splitlines()[0] in str(caught.value)


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), three(HashStore(), 0).naming_the_lost():
        raise RuntimeError("shapes do not fit")


def look_and_refuse(world: World) -> list[object]:
    """What a process is told: by the first one's look, by its refusal, by another's, by all of them, by one that sees something else."""
    said: list[object] = [world.look(lambda: os.getpid())]
    for refuses in ([0], [1], [0, 1, 2]):
        try:
            with world.together():
                if world.rank in refuses:
                    raise UserError(f"{world.rank} says no.")
        except UserError as error:
            said.append(str(error))
    try:
        world.look(lambda: _refuse("The first one says no."))
    except UserError as error:
        said.append(str(error))
    world.check_same_folder("the same", "it")
    try:
        world.check_same_folder("mine" if world.rank == 2 else "ours", "it")
    except UserError as error:
        said.append(str(error))
    return said


def _refuse(sentence: str) -> None:
    raise UserError(sentence)


def test_one_process_looks_and_what_one_refuses_all_refuse():
    ranks = together(3, look_and_refuse)
    assert ranks[0] == ranks[1] == ranks[2]
    _, first, second, everyone, looked, differs = ranks[0]
    assert re.fullmatch(r"process 0 on .* \(process id \d+\): 0 says no\.", first)
    assert re.fullmatch(r"process 1 on .* \(process id \d+\): 1 says no\.", second)
    assert (everyone, looked) == ("0 says no.", "The first one says no.")
    assert re.match(r"it is another folder to process 2 on .* than to process 0 on .*: all processes must see the same files\.", differs)
