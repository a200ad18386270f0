"""The commands about data: microdit data encode, import-latents, look, verify, push, pull."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from microdit.cli.terminal import SOURCE_HELP, Device, Dtype, console, reporter, share, warn
from microdit.data.latent_statistics import common_std
from microdit.data.packing import CaptionPacking, LatentPacking, NumberPacking
from microdit.data.sources.base import passed_over_in_words
from microdit.data.sources.caption_options import CaptionLines, CaptionOptions, CaptionsFrom
from microdit.data.stored_pictures import PICTURES, QUALITY
from microdit.devices import choose_dtype, choose_own_device, describe_device, device_errors_explained
from microdit.errors import UserError
from microdit.io.console import LineOfProgress, PlainColumn, joined, styled
from microdit.io.places import Place, location

if TYPE_CHECKING:
    from microdit.data.encode import EncodeSettings
    from microdit.data.sources.base import Source
    from microdit.encoders.autoencoder import Autoencoder
    from microdit.encoders.text import TextEncoder
    from microdit.encoders.vision import VisionEncoder

CaptionsFromOption = Annotated[CaptionsFrom, typer.Option("--captions-from", help="text, or the name of each picture's file or folder.")]
JoinedOption = Annotated[
    str | None,
    typer.Option(
        "--captions",
        help="FILE or FILE:KEY_COLUMN:COLUMN with captions (JSON lines, CSV, Parquet), joined by key, path or URL, in place of the own.",
    ),
]
LinesOption = Annotated[CaptionLines, typer.Option("--caption-lines", help="Keep all lines of a caption, or the first one.")]
RegexOption = Annotated[
    str | None, typer.Option("--caption-regex", help="Keep what this regular expression matches, or its first group; reject the others.")
]
DropOption = Annotated[
    list[str] | None, typer.Option("--caption-drop", help="Remove what this regular expression matches from captions; repeatable.")
]
FileColumnOption = Annotated[str | None, typer.Option("--file-column", help="Column of a list or table that names the files.")]

data_app = typer.Typer(no_args_is_help=True, help="Encode data sets, look at sources, and verify checksums.")


@data_app.command("encode")
def encode_data(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[str, typer.Option(help="Folder to create, or a place in an object store, such as s3://BUCKET/FOLDER.")],
    resolutions: Annotated[
        list[int] | None, typer.Option("--resolutions", help="Side lengths in pixels, one or more. (default: 64)")
    ] = None,
    autoencoder: Annotated[
        str, typer.Option(help="icon, pixels, sdxl, 16ch, or the folder or hub name of a diffusers autoencoder.")
    ] = "icon",
    text_encoder: Annotated[
        str, typer.Option(help="minilm, dfn-clip-h, or the folder or hub name of a CLIP, T5, open_clip or language model.")
    ] = "minilm",
    features: Annotated[
        str | None,
        typer.Option(
            help="Also store features of each image, for representation alignment: efficientnet, or the folder or hub name of a DINOv2, "
            "DINOv3 or SigLIP."
        ),
    ] = None,
    store_latents: Annotated[
        LatentPacking,
        typer.Option(
            help="Storage format of latents; int8 has one scale per channel; jpeg and webp are pictures, for --autoencoder pixels."
        ),
    ] = "int8",
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Quality of the pictures that --store-latents jpeg or webp stores. (default: 90)")
    ] = None,
    store_captions: Annotated[CaptionPacking, typer.Option(help="Storage format of captions; ids are embedded during training.")] = "int8",
    caption: Annotated[list[str] | None, typer.Option("--caption", help="Which captions to use: NAME or NAME=WEIGHT; repeatable.")] = None,
    captions_from: CaptionsFromOption = "text",
    captions: JoinedOption = None,
    caption_lines: LinesOption = "all",
    caption_regex: RegexOption = None,
    caption_drop: DropOption = None,
    first_sentences: Annotated[
        bool,
        typer.Option(
            "--first-sentences", help="Also store the first sentence of each longer caption, for data.first_sentence in a recipe."
        ),
    ] = False,
    file_column: FileColumnOption = None,
    min_side: Annotated[
        int | None, typer.Option(help="Reject pictures with a shorter side than this. (default: the source's own, or the resolution)")
    ] = None,
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Use only this fraction of the source, chosen by key.")] = 1.0,
    hold_out: Annotated[
        str | None,
        typer.Option(help="Encode this share (5%) or number (500) of the pictures, chosen by key, as a second set, OUT-held-out."),
    ] = None,
    buckets: Annotated[
        bool,
        typer.Option(
            "--buckets", help="Keep aspect ratios (sides in steps of 64 pixels, of 32 or 16 below 192) instead of cropping to squares."
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures and captions per batch of the encoders. (default: by the device)")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Number of processes that decode files. (default: by the number of cores)")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Encode pictures to latents and captions to embeddings, once.

    If it was interrupted, the same command continues after the last complete shard. Under torchrun each rank encodes its share of the
    parts, and the ranks share the machine's GPUs. A batch that does not fit in GPU memory is halved.

    Example: microdit data encode emoji --out data/emoji

    Example: microdit data encode my-pictures --out data/mine --hold-out 5%

    Example: microdit data encode my-pictures --out data/mine --resolutions 256 512 --autoencoder sdxl --text-encoder dfn-clip-h

    Example: microdit data encode my-pictures --out data/mine --first-sentences --text-encoder google/flan-t5-large

    Example: microdit data encode emoji --out data/emoji --features efficientnet

    Example: microdit data encode emoji --out data/emoji-pixels --autoencoder pixels --store-latents webp
    """
    from microdit.data.encode import EncodeSettings, default_batch_size, default_workers, held_out_folder, unfinished
    from microdit.data.encode_to_store import local_folder
    from microdit.data.sources.folders import listed_once
    from microdit.data.sources.open import open_source
    from microdit.data.sources.subsets import HoldOut, split_off
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.encoders.text import load_text_encoder
    from microdit.encoders.vision import load_vision_encoder

    if quality is not None and store_latents not in PICTURES:
        raise UserError(f"--quality {quality} is for pictures: give --store-latents jpeg or webp too, or leave it out.")
    world, drop, place = share()[1], tuple(caption_drop or ()), location(out)
    listing = unfinished(place) if isinstance(place, Path) else local_folder(place)
    held_out = HoldOut.parse(hold_out) if hold_out else None
    reading = CaptionOptions(captions_from, captions, caption_lines, caption_regex, drop, file_column, listing)
    with listed_once(place if isinstance(place, Path) else listing / "done", listing, world) as list_once:
        opened = open_source(source, _weights(caption), fraction, list_once, reading)
        sides = tuple(resolutions or [64])
        chosen = choose_own_device(device)
        numbers = choose_dtype(dtype, chosen)
        settings = EncodeSettings(
            resolutions=sides,
            latents=store_latents,
            captions=store_captions,
            quality=quality or QUALITY,
            min_side=next(side for side in (min_side, opened.min_side, min(sides)) if side is not None),
            buckets=buckets,
            first_sentences=first_sentences,
            dtype=str(numbers).removeprefix("torch."),
            device=chosen,
            batch_size=batch_size or default_batch_size(chosen, sides),
            workers=default_workers(chosen.type) if workers is None else workers,
        )
        console.print(f"Encoding {describe_device(chosen, numbers)}.")
        sets = {place: opened}
        if held_out:
            training, held = split_off(opened, held_out)
            sets = {held_out_folder(place): held, place: training}  # a complete held-out set is kept when the same command continues
        with device_errors_explained("the encoders need --dtype bfloat16 (half of float32), or --device cpu"):
            encoders = load_autoencoder(autoencoder), load_text_encoder(text_encoder)
            vision = {} if features is None else {place: load_vision_encoder(features)}  # the held-out loss is measured without
            manifests = {one: _encode(part, one, settings, encoders, vision.get(one), one != place) for one, part in sets.items()}
    if held_out and manifests[place]:
        _report_split(place, held_out_folder(place))


