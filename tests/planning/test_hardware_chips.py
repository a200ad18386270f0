import math
import re
import time

import pytest
import torch

from microdit.planning.hardware import CHIPS, find_chip, named_chip, peak_flops


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-SXM2-32GB", "V100 32 GB"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_chips_are_known_by_the_drivers_name(device_name, name):
    assert find_chip(device_name).name == name


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA GeForce GTX 1080 Ti",
        "NVIDIA A1000",
        "",
        "Quadro T400",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ],
)
def test_an_unknown_chip_is_not_guessed(device_name):
    assert find_chip(device_name) is None


def test_every_chip_can_be_found():
    assert {find_chip(f"NVIDIA {' '.join(chip.marks)}").name for chip in CHIPS} == {chip.name for chip in CHIPS}


def test_the_cpu_is_measured():
    flops, source = peak_flops(torch.device("cpu"), torch.float32)
    assert math.isfinite(flops)
    assert flops > 1e8
    assert re.fullmatch(r"a measured float32 product of (256|1024) x \1", source)


def test_a_slow_machine_is_measured_by_its_small_products_alone(monkeypatch):
    """As where 16 bits are emulated: what a product of 1024 would take is foreseen from smaller ones."""
    sides, product = [], torch.mm

    def slow(a, b, out):
        sides.append(len(a))
        time.sleep(0.05)
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", slow)
    _, source = peak_flops.__wrapped__(torch.device("cpu"), torch.float32)
    assert set(sides) == {256}
    assert source == "a measured float32 product of 256 x 256"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "H100 SXM"),
        ("H100-PCIe", "H100 PCIe"),
        ("a100", "A100 40 GB"),
        ("A100 80GB", "A100 80 GB"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("v100", "V100"),
        ("a10", "A10"),
        ("h200", "H200"),
    ],
)
def test_chips_are_known_by_the_names_that_people_write(written, name):
    assert named_chip(written).name == name


@pytest.mark.parametrize("written", ["", "h900", "0", "rtx"])
def test_what_is_no_name_of_a_chip_is_not_guessed(written):
    assert named_chip(written) is None


def test_every_chip_is_known_by_its_own_name():
    assert all(named_chip(chip.name) is chip for chip in CHIPS)
