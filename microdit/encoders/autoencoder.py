"""Frozen autoencoders between images (B, 3, H, W) in [-1, 1] and scaled latents (B, C, H/f, W/f)."""

import re
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microdit.encoders.model_files import (
    DOWNLOAD_AGAIN,
    check_complete,
    dtype_argument,
    find_folder,
    fingerprint_of,
    first_line,
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
_PROVED = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")  # classes that are not tried when they are loaded
_CLASS = re.compile(r"\w*Autoencoder\w*")
TRIED_SIDE = 64  # pixels


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
    """Load `pixels`, `icon` (bundled, 64 px -> 8 x 8 x 8), `sdxl`, `16ch`, or any autoencoder of diffusers that encodes images.

    The last ones (AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, AutoencoderDC, AutoencoderKLQwenImage ...) are named by their folder,
    by a folder that contains `vae/`, or by a hub id: `owner/name` or `owner/name:subfolder`. Raises UserError if there is no such
    autoencoder, or if it cannot be used.
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
    """A frozen autoencoder of diffusers. Latents are (z - shift) * scale, by the model's own statistics or factors (`_shift_and_scale`).

    Where z is a distribution (AutoencoderKL and its relatives), its mean is taken, so that encoding is deterministic; the authors of
    2407.15811 sample from it. An autoencoder of videos takes an image as a video of one frame. Inputs may be on any device; results are on
    the model's device, in float32.
    """

    def __init__(self, name: str, model: Any, fingerprint: str):
        self.name, self.model, self.fingerprint = name, model, fingerprint
        self._patch = _patch_side(model)
        self.channels: int = (model.config.get("latent_channels") or model.config.get("z_dim")) * self._patch**2
        self.downsampling: int = pixels_per_latent(model)
        self._of_videos = _is_of_videos(model)
        self._shift, self._scale = _shift_and_scale(model)
        lay_out_for_speed(model.eval().requires_grad_(False))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = _fit(images_BCHW, self.model)
        encoded = self.model.encode(images_BCHW.unsqueeze(2) if self._of_videos else images_BCHW)
        z_BCHW = _latents_of(encoded).contiguous().float()
        z_BCHW = F.pixel_unshuffle(z_BCHW.squeeze(2) if self._of_videos else z_BCHW, self._patch)
        return (z_BCHW - _on(self._shift, z_BCHW)) * _on(self._scale, z_BCHW)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W) in [-1, 1]. A float16 model that may overflow is converted to float32 first."""
        if self.model.dtype == torch.float16 and overflows(self.model):
            self.model.to(torch.float32)
        z_BCHW = latents_BCHW / _on(self._scale, latents_BCHW) + _on(self._shift, latents_BCHW)
        z_BCHW = _fit(F.pixel_shuffle(z_BCHW, self._patch), self.model)
        decoded = self.model.decode(z_BCHW.unsqueeze(2) if self._of_videos else z_BCHW).sample.contiguous().float()
        return decoded.squeeze(2) if self._of_videos else decoded

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model. float16 becomes float32, unless the model's config says that it does not overflow in float16."""
        self.model.to(device=device, dtype=torch.float32 if dtype == torch.float16 and overflows(self.model) else dtype)
        return self


def lay_out_for_speed(model: Any) -> None:
    """Store the weights of an autoencoder of images channels last: faster convolutions, and the same results to the last bit."""
    if not _is_of_videos(model):
        model.to(memory_format=torch.channels_last)


def _is_of_videos(model: Any) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in model.modules())


def overflows(model: Any) -> bool:
    """Return whether a diffusers autoencoder may overflow in float16, as SDXL's does: yes, unless its config denies it (`force_upcast`)."""
    return bool(model.config.get("force_upcast", True))


def pixels_per_latent(model: Any) -> int:
    """Return how many pixels one latent of a diffusers autoencoder spans along each side."""
    config = model.config
    widths = next((config[name] for name in _WIDTHS if config.get(name)), None)
    ratio = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    return _patch_side(model) * (ratio or (2 ** (len(widths) - 1) if widths else model.spatial_compression_ratio))


