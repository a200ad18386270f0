"""How fast is the data path? Prints five tables, each with a reference measured in the same run.

    python benchmarks/data.py

1. Reading: samples per second in shuffled batches of the paper's samples (4 x 32 x 32 latents, captions of 77 x 1024, whole and cut to 25
   tokens), compared with mosaicml-streaming and webdataset, which are installed only for this, into build/peers.
2. Start-up: the time to the first batch, by the number of rows.
3. Memory: the anonymous pages that reading and encoding hold, by the number of rows.
4. Cold reads: bytes fetched per byte needed, for rows of shards that are not in the page cache.
5. Encoding: the share of the encoders' bare forward speed that `encode_source` reaches on a CPU (encoding.py: on any device).
"""

import argparse
import importlib.machinery
import io
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fabricated import plan_of
from page_cache import bytes_asked_for, bytes_read, forget
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.encode_plan import EncodeEvents
from microdit.data.manifest import write_manifest
from microdit.data.packing import pack_latents, pack_text
from microdit.data.pixels import normalise
from microdit.data.sampler import BatchSampler, SamplerPhase
from microdit.data.shards import CHECKSUM_BYTES, EncodedRow, ShardWriter, checksums_of
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.builtin import emoji_source
from microdit.diffusion.edm import EDM
from microdit.encoders.autoencoder import Autoencoder, Pixels, load_autoencoder
from microdit.encoders.text import MiniLM, TextEncoder
from microdit.process_limits import keep_freed_memory
from microdit.training.noise import NoiseSettings, sample_noise

PEERS = Path("build/peers")
# With --no-deps: their whole list would bring torchvision, which does not import beside a CPU torch.
PEER_PACKAGES = ["mosaicml-streaming", "webdataset", "braceexpand", "brotli", "zstd", "python-snappy", "cramjam", "catalogue"]
LATENTS, CHANNELS = (4, 32, 32), 1024
BATCH = 64
SECONDS = 4.0  # of reading, for each number
COLD_ROWS = 200
MOST_TIMES = 4  # bytes fetched for each byte that is wanted
TABLES = ["read", "start", "memory", "cold", "encode"]
GPU_WANTS = 1578  # samples/s of one H100 at 45% of its peak, in phase 1 of MicroDiT_XL_2; the bar is twice that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="samples in the sets that are read")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    args = parser.parse_args()
    PEERS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PEERS.parent) as place:
        if "read" in args.tables:
            compare_reading(Path(place), args.rows)
        if "start" in args.tables or "memory" in args.tables:
            grow(Path(place))
        if "cold" in args.tables:
            read_cold(Path(place), args.rows)
        if "encode" in args.tables:
            compare_encoding(Path(place))


# --- 1. reading


def compare_reading(place: Path, rows: int) -> None:
    """Keep freed memory, as the trainer does, for all loaders alike."""
    keep_freed_memory()
    import_peers()
    print(f"{'reading, samples/s':34}{'0 workers':>12}{'1 worker':>12}")
    for tokens in (77, 25):
        best: dict[str, float] = {}
        for name, (write, _) in READERS.items():
            folder = place / f"{name}-{tokens}"
            write(folder, rows, tokens)
            speeds = [samples_per_second(READERS[name][1](folder), workers) for workers in (0, 1)]
            best[name] = max(speeds)
            print(f"{f'{name}, {tokens} tokens':34}" + "".join(f"{speed:12,.0f}" for speed in speeds), flush=True)
            shutil.rmtree(folder)
        peer = max(speed for name, speed in best.items() if name != "microdit")
        print(f"{f'  our best over the best peer, {tokens} tokens':46}{best['microdit'] / peer:.1f}x", flush=True)
        in_new_process(show_trainers_own, place / f"trainer-{tokens}", rows, tokens)


