import hashlib
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.data.decode import fit
from microdit.distributed import World, start_world
from microdit.errors import UserError
from microdit.evaluation import extraction
from microdit.evaluation.extraction import Features, Pictures, extract, pick, read_tensors, write_tensors
from microdit.io.console import Reporter
from tests.damage import flips


class Listener(Reporter):
    """Hands each warning to a function."""

    def __init__(self, on_warning: Callable[[str], Any]):
        super().__init__()
        self._on_warning = on_warning

    def warn(self, sentence: str) -> None:
        self._on_warning(sentence)


class MeanColours:
    """A network as simple as they come: its features can be computed by hand. Counts what it sees."""

    resize = "none"

    def __init__(self, fingerprint: str = "1"):
        self.name, self.fingerprint, self.seen = "mean colours", fingerprint, 0

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        self.seen += len(images)
        return torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1)) for image in images])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK", 4)


@pytest.fixture(scope="module")
def world() -> World:
    return start_world("cpu")


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def extracted(network: MeanColours, contents: list[bytes], folder: Path, world: World, side: int | None = None) -> tuple[Features, list]:
    warnings: list[str] = []
    return extract(network, "pictures", parts_of(contents), side, folder, world, Listener(warnings.append)), warnings


def parts_of(contents: list[bytes], size: int = 3) -> list[Pictures]:
    """Parts that do not end where blocks do."""
    return [partial(iter, contents[start : start + size]) for start in range(0, len(contents), size)]


def test_features_come_in_the_order_of_the_pictures_cut_to_squares(tmp_path, world):
    images = [picture(seed) for seed in range(10)]
    found, _ = extracted(MeanColours(), [png(image) for image in images], tmp_path, world, side=8)
    expected = torch.stack([torch.from_numpy(fit(image, 8, 8).astype(np.float32)).mean(dim=(0, 1)) for image in images])
    assert torch.equal(found.features_ND, expected)
    assert found.numbers_N.tolist() == list(range(10))
    assert (found.total, found.left_out, found.enlarged) == (10, 0, 0)


def test_unreadable_images_are_left_out_and_small_ones_counted(tmp_path, world):
    contents = [png(picture(0)), b"", png(picture(1, 5, 5)), b"no picture", png(picture(2)), png(picture(3))]
    found, _ = extracted(MeanColours(), contents, tmp_path, world, side=8)
    assert found.numbers_N.tolist() == [0, 2, 4, 5]
    assert (found.total, found.left_out, found.enlarged) == (6, 2, 1)
    nothing, _ = extracted(MeanColours(), [b"", b"x"] * 3, tmp_path, world)
    assert (len(nothing.features_ND), nothing.left_out) == (0, 6)


def test_nothing_is_seen_twice_and_nothing_changed_is_taken_for_the_same(tmp_path, world):
    contents = [png(picture(seed)) for seed in range(10)]
    first = MeanColours()
    found, _ = extracted(first, contents, tmp_path, world)
    assert first.seen == 10
    again = MeanColours()
    assert torch.equal(extracted(again, contents, tmp_path, world)[0].features_ND, found.features_ND)
    assert again.seen == 0
    changed = MeanColours()
    other, _ = extracted(changed, [*contents[:9], png(picture(99))], tmp_path, world)
    assert changed.seen == 2  # its block alone: 9 and 10 of 10 pictures
    assert other.fingerprint != found.fingerprint
    for network, side in ((MeanColours("2"), None), (MeanColours(), 8)):
        extracted(network, contents, tmp_path, world, side)
        assert network.seen == 10


def test_who_was_stopped_goes_on(tmp_path, world):
    """After two blocks the third cannot be computed; the next call computes that one only."""

    class Dying(MeanColours):
        def __call__(self, images: list[Image.Image]) -> torch.Tensor:
            if self.seen == 8:
                raise KeyboardInterrupt
            return super().__call__(images)

    contents = [png(picture(seed)) for seed in range(12)]
    with pytest.raises(KeyboardInterrupt):
        extracted(Dying(), contents, tmp_path, world)
    rest = MeanColours()
    assert len(extracted(rest, contents, tmp_path, world)[0].features_ND) == 12
    assert rest.seen == 4


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-3] + b"abc", lambda content: b""])
def test_a_damaged_block_is_said_to_be_and_computed_again(tmp_path, world, damage):
    contents = [png(picture(seed)) for seed in range(8)]
    found, _ = extracted(MeanColours(), contents, tmp_path, world)
    block = sorted(tmp_path.iterdir())[0]
    block.write_bytes(damage(block.read_bytes()))
    network = MeanColours()
    again, warnings = extracted(network, contents, tmp_path, world)
    assert torch.equal(again.features_ND, found.features_ND)
    assert network.seen == 4
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    assert "computed again" in warnings[0]


