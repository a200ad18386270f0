"""The commands about data: microdit data encode, look, verify."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from microdit.cli.terminal import SOURCE_HELP, Device, Dtype, console, share, warn
from microdit.data.packing import CaptionPacking, LatentPacking
from microdit.devices import choose_dtype, choose_own_device, describe_device, device_errors_explained
from microdit.errors import UserError
from microdit.io.console import LineOfProgress, PlainColumn, joined, styled

data_app = typer.Typer(no_args_is_help=True, help="Make and check encoded data sets.")


@data_app.command("encode")
def encode_data(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    resolutions: Annotated[list[int] | None, typer.Option("--resolutions", help="Pixels of a side, one or more. [default: 64]")] = None,
    autoencoder: Annotated[str, typer.Option(help="icon, pixels, sdxl, 16ch, or a folder or hub name of diffusers.")] = "icon",
    text_encoder: Annotated[str, typer.Option(help="minilm, dfn-clip-h, or a folder or hub name: CLIP, T5, open_clip.")] = "minilm",
    store_latents: Annotated[LatentPacking, typer.Option(help="How latents are stored: int8 has a scale for each channel.")] = "int8",
    store_captions: Annotated[CaptionPacking, typer.Option(help="How captions are stored; ids are embedded in training.")] = "int8",
    caption: Annotated[list[str] | None, typer.Option("--caption", help="Which captions: NAME or NAME=WEIGHT; repeatable.")] = None,
    min_side: Annotated[
        int | None, typer.Option(help="Reject pictures with a shorter side. [default: the set's own, or the resolution]")
    ] = None,
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Use only this share of the source, chosen by key.")] = 1.0,
    buckets: Annotated[bool, typer.Option("--buckets", help="Keep aspect ratios (sides in steps of 64), cut no squares.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures, and captions, that the encoders take at a time. [default: by the device]")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode files. [default: by the cores]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Encode pictures to latents and captions to embeddings, once.

    Stopped at any moment, the same command goes on behind the last whole shard. Under torchrun each rank encodes its share of the parts, on
    its share of the machine's GPUs. A batch that does not fit a GPU's memory is halved.

    Example: microdit data encode emoji --out data/emoji

    Example: microdit data encode my-pictures --out data/mine --resolutions 256 512 --autoencoder sdxl --text-encoder dfn-clip-h
    """
    from microdit.data.encode import EncodeSettings, default_batch_size, encode_source, unfinished
    from microdit.data.sources.folders import listed_once
    from microdit.data.sources.open import open_source
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.encoders.text import load_text_encoder

    rank, world = share()
    with listed_once(out, unfinished(out), world) as list_once:
        opened = open_source(source, _weights(caption), fraction, list_once)
        sides = tuple(resolutions or [64])
        chosen = choose_own_device(device)
        numbers = choose_dtype(dtype, chosen)
        settings = EncodeSettings(
            resolutions=sides,
            latents=store_latents,
            captions=store_captions,
            min_side=next(side for side in (min_side, opened.min_side, min(sides)) if side is not None),
            buckets=buckets,
            dtype=str(numbers).removeprefix("torch."),
            device=chosen,
            batch_size=batch_size or default_batch_size(chosen, sides),
            workers=default_workers(chosen.type) if workers is None else workers,
        )
        console.print(f"Encoding {describe_device(chosen, numbers)}.")
        with (
            _parts_progress(f"encode {opened.name}", len(range(rank, len(opened.parts), world))) as on_progress,
            device_errors_explained("the encoders need --dtype bfloat16 (half of float32), or --device cpu"),
        ):
            encoders = load_autoencoder(autoencoder), load_text_encoder(text_encoder)
            card = encode_source(opened, out, settings, *encoders, (rank, world), on_progress, warn)
        if card:
            _report_encoded(card, out)


@data_app.command("look")
def look_at_data(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option(help="The PNG to write: 16 pictures with their captions.")] = Path("look.png"),
    caption: Annotated[list[str] | None, typer.Option("--caption", help="As for encode.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many records to read for the statistics.")] = 2000,
) -> None:
    """See what a source holds before encoding it: 16 pictures as a PNG; sizes, shapes, caption lengths, duplicates, troubles.

    Example: microdit data look my-pictures
    """
    from microdit.data.look import look
    from microdit.data.sources.open import open_source
    from microdit.reports.grids import draw_grid, save_png

    pictures, captions, statistics = look(open_source(source, _weights(caption)), limit=limit)
    console.print_json(data=statistics)
    if pictures:
        save_png(draw_grid(pictures, captions, columns=4), out)
        console.print(joined(f"{len(pictures)} pictures in ", styled(out)))


@data_app.command("verify")
def verify_data(folder: Annotated[Path, typer.Argument(help="An encoded data set.")]) -> None:
    """Read every byte of an encoded data set and compare with its checksums."""
    from microdit.data.dataset import EncodedDataset

    damaged = EncodedDataset(folder).verify()
    if damaged:
        raise UserError(f"Damaged in {folder}: {', '.join(damaged)}. Encode the data again.")
    console.print(f"{folder} is whole.")


def default_workers(device: str) -> int:
    """Of each process: half of its cores where the encoders need them too, all but one beside a GPU."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, cores - 2) // 2 if device == "cpu" else max(1, cores - 1)


@contextmanager
def _parts_progress(name: str, parts: int) -> Iterator[Callable[[int, int], None]]:
    """A line that counts parts, with the records and their speed: how many records there are is not known before."""
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


def _report_encoded(card: dict[str, Any], out: Path) -> None:
    resolutions = ", ".join(str(r) for r in card["settings"]["resolutions"])
    size = sum(shard["bytes"] for shard in card["shards"])
    console.print(
        joined(
            f"{card['rows']:,} of {card['seen']:,} records kept at {resolutions} px in ",
            styled(out),
            f", {size / 1e6:,.1f} MB ({size / card['rows']:,.0f} bytes each, captions of {card['tokens'] / card['captions']:.1f} tokens)",
        )
    )
    for reason, count in card["rejected"].items():
        console.print(f"  rejected {count:,}: {reason}")
    if card["rejected"]:
        console.print(f"  each by name in {out}/*.rejected.jsonl")
    if card["captions_cut"]:
        console.print(f"  {card['captions_cut']:,} captions were longer than the text encoder's {card['max_tokens']} tokens, and cut")


def _weights(captions: list[str] | None) -> dict[str, float] | None:
    """NAME or NAME=WEIGHT, some of them -> a dict."""
    weights = {}
    for item in captions or []:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--caption {item}: write NAME or NAME=WEIGHT, such as --caption text=0.7.") from None
    return weights or None
