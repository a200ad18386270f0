"""A user's own list of chips and prices: what is missing in our tables, or otherwise there.

h100: 2.2                                               # dollars of a GPU-hour
rtx4090: {teraflops: 160}                               # one figure of a known chip
rtx5080: {teraflops: 112.6, memory_gb: 16, price: 0.3}   # a chip of one's own
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microdit.budget.prices import Price, checked_price
from microdit.errors import UserError
from microdit.formats import finite
from microdit.training.chips import CHIPS, Chip, named_chip, same_name
from microdit.typed_yaml import decimal
from microdit.yaml_file import Plain, Tree, read_yaml

KEYS = ("teraflops", "memory_gb", "price")


@dataclass(frozen=True)
class OwnChip:
    """`price` is None where the file says none."""

    chip: Chip
    price: Price | None


def read_own_chips(file: Path) -> list[OwnChip]:
    """Raises UserError, naming file and key, for what is no such list."""
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold chips and dollars an hour, such as 'h100: 2.2'.")
    own: list[OwnChip] = []
    for name, said in content.items():
        item = _own_chip(name, said, file)
        if any(same_name(item.chip.name, earlier.chip.name) for earlier in own):
            raise UserError(f"{file} speaks of {item.chip.name} twice, the second time as {name}: put it into one entry.")
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
            f"{where} is no known chip, so its speed and memory must be said: "
            f"'{name}: {{teraflops: 112.6, memory_gb: 16, price: 0.3}}'. Known are {', '.join(chip.name for chip in CHIPS)}."
        )
    values = {key: _figure(value) for key, value in values.items()}
    figures = {key: _above_0(values[key], f"{where}: {key}") for key in ("teraflops", "memory_gb") if key in values}
    base = known or Chip(name, (name,), 0.0, 0)
    chip = Chip(base.name, base.marks, figures.get("teraflops", base.teraflops), figures.get("memory_gb", base.memory_gb))
    at = f"{where}: price" if isinstance(said, dict) else where
    return OwnChip(chip, Price(checked_price(values["price"], at), str(file)) if "price" in values else None)


def _figure(written: Tree) -> Any:
    """A number, if one is written there; None for nothing; else what is written."""
    if isinstance(written, Plain) and written.is_null:
        return None
    number = decimal(written) if isinstance(written, str) else None
    return written if number is None else number


def _above_0(value: Any, where: str) -> float:
    number = finite(value)
    if number is None or number <= 0:
        raise UserError(f"{where} is {value}, and must be a number above 0.")
    return number
