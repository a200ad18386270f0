"""The noise of EDM as a component of a pipeline of diffusers: settings alone, the sampler is `microdit.diffusion`'s."""

from dataclasses import asdict
from typing import Self

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from microdit.diffusion.edm import EDM


class EDMSettings(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The fields of `EDM` (2206.00364, table 1), saved as scheduler_config.json."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sigma_data: float = 0.9,
        P_mean: float = -0.6,
        P_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ):
        self.edm = EDM(sigma_data, P_mean, P_std, sigma_min, sigma_max, rho)

    @classmethod
    def around(cls, edm: EDM) -> Self:
        return cls(**asdict(edm))
