"""Hardware for estimates: chips, prices, measured utilisation, and the machine that combines them.

`CHIPS` holds the vendors' figures and `PRICES` dated prices of a GPU-hour. Users override both in a YAML file:

    h100: 2.2                                               # dollars of a GPU-hour
    rtx4090: {teraflops: 160}                               # one figure of a known chip
    rtx5080: {teraflops: 112.6, memory_gb: 16, price: 0.3}  # another chip

`microdit bench` keeps its measurements in a file of the user, from which `microdit budget` reads the utilisation.
"""

import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from microdit.devices import choose_device, choose_dtype, device_name, memory_of
from microdit.errors import UserError
from microdit.io.files import from_checked_json, read_regular, to_checked_json, write_aside
from microdit.io.strict_yaml import Plain, Tree, decimal, read_yaml
from microdit.reports.formats import finite


@dataclass(frozen=True)
class Chip:
    """A GPU. `teraflops` is for dense bfloat16 products (float16 on V100 and T4) accumulated in float32; `memory_gb` as advertised."""

    name: str
    marks: tuple[str, ...]  # words that the driver's name for the chip contains
    teraflops: float
    memory_gb: float


# The vendors' published figures, written down in November 2026 without the data sheets at hand. Where a sheet gives the figure "with
# sparsity", half of it. Consumer cards: with float32 accumulation. The first match is taken, so more specific names come first.
CHIPS = (
    Chip("B200", ("B200",), 2250.0, 180),
    Chip("H200 NVL", ("H200", "NVL"), 835.5, 141),
    Chip("H200", ("H200",), 989.4, 141),
    Chip("H100 NVL", ("H100", "NVL"), 835.5, 94),
    Chip("H100 PCIe", ("H100", "PCIe"), 756.0, 80),
    Chip("H100 SXM", ("H100",), 989.4, 80),
    Chip("A100 80 GB", ("A100", "80GB"), 312.0, 80),
    Chip("A100 40 GB", ("A100",), 312.0, 40),
    Chip("L40S", ("L40S",), 362.05, 48),
    Chip("L40", ("L40",), 181.05, 48),
    Chip("L4", ("L4",), 121.0, 24),
    Chip("RTX 6000 Ada", ("RTX 6000 Ada",), 364.2, 48),
    Chip("RTX A6000", ("RTX A6000",), 154.8, 48),
    Chip("A40", ("A40",), 149.7, 48),
    Chip("A10G", ("A10G",), 70.0, 24),
    Chip("A10", ("A10",), 125.0, 24),
    Chip("RTX 5090", ("RTX 5090",), 209.5, 32),
    Chip("RTX 4090", ("RTX 4090",), 165.2, 24),
    Chip("RTX 3090", ("RTX 3090",), 71.0, 24),
    Chip("V100 32 GB", ("V100", "32GB"), 125.0, 32),
    Chip("V100", ("V100",), 125.0, 16),
    Chip("T4", ("T4",), 65.0, 16),
    Chip("MI300X", ("MI300X",), 1307.4, 192),
)
OTHERS = ("MIG", "Laptop", "Ti", "D")  # partitions, and variants that share a name with a faster or slower chip

SIDES = {"cuda": (2048, 8192), "cpu": (256, 1024)}  # of the matrix products to time, small first
TRIES = 5  # per size: the first ones warm up, and other processes disturb some
SECONDS = 1.0  # time limit for all: many CPUs emulate 16 bits, and take a second for one product of side 1024


def find_chip(device_name: str) -> Chip | None:
    """Find a chip by the name that `torch.cuda.get_device_name` gives, such as "NVIDIA H100 80GB HBM3"."""
    words = device_name.replace("-", " ")
    if any(_has(words, mark) for mark in OTHERS):
        return None
    return next((chip for chip in CHIPS if all(_has(words, mark) for mark in chip.marks)), None)


