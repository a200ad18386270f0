import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, default_batch_size, encode_source
from microdit.data.manifest import read_manifest
from microdit.data.packing import unpack_ids
from microdit.data.pixels import to_tensor
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.builtin import emoji_images, emoji_source
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import DiffusersAutoencoder, Pixels, load_autoencoder
from microdit.encoders.text import MiniLM
from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json
from tests.conftest import first_of
from tests.data.pictures import picture, write_tar
from tests.encoders.tiny_models import save_kl
from tests.training.processes import Running, start

SMALL = EncodeSettings((16,), "fp16", "fp16", batch_size=8)


def source_of(*parts: list[Record], **weights: float) -> Source:
    def part(name: str, records: list[Record]) -> Part:
        return Part(name, lambda: iter(records))

    return Source("test", [part(f"part {n}", records) for n, records in enumerate(parts)], weights or {"caption": 1.0})


def good(number: int, caption: str = "a picture") -> Record:
    return Record(f"k{number}", {"caption": f"{caption} {number}"}, picture(number, "PNG", (20, 18)))


def latents_of(data: EncodedDataset, number: int, bucket: int = 0) -> torch.Tensor:
    return data.latents([data.read(bucket, number)[0]], bucket)[0]


def text_of(data: EncodedDataset, number: int, draw: float = 0.0) -> torch.Tensor:
    return data.text([data.read(0, number, draw)[1]])[0][0]


def sums(folder: Path) -> list[str]:
    return [shard["sha256"] for shard in read_manifest(folder)["shards"]]


def test_what_was_encoded_is_what_is_read(encoded_emoji, text_encoder):
    data, rows = EncodedDataset(encoded_emoji), list(emoji_images("train"))
    assert data.column("captions") == [[row.caption] for row in rows[:40]]
    assert data.column("key") == [row.key for row in rows[:40]]
    for i in (7, 0, 31):
        assert torch.allclose(latents_of(data, i), to_tensor(rows[i].image, 16), atol=1e-3)  # float16 on the disk
        text, _ = text_encoder.encode([rows[i].caption])
        assert torch.allclose(text_of(data, i), text[0], atol=1e-2)


