"""What a run has cost, and what is left of it to pay."""

import time
from dataclasses import dataclass, field


@dataclass
class Cost:
    """GPU-hours (on a machine without GPUs: hours of processes) and dollars, counted on from those of earlier starts of the run.

    `price_per_hour` is that of one GPU. Work that was lost with a machine stays in the sum: it was paid.
    """

    processes: int
    price_per_hour: float | None = None
    earlier_hours: float = 0.0
    earlier_dollars: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    def gpu_hours(self) -> float:
        return self.earlier_hours + self._hours()

    def dollars(self) -> float | None:
        """None if no price was ever given."""
        if self.price_per_hour is None:
            return self.earlier_dollars or None
        return self.earlier_dollars + self._hours() * self.price_per_hour

    def so_far(self) -> dict[str, float | None]:
        """As it goes into records."""
        return {"gpu_hours": self.gpu_hours(), "dollars": self.dollars()}

    def to_go(self, seconds: float) -> float | None:
        """Dollars for `seconds` more."""
        return None if self.price_per_hour is None else seconds * self.processes * self.price_per_hour / 3600

    def _hours(self) -> float:
        return (time.monotonic() - self._started) * self.processes / 3600