def _encode(
    source: "Source",
    out: Path | Place,
    settings: "EncodeSettings",
    encoders: "tuple[Autoencoder, TextEncoder]",
    vision: "VisionEncoder | None",
    may_be_done: bool,
) -> dict[str, Any] | None:
    """Encode this process's share of a source, unless that is done already and may be, and report the set that this process completes."""
    from microdit.data.encode import encode_source, is_encoded
    from microdit.data.encode_plan import EncodeEvents
    from microdit.evaluation.reconstruction import save_reconstructions

    if may_be_done and is_encoded(source, out, settings, *encoders):
        console.print(f"{out} is encoded already.")
        return None

    def show(folder: Path) -> None:
        save_reconstructions(source, folder, encoders[0], min(settings.resolutions), reporter)

    rank, world = share()
    with _parts_progress(f"encode {source.name}", len(range(rank, len(source.parts), world))) as on_progress:
        manifest = encode_source(source, out, settings, *encoders, (rank, world), EncodeEvents(on_progress, show), warn, vision)
    if manifest:
        _report_encoded(manifest, out)
    return manifest


@data_app.command("import-latents")
def import_encoded_latents(
    folder: Annotated[Path, typer.Argument(help="Folder of MDS shards that precompute.py of the paper's code wrote.")],
    out: Annotated[str, typer.Option(help="Folder to create, or a place in an object store, as for encode.")],
    autoencoder: Annotated[str, typer.Option(help="The autoencoder that made the latents, as for encode.")] = "sdxl",
    text_encoder: Annotated[str, typer.Option(help="The text encoder that made the caption vectors, as for encode.")] = "dfn-clip-h",
    store_latents: Annotated[NumberPacking, typer.Option(help="Storage format of latents, as for encode.")] = "fp16",
    store_captions: Annotated[CaptionPacking, typer.Option(help="Storage format of captions, as for encode; full is as stored.")] = "full",
) -> None:
    """Import latents and caption vectors of the paper's own data sets, without encoding anything again.

    The encoders are loaded, since drawing needs them too: the numbers stored must be as many as theirs, and the first captions, embedded
    again, must give the vectors that are stored. If it was interrupted, the same command continues; under torchrun each rank imports its
    share of the shards.

    Example: microdit data import-latents cc12m/mds_latents_sdxl1_dfnclipH14 --out data/cc12m
    """
    from microdit.data.encode_plan import EncodeEvents
    from microdit.data.import_latents import import_latents, latents_source
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.encoders.text import load_text_encoder

    rank, world = share()
    source, _ = latents_source(folder)
    encoders = load_autoencoder(autoencoder), load_text_encoder(text_encoder)
    with _parts_progress(f"import {source.name}", len(range(rank, len(source.parts), world))) as on_progress:
        packing = store_latents, store_captions
        manifest = import_latents(folder, location(out), *encoders, packing, (rank, world), EncodeEvents(on_progress), warn)
    if manifest:
        _report_encoded(manifest, location(out))


