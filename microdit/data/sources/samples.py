"""Group the files of an archive into samples: an image and the files with its captions.

WebDataset's convention: files belong together if their paths are equal up to the first dot of the file name. Real archives also hold names
with more dots. Within a group, the files that differ in their last extension only form a unit, and the units decide which images are
samples:

- An image with captions of its own (`2024.05.01.png`, `2024.05.01.txt`) is a sample.
- The only image of a group (`0.image.png`) takes all captions of the group (`0.caption.txt` is the one named "caption").
- An image beside the main one of its group (`0.seg.png` beside `0.png`) is passed over, and counted.
- Several images that could all be meant (`0.input.png`, `0.output.png` and `0.txt`; or `0.png` and `0.jpg`) are rejected together.

Files are told apart by their suffixes, and images of any other name (`0`, `0.dat`) by their first bytes. Beside an image with the suffix of
one, those are passed over unless both have captions of their own.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from microdit.data.sources.untrusted_files import (
    IMAGE_SUFFIXES,
    LARGEST_FILE,
    LARGEST_TEXT,
    begins_as_image,
    count_kind,
    is_hidden,
    kind_of,
    sum_of_kinds,
)

SEVERAL = "several pictures share the name before the first dot"
NO_IMAGE = "no image"
NO_SAMPLES = "archive holds no pictures"
Use = Literal["image", "caption", "list", ""]  # a list holds captions of many images
MOST_UNITS = 64  # of a group that are held; where names begin with a date, a whole archive is one group


@dataclass(frozen=True)
class Member:
    """A file in an archive. `key` is its path up to the first dot of its name, and `extension` is the rest.

    `use` is empty for files that are neither images nor captions. `ends` marks the report that the rest of the archive cannot be read.
    """

    key: str
    extension: str
    use: Use = ""
    content: bytes = b""
    problem: str = ""
    ends: bool = False

    @property
    def name(self) -> str:
        return f"{self.key}.{self.extension}" if self.extension else self.key

    @property
    def has_image_suffix(self) -> bool:
        return f".{self.extension}".endswith(IMAGE_SUFFIXES)


@dataclass
class Sample:
    """An image, and the files with its captions by extension. `passed_over` counts the files met since the previous sample by kind.

    `file` is the name of the image in the archive, with its extension in lower case.
    """

    key: str
    image: bytes = b""
    sidecars: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""
    ends: bool = False  # not a sample, but the report that the rest of the archive cannot be read
    passed_over: dict[str, int] = field(default_factory=dict)
    file: str = ""


def split_name(path: str) -> tuple[str, str]:
    """Split "a/b.seg.png" into ("a/b", "seg.png"). The key of a hidden file, or of one in a hidden folder, is empty."""
    path = path.removeprefix("./")
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return ("", path) if is_hidden(path) or not stem else (folder + slash + stem, extension.lower())


def use_of(extension: str, sidecars: frozenset[str], read: Callable[[int], bytes]) -> Use:
    """Return what a file with this extension, such as "seg.png", is. `sidecars` are the extensions of captions.

    `read(size)` returns its first bytes. It is called only where the extension does not tell.
    """
    if f".{extension}".endswith(IMAGE_SUFFIXES):
        return "image"
    if extension.rpartition(".")[2] in sidecars:
        return "caption"
    return "image" if begins_as_image(f".{extension}", read) else ""


def grouped(members: Iterable[Member], end: str, need_sidecar: bool) -> Iterator[Sample]:
    """Yield the samples that the members form, or one with the key `end` which reports that there is none.

    Without `need_sidecar`, captions come from elsewhere, and an image is complete without any file beside it.
    """
    output = _Output()
    group: _Group | None = None
    for member in members:
        if member.ends:
            # The last samples may lack files that were to follow. They count as complete if they can be used as they are.
            samples, group = group.samples() if group else [], None
            samples = [sample for sample in samples if sample.image and not sample.problem and (sample.sidecars or not need_sidecar)]
            yield from output.put([*samples, Sample(member.key, problem=member.problem, ends=True)])
            break
        if group and member.key and (member.key != group.key or member.extension in group.extensions):
            samples, group = group.samples(), None
            yield from output.put(samples)
        if member.key and member.use:
            group = group or _Group(member.key, need_sidecar, output.pass_over)
            yield from output.put(group.add(member))
        else:
            output.pass_over(kind_of(f"x.{member.extension}" if member.key else member.extension))
    yield from output.put(group.samples() if group else [])
    yield from output.rest(end)


@dataclass
class _Unit:
    """The files of a group that differ in their last extension only."""

    images: list[Member] = field(default_factory=list)
    captions: list[Member] = field(default_factory=list)

    def is_complete(self) -> bool:
        return bool(self.images and self.captions)

    def size(self) -> int:
        return sum(len(member.content) for member in self.images + self.captions)


class _Group:
    """The files with one name up to the first dot, in units by what follows it. Where they are many, units leave before the group ends."""

    def __init__(self, key: str, need_sidecar: bool, pass_over: Callable[[str], None]):
        self.key, self.need_sidecar, self.pass_over = key, need_sidecar, pass_over
        self.extensions: set[str] = set()
        self._units: dict[str, _Unit] = {}
        self._size = 0
        self._had_main = self._is_split = False

    def add(self, member: Member) -> list[Sample]:
        """Add a file. Returns the samples that leave the group to make room."""
        self.extensions.add(member.extension)
        name = member.extension.rpartition(".")[0]
        unit = self._units.setdefault(name, _Unit())
        (unit.images if member.use == "image" else unit.captions).append(member)
        self._size += len(member.content)
        if len(self._units) <= MOST_UNITS and self._size <= LARGEST_FILE + LARGEST_TEXT:
            return []
        self._is_split = True
        newest = self._units.pop(name)
        samples = self.samples()
        self._units, self._size = {name: newest}, newest.size()
        return samples

    def samples(self) -> list[Sample]:
        """Return the samples of the group. Each file is part of one of them, or passed over."""
        self._leave_out_images_by_content()
        images = {name: unit for name, unit in self._units.items() if unit.images}
        captions = {name: unit for name, unit in self._units.items() if not unit.images}
        if not images:
            return [self._sample("", *captions.values())] if "" in captions else [self._sample(*item) for item in captions.items()]
        if "" in images or (len(images) == 1 and not self._is_split):
            self._had_main = True
            name = "" if "" in images else next(iter(images))
            main = images.pop(name)
            key = name if main.is_complete() else ""
            return [self._sample(key, main, *captions.values()), *self._beside_main(images)]
        if self._had_main:
            return self._beside_main(images) + [self._sample(*item) for item in captions.items()]
        if captions and self.need_sidecar and not self._is_split and not any(unit.is_complete() for unit in images.values()):
            return [self._sample("", *self._units.values())]
        return [self._sample(*item) for item in self._units.items()]

    def _leave_out_images_by_content(self) -> None:
        """Pass over images without the suffix of one beside those that have it, unless both have captions of their own."""
        with_suffix = [unit for unit in self._units.values() if any(member.has_image_suffix for member in unit.images)]
        if not with_suffix:
            return
        any_complete = any(unit.captions for unit in with_suffix)
        for unit in self._units.values():
            if unit in with_suffix or not unit.captions or not any_complete:
                self._pass_over([member for member in unit.images if not member.has_image_suffix])
                unit.images = [member for member in unit.images if member.has_image_suffix]
        self._units = {name: unit for name, unit in self._units.items() if unit.images or unit.captions}

    def _beside_main(self, images: dict[str, _Unit]) -> list[Sample]:
        """Return the samples among units beside the main image, and pass over the others."""
        for unit in images.values():
            if not unit.is_complete():
                self._pass_over(unit.images)
        return [self._sample(name, unit) for name, unit in images.items() if unit.is_complete()]

    def _sample(self, name: str, *units: _Unit) -> Sample:
        """Return the sample that these units form. Of several images, none is taken."""
        images = [member for unit in units for member in unit.images]
        captions = [member for unit in units for member in unit.captions]
        drawings = [member for member in images if member.extension.endswith("svg")]
        if 0 < len(drawings) < len(images):  # the drawing of a picture that is there as well
            self._pass_over(drawings)
            images = [member for member in images if member not in drawings]
        self._pass_over(images[1:])
        problem = SEVERAL if len(images) > 1 else next((member.problem for member in images + captions if member.problem), "")
        return Sample(
            f"{self.key}.{name}" if name else self.key,
            images[0].content if images and not problem else b"",
            {member.extension.removeprefix(f"{name}."): member.content for member in captions if member.content},
            problem or ("" if images else NO_IMAGE),
            file=images[0].name if images else "",
        )

    def _pass_over(self, images: list[Member]) -> None:
        for member in images:
            self.pass_over(f".{member.extension}" if _WORDS.fullmatch(member.extension) else kind_of(f"x.{member.extension}"))


_WORDS = re.compile(
    r"[a-z_]{1,16}(\.[a-z_0-9]{1,8}){1,2}"
)  # "seg.png", which says more than "png"; not "1.png", of which there may be many


class _Output:
    """Makes the keys of samples unique, and tells each, and the last one in the end, what was passed over before."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._passed_over: Counter[str] = Counter()
        self._held: Sample | None = None

    def pass_over(self, kind: str) -> None:
        count_kind(self._passed_over, kind)

    def put(self, samples: list[Sample]) -> Iterator[Sample]:
        """Yield the samples put before, and hold the last one. Empties the list, so that it does not keep images in memory."""
        while samples:
            if self._held:
                yield self._take()
            self._held = samples.pop(0)
            self._make_unique(self._held)
            self._held.passed_over, self._passed_over = dict(self._passed_over), Counter()

    def rest(self, end: str) -> Iterator[Sample]:
        """Yield the sample that is held, or one with the key `end` if there was none."""
        self._held = self._held or Sample(end, problem=NO_SAMPLES)
        self._held.passed_over = sum_of_kinds(self._held.passed_over, self._passed_over)
        yield self._take()

    def _take(self) -> Sample:
        """Return the sample that is held, without keeping its image in memory."""
        held, self._held = self._held, None
        assert held is not None
        return held

    def _make_unique(self, sample: Sample) -> None:
        key, times = sample.key, self._times
        times[key] += 1
        if times[key] == 1:
            return
        while f"{key}#{times[key]}" in times:  # another file really has that name
            times[key] += 1
        sample.key, sample.problem = f"{key}#{times[key]}", "duplicate key"