def named_chip(name: str) -> Chip | None:
    """Find a chip by a name as people write it, in any case: h100, rtx4090, 4090, "A100 80GB"."""
    wanted = _plain(name)
    exact = next((chip for chip in CHIPS if _plain(chip.name) == wanted), None)
    if exact is not None or not wanted:
        return exact
    first = [chip for chip in CHIPS if _plain(chip.marks[0]) == wanted and len(chip.marks) == 1]  # plain h100 is the SXM version
    endings = [chip for chip in CHIPS if _plain(chip.name).endswith(wanted)]
    return first[0] if first else endings[0] if len(endings) == 1 else None


def same_name(one: str, other: str) -> bool:
    """Return whether two names mean the same chip, such as rtx5080 and "RTX 5080"."""
    return _plain(one) == _plain(other)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s of `device` in matrix products of `dtype`, and the source of the figure.

    The figure is from the table for a known GPU in 16 bits, else measured once per process: the best of a few products, small ones
    first, because a CPU that emulates 16 bits would take long for large ones.
    """
    chip = find_chip(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if chip is not None and dtype in (torch.bfloat16, torch.float16):
        return chip.teraflops * 1e12, f"the vendor's figure for the {chip.name}"
    flops, side = _measured(device, dtype)
    return flops, f"a measured {str(dtype).removeprefix('torch.')} product of {side} x {side}"


def _measured(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Return (FLOP/s, side) of the fastest product."""
    best, deadline = (0.0, 0), time.perf_counter() + SECONDS
    for side in SIDES.get(device.type, SIDES["cpu"]):
        seconds = min(_product_seconds(device, dtype, side) for _ in range(TRIES))
        best = max(best, (2 * side**3 / seconds, side))
        if time.perf_counter() + TRIES * 4**3 * seconds > deadline:  # the next side is four times as long
            break
    return best