@data_app.command("look")
def look_at_data(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="PNG file to write: 16 pictures with their captions.")] = Path("look.png"),
    caption: Annotated[list[str] | None, typer.Option("--caption", help="As for encode.")] = None,
    captions_from: CaptionsFromOption = "text",
    captions: JoinedOption = None,
    caption_lines: LinesOption = "all",
    caption_regex: RegexOption = None,
    caption_drop: DropOption = None,
    file_column: FileColumnOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of records to read for the statistics.")] = 2000,
    text_encoder: Annotated[str, typer.Option(help="Text encoder whose limit of tokens counts, as for encode.")] = "minilm",
    autoencoder: Annotated[str | None, typer.Option(help="Also show what this autoencoder makes of the pictures, as for encode.")] = None,
    resolution: Annotated[int, typer.Option(min=8, help="Side in pixels at which --autoencoder is tried.")] = 64,
    html: Annotated[Path | None, typer.Option(help="HTML page to write as well, which shows captions in any script.")] = None,
) -> None:
    """Inspect a source before encoding it: 16 pictures; sizes, shapes, languages and lengths of captions, duplicates, problems.

    Warnings name the files that they are about. Nothing is written but the pictures and the page. With --autoencoder, a second picture
    (look-reconstructions.png) shows the reconstructions, beyond which no training can improve.

    Example: microdit data look my-pictures

    Example: microdit data look my-pictures --autoencoder icon --html look.html
    """
    from microdit.data.look import TextLimit, look
    from microdit.data.sources.open import open_source
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.encoders.text import load_text_encoder
    from microdit.evaluation.reconstruction import reconstruct
    from microdit.reports.grids import draw_grid, save_png
    from microdit.reports.look_page import write_look_page

    reading = CaptionOptions(captions_from, captions, caption_lines, caption_regex, tuple(caption_drop or ()), file_column)
    opened = open_source(source, _weights(caption), options=reading)
    encoder = load_text_encoder(text_encoder)
    text = TextLimit(text_encoder, encoder.max_tokens, lambda caption: len(encoder.tokenize([caption])[0]))
    pictures, shown, statistics = look(opened, limit=limit, text=text)
    made = reconstruct(load_autoencoder(autoencoder), pictures, resolution) if autoencoder and pictures else None
    if made:
        statistics["reconstructions"] = made.figures()
        statistics["warnings"] += filter(None, [made.warning()])
    console.print_json(data=statistics)
    if statistics["is_sample"]:
        console.print(f"These numbers are those of a sample of {statistics['records']:,} records; --limit sets its size.")
    if "joined" in statistics:
        console.print(joined_in_words(statistics["joined"]))
    if statistics["passed_over"]:
        console.print(f"passed over: {passed_over_in_words(statistics['passed_over'])}")
    for sentence in statistics["warnings"]:
        warn(sentence)
    if html:
        write_look_page(opened.name, pictures, shown, statistics, html, made.draw() if made else None)
        console.print(joined("The page is ", styled(html)))
    if pictures:
        save_png(draw_grid(pictures, shown, columns=4), out)
        console.print(joined(f"{len(pictures)} pictures in ", styled(out)))
    if made:
        rebuilt = out.with_stem(f"{out.stem}-reconstructions")
        made.save(rebuilt)
        console.print(joined(made.describe(), " They are in ", styled(rebuilt)))