def test_the_folder_opens_with_hf_datasets_too(encoded_emoji):
    rows = datasets.load_from_disk(str(encoded_emoji))
    assert len(rows) == 40
    assert rows[3]["captions"] == EncodedDataset(encoded_emoji).column("captions")[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_rank_and_four_write_the_same(tmp_path, text_encoder, workers):
    source = source_of(*[[good(10 * n + i) for i in range(7)] for n in range(6)])
    encode_source(source, tmp_path / "one", SMALL, Pixels(), text_encoder)
    settings = EncodeSettings((16,), "fp16", "fp16", batch_size=8, workers=workers)
    manifests = [encode_source(source, tmp_path / "four", settings, Pixels(), text_encoder, (rank, 4)) for rank in (3, 0, 2, 1)]
    assert [manifest is not None for manifest in manifests] == [False, False, False, True]
    assert sums(tmp_path / "one") == sums(tmp_path / "four")
    keys = EncodedDataset(tmp_path / "four").column("key")
    assert len(keys) == len(set(keys)) == 42


def test_every_record_is_kept_or_rejected_by_name(tmp_path, text_encoder):
    records = [
        good(0),
        Record("empty", {"caption": "x"}, b""),
        Record("known", {"caption": "x"}, b"", problem="no such file"),
        Record("blank", {"caption": " \n\t "}, picture(1)),
        Record("surrogate", {"caption": "a \ud800 b"}, picture(1)),
        Record("tiny", {"caption": "x"}, picture(1, "PNG", (4, 4))),
        good(0),
        good(1, "word " * 5000),
    ]
    settings = EncodeSettings((8,), min_side=8)
    manifest = encode_source(source_of(records, [good(0)]), tmp_path / "set", settings, Pixels(), text_encoder)
    assert (manifest["rows"], manifest["seen"]) == (3, 9)  # the key of another part is another record
    assert manifest["captions_cut"] == 1
    rejected = [json.loads(line) for line in (tmp_path / "set" / "shard-00000.rejected.jsonl").read_text().splitlines()]
    assert {item["key"]: item["reason"] for item in rejected} == {
        "empty": "file is empty",
        "known": "no such file",
        "blank": "no caption",
        "surrogate": "no caption",
        "tiny": "a side is shorter than 8 pixels",
        "k0": "duplicate key",
    }
    assert manifest["rejected"] == Counter(item["reason"] for item in rejected)


def test_several_captions_are_kept_with_their_weights(tmp_path, text_encoder):
    record = Record("k", {"alt": "an alt text", "llava": "a long description of it", "other": "unused"}, picture(1))
    encode_source(source_of([record], alt=0.25, llava=0.75), tmp_path / "set", EncodeSettings((8,)), Pixels(), text_encoder)
    data = EncodedDataset(tmp_path / "set")
    assert data.column("captions") == [["an alt text", "a long description of it"]]
    assert data.column("weights") == [[0.25, 0.75]]
    assert len(text_of(data, 0, 0.2)) < len(text_of(data, 0, 0.3))


@pytest.mark.parametrize("form", ["int8", "ids", "full"])
def test_the_other_forms_of_captions(tmp_path, text_encoder, form):
    encode_source(first_of(emoji_source("train"), 9), tmp_path / "set", EncodeSettings((8,), "int8", form), Pixels(), text_encoder)
    data, captions = EncodedDataset(tmp_path / "set"), [row.caption for row in emoji_images("train")][:9]
    for i, caption in enumerate(captions):
        ids = text_encoder.tokenize([caption])
        if form == "ids":
            assert unpack_ids(data.read(0, i)[1]) == ids[0]
        elif form == "full":
            assert torch.allclose(text_of(data, i), text_encoder.embed_full(ids)[0], atol=1e-2)
        else:
            assert torch.allclose(text_of(data, i), text_encoder.embed(ids)[0][0], atol=3e-2)


def test_several_resolutions_lie_side_by_side(tmp_path, text_encoder):
    encode_source(first_of(emoji_source("train"), 5), tmp_path / "set", EncodeSettings((16, 32)), Pixels(), text_encoder)
    assert latents_of(EncodedDataset(tmp_path / "set", 16), 2).shape == (3, 16, 16)
    assert latents_of(EncodedDataset(tmp_path / "set", 32), 2).shape == (3, 32, 32)
    with pytest.raises(UserError, match="holds the resolutions 16, 32"):
        EncodedDataset(tmp_path / "set")


def test_aspect_ratios_can_be_kept(tmp_path, text_encoder):
    sizes = [(200, 100), (100, 200), (128, 128), (200, 100), (100, 190)]
    records = [Record(f"{n}", {"caption": "c"}, picture(n, "PNG", size)) for n, size in enumerate(sizes)]
    settings = EncodeSettings((192,), "fp16", buckets=True)
    encode_source(source_of(records[:3], records[3:]), tmp_path / "set", settings, Pixels(), text_encoder)
    data = EncodedDataset(tmp_path / "set")
    assert sum(data.bucket_sizes) == 5
    found = {}
    for bucket, size in enumerate(data.bucket_sizes):
        for number in range(size):
            latents = latents_of(data, number, bucket)
            assert latents.shape == data.latent_shape(bucket)
            found[tuple(((latents[:, 0, 0] + 1) * 127.5).round().int().tolist())] = latents.shape[1:]
    for n, (width, height) in enumerate(sizes):
        tall, wide = found[n * 37 % 256, n * 91 % 256, n % 256]
        assert (tall > wide) == (height > width)


def test_a_broken_source_leaves_whole_shards_and_the_same_command_goes_on(tmp_path, text_encoder):
    parts = [[good(10 * n + i) for i in range(5)] for n in range(3)]

    def breaks():
        yield from parts[2][:2]
        raise RuntimeError("the source broke")

    broken = source_of(*parts)
    broken.parts[2] = Part("part 2", breaks)
    with pytest.raises(RuntimeError):
        encode_source(broken, tmp_path / "set", SMALL, Pixels(), text_encoder)
    assert not (tmp_path / "set").exists()
    done = tmp_path / ".set.part"
    assert sorted(path.name for path in done.glob("*.arrow")) == ["shard-00000.arrow", "shard-00001.arrow"]
    assert list(done.glob("*.part")) == []
    before = (done / "shard-00000.arrow").stat().st_mtime_ns
    encode_source(source_of(*parts), tmp_path / "set", SMALL, Pixels(), text_encoder)
    assert (tmp_path / "set" / "shard-00000.arrow").stat().st_mtime_ns == before
    assert len(EncodedDataset(tmp_path / "set")) == 15


def test_what_was_begun_otherwise_or_is_there_is_not_touched(tmp_path, text_encoder):
    broken = source_of([good(1)], [good(2)])
    broken.parts[1] = Part("part 1", lambda: (_ for _ in ()).throw(RuntimeError("broke")))
    with pytest.raises(RuntimeError):
        encode_source(broken, tmp_path / "set", SMALL, Pixels(), text_encoder)
    with pytest.raises(UserError, match=r"started with other settings \(resolutions, latents, captions, sizes differ\)"):
        encode_source(source_of([good(1)], [good(2)]), tmp_path / "set", EncodeSettings((8,)), Pixels(), text_encoder)
    encode_source(source_of([good(1)], [good(2)]), tmp_path / "set", SMALL, Pixels(), text_encoder)
    with pytest.raises(UserError, match="exists already"):
        encode_source(source_of([good(1)]), tmp_path / "set", SMALL, Pixels(), text_encoder)


def begin(out: Path, text_encoder) -> dict:
    """Start an encoding that stops after its first part, and return its plan."""
    broken = source_of([good(1)], [good(2)])
    broken.parts[1] = Part("part 1", lambda: (_ for _ in ()).throw(RuntimeError("broke")))
    with pytest.raises(RuntimeError):
        encode_source(broken, out, SMALL, Pixels(), text_encoder)
    return from_checked_json((out.with_name(f".{out.name}.part") / "plan.json").read_bytes())


def test_the_dtype_must_stay_and_the_batch_size_may_change(tmp_path, text_encoder):
    plan = begin(tmp_path / "set", text_encoder)
    assert plan["settings"]["dtype"] == "float32"
    assert not {"batch_size", "device", "workers"} & set(plan["settings"])
    other = dataclasses.replace(SMALL, dtype="bfloat16")
    with pytest.raises(UserError, match=r"\(dtype differ\).*started with --dtype float32"):
        encode_source(source_of([good(1)], [good(2)]), tmp_path / "set", other, Pixels(), text_encoder)
    encode_source(source_of([good(1)], [good(2)]), tmp_path / "set", dataclasses.replace(SMALL, batch_size=3), Pixels(), text_encoder)
    encode_source(source_of([good(1)], [good(2)]), tmp_path / "whole", SMALL, Pixels(), text_encoder)
    assert sums(tmp_path / "set") == sums(tmp_path / "whole")


def test_unfinished_work_of_other_versions_is_refused_and_damage_seen(tmp_path, text_encoder):
    plan = begin(tmp_path / "set", text_encoder)
    begun, source = tmp_path / ".set.part", source_of([good(1)], [good(2)])
    written = (begun / "plan.json").read_bytes()
    (begun / "plan.json").write_bytes(to_checked_json({**plan, "format": 2}))
    with pytest.raises(UserError, match="was started by another version of microdit: delete it"):
        encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder)
    (begun / "plan.json").write_bytes(written.replace(b"float32", b"float33"))
    with pytest.raises(UserError, match=rf"plan\.json is damaged .*: delete {begun}, and run the same command again"):
        encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder)
    (begun / "plan.json").write_bytes(written)
    manifest = begun / "shard-00000.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows": 1', b'"rows": 3'))
    said: list[str] = []
    assert encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, warn=said.append)["rows"] == 2
    assert said == ["These parts have changed since they were encoded and are encoded again: shard-00000.json."]


