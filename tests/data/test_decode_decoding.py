import io
import os

import numpy as np
import pytest
from PIL import Image

from microdit.data.decode import Decoder, TargetSizes, decode, fit, prepare
from microdit.data.sources.base import Record
from microdit.errors import UserError


def record(width: int, height: int = 20) -> Record:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(buffer, "PNG")
    return Record(f"{width}x{height}", {"caption": "c"}, buffer.getvalue())


class Deadly(TargetSizes):
    """Exit the process at an image of 13 pixels width, as a crash inside a decoder would."""

    def bucket_of(self, height: int, width: int) -> int:
        if width == 13:
            os._exit(1)
        return super().bucket_of(height, width)


def flat(chunks):
    return [(rec.key, outcome) for chunk in chunks for rec, outcome in zip(chunk.records, chunk.outcomes, strict=True)]


def keys_of(chunks):
    return [([rec.key for rec in chunk.records], chunk.last) for chunk in chunks]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_count_are_the_sources(workers):
    records = [record(10 + i) for i in range(25)] + [Record("bad", {"caption": "c"}, b"x"), record(5)]
    with Decoder(TargetSizes.of((8, 16), 8, False, 1), workers) as decoder:
        chunks = list(decoder.chunks([records], 10))
    assert [(len(chunk.records), chunk.last) for chunk in chunks] == [(10, False), (10, False), (7, True)]
    outcomes = flat(chunks)
    assert [key for key, _ in outcomes] == [r.key for r in records]
    bucket, (small, large) = outcomes[3][1]
    assert (bucket, small.shape, large.shape) == (0, (8, 8, 3), (16, 16, 3))
    assert small[0, 0].tolist() == [13, 20, 0]
    assert outcomes[-2][1] == "no picture of a kind that is read"
    assert outcomes[-1][1] == "a side is shorter than 8 pixels"


def test_a_worker_that_dies_costs_one_record():
    wanted = Deadly(TargetSizes.of((8,), 0, False, 1).buckets, 0)
    with Decoder(wanted, 2) as decoder:
        outcomes = flat(decoder.chunks([[record(10), record(11), record(13), record(12)], [record(9)] * 6], 4))
    assert len(outcomes) == 10
    assert [key for key, outcome in outcomes if isinstance(outcome, str)] == ["13x20"]
    assert dict(outcomes)["13x20"] == "decoder crashed"


@pytest.mark.parametrize("workers", [0, 2])
def test_chunks_end_with_their_group(workers):
    groups = [[record(8 + n) for n in range(5)], [], [record(20 + n) for n in range(4)], [record(30)]]
    with Decoder(TargetSizes.of((8,), 0, False, 1), workers) as decoder:
        chunks = list(decoder.chunks(groups, 2))
    assert keys_of(chunks) == [
        (["8x20", "9x20"], False),
        (["10x20", "11x20"], False),
        (["12x20"], True),
        ([], True),
        (["20x20", "21x20"], False),
        (["22x20", "23x20"], False),
        ([], True),
        (["30x20"], True),
    ]
    assert all(len(chunk.records) == len(chunk.outcomes) for chunk in chunks)


def test_large_files_make_small_chunks(monkeypatch):
    monkeypatch.setattr("microdit.data.decode.MOST_BYTES", 1000)
    records = [Record(f"{number}", {}, bytes(size)) for number, size in enumerate((400, 400, 400, 1500, 600, 10, 10))]
    with Decoder(TargetSizes.of((8,), 0, False, 1), workers=0) as decoder:
        chunks = list(decoder.chunks([records], 64))
    assert keys_of(chunks) == [(["0", "1"], False), (["2"], False), (["3"], False), (["4", "5", "6"], True)]


