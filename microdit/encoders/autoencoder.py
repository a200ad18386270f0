"""Frozen autoencoders between images (B, 3, H, W) in [-1, 1] and scaled latents (B, C, H/f, W/f)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from microdit.encoders.model_files import (
    DOWNLOAD_AGAIN,
    check_complete,
    dtype_argument,
    find_folder,
    fingerprint_of,
    is_file_name,
    is_place,
    lasting_name,
    loading,
    weight_files,
    weight_patterns,
)
from microdit.errors import UserError
from microdit.io.files import from_checked_json, read_json, sha256_of

RECORD = "record.json"  # beside the weights that `microdit train-autoencoder` writes
BUNDLED_ICON = Path(__file__).parent / "icon_autoencoder"
ALIASES = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0:vae", "16ch": "ostris/vae-kl-f8-d16"}

_KNOWN = f"pixels, icon, {', '.join(ALIASES)}, a folder, or a hub id (owner/name)"
_STEM = "diffusion_pytorch_model"
_FILES = ["config.json", *weight_patterns(_STEM, ".safetensors")]
_LATENTS: dict[str, Callable[[Any], Tensor]] = {  # how each diffusers class returns its latents
    "AutoencoderKL": lambda encoded: encoded.latent_dist.mean,
    "AutoencoderTiny": lambda encoded: encoded.latents,
    "AutoencoderDC": lambda encoded: encoded.latent,
}


class Autoencoder(Protocol):
    """A frozen autoencoder.

    `load_autoencoder(name)` loads it again, and equal weights have equal fingerprints. Latents have `channels` channels, and one latent
    spans `downsampling` x `downsampling` pixels.
    """

    name: str
    fingerprint: str
    channels: int
    downsampling: int

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the computation. Images and latents are always float32."""
        ...

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f)."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W) in [-1, 1], approximately."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model to a device and a precision, and return it."""
        ...


def load_autoencoder(name: str) -> Autoencoder:
    """Load `pixels`, `icon` (bundled, 64 px -> 8 x 8 x 8), `sdxl`, `16ch`, or any AutoencoderKL, AutoencoderTiny or AutoencoderDC.

    The last three, classes of diffusers, are named by their folder, by a folder that contains `vae/`, or by a hub id: `owner/name` or
    `owner/name:subfolder`. Raises UserError if there is no such autoencoder, or if it cannot be used.
    """
    if name == "pixels":
        return Pixels()
    if name == "icon":
        return _load(name, BUNDLED_ICON)
    place = ALIASES.get(name, name)
    if not is_place(place):
        raise UserError(f"There is no autoencoder in {name}: no such folder. Known names: {_KNOWN}.")
    folder = find_folder(place, [*_FILES, *(f"vae/{file}" for file in _FILES)])
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    return _load(lasting_name(name), folder)


class Pixels:
    """No autoencoder: the latents are the pixels."""

    name = "pixels"
    fingerprint = "pixels"
    channels = 3
    downsampling = 1
    dtype = torch.float32

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return self


class DiffusersAutoencoder:
    """A frozen autoencoder of diffusers. Latents are (z - shift_factor) * scaling_factor, with the factors of the model's config.

    For an AutoencoderKL, z is the mean of the distribution, so that encoding is deterministic; the authors of 2407.15811 sample from the
    distribution. Inputs may be on any device; results are on the model's device, in float32.
    """

    def __init__(self, name: str, model: Any, fingerprint: str):
        self.name, self.model, self.fingerprint = name, model, fingerprint
        self.channels: int = model.config.latent_channels
        self.downsampling: int = pixels_per_latent(model)
        model.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        scale, shift = _scale_and_shift(self.model)
        latents_of = _LATENTS[type(self.model).__name__]
        z_BCHW = latents_of(self.model.encode(_fit(images_BCHW, self.model))).contiguous().float()
        return (z_BCHW - shift) * scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return decode_latents(self.model, latents_BCHW)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model. float16 becomes float32, unless the model's config says that it does not overflow in float16."""
        self.model.to(device=device, dtype=torch.float32 if dtype == torch.float16 and overflows(self.model) else dtype)
        return self


