"""What a recipe learns on, in numbers: read from its encoded sets where they are on the disk, else assumed, and said so."""

from dataclasses import dataclass
from pathlib import Path

from microdit.data.card import CARD
from microdit.data.forms import bytes_of_row
from microdit.data.latents import EncodedSet
from microdit.data.shards import DamagedShard
from microdit.errors import UserError
from microdit.recipe import Recipe

RESOLUTION = 256  # pixels, where a recipe says none
LOOKED_AT = 512  # captions of a set, to know how long a batch of them is
AUTOENCODERS = {"sdxl": (4, 8), "16ch": (16, 8), "icon": (8, 8), "pixels": (3, 1)}  # channels, downsampling
TEXT_ENCODERS = {"dfn-clip-h": (77, 1024), "minilm": (16, 384)}  # tokens, channels; MiniLM's captions have no fixed length


@dataclass(frozen=True)
class Given:
    """What is known better than our assumptions."""

    latent_channels: int | None = None
    downsampling: int | None = None
    caption_tokens: int | None = None
    caption_channels: int | None = None


@dataclass(frozen=True)
class Shapes:
    """`sides`: (share of the samples, height, width) of latents, one for each aspect ratio. `assumed`: in words, what was not read.

    `samples` and `bytes`, on the disk, are None where a set is missing. `autoencoder` and `text_encoder` by name.
    """

    resolution: int
    latent_channels: int
    sides: tuple[tuple[float, int, int], ...]
    caption_tokens: int
    caption_channels: int
    autoencoder: str
    text_encoder: str
    samples: int | None
    bytes: int | None
    assumed: tuple[str, ...]


def shapes_of(recipe: Recipe, given: Given = Given()) -> Shapes:
    """Raises UserError if a set is damaged, or if the model's patches do not fit."""
    folders = [Path(item.path) for item in recipe.data.named_sets.values()]
    found = [EncodedSet(folder, recipe.data.resolution) for folder in folders if (folder / CARD).is_file()]
    shapes = _read(found, len(found) == len(folders)) if found else assumed_shapes(recipe, given)
    p = recipe.model.patch_size
    for _, height, width in shapes.sides:
        if height % p or width % p or not height or not width:
            raise UserError(f"{recipe.name}: model.patch_size {p} does not divide the {height} x {width} latents.")
    return shapes


def assumed_shapes(recipe: Recipe, given: Given = Given()) -> Shapes:
    """From what the recipe says of its data alone, whatever lies on the disk."""
    data = recipe.data
    autoencoder, text_encoder = data.autoencoder or "sdxl", data.text_encoder or "dfn-clip-h"
    channels, downsampling = AUTOENCODERS.get(autoencoder, AUTOENCODERS["sdxl"])
    tokens, width = TEXT_ENCODERS.get(text_encoder, TEXT_ENCODERS["dfn-clip-h"])
    resolution = data.resolution or RESOLUTION
    down = given.downsampling or downsampling
    side, channels = resolution // down, given.latent_channels or channels
    tokens, width = given.caption_tokens or tokens, given.caption_channels or width
    assumed = [
        f"latents of {channels} x {side} x {side} ({autoencoder}, {down} pixels a side)",
        f"captions of {tokens} x {width} ({text_encoder})",
    ]
    if data.resolution is None:
        assumed.insert(0, f"{RESOLUTION} px")
    return Shapes(resolution, channels, ((1.0, side, side),), tokens, width, autoencoder, text_encoder, None, None, tuple(assumed))


def _read(sets: list[EncodedSet], complete: bool) -> Shapes:
    first, rows = sets[0], sum(len(item) for item in sets)
    sides = [(size / rows, *item.latent_shape(bucket)[1:]) for item in sets for bucket, size in enumerate(item.bucket_sizes)]
    return Shapes(
        first.resolution,
        first.latent_shape()[0],
        tuple(sides),
        max(_longest_caption(item) for item in sets),
        first.card["text_channels"],
        first.card["autoencoder"]["name"],
        first.card["text_encoder"]["name"],
        rows if complete else None,
        sum(shard["bytes"] for item in sets for shard in item.card["shards"]) if complete else None,
        () if complete else ("sets that are not encoded yet are taken to be like those that are",),
    )


def _longest_caption(encoded: EncodedSet) -> int:
    """Tokens, in the first captions: a batch is as long as its longest one."""
    bucket = max(range(len(encoded.bucket_sizes)), key=encoded.bucket_sizes.__getitem__)
    row = bytes_of_row(encoded.card["text_channels"], encoded.card["settings"]["captions"])
    try:
        return max(len(encoded.read(bucket, number)[1]) // row for number in range(min(LOOKED_AT, encoded.bucket_sizes[bucket])))
    except DamagedShard as damage:
        raise UserError(f"{damage}: encode {encoded.folder} again.") from damage