def _product_seconds(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _has(words: str, mark: str) -> bool:
    """Return whether `words`, in which spaces replace dashes, contains whole words: A10 is not in "A100 SXM4 80GB"."""
    return f" {mark} " in f" {words} "


@dataclass(frozen=True)
class Price:
    """Dollars per GPU-hour, and the source of the figure."""

    dollars: float
    source: str


# On-demand prices. A third party's list of one provider's cheapest offers, read through a search index in November
# 2026, not on the provider's own page: deploybase.ai/articles/runpod-gpu-pricing, 10 March 2026. That page calls the column "spot";
# spheron.network/blog/runpod-h100-pricing-2026, 22 May 2026, has $2.69 for the H100 SXM as an ordinary price of the same provider.
LISTED = "RunPod's cheapest, as deploybase.ai listed it on 10 March 2026"
# No source was found for these: rough figures from memory, to be overridden.
ROUGH = "a rough figure without a source"

PRICES = {
    "B200": Price(5.98, LISTED),
    "H200 NVL": Price(3.40, ROUGH),
    "H200": Price(3.59, LISTED),
    "H100 NVL": Price(2.60, ROUGH),
    "H100 PCIe": Price(1.99, LISTED),
    "H100 SXM": Price(2.69, LISTED),
    "A100 80 GB": Price(1.39, LISTED),
    "A100 40 GB": Price(1.29, ROUGH),
    "L40S": Price(0.79, LISTED),
    "L40": Price(0.69, LISTED),
    "L4": Price(0.44, LISTED),
    "RTX 6000 Ada": Price(0.77, ROUGH),
    "RTX A6000": Price(0.49, ROUGH),
    "A40": Price(0.40, ROUGH),
    "A10G": Price(1.00, ROUGH),
    "A10": Price(0.75, ROUGH),
    "RTX 5090": Price(0.69, LISTED),
    "RTX 4090": Price(0.34, LISTED),
    "RTX 3090": Price(0.22, LISTED),
    "V100 32 GB": Price(0.70, ROUGH),
    "V100": Price(0.50, ROUGH),
    "T4": Price(0.50, ROUGH),
    "MI300X": Price(2.99, ROUGH),
}


def checked_price(dollars: object, where: str) -> float:
    """Return a price in dollars. Raises UserError, which begins with `where`, if it is not a number of 0 or more."""
    number = finite(dollars)
    if number is None or number < 0:
        raise UserError(f"{where} is {dollars}, and must be the dollars of a GPU-hour, 0 or more.")
    return number


KEYS = ("teraflops", "memory_gb", "price")


@dataclass(frozen=True)
class OwnChip:
    """A chip from the user's file. `price` is None if the file gives none."""

    chip: Chip
    price: Price | None


def read_own_chips(file: Path) -> list[OwnChip]:
    """Read the user's chips and prices from YAML. Raises UserError, naming file and key, if the file is invalid."""
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold chips and dollars an hour, such as 'h100: 2.2'.")
    own: list[OwnChip] = []
    for name, said in content.items():
        item = _own_chip(name, said, file)
        if any(same_name(item.chip.name, earlier.chip.name) for earlier in own):
            raise UserError(f"{file} names {item.chip.name} twice, the second time as {name}: merge the entries.")
        own.append(item)
    return own


def _own_chip(name: str, said: Tree, file: Path) -> OwnChip:
    where, known = f"{file}: {name}", named_chip(name)
    values = said if isinstance(said, dict) else {"price": said}
    for key in values:
        if key not in KEYS:
            raise UserError(f"{where}: {key} is no key of a chip: these are {', '.join(KEYS)}.")
    if known is None and not {"teraflops", "memory_gb"} <= values.keys():
        raise UserError(
            f"{where} is not a known chip, so its speed and memory must be given: "
            f"'{name}: {{teraflops: 112.6, memory_gb: 16, price: 0.3}}'. Known are {', '.join(chip.name for chip in CHIPS)}."
        )
    values = {key: _figure(value) for key, value in values.items()}
    figures = {key: _above_0(values[key], f"{where}: {key}") for key in ("teraflops", "memory_gb") if key in values}
    base = known or Chip(name, (name,), 0.0, 0)
    chip = Chip(base.name, base.marks, figures.get("teraflops", base.teraflops), figures.get("memory_gb", base.memory_gb))
    at = f"{where}: price" if isinstance(said, dict) else where
    return OwnChip(chip, Price(checked_price(values["price"], at), str(file)) if "price" in values else None)


def _figure(written: Tree) -> Any:
    """Return the number that is written, None for an empty value, or the value unchanged if it is not a number."""
    if isinstance(written, Plain) and written.is_null:
        return None
    number = decimal(written) if isinstance(written, str) else None
    return written if number is None else number


def _above_0(value: Any, where: str) -> float:
    number = finite(value)
    if number is None or number <= 0:
        raise UserError(f"{where} is {value}, and must be a number above 0.")
    return number


@dataclass(frozen=True)
class Measurement:
    """A result of `microdit bench`. `utilisation` is FLOP/s over `peak`, `date` is YYYY-MM-DD, `model` the recipe's name."""

    chip: str
    utilisation: float
    peak: float
    peak_source: str
    images_per_second: float
    model: str
    micro_batch: int
    precision: str
    torch: str
    date: str


def measurements_file() -> Path:
    """Return the path of the measurements file, in $XDG_STATE_HOME or, if that is not set, in ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "microdit" / "bench.json"


def read_measurements(file: Path) -> dict[str, Measurement]:
    """Return the last measurement of each chip, by its name; empty if there is no file. Raises UserError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        found = {name: Measurement(**values) for name, values in from_checked_json(read_regular(file)).items()}
        if not all(item.utilisation > 0 for item in found.values()):
            raise ValueError("a utilisation is not above 0")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"The measurements in {file} cannot be read ({error}): delete it, and run microdit bench again.") from error
    return found


def keep_measurement(measurement: Measurement, file: Path) -> None:
    """Write a measurement to the file, replacing the chip's earlier one. Raises UserError if the file cannot be written."""
    kept = {**read_measurements(file), measurement.chip: measurement}
    try:
        write_aside(file, to_checked_json({name: asdict(item) for name, item in kept.items()}))
    except OSError as error:
        raise UserError(f"The measurement cannot be written to {file}: {error}. Choose another --file.") from error


# Measured for MicroDiT_XL_2's first phase on one H100 (docs/gpu); the paper's run reached 19% on eight.
# For other chips and shapes it is a guess: `microdit bench` measures it.
ASSUMED_UTILISATION = 0.32