@data_app.command("verify")
def verify_data(folder: Annotated[str, typer.Argument(help="An encoded data set: a folder, or a place such as s3://bucket/set.")]) -> None:
    """Read every byte of an encoded data set and compare it with the checksums.

    Example: microdit data verify data/emoji
    """
    from microdit.data.dataset import EncodedDataset

    damaged = EncodedDataset(location(folder)).verify()
    if damaged:
        raise UserError(f"Damaged in {folder}: {', '.join(damaged)}. Encode the data again.")
    console.print(f"{folder} is whole.")


@data_app.command("push")
def push_data(
    folder: Annotated[Path, typer.Argument(help="An encoded data set.")],
    place: Annotated[str, typer.Argument(help="Where to copy it: s3://BUCKET/FOLDER, gs://, az:// or hf://.")],
) -> None:
    """Copy an encoded data set to an object store, from which it can be trained.

    If it was interrupted, the same command continues after the last complete shard. Credentials are found as the store's own tools find
    them; for stores that are compatible with S3, AWS_ENDPOINT_URL names the address.

    Example: microdit data push data/mine s3://my-bucket/mine
    """
    from microdit.data.transfer import push

    manifest = push(folder, _place(place), reporter)
    console.print(joined(f"{manifest['rows']:,} rows are in ", styled(place), f". A recipe reads them with data.path: {place}"))


@data_app.command("pull")
def pull_data(
    place: Annotated[str, typer.Argument(help="An encoded data set in an object store, such as s3://BUCKET/FOLDER.")],
    folder: Annotated[Path, typer.Argument(help="Folder to create.")],
) -> None:
    """Copy an encoded data set from an object store to this machine, and compare it with its checksums.

    If it was interrupted, the same command continues after the last complete shard.

    Example: microdit data pull s3://my-bucket/mine data/mine
    """
    from microdit.data.transfer import pull

    manifest = pull(_place(place), folder, reporter)
    console.print(joined(f"{manifest['rows']:,} rows are in ", styled(folder), "."))


def _place(name: str) -> Place:
    """Return the place in an object store that a name stands for. Raises UserError for a folder of this machine."""
    place = location(name)
    if isinstance(place, Path):
        raise UserError(f"{name} is a folder of this machine: name a place in an object store, such as s3://my-bucket/mine.")
    return place