@torch.no_grad()
def decode_latents(model: Any, latents_BCHW: Tensor) -> Tensor:
    """Decode latents with an autoencoder of diffusers to images (B, 3, H, W) in [-1, 1], in float32 on its device.

    A float16 model that may overflow is converted to float32 first.
    """
    if model.dtype == torch.float16 and overflows(model):
        model.to(torch.float32)
    scale, shift = _scale_and_shift(model)
    return model.decode(_fit(latents_BCHW / scale + shift, model)).sample.contiguous().float()


def overflows(model: Any) -> bool:
    """Return whether a diffusers autoencoder may overflow in float16, as SDXL's does: yes, unless its config denies it (`force_upcast`)."""
    return bool(model.config.get("force_upcast", True))


def pixels_per_latent(model: Any) -> int:
    """Return how many pixels one latent of a diffusers autoencoder spans along each side."""
    return 2 ** (len(model.config.get("encoder_block_out_channels") or model.config.block_out_channels) - 1)


def _scale_and_shift(model: Any) -> tuple[float, float]:
    return model.config.scaling_factor, model.config.get("shift_factor") or 0.0


def _fit(tensor: Tensor, model: Any) -> Tensor:
    return tensor.to(model.device, model.dtype)


def _load(name: str, folder: Path) -> DiffusersAutoencoder:
    """Load an autoencoder of diffusers from a folder. Raises UserError if there is none that can be used."""
    files = _safe_weights(folder)
    _check_record(folder)
    class_name = read_json(folder / "config.json", DOWNLOAD_AGAIN).get("_class_name")
    if not isinstance(class_name, str) or class_name not in _LATENTS:
        raise UserError(f"{folder / 'config.json'} says _class_name {class_name}; only {', '.join(_LATENTS)} can be used.")
    import diffusers  # slow to import

    with loading(folder):
        model, info = getattr(diffusers, class_name).from_pretrained(
            folder, **dtype_argument(torch.float32), use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    check_complete(folder, info["missing_keys"])
    return DiffusersAutoencoder(name, model, fingerprint_of(files))


def _check_record(folder: Path) -> None:
    """Check the files of a folder that `microdit train-autoencoder` wrote. Raises UserError if they are not what was written."""
    if not (folder / RECORD).is_file():
        return
    try:
        written = from_checked_json((folder / RECORD).read_bytes()).get("files") or {}
        if not isinstance(written, dict) or not all(map(is_file_name, written)):
            raise ValueError("it lists no files of its folder")
        damaged = [name for name, checksum in written.items() if sha256_of(folder / name) != checksum]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / RECORD} does not match the files beside it ({error}): copy the folder again, or train again."
        ) from error
    if damaged:
        raise UserError(f"{folder} is damaged ({', '.join(damaged)}: not what was written): copy it again, or train again.")


def _safe_weights(folder: Path) -> list[Path]:
    """Return the weight files. Raises UserError if there is no autoencoder, or if its weights exist only as a pickle."""
    files = weight_files(folder, _STEM, ".safetensors")
    if files and (folder / "config.json").is_file():
        return files
    if not files and weight_files(folder, _STEM, ".bin"):
        raise UserError(
            f"{folder} holds its weights only as {_STEM}.bin, a pickle that can run code: use a version of it with {_STEM}.safetensors, "
            "or, if you trust it, convert it with diffusers: from_pretrained(folder), then save_pretrained(new_folder)."
        )
    missing = f"{_STEM}.safetensors" if not files else "config.json"
    raise UserError(f"There is no autoencoder in {folder} (no {missing}). Known names: {_KNOWN}; or train one.")
