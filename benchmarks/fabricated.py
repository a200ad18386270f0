"""Make up the plan of an encoding, for data sets of random numbers."""

from typing import Any

from microdit.data.manifest import FORMAT
from microdit.data.packing import CaptionPacking, LatentPacking


def plan_of(sides: dict[int, int], latents: LatentPacking, captions: CaptionPacking, caption: tuple[int, int]) -> dict[str, Any]:
    """Return a plan. `sides` maps the sides of square images to those of their latents; `caption` is (tokens, channels)."""
    return {
        "format": FORMAT,
        "source": "random numbers",
        "settings": {"resolutions": list(sides), "latents": latents, "captions": captions},
        "sizes": [{str(side): [side, side] for side in sides}],
        "latent_channels": 4,
        "downsampling": next(side // small for side, small in sides.items()),
        "text_channels": caption[1],
        "max_tokens": caption[0],
        "autoencoder": {"name": "none", "fingerprint": ""},
        "text_encoder": {"name": "none", "fingerprint": ""},
    }