@contextmanager
def _parts_progress(name: str, parts: int) -> Iterator[Callable[[int, int], None]]:
    """Show a progress line that counts parts, with the records and their speed. The total number of records is not known in advance."""
    columns = (PlainColumn(), BarColumn(), MofNCompleteColumn(), PlainColumn("records"))
    started, records = time.monotonic(), 0
    with LineOfProgress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=parts, records="parts")

        def advance(more_records: int, more_parts: int) -> None:
            nonlocal records
            records += more_records
            speed = records / (time.monotonic() - started)
            progress.update(task, advance=more_parts, records=f"parts  {records:,} records  {speed:.0f}/s")

        yield advance


def _report_encoded(manifest: dict[str, Any], out: Path | Place) -> None:
    resolutions = ", ".join(str(r) for r in manifest["settings"]["resolutions"])
    rows, size = manifest["rows"], sum(shard["bytes"] for shard in manifest["shards"])
    console.print(
        joined(
            f"{rows:,} of {manifest['seen']:,} records kept at {resolutions} px in ",
            styled(out),
            f", {size / 1e6:,.1f} MB ({size / rows:,.0f} bytes each, captions of {manifest['tokens'] / manifest['captions']:.1f} tokens)",
        )
    )
    if manifest["settings"]["buckets"]:
        shapes = [f"{height} x {width}" for height, width in (bucket[min(bucket, key=int)] for bucket in manifest["sizes"])]
        console.print(f"  {len(shapes)} aspect ratios, as height x width: {', '.join(shapes)}")
    for resolution, statistics in manifest.get("latents", {}).items():
        stds = statistics["std"]
        console.print(
            f"  latents at {resolution} px: standard deviation {common_std([(1.0, statistics)]):.3f} "
            f"(by channel {min(stds):.3f} to {max(stds):.3f}, means {min(statistics['mean']):.3f} to {max(statistics['mean']):.3f})"
        )
    if features := manifest.get("features"):
        cell = features["cell"]
        console.print(f"  features of {features['name']}: {features['channels']:,} numbers for each {cell} x {cell} pixels")
    for reason, count in manifest["rejected"].items():
        console.print(f"  rejected {count:,}: {reason}")
    if manifest["rejected"]:
        console.print(f"  each by name in {out}/*.rejected.jsonl")
    if manifest["passed_over"]:
        console.print(f"  passed over: {passed_over_in_words(manifest['passed_over'])}")
    if "joined" in manifest:
        console.print(f"  {joined_in_words(manifest['joined'])}")
    if manifest["captions_cut"]:
        console.print(
            f"  {manifest['captions_cut']:,} captions were longer than the text encoder's {manifest['max_tokens']} tokens, and cut"
        )


def _report_split(out: Path | Place, held_out: Path | Place) -> None:
    """Print the sum over both sets, and how a recipe names the held-out one."""
    from microdit.data.manifest import has_manifest, read_manifest

    if not has_manifest(held_out):  # another process is about to complete it
        return
    both = [read_manifest(folder) for folder in (out, held_out)]
    (kept, held), rejected = (manifest["rows"] for manifest in both), sum(sum(manifest["rejected"].values()) for manifest in both)
    console.print(
        f"{kept:,} to train on + {held:,} held out + {rejected:,} rejected = {sum(manifest['seen'] for manifest in both):,} records. "
        f"A recipe measures the held-out loss with data.held_out: {held_out}"
    )


def joined_in_words(joined: dict[str, Any]) -> str:
    """Return a sentence on how many records and rows of a file with captions found each other."""
    records = joined["records_matched"] + joined["records_unmatched"]
    broken = f"; {joined['rows_broken']:,} rows are broken" if joined["rows_broken"] else ""
    repeated = f"; {joined['rows_repeated']:,} rows repeat a key" if joined["rows_repeated"] else ""
    return (
        f"captions of {joined['file']}: {joined['records_matched']:,} of {records:,} pictures found theirs; "
        f"{joined['rows_unmatched']:,} of its rows found no picture{repeated}{broken}"
    )


def _weights(captions: list[str] | None) -> dict[str, float] | None:
    """Parse --caption options, each NAME or NAME=WEIGHT. Returns None if there are none. Raises UserError."""
    weights = {}
    for item in captions or []:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--caption {item}: write NAME or NAME=WEIGHT, such as --caption text=0.7.") from None
    return weights or None
