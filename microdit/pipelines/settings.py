"""Settings of the sampler, and sheets on which one or two of them vary (`microdit grid`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from microdit.diffusion.guidance import GuidanceKind
from microdit.diffusion.objective import Objective
from microdit.diffusion.samplers import Churn, Solver
from microdit.errors import UserError

MAX_SHEET_IMAGES = 200


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the sampler. Raises UserError for those with which no image can be drawn.

    Noise levels are sigma, from 80 (noise alone) down to 0.002 unless `noise_range` says otherwise; those of a model trained by flow
    matching are 1 - t, from 1 down to 0, and such a model takes no churn. `guidance_interval` holds the noise
    levels, above the first and up to the second, at which guidance acts (2404.07724); `guidance_rescale` lies between 0, which leaves it
    out, and 1 (2305.08891). `churn`, `churn_interval` and `churn_noise` are S_churn, (S_tmin, S_tmax) and S_noise of 2206.00364,
    algorithm 2. `noise_range` is the last noise level before the jump to 0, and the first; None takes the objective's.

    >>> SamplerSettings(num_inference_steps=12, solver="dpm", guidance_interval=(0.2, 5)).guidance_scale
    2.0
    """

    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    solver: Solver = "heun"
    guidance: GuidanceKind = "classifier-free"
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    churn: float = 0.0
    churn_interval: tuple[float, float] | None = None
    churn_noise: float = 1.0
    noise_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_inference_steps <= 1000:
            raise UserError(f"num_inference_steps must be from 2 to 1000 steps, not {self.num_inference_steps}; 18 to 30 are usual.")
        _check_between("guidance_scale", self.guidance_scale, -100, 100, "; 3 to 6 are usual")
        _check_among("solver", self.solver, get_args(Solver))
        _check_among("guidance", self.guidance, get_args(GuidanceKind))
        _check_interval("guidance_interval", self.guidance_interval)
        _check_between("guidance_rescale", self.guidance_rescale, 0, 1, "; 0.7 is usual, 0 leaves it out")
        _check_between("churn", self.churn, 0, 1000, "; 40 is usual, 0 leaves it out")
        _check_interval("churn_interval", self.churn_interval)
        _check_between("churn_noise", self.churn_noise, 0, 2, "; 1 to 1.007 are usual")
        _check_interval("noise_range", self.noise_range)
        if self.noise_range and not (self.noise_range[0] > 0 and math.isfinite(self.noise_range[1])):
            low, high = self.noise_range
            raise UserError(f"noise_range must lie above 0 and end somewhere, such as 0.03 30, not {low} {high}.")
        if self.churn and self.solver != "heun":
            raise UserError(f"Only the solver heun can churn, not {self.solver}: take heun, or churn 0.")

    @property
    def churn_settings(self) -> Churn:
        return Churn(self.churn, *(self.churn_interval or (Churn.S_tmin, Churn.S_tmax)), self.churn_noise)


@dataclass(frozen=True)
class Cell:
    """The settings of one image of a sheet."""

    settings: SamplerSettings
    seed: int


@dataclass(frozen=True)
class Sheet:
    """`cells` row by row."""

    cells: list[list[Cell]]
    row_labels: list[str]
    column_labels: list[str]


def sheet_of(sweeps: list[str], base: Cell) -> Sheet:
    """Return the sheet of one or two sweeps such as `guidance=1,2,4`: the first one's values become columns, the second one's rows.

    Raises UserError that names the sweep and what it may say.
    """
    if not 1 <= len(sweeps) <= 2:
        raise UserError(f"A sheet has columns and perhaps rows: give --sweep once or twice, not {len(sweeps)} times.")
    (name, columns), *others = [_parse_sweep(sweep) for sweep in sweeps]
    other, rows = others[0] if others else ("", [""])
    if name == other:
        raise UserError(f"--sweep {name} is given twice: put all its values into one.")
    if len(columns) * len(rows) > MAX_SHEET_IMAGES:
        raise UserError(
            f"{len(columns)} x {len(rows)} pictures are more than the {MAX_SHEET_IMAGES} that fit on a sheet: sweep fewer values."
        )
    cells = [[_with_value(_with_value(base, name, column), other, row) for column in columns] for row in rows]
    return Sheet(cells, [f"{other} {row}".strip() for row in rows], [f"{name} {column}" for column in columns])


def _check_between(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} must be a number between {low} and {high}, not {value}{hint}.")


def _check_among(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"There is no {name} '{value}'. Known: {', '.join(known)}.")


def _check_interval(name: str, interval: tuple[float, float] | None) -> None:
    if interval is not None and not 0 <= interval[0] < interval[1]:
        low, high = interval
        raise UserError(f"{name} must be two noise levels, the lower one first, such as 0.2 5, not {low} {high}.")


def _parse_sweep(sweep: str) -> tuple[str, list[str]]:
    name, equals, values = sweep.partition("=")
    name, values_list = name.strip(), [value.strip() for value in values.split(",") if value.strip()]
    if not equals or not values_list:
        raise UserError(f"--sweep {sweep} must be NAME=VALUE,VALUE,..., such as guidance=1,2,4.")
    if name not in _SWEPT and name != "seed":
        raise UserError(f"There is no setting '{name}' to sweep. Known: {', '.join(_SWEPT)}, seed.")
    return name, values_list


def _with_value(cell: Cell, name: str, value: str) -> Cell:
    if not name:
        return cell
    field, kind = _SWEPT.get(name, ("seed", int))
    try:
        parsed = kind(value)
    except ValueError as error:
        raise UserError(f"--sweep {name}: '{value}' is no value for it.") from error
    return replace(cell, seed=parsed) if field == "seed" else replace(cell, settings=replace(cell.settings, **{field: parsed}))


def _parse_interval(value: str) -> tuple[float, float] | None:
    if value == "none":
        return None
    low, high = value.split(":")
    return float(low), float(high)


_SWEPT: dict[str, tuple[str, Callable[[str], Any]]] = {  # name of a sweep: field of SamplerSettings, how its values are parsed
    "steps": ("num_inference_steps", int),
    "guidance": ("guidance_scale", float),
    "solver": ("solver", str),
    "guidance-interval": ("guidance_interval", _parse_interval),
    "guidance-rescale": ("guidance_rescale", float),
    "churn": ("churn", float),
    "noise-range": ("noise_range", _parse_interval),
}

DEFAULT_SETTINGS = SamplerSettings()


def suited_to(objective: Objective, usual: SamplerSettings = DEFAULT_SETTINGS) -> SamplerSettings:
    """Return the settings by default: those that a distilled model was trained for, and for any other the `usual` ones."""
    return SamplerSettings(objective.student_steps, 1.0, "euler") if objective.student_steps else usual