def test_every_flipped_bit_of_a_cache_file_is_noticed_or_harmless(tmp_path):
    tensors = {"features": torch.randn(3, 2), "numbers": torch.tensor([0, 1, 3])}
    path = tmp_path / "block.safetensors"
    write_tensors(path, tensors, {"pictures": "4", "enlarged": "1"})
    noticed, places = 0, 0
    for _ in flips(path):
        said: list[str] = []
        found = read_tensors(path, tensors, Listener(said.append))
        places += 1
        noticed += found is None
        assert (found is None) == bool(said)
        if found is not None:  # a space that only fills up the header
            assert found[1] == {"pictures": "4", "enlarged": "1"}
            assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
    assert noticed > 0.9 * places


def former_names(network: MeanColours, side: int | None, contents: list[bytes]) -> list[str]:
    """How blocks have always been named: whoever has a cache keeps it."""
    names = []
    for start in range(0, len(contents), 4):
        digest = hashlib.sha256(f"{network.name} {network.fingerprint} {network.resize} {side}".encode())
        for content in contents[start : start + 4]:
            digest.update(hashlib.sha256(content).digest())
        names.append(digest.hexdigest()[:32])
    return names


def test_cache_names_do_not_depend_on_how_images_are_split_into_parts(tmp_path, world):
    contents = [png(picture(seed)) for seed in range(10)]
    names = former_names(MeanColours(), 8, contents)
    for size in (1, 3, 4, 100):
        found = extract(MeanColours(), "pictures", parts_of(contents, size), 8, tmp_path / str(size), world, Listener(pytest.fail))
        assert sorted(path.stem for path in (tmp_path / str(size)).iterdir()) == sorted(names)
        assert found.fingerprint == hashlib.sha256("".join(names).encode()).hexdigest()[:16]
        assert found.counts == tuple(len(list(part())) for part in parts_of(contents, size))


class Meeting:
    """Threads of this process as the processes of a run, for what `extract` says to the others. One works at a time."""

    def __init__(self, size: int):
        self.size, self.turn, self.barrier = size, threading.Lock(), threading.Barrier(size, timeout=600)
        self.said: list[Any] = [None] * size

    def world(self, world: World, rank: int) -> World:
        return InThread(rank, self.size, world.device, world.saving, meeting=self)


@dataclass(frozen=True)
class InThread(World):
    meeting: Meeting | None = None

    def gather(self, value, group=None):
        assert self.meeting is not None
        self.meeting.said[self.rank] = value
        self.meeting.turn.release()
        self.meeting.barrier.wait()
        said = list(self.meeting.said)
        self.meeting.barrier.wait()
        self.meeting.turn.acquire()
        return said

    def wait_for_all(self):
        self.gather(None)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_pictures_are_dealt_before_they_are_read(tmp_path, world, size):
    """Each is read once in all to be hashed, and again by who takes its features; few parts are opened by two. Cached, only once."""
    contents = [png(picture(seed)) for seed in range(40)]
    expected, _ = extracted(MeanColours(), contents, tmp_path / "alone", world)
    for reads_at_most in (1 + 1, 1):
        read = [0] * 40
        networks = [MeanColours() for _ in range(size)]
        meeting = Meeting(size)

        def counted(start: int, read=read):
            for number in range(start, min(start + 3, 40)):
                read[number] += 1
                yield contents[number]

        def work(rank: int, networks=networks, meeting=meeting, counted=counted) -> Features:
            parts = [partial(counted, start) for start in range(0, 40, 3)]
            with meeting.turn:
                return extract(
                    networks[rank], "pictures", parts, None, tmp_path / "shared", meeting.world(world, rank), Listener(pytest.fail)
                )

        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(work, range(size)))
        for features in found:
            assert torch.equal(features.features_ND, expected.features_ND)
            assert (features.fingerprint, features.counts) == (expected.fingerprint, expected.counts)
        assert sum(network.seen for network in networks) == (40 if reads_at_most > 1 else 0)
        assert max(network.seen for network in networks) - min(network.seen for network in networks) <= 4  # a block
        assert sum(read) <= 40 * reads_at_most + (reads_at_most - 1) * 2 * size  # and a part's beginning, at either end of a run


def test_of_parts_without_a_wanted_picture_nothing_is_read():
    opened = []

    def part(name: str):
        opened.append(name)
        yield from (f"{name}{i}".encode() for i in range(4))

    parts = [partial(part, name) for name in "abc"]
    assert list(pick(parts, (4, 4, 4), [1, 3, 8])) == [(1, b"a1"), (3, b"a3"), (8, b"c0")]
    assert opened == ["a", "c"]
    assert list(pick(parts, (4, 4, 4), [])) == []


@pytest.mark.parametrize("later", [[b"other"] * 6, [b"x"] * 5, []])
def test_pictures_that_change_while_they_are_read_end_in_a_sentence(tmp_path, world, later):
    """The files are others, one is gone, all are gone."""
    versions = iter([[b"x"] * 6, later])
    with pytest.raises(UserError, match="changed while they were being read"):
        extract(MeanColours(), "pictures", [lambda: iter(next(versions))], None, tmp_path, world, Listener(pytest.fail))


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, world):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Features of owls cannot be written to .*file/cache \(Not a directory\): free some space"):
        extract(MeanColours(), "owls", parts_of([png(picture(0))], 1), 8, tmp_path / "file" / "cache", world, Listener(pytest.fail))
