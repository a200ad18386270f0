"""What a run would be done on: which chip, how many, what an hour costs, and how much of their peak is used."""

from dataclasses import dataclass
from pathlib import Path

from microdit.budget.measured import read_measurements
from microdit.budget.prices import Price, price_of
from microdit.errors import UserError
from microdit.training.chips import CHIPS, Chip, named_chip

# Between what the paper's run comes to (19% of 8 H100, tests/budget/test_bill.py) and what others report of well-tuned transformers
# (half and more, Chowdhery et al. 2022, 2204.02311, table 3). Not measured here: `microdit bench` does.
ASSUMED_UTILISATION = 0.35


@dataclass(frozen=True)
class Machine:
    """`count` GPUs of one kind. `utilisation` (MFU): FLOPs that the method needs, over what the chips could do in the same time."""

    chip: Chip
    count: int
    price: Price
    utilisation: float
    utilisation_source: str

    @property
    def flops_per_second(self) -> float:
        """That are put to use, of all GPUs."""
        return self.count * self.chip.teraflops * 1e12 * self.utilisation

    def hours(self, flops: float) -> float:
        return flops / self.flops_per_second / 3600

    def dollars(self, hours: float) -> float:
        return hours * self.count * self.price.dollars


def find_machine(chip: str, count: int, price: float | None, utilisation: float | None, prices: Path | None, measurements: Path) -> Machine:
    """What is not given is looked up: the price in `prices` or our table, the utilisation in what `microdit bench` measured.

    Raises UserError for an unknown chip, and for numbers that cannot be.
    """
    found = named_chip(chip)
    if found is None:
        raise UserError(f"There is no chip named {chip} in our table; known are {', '.join(known.name for known in CHIPS)}.")
    if count < 1:
        raise UserError(f"--count is {count}, and must be at least 1 GPU.")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--mfu is {utilisation}, and must lie in (0, 1]: the share of the chip's peak that is used, such as 0.45.")
    return Machine(found, count, price_of(found, price, prices), *_utilisation(found, utilisation, measurements))


def _utilisation(chip: Chip, given: float | None, measurements: Path) -> tuple[float, str]:
    """The share, and where it is from."""
    if given is not None:
        return given, "--mfu"
    measured = read_measurements(measurements).get(chip.name)
    if measured is None:
        return ASSUMED_UTILISATION, "assumed; microdit bench measures it"
    return measured.utilisation, f"measured on {measured.date} with {measured.model}, {measurements}"