def show_trainers_own(folder: Path, rows: int, tokens: int) -> None:
    """Time the work of the trainer's reading thread per sample, and the work that a CPU then does in place of a GPU."""
    keep_freed_memory()  # as the trainer does
    write_ours(folder, rows, tokens)
    mixture = MixedDataset([EncodedDataset(folder)], [SamplerPhase(10**6, BATCH, (1,))], seed=0)
    torch.set_num_threads(1)

    def drawn(step: int) -> None:
        sample_noise(mixture.stored(step).expand(), NoiseSettings(EDM(), 0.75, 0.1), 0, step, range(BATCH), (16, 16))

    ways: dict[str, Callable[[int], object]] = {"read, checked and put together": mixture.stored, "and expanded and drawn by a CPU": drawn}
    for name, make in ways.items():
        started, step = time.perf_counter(), 0
        while time.perf_counter() - started < SECONDS:
            make(step)
            step += 1
        speed = BATCH * step / (time.perf_counter() - started)
        print(f"{f'trainer, {name}, {tokens} tokens':62}{speed:8,.0f}   {speed / GPU_WANTS:.1f}x what an H100 at 45% wants", flush=True)
    shutil.rmtree(folder)


def samples_per_second(dataset: Dataset[Any], workers: int) -> float:
    """Shuffled batches of 64 as they are stored, float16, captions padded; everyone's bytes go through `to_batch`.

    With two workers mosaicml-streaming hung on the machine this was written on, so there are none or one.
    """
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=workers))
    for _ in range(5):
        next(loader)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        count += len(next(loader)[0])
    return count / (time.perf_counter() - started)


def sample(generator: np.random.Generator, tokens: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return generator.standard_normal(LATENTS, np.float32), generator.standard_normal((tokens, CHANNELS), np.float32)


def to_batch(samples: Sequence[tuple[bytes | memoryview, bytes | memoryview]]) -> tuple[torch.Tensor, torch.Tensor]:
    latents = np.stack([np.frombuffer(blob, np.float16).reshape(LATENTS) for blob, _ in samples])
    texts = [np.frombuffer(blob, np.float16).reshape(-1, CHANNELS) for _, blob in samples]
    padded = np.zeros((len(texts), max(map(len, texts)), CHANNELS), np.float16)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(latents), torch.from_numpy(padded)


def write_ours(folder: Path, rows: int, tokens: int, rows_a_shard: int = 500) -> None:
    folder.mkdir()
    generator, shards = np.random.default_rng(0), []
    for number, first in enumerate(range(0, rows, rows_a_shard)):
        writer = ShardWriter(folder / f"shard-{number:05d}.arrow", [256])
        for i in range(first, min(first + rows_a_shard, rows)):
            latents, text = sample(generator, tokens)
            writer.write(EncodedRow(f"{i}", 0, [f"caption {i}"], [1.0], [pack_text(text, "fp16")], {256: pack_latents(latents, "fp16")}))
        writer.close()
        path = writer.path
        count = {"captions": writer.rows, "tokens": writer.rows * tokens, "captions_cut": 0, "seen": writer.rows, "rejected": {}}
        shards.append({"name": path.name, "rows": writer.rows, "buckets": {"0": writer.rows}, "bytes": path.stat().st_size, **count})
        shards[-1] |= {"sha256": "0" * 64, "checksums": checksums_of(path)._asdict()}
    write_manifest(folder, plan_of({256: 32}, "fp16", "fp16", (77, CHANNELS)), shards)


class Ours(Dataset[Any]):
    """Reads our batches by step number."""

    def __init__(self, folder: Path):
        self.data = EncodedDataset(folder)
        self.order = BatchSampler((tuple(self.data.bucket_sizes),), 0, (SamplerPhase(10**6, BATCH, (1,)),))

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return to_batch([self.data.read(place.bucket, place.row, place.draw) for place in self.order.batch(step)])


def write_mds(folder: Path, rows: int, tokens: int) -> None:
    from streaming import MDSWriter

    generator = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns={"latents": "bytes", "text": "bytes"}, compression=None, size_limit=1 << 28) as writer:
        for _ in range(rows):
            latents, text = sample(generator, tokens)
            writer.write({"latents": latents.astype(np.float16).tobytes(), "text": text.astype(np.float16).tobytes()})