def test_what_a_source_lacks_is_said(tmp_path, text_encoder):
    said: list[str] = []
    source = dataclasses.replace(source_of([good(1)]), note="Half of it is not installed.")
    encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, warn=said.append)
    assert said == ["Half of it is not installed."]


def test_two_encodings_of_one_folder_are_refused_with_who_is_at_it(tmp_path, text_encoder):
    tried = []

    def meanwhile():
        for share in ((0, 1), (0, 2), (1, 2)):  # also on another number of ranks
            with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on {socket.gethostname()}: wait for it") as refusal:
                encode_source(source_of([good(1)]), tmp_path / "set", SMALL, Pixels(), text_encoder, share)
            tried.append(str(refusal.value))
        yield good(2)

    source = source_of([good(1)])
    source.parts[0] = Part("part 0", meanwhile)
    encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder)
    assert len(tried) == 3
    assert EncodedDataset(tmp_path / "set").column("key") == ["k2"]
    assert not list((tmp_path / "set").glob(".*"))
    assert not (tmp_path / ".set.part").exists()


def test_the_ranks_of_one_encoding_are_let_in(tmp_path, text_encoder):
    manifests = []

    def meanwhile():
        manifests.append(encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, (1, 2)))
        yield good(1)

    source = source_of([], [good(2)])
    source.parts[0] = Part("part 0", meanwhile)
    assert encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, (0, 2))["rows"] == 2
    assert manifests == [None]


