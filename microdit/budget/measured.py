"""What `microdit bench` measured on this user's machines, kept in a file of the user's for `microdit budget`."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from microdit.errors import UserError
from microdit.files import write_aside
from microdit.foreign_json import parse_json


@dataclass(frozen=True)
class Measurement:
    """`utilisation`: FLOPs done in a second over `peak`. `date`: YYYY-MM-DD. `model`: the recipe that was trained on."""

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
    """Under $XDG_STATE_HOME, which is ~/.local/state where it is not set: the place for what belongs to this machine and is kept."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "microdit" / "bench.json"


def read_measurements(file: Path) -> dict[str, Measurement]:
    """The last one of each chip, by its name. None yet: empty. Raises UserError if the file is damaged."""
    if not file.is_file():
        return {}
    try:
        found = {name: Measurement(**values) for name, values in parse_json(file.read_bytes()).items()}
        if not all(item.utilisation > 0 for item in found.values()):
            raise ValueError("a utilisation is not above 0")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"The measurements in {file} cannot be read ({error}): delete it, and run microdit bench again.") from error
    return found


def keep_measurement(measurement: Measurement, file: Path) -> None:
    """In place of the chip's earlier one. Raises UserError where the file cannot be written."""
    kept = {**read_measurements(file), measurement.chip: measurement}
    try:
        write_aside(file, json.dumps({name: asdict(item) for name, item in kept.items()}, indent=1).encode())
    except OSError as error:
        raise UserError(f"The measurement cannot be written to {file}: {error}. Choose another --file.") from error
