"""One or two settings of the sampler varied, everything else the same: `guidance=1,2,4` says which and how."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from microdit.errors import UserError
from microdit.pipelines.native import SamplerSettings

MOST = 200  # pictures on a sheet


@dataclass(frozen=True)
class Drawn:
    """How one picture is drawn."""

    settings: SamplerSettings
    seed: int


@dataclass(frozen=True)
class Sheet:
    """`cells` row by row."""

    cells: list[list[Drawn]]
    row_labels: list[str]
    column_labels: list[str]


def sheet_of(sweeps: list[str], base: Drawn) -> Sheet:
    """The first sweep's values become columns, the second's rows. Raises UserError naming the sweep and what it may say."""
    if not 1 <= len(sweeps) <= 2:
        raise UserError(f"A sheet has columns and perhaps rows: give --sweep once or twice, not {len(sweeps)} times.")
    (name, columns), *others = [_parse(sweep) for sweep in sweeps]
    other, rows = others[0] if others else ("", [""])
    if name == other:
        raise UserError(f"--sweep {name} is given twice: put all its values into one.")
    if len(columns) * len(rows) > MOST:
        raise UserError(f"{len(columns)} x {len(rows)} pictures are more than the {MOST} that fit on a sheet: sweep fewer values.")
    cells = [[_changed(_changed(base, name, column), other, row) for column in columns] for row in rows]
    return Sheet(cells, [f"{other} {row}".strip() for row in rows], [f"{name} {column}" for column in columns])


def _parse(sweep: str) -> tuple[str, list[str]]:
    name, equals, values = sweep.partition("=")
    name, values_list = name.strip(), [value.strip() for value in values.split(",") if value.strip()]
    if not equals or not values_list:
        raise UserError(f"--sweep {sweep} must be NAME=VALUE,VALUE,..., such as guidance=1,2,4.")
    if name not in _SETTINGS and name != "seed":
        raise UserError(f"There is no setting '{name}' to sweep. Known: {', '.join(_SETTINGS)}, seed.")
    return name, values_list


def _changed(drawn: Drawn, name: str, value: str) -> Drawn:
    if not name:
        return drawn
    field, kind = _SETTINGS.get(name, ("seed", int))
    try:
        read = kind(value)
    except ValueError as error:
        raise UserError(f"--sweep {name}: '{value}' is no value for it.") from error
    return replace(drawn, seed=read) if field == "seed" else replace(drawn, settings=replace(drawn.settings, **{field: read}))


def _interval(value: str) -> tuple[float, float] | None:
    if value == "none":
        return None
    low, high = value.split(":")
    return float(low), float(high)


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "steps": ("num_inference_steps", int),
    "guidance": ("guidance_scale", float),
    "solver": ("solver", str),
    "guidance-interval": ("guidance_interval", _interval),
    "guidance-rescale": ("guidance_rescale", float),
    "churn": ("churn", float),
    "noise-range": ("noise_range", _interval),
}