_WIDTHS = ("encoder_block_out_channels", "block_out_channels", "down_block_out_channels")


def is_autoencoder(class_name: object) -> bool:
    """Return whether diffusers has an autoencoder class of that name. Some of them encode no images, which loading finds out."""
    import diffusers  # slow to import

    return isinstance(class_name, str) and _CLASS.fullmatch(class_name) is not None and hasattr(diffusers, class_name)


def _latents_of(encoded: Any) -> Tensor:
    """Return the latents in the output of a diffusers autoencoder: the mean of a distribution, or a tensor."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def _patch_side(model: Any) -> int:
    """Return the side of the patches of latents that are stacked as channels: 2 for FLUX.2, whose batch norm counts them, else 1."""
    return int(model.config.patch_size[0]) if hasattr(model, "bn") else 1


def _shift_and_scale(model: Any) -> tuple[float | Tensor, float | Tensor]:
    """Return what turns z into latents, as numbers or by channel, (1, C, 1, 1): the statistics of FLUX.2's batch norm, the factors of the
    config, or the statistics in the config, as of Wan and Qwen-Image.
    """
    config = model.config
    if hasattr(model, "bn"):
        mean_C, variance_C = model.bn.running_mean.float(), model.bn.running_var.float()
        return mean_C.view(1, -1, 1, 1).clone(), (variance_C + config.batch_norm_eps).rsqrt().view(1, -1, 1, 1)
    if config.get("scaling_factor") is None and config.get("latents_mean") is not None:
        mean, std = (torch.tensor(config[name], dtype=torch.float32).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return mean, 1 / std
    scale = config.get("scaling_factor")
    return config.get("shift_factor") or 0.0, 1.0 if scale is None else scale


def _on(value: float | Tensor, where: Tensor) -> float | Tensor:
    return value.to(where.device) if isinstance(value, Tensor) else value


def _fit(tensor: Tensor, model: Any) -> Tensor:
    return tensor.to(model.device, model.dtype)


def _load(name: str, folder: Path) -> DiffusersAutoencoder:
    """Load an autoencoder of diffusers from a folder. Raises UserError if there is none that can be used."""
    files = _safe_weights(folder)
    _check_record(folder)
    class_name = read_json(folder / "config.json", DOWNLOAD_AGAIN).get("_class_name")
    if not isinstance(class_name, str) or not is_autoencoder(class_name):
        raise UserError(
            f"{folder / 'config.json'} says _class_name {class_name}; only autoencoders of diffusers can be used, such as "
            f"{', '.join(_PROVED)}."
        )
    import diffusers  # slow to import

    with loading(folder):
        model, info = getattr(diffusers, class_name).from_pretrained(
            folder, **dtype_argument(torch.float32), use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    check_complete(folder, info["missing_keys"])
    with loading(folder):  # the config of a model that is not for images lacks some of what is asked
        autoencoder = DiffusersAutoencoder(name, model, fingerprint_of(files))
    if class_name not in _PROVED:
        _try(autoencoder, folder, class_name)
    return autoencoder


def _try(autoencoder: DiffusersAutoencoder, folder: Path, class_name: str) -> None:
    """Raise UserError unless the autoencoder takes images to latents of the shape that it states, and back."""
    side = max(TRIED_SIDE, autoencoder.downsampling)
    try:
        latents = autoencoder.encode(torch.zeros(1, 3, side, side))
        shapes = tuple(latents.shape), tuple(autoencoder.decode(latents).shape)
    except Exception as error:  # models of sound and of something else fail in many ways
        raise UserError(f"The {class_name} in {folder} does not encode images ({first_line(error)}): take another autoencoder.") from error
    own = side // autoencoder.downsampling
    if shapes != ((1, autoencoder.channels, own, own), (1, 3, side, side)):
        raise UserError(
            f"The {class_name} in {folder} makes latents {shapes[0]} and images {shapes[1]} of {side} pixels: it cannot be used."
        )


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
