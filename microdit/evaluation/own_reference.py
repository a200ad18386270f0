"""A run's own data as the reference of its evaluation: pictures of its held-out set, or of a training set, as the autoencoder decodes them.

Encoded sets hold no pictures, and the source may be gone. Decoded latents are also the ceiling of what the model can reach, so that the
autoencoder's own error does not count against it; figures against the original pictures are therefore higher.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch

from microdit.checkpoint import checkpoint_folders, open_checkpoint
from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.data.pixels import to_image
from microdit.data.sources.base import Source
from microdit.data.sources.open import open_source
from microdit.distributed import World
from microdit.encoders.autoencoder import load_autoencoder
from microdit.errors import UserError
from microdit.io.console import QUIET, Reporter
from microdit.io.near_names import did_you_mean_path
from microdit.io.places import location
from microdit.pipelines.components import check_unchanged
from microdit.pipelines.export import read_record, write_folder
from microdit.reports.run_folder import RECIPE, is_run

COUNT = 256  # captions that are generated
MOST_PICTURES = 1000
LEAST_HELD_OUT = 32  # pictures of a held-out set, below which the training set is the better reference
OTHER = "name a set of pictures with --reference"


def trained_on_emoji(model: str) -> bool:
    """Return whether a run or an exported model was trained on the built-in emoji, for which there is a task of its own."""
    folder = Path(model)
    return re.match(r"emoji\b", _source_of_run(folder) if is_run(folder) else _source_of_export(folder)) is not None


def own_reference(run: Path, out: Path, world: World, reporter: Reporter = QUIET) -> Source:
    """Return up to MOST_PICTURES of the run's own pictures as a source; the first process decodes them into a folder in `out`.

    They are those of `data.held_out` if it has at least LEAST_HELD_OUT, else those of the first training set. All processes must call
    this. Raises UserError if `run` is no run folder, or its data is gone or was encoded by an autoencoder that has changed.
    """
    if not is_run(run):
        near = "" if run.exists() else did_you_mean_path(run)
        raise UserError(f"{run} is no run folder.{near} Without one its data is unknown: {OTHER}.")
    with world.together():
        encoded, kind = _own_set(run)
    folder = out / f"reference-{_fingerprint(encoded)}"
    with world.together():
        if world.is_main and not folder.is_dir():
            write_folder(folder, lambda empty: _decode_into(empty, encoded, world, reporter))
    world.wait_for_all()
    return replace(open_source(str(folder)), name=f"{encoded.folder} ({kind}, as decoded)")


def own_count(source: Source) -> int:
    """Return how many captions of an own reference to generate: COUNT, or one for each picture if there are fewer."""
    return min(COUNT, sum(1 for part in source.parts for _ in part.records()))


def _own_set(run: Path) -> tuple[EncodedDataset, str]:
    data = load_recipe(run / RECIPE).data
    places = [(location(data.held_out), "held out")] if data.held_out else []
    places += [(next(iter(data.named_sets.values())).folder, "training set")]
    for place, kind in places:
        try:
            encoded = EncodedDataset(place, data.resolution)
        except UserError as error:
            raise UserError(f"The data that {run} was trained on cannot be read. {error} Or {OTHER}.") from error
        if len(encoded) >= LEAST_HELD_OUT or (place, kind) == places[-1]:
            return encoded, kind
    raise AssertionError("the last place is returned")


def _decode_into(folder: Path, encoded: EncodedDataset, world: World, reporter: Reporter) -> None:
    """Write evenly spread pictures of a set, each with its caption beside it."""
    recorded = encoded.manifest["autoencoder"]
    autoencoder = check_unchanged(load_autoencoder(recorded["name"]), recorded["fingerprint"])
    autoencoder.to(world.device, torch.float32)
    count = min(MOST_PICTURES, len(encoded))
    with torch.no_grad(), reporter.progress(f"decode {encoded.folder}", count) as advance:
        for number, (bucket, stored, captions) in enumerate(encoded.spread(count)):
            picture = to_image(autoencoder.decode(encoded.latents([stored], bucket))[0])
            picture.save(folder / f"{number:04}.png")
            (folder / f"{number:04}.txt").write_text(captions[0], encoding="utf-8")
            advance(1)


def _fingerprint(encoded: EncodedDataset) -> str:
    sums = "".join(shard["sha256"] for shard in encoded.manifest["shards"])
    return hashlib.sha256(f"{encoded.resolution}{sums}".encode()).hexdigest()[:8]


def _source_of_run(run: Path) -> str:
    """Return the name of the source that the newest readable checkpoint was trained on; empty if there is none."""
    for folder in checkpoint_folders(run):
        try:
            return str(open_checkpoint(folder).state["data"]["source"])
        except UserError:  # whoever opens the model reports the damage
            continue
    return ""


def _source_of_export(folder: Path) -> str:
    data = read_record(folder).get("data")
    return str(data.get("source", "")) if isinstance(data, dict) else ""