@dataclass(frozen=True)
class Machine:
    """`count` GPUs of one kind. `utilisation` is the model FLOPs utilisation (MFU): useful FLOP/s over the chips' peak."""

    chip: Chip
    count: int
    price: Price
    utilisation: float
    utilisation_source: str

    @property
    def flops_per_second(self) -> float:
        """Useful FLOP/s of all GPUs together."""
        return self.count * self.chip.teraflops * 1e12 * self.utilisation

    def hours(self, flops: float) -> float:
        return flops / self.flops_per_second / 3600

    def dollars(self, hours: float) -> float:
        return hours * self.count * self.price.dollars


def find_machine(chip: str, count: int, price: float | None, utilisation: float | None, prices: Path | None, measurements: Path) -> Machine:
    """Return the machine that the options of `microdit budget` describe.

    The chip and its price are looked up in the file `prices` first, then in the tables; the utilisation in the file `measurements`.
    Raises UserError for an unknown chip and for numbers out of range.
    """
    found = _find_chip(chip, prices)
    if count < 1:
        raise UserError(f"--count is {count}, and must be at least 1 GPU.")
    _check_utilisation(utilisation)
    dollars = Price(checked_price(price, "--price"), "--price") if price is not None else found.price
    if dollars is None:
        raise UserError(f"{prices} has no price of {found.chip.name}: add one, in dollars of a GPU-hour, or give --price.")
    return Machine(found.chip, count, dollars, *_utilisation(found.chip, utilisation, measurements))


def this_machine(
    device: str, precision: str, price: float | None, utilisation: float | None, prices: Path | None, measurements: Path
) -> Machine:
    """Return the machine that this runs on, for a recipe's `device` and `precision`: a GPU of the table, or with a peak that is measured.

    Without `price`, in dollars of an hour, a GPU of the table has the price of `prices` or the table; other machines cost nothing. Raises
    UserError for numbers out of range.
    """
    here = choose_device(device)
    name = device_name(here)
    if here.type == "cuda" and (known := find_chip(name)) is not None:
        return find_machine(known.name, 1, price, utilisation, prices, measurements)
    _check_utilisation(utilisation)
    peak, _ = peak_flops(here, choose_dtype(precision, here))
    chip = Chip(name, (name,), peak / 1e12, round(memory_of(here) / 1e9, 1))
    dollars = Price(0.0, "this machine; --price says another") if price is None else Price(checked_price(price, "--price"), "--price")
    return Machine(chip, 1, dollars, *_utilisation(chip, utilisation, measurements))


def _check_utilisation(utilisation: float | None) -> None:
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--mfu is {utilisation}, and must lie in (0, 1]: the share of the chip's peak that is used, such as 0.45.")


def _find_chip(name: str, prices: Path | None) -> OwnChip:
    own = read_own_chips(prices) if prices is not None else []
    known = named_chip(name)
    wanted = known.name if known is not None else name
    said = next((item for item in own if same_name(item.chip.name, wanted)), None)
    if said is not None:
        return OwnChip(said.chip, said.price or PRICES.get(said.chip.name))
    if known is not None:
        return OwnChip(known, PRICES[known.name])
    names = [item.name for item in CHIPS] + [item.chip.name for item in own if item.chip.name not in PRICES]
    raise UserError(
        f"There is no chip named {name} in our table; known are {', '.join(names)}. Another one is defined in a file for --prices, "
        "such as 'rtx5080: {teraflops: 112.6, memory_gb: 16, price: 0.3}'."
    )


def _utilisation(chip: Chip, given: float | None, measurements: Path) -> tuple[float, str]:
    """Return the utilisation and its source. Rescales a measured utilisation when the user overrides the chip's peak."""
    if given is not None:
        return given, "--mfu"
    measured = read_measurements(measurements).get(chip.name)
    if measured is None:
        return ASSUMED_UTILISATION, "assumed, as on an H100; microdit bench measures yours"
    share = measured.utilisation * (measured.peak / (chip.teraflops * 1e12))
    return share, f"measured on {measured.date} with {measured.model}, {measurements}"