def write_tars(folder: Path, rows: int, tokens: int) -> None:
    import webdataset

    folder.mkdir()
    generator = np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=500, verbose=0) as writer:
        for i in range(rows):
            latents, text = sample(generator, tokens)
            blobs = {"lat": latents.astype(np.float16).tobytes(), "txt": text.astype(np.float16).tobytes()}
            writer.write({"__key__": f"{i:06d}", **blobs})


class Batches(IterableDataset[Any]):
    """Yield a peer's shuffled samples endlessly, as batches that its workers build."""

    def __init__(self, samples: Callable[[], Iterator[tuple[bytes, bytes]]]):
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        waiting: list[tuple[bytes, bytes]] = []
        while True:
            for blobs in self.samples():
                waiting.append(blobs)
                if len(waiting) == BATCH:
                    yield to_batch(waiting)
                    waiting = []


def mds_dataset(folder: Path) -> Batches:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return Batches(lambda: ((row["latents"], row["text"]) for row in data))


def tar_dataset(folder: Path) -> Batches:
    import webdataset

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000)
    return Batches(lambda: ((row["lat"], row["txt"]) for row in data))


READERS: dict[str, tuple[Callable[[Path, int, int], None], Callable[[Path], Dataset[Any]]]] = {
    "microdit": (write_ours, Ours),
    "mosaicml-streaming": (write_mds, mds_dataset),
    "webdataset": (write_tars, tar_dataset),
}