def test_few_chunks_of_large_files_are_decoded_ahead(monkeypatch):
    monkeypatch.setattr("microdit.data.decode.MOST_BYTES", 1000)
    read, ahead = [], []

    def group():
        for number in range(6):
            read.append(number)
            yield Record(f"{number}", {}, bytes(600))

    with Decoder(TargetSizes.of((8,), 0, False, 1), workers=1) as decoder:
        for number, _ in enumerate(decoder.chunks([group()], 64), start=1):
            ahead.append(len(read) - number)
    assert ahead == [2, 2, 2, 2, 1, 0]  # one that is decoded, and one that was found not to fit beside it


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_read_before_an_error_is_given_first(workers):
    def breaks():
        yield record(9)
        raise RuntimeError("the source broke")

    with Decoder(TargetSizes.of((8,), 0, False, 1), workers) as decoder:
        chunks = decoder.chunks([[record(8)], breaks()], 1)
        given = [next(chunks).records for _ in range(3)]
        with pytest.raises(RuntimeError, match="the source broke"):
            next(chunks)
    assert [[rec.key for rec in records] for records in given] == [["8x20"], [], ["9x20"]]


def test_large_jpegs_are_decoded_smaller_and_judged_by_full_size():
    content = jpeg(600, 400)
    exact = fit(decode(content), 64, 64)
    bucket, (drafted,) = prepare(TargetSizes.of((64,), 400, False, 1), [content])[0]
    assert (bucket, drafted.shape) == (0, (64, 64, 3))
    assert 0 < np.abs(drafted.astype(int) - exact).max() <= 4
    (whole,) = prepare(TargetSizes.of((192,), 400, False, 1), [content])[0][1]
    assert np.array_equal(whole, fit(decode(content), 192, 192))
    assert prepare(TargetSizes.of((64,), 401, False, 1), [content]) == ["a side is shorter than 401 pixels"]


def jpeg(width: int, height: int) -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (height // 40, width // 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_aspect_buckets_hold_about_the_resolutions_pixels_in_steps_of_64():
    wanted = TargetSizes.of((256, 512), 0, True, 8)
    shapes = {bucket[256] for bucket in wanted.buckets}
    assert (256, 256) in shapes
    assert len(shapes) == len(wanted.buckets) >= 5
    for bucket in wanted.buckets:
        for resolution, (height, width) in bucket.items():
            assert height % 64 == width % 64 == 0
            assert height * width == pytest.approx(resolution**2, rel=0.26)
            assert 0.5 <= height / width <= 2
        assert np.log(bucket[512][0] / bucket[512][1]) == pytest.approx(np.log(bucket[256][0] / bucket[256][1]), abs=0.3)
    assert wanted.buckets[wanted.bucket_of(300, 300)][256] == (256, 256)
    tall, wide = (wanted.buckets[wanted.bucket_of(*size)][256] for size in ((800, 500), (500, 800)))
    assert tall == wide[::-1]
    assert tall[0] > tall[1]


def test_a_resolution_that_the_autoencoder_cannot_take_is_refused():
    with pytest.raises(UserError, match="--resolutions 60 must be a multiple of 8"):
        TargetSizes.of((60,), 0, False, 8)


@pytest.mark.parametrize(
    ("resolutions", "downsampling", "step"), [((64,), 8, 16), ((128,), 8, 32), ((64, 512), 8, 16), ((128, 256), 1, 32), ((192,), 8, 64)]
)
def test_small_resolutions_have_aspect_buckets_in_smaller_steps(resolutions, downsampling, step):
    sizes = TargetSizes.of(resolutions, 0, True, downsampling)
    shapes = {bucket[min(resolutions)] for bucket in sizes.buckets}
    assert len(shapes) > 1
    assert all(side % step == 0 for shape in shapes for side in shape)
    assert sizes.buckets[sizes.bucket_of(30, 50)][min(resolutions)][0] < min(resolutions)


def test_where_only_squares_fit_buckets_are_refused():
    with pytest.raises(UserError, match=r"--buckets keeps no aspect ratio at --resolutions 64: sides in steps of 64 pixels"):
        TargetSizes.of((64,), 0, True, 32)
