"""What a run would be done on: which chip, how many, what an hour costs, and how much of their peak is used."""

from dataclasses import dataclass
from pathlib import Path

from microdit.budget.measured import read_measurements
from microdit.budget.own_chips import OwnChip, read_own_chips
from microdit.budget.prices import PRICES, Price, checked_price
from microdit.errors import UserError
from microdit.training.chips import CHIPS, Chip, named_chip, same_name

# What MicroDiT_XL_2's first phase came to on one H100 (docs/gpu), where the paper's run came to 19% on eight (tests/budget/test_bill.py).
# On other cards and shapes it is a guess: `microdit bench` measures it.
ASSUMED_UTILISATION = 0.29


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
    """What is not given is looked up: chip and price in `prices` (own_chips.py), then in our tables, the utilisation in what
    `microdit bench` measured.

    Raises UserError for an unknown chip, and for numbers that cannot be.
    """
    found = _find_chip(chip, prices)
    if count < 1:
        raise UserError(f"--count is {count}, and must be at least 1 GPU.")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--mfu is {utilisation}, and must lie in (0, 1]: the share of the chip's peak that is used, such as 0.45.")
    dollars = Price(checked_price(price, "--price"), "--price") if price is not None else found.price
    if dollars is None:
        raise UserError(f"{prices} has no price of {found.chip.name}: add one, in dollars of a GPU-hour, or give --price.")
    return Machine(found.chip, count, dollars, *_utilisation(found.chip, utilisation, measurements))


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
    """The share, and where it is from. A speed that was measured stays the same where the user's own list says another peak."""
    if given is not None:
        return given, "--mfu"
    measured = read_measurements(measurements).get(chip.name)
    if measured is None:
        return ASSUMED_UTILISATION, "assumed, as on an H100; microdit bench measures yours"
    share = measured.utilisation * (measured.peak / (chip.teraflops * 1e12))
    return share, f"measured on {measured.date} with {measured.model}, {measurements}"