def encode_together(shares: list[tuple[int, int]], source: Source, out: Path, text_encoder) -> list[int | None]:
    """Return the exit codes of processes that start at the same moment. They are forked, which saves the imports."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(shares))

    def encode(share: tuple[int, int]) -> None:
        torch.set_num_threads(1)  # others do not survive a fork
        barrier.wait()
        try:
            encode_source(source, out, dataclasses.replace(SMALL, captions="ids"), Pixels(), text_encoder, share)
        except UserError:
            os._exit(REFUSED)

    processes = [context.Process(target=encode, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


REFUSED = 3


@pytest.mark.parametrize("parts", [1, 8])  # most have nothing to do, and may come when all is done; all complete it at once
def test_eight_processes_that_begin_together_all_succeed(tmp_path, text_encoder, parts):
    source = source_of(*[[good(n)] for n in range(parts)])
    for trial in range(3):
        out = tmp_path / str(trial)
        assert encode_together([(rank, 8) for rank in range(8)], source, out, text_encoder) == [0] * 8
        assert EncodedDataset(out).column("key") == [f"k{n}" for n in range(parts)]
        assert not list(out.glob(".*"))


def test_two_numbers_of_ranks_that_begin_together_are_never_at_it_at_once(tmp_path, text_encoder):
    codes = encode_together(
        [(rank, 4) for rank in range(4)] + [(0, 5)], source_of(*[[good(n)] for n in range(8)]), tmp_path / "set", text_encoder
    )
    assert set(codes) <= {0, REFUSED}  # which ones, depends on who comes first, and who has ended by then
    assert (tmp_path / "set").exists() == (codes[:4] == [0] * 4)


def test_ranks_that_come_when_all_is_done_have_nothing_to_do(tmp_path, text_encoder):
    source, told = source_of([good(1)]), []
    assert encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, (0, 2))["rows"] == 1
    assert encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, (1, 2), warn=told.append) is None
    assert told == [
        f"{tmp_path / 'set'} is already complete, from the same parts of the same source with the same settings: nothing is left to do."
    ]
    for other, settings in ((source_of([good(1)], [good(2)]), SMALL), (source, EncodeSettings((8,)))):
        with pytest.raises(UserError, match="exists already: delete it"):
            encode_source(other, tmp_path / "set", settings, Pixels(), text_encoder, (1, 2))
    (tmp_path / "else").mkdir()
    with pytest.raises(UserError, match="exists already: delete it"):
        encode_source(source, tmp_path / "else", SMALL, Pixels(), text_encoder, (1, 2))


def test_a_rank_that_sees_another_source_is_told_so(tmp_path, text_encoder):
    def meanwhile():
        with pytest.raises(UserError, match=r"sees another source test than those that are encoding it into .* \(1 parts here, 2 there\)"):
            encode_source(source_of([good(1)]), tmp_path / "set", SMALL, Pixels(), text_encoder, (1, 2))
        yield good(1)

    source = source_of([], [good(2)])
    source.parts[0] = Part("part 0", meanwhile)
    assert encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, (0, 2)) is None  # rank 1's part is missing
    assert encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder, (1, 2))["rows"] == 2


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(tmp_path, text_encoder):
    """A limit on the size of files stands for a full disk: the system fails in the same way, in the middle of a write."""
    source, soft_and_hard = source_of([good(n) for n in range(40)]), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, soft_and_hard[1]))
    try:
        with pytest.raises(
            UserError, match=r"Encoding into .*\.set\.part stopped: .*File too large.*make room.*the same command to continue"
        ):
            encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
        signal.signal(signal.SIGXFSZ, handler)
    assert encode_source(source, tmp_path / "set", SMALL, Pixels(), text_encoder)["rows"] == 40


def test_half_written_files_of_a_killed_process_are_removed(tmp_path, text_encoder):
    begin(tmp_path / "set", text_encoder)
    (tmp_path / ".set.part" / ".shard-00001.arrow.12345.part").write_bytes(b"half")
    encode_source(source_of([good(1)], [good(2)]), tmp_path / "set", SMALL, Pixels(), text_encoder)
    assert not list((tmp_path / "set").glob(".*"))


class SmallGPU(DiffusersAutoencoder):
    """An autoencoder whose memory holds `room` images."""

    room = 3

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if len(images_BCHW) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().encode(images_BCHW)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(tmp_path, text_encoder):
    save_kl(tmp_path / "kl")
    whole = load_autoencoder(str(tmp_path / "kl"))
    small = SmallGPU(whole.name, whole.model, whole.fingerprint)
    parts = [[good(10 * n + i) for i in range(7)] for n in range(3)]
    told: list[str] = []
    for name, autoencoder in (("whole", whole), ("small", small)):
        encode_source(source_of(*parts), tmp_path / name, SMALL, autoencoder, text_encoder, warn=told.append)
    assert told == ["The GPU's memory holds fewer images at a time: 3 from here on."]
    one, other = EncodedDataset(tmp_path / "whole"), EncodedDataset(tmp_path / "small")
    assert one.column("key") == other.column("key")
    for number in range(21):  # a convolution of another batch may differ in its last bit
        assert torch.allclose(latents_of(one, number), latents_of(other, number), atol=2e-3)
        assert torch.equal(text_of(one, number), text_of(other, number))


def test_where_not_even_one_picture_fits_a_sentence_says_what_would(tmp_path, text_encoder):
    save_kl(tmp_path / "kl")
    whole = load_autoencoder(str(tmp_path / "kl"))
    tiny = SmallGPU(whole.name, whole.model, whole.fingerprint)
    tiny.room = 0
    with pytest.raises(UserError, match=r"one of the images in float32 .*2\.00 GiB.*--dtype bfloat16.*--resolutions, or --device cpu"):
        encode_source(source_of([good(1), good(2)]), tmp_path / "set", SMALL, tiny, text_encoder)


class Overflowing(Pixels):
    """An autoencoder whose results are infinite from the second batch on."""

    calls = 0

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return images_BCHW * (float("inf") if self.calls > 1 else 1)


def test_numbers_that_are_not_finite_stop_it_behind_the_last_whole_shard(tmp_path, text_encoder):
    with pytest.raises(UserError, match=r"latents that are not finite.*--dtype float32"):
        encode_source(source_of(*[[good(n)] for n in range(4)]), tmp_path / "set", SMALL, Overflowing(), text_encoder)
    assert sorted(path.name for path in (tmp_path / ".set.part").glob("[!.]*")) == ["plan.json", "shard-00000.arrow", "shard-00000.json"]


def test_bfloat16_is_near_float32_and_the_card_says_which(tmp_path):
    save_kl(tmp_path / "kl")
    sets = []
    for dtype in ("float32", "bfloat16"):
        settings = dataclasses.replace(SMALL, captions="ids", dtype=dtype)
        manifest = encode_source(source_of([good(1)]), tmp_path / dtype, settings, load_autoencoder(str(tmp_path / "kl")), MiniLM())
        assert manifest["settings"]["dtype"] == dtype
        sets.append(EncodedDataset(tmp_path / dtype))
    difference = (latents_of(sets[0], 0) - latents_of(sets[1], 0)).abs().max()
    assert 0 < difference < 0.05


def test_batches_on_a_gpu_take_about_the_same_memory_at_any_resolution():
    gpu = torch.device("cuda", 0)
    assert [default_batch_size(gpu, (256, side)) for side in (256, 512, 1024, 8192)] == [128, 32, 8, 1]
    assert default_batch_size(gpu, (64,)) == 256
    assert default_batch_size(torch.device("cpu"), (512,)) == 64


def test_a_source_that_gives_nothing_says_why(tmp_path, text_encoder):
    with pytest.raises(
        UserError, match=r"No image of the source test could be kept; rejected: 1 file is empty\. 'microdit data look SOURCE' shows"
    ):
        encode_source(source_of([Record("k", {"caption": "c"}, b"")]), tmp_path / "set", SMALL, Pixels(), text_encoder)
    with pytest.raises(UserError, match=r"The source test holds no image: of few images a small share may be empty, so take a larger one"):
        encode_source(source_of([]), tmp_path / "empty", SMALL, Pixels(), text_encoder)


def test_a_thousand_corruptions_lose_nothing_silently(tmp_path, text_encoder):
    generator = random.Random(0)
    whole = [picture(n, form, (24, 24)) for n, form in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP"))]
    records = []
    for n in range(1000):
        content = bytearray(generator.choice(whole))
        for _ in range(generator.randrange(4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        if generator.random() < 0.3:
            del content[generator.randrange(len(content)) :]
        caption = "".join(
            chr(generator.choice([32, 65, 66, 67, 0x1F600, 0x200D, 10, 0, 0x4E00] + [0xD800] * (n % 9 == 0)))
            for _ in range(generator.randrange(8))
        )
        records.append(Record(f"{n}", {"caption": caption} if generator.random() < 0.95 else {}, bytes(content)))
    settings = EncodeSettings((8,), min_side=8)
    manifest = encode_source(source_of(records[:600], records[600:]), tmp_path / "set", settings, Pixels(), text_encoder)
    rejected = [json.loads(line) for path in (tmp_path / "set").glob("*.rejected.jsonl") for line in path.read_text().splitlines()]
    assert manifest["seen"] == manifest["rows"] + sum(manifest["rejected"].values()) == 1000
    assert sorted(EncodedDataset(tmp_path / "set").column("key") + [item["key"] for item in rejected], key=int) == [
        str(n) for n in range(1000)
    ]
    assert 100 < manifest["rows"] < 900
    assert all(reason and len(reason) < 80 for reason in manifest["rejected"])
    assert len(manifest["rejected"]) >= 3


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_at_any_moment_nothing_is_missing_and_nothing_twice(tmp_path, ranks, text_encoder):
    """Killing the process (SIGKILL) at random moments and then finishing gives the same files as an undisturbed run."""
    for tar in range(6):
        files = [(f"{tar}{n:03d}.{form}", content) for n in range(60) for form, content in sample_files(tar * 1000 + n)]
        write_tar(tmp_path / "tars" / f"{tar}.tar", files)
    settings = EncodeSettings((16,), min_side=8, batch_size=16)
    encode_source(open_source(str(tmp_path / "tars")), tmp_path / "whole", settings, Pixels(), text_encoder)

    out, generator, killed = tmp_path / "set", random.Random(ranks), 0
    while killed < ranks + 1 and not out.exists():
        running = start_encoding(tmp_path / "tars", out, ranks)
        while not shards_being_written(out) and running.alive:
            time.sleep(0.01)
        if killed:  # the first are killed at once, long before they can have finished
            time.sleep(generator.uniform(0, 0.4))
        killed += sum(process.is_alive() for process in running.processes)
        running.kill()
    assert killed
    if not out.exists():
        last = start_encoding(tmp_path / "tars", out, ranks)
        assert last.wait() == [0] * ranks, last.output
    assert sums(out) == sums(tmp_path / "whole")
    keys = EncodedDataset(out).column("key")
    assert len(keys) == len(set(keys)) == 360


def sample_files(number: int) -> list[tuple[str, bytes]]:
    return [("png", picture(number, "PNG", (16, 16))), ("txt", f"picture number {number}".encode())]


def start_encoding(tars: Path, out: Path, ranks: int) -> Running:
    options = ["--resolutions", 16, "--autoencoder", "pixels", "--workers", 0, "--batch-size", 16, "--min-side", 8]
    return start(out.parent / "logs", ["data", "encode", tars, "--out", out, *options], ranks)


def shards_being_written(out: Path) -> list[Path]:
    return list(out.with_name(f".{out.name}.part").glob(".shard-*"))


def test_the_icon_autoencoders_latents_survive_eight_bits(tmp_path, text_encoder):
    icon = load_autoencoder("icon")
    encode_source(first_of(emoji_source("train"), 20), tmp_path / "set", EncodeSettings((64,)), icon, text_encoder)
    data, rows = EncodedDataset(tmp_path / "set"), [row for row, _ in zip(emoji_images("train"), range(20), strict=False)]
    pixels = torch.stack([to_tensor(row.image, 64) for row in rows])
    latents = torch.stack([latents_of(data, i) for i in range(20)])
    exact = icon.decode(icon.encode(pixels))
    assert (icon.decode(latents) - exact).square().mean() < 0.01 * (exact - pixels).square().mean()