def import_peers() -> None:
    if not PEERS.is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", PEERS, *PEER_PACKAGES], check=True)
    sys.path.append(str(PEERS))
    import transformers  # noqa: F401 - before torchvision seems to be there

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        # mosaicml-streaming imports torchvision for its picture data sets; reading bytes does without, so an empty module will do.
        module = _Empty(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


# --- 2. and 3. start-up and memory


def grow(place: Path) -> None:
    print(f"\n{'rows':>10}{'first batch, s':>18}{'reading, MB':>16}{'encoding, MB':>16}")
    for rows in (400, 4_000, 40_000):
        folder = place / f"rows-{rows}"
        write_ours(folder, rows, 4)
        first, reading = in_new_process(read_a_while, folder)
        encoding = in_new_process(encode_a_while, rows // 10, place / f"encoded-{rows}")
        print(f"{rows:10,}{first:18.2f}{reading:16.0f}{encoding:16.0f}   ({rows // 10:,} records encoded)")


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def read_a_while(folder: Path) -> tuple[float, float]:
    started = time.perf_counter()
    data = Ours(folder)
    data[0]
    first = time.perf_counter() - started
    before = anonymous_megabytes()
    most = 0.0
    for step in range(400):
        data[step]
        most = max(most, anonymous_megabytes() - before)
    return first, most


def encode_a_while(records: int, out: Path) -> float:
    encoders = Pixels(), MiniLM()
    files = [Record(f"{n}", {"caption": f"picture number {n}"}, jpeg(n, 64)) for n in range(50)]

    def part(first: int) -> Iterator[Record]:
        return (Record(f"{n}", files[n % 50].captions, files[n % 50].image) for n in range(first, min(first + 500, records)))

    source = Source("pictures", [Part(f"{first}", partial(part, first)) for first in range(0, records, 500)])
    settings = EncodeSettings((64,), batch_size=16)
    encode_source(Source("warm", [Part("0", partial(part, 0))]), out.with_suffix(".warm"), settings, *encoders)
    before, most = anonymous_megabytes(), 0.0

    def watch(more_records: int, more_parts: int) -> None:
        nonlocal most
        most = max(most, anonymous_megabytes() - before)

    encode_source(source, out, settings, *encoders, events=EncodeEvents(watch))
    return most


def anonymous_megabytes() -> float:
    """Return this process's own memory, without mapped files, whose pages the kernel may drop at any time."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000


# --- 4. cold


def read_cold(place: Path, rows: int) -> None:
    """Read random rows one after the other, and count the bytes requested from the disk and from the system."""
    print(f"\n{'cold, ' + str(COLD_ROWS) + ' rows':34}{'wanted':>12}{'from the disk':>16}{'read':>12}{'times':>8}")
    for tokens in (77, 25):
        folder = place / f"cold-{tokens}"
        write_ours(folder, rows, tokens)
        forget(folder.glob("*"))
        data, numbers = EncodedDataset(folder), np.random.default_rng(0).permutation(rows)[:COLD_ROWS]
        disk, asked = bytes_read(), bytes_asked_for()
        blobs = [blob for number in numbers for blob in data.read(0, int(number))]
        disk, asked = bytes_read() - disk, bytes_asked_for() - asked
        wanted = sum(len(blob) + CHECKSUM_BYTES for blob in blobs)
        verdict = f"at most {MOST_TIMES} holds" if disk <= MOST_TIMES * wanted else f"MORE THAN {MOST_TIMES}"
        verdict = verdict if disk >= wanted else "NOT MEASURED: this file system cannot be made to forget"
        print(f"{f'  {tokens} tokens':34}{wanted:12,}{disk:16,}{asked:12,}{disk / wanted:8.2f}   {verdict}")
        shutil.rmtree(folder)


# --- 5. encoding


def compare_encoding(place: Path) -> None:
    print(f"\n{'encoding':44}{'pictures/s':>12}{'bare forward':>14}{'share':>8}")
    emoji = [record for part in emoji_source("train").parts for record in part.records()][:512]
    photos = [Record(f"{n}", {"caption": record.captions["caption"]}, jpeg(n, 400)) for n, record in enumerate(emoji[:64])]
    text_encoder = MiniLM()
    for name, records, autoencoder, side in (
        ("emoji at 64 px, icon autoencoder", emoji, load_autoencoder("icon"), 64),
        ("JPEG of 400 px at 256 px, small KL autoencoder", photos, small_kl(place), 256),
    ):
        bare, whole = [], []
        source = Source("records", [Part("0", lambda records=records: iter(records))])  # type: ignore[misc]
        for turn in range(3):
            bare.append(bare_forward(records, autoencoder, text_encoder, side))
            started = time.perf_counter()
            encode_source(source, place / f"{side}-{turn}", EncodeSettings((side,)), autoencoder, text_encoder)
            whole.append(time.perf_counter() - started)
        speeds = [len(records) / sorted(times)[1] for times in (whole, bare)]
        print(f"{name:44}{speeds[0]:12.1f}{speeds[1]:14.1f}{speeds[0] / speeds[1]:8.0%}")


def bare_forward(records: list[Record], autoencoder: Autoencoder, text_encoder: TextEncoder, side: int) -> float:
    """Time the encoders alone on the same batches, with pixels and sorted token ids prepared beforehand."""
    ids = sorted(text_encoder.tokenize([record.captions["caption"] for record in records]), key=len)
    pixels = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), np.uint8)
    started = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(records), 64):
            autoencoder.encode(normalise(pixels[: len(records) - first]))
            text_encoder.embed(ids[first : first + 64])
    return time.perf_counter() - started


def small_kl(place: Path) -> Autoencoder:
    """Return an autoencoder of SDXL's shape, a quarter as wide, with random weights."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=(32, 64, 128, 128), latent_channels=4, layers_per_block=2, **blocks).save_pretrained(place / "kl")
    return load_autoencoder(str(place / "kl"))


def jpeg(seed: int, side: int) -> bytes:
    buffer = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
