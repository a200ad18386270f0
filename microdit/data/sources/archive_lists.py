"""Read the caption list at the root of an archive, metadata.jsonl, .csv or .tsv, and join it to the images of that archive.

The list of one archive is held in memory, up to a size limit. A tar archive is read once, from its beginning, so its list must stand before
the images. A list that cannot be used becomes a record with a problem.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from microdit.data.sources.base import Record
from microdit.data.sources.lists import LISTS, caption_name, check_captions, find_lines, repeated_in
from microdit.data.sources.samples import Member, split_name
from microdit.data.sources.untrusted_files import NO_FILE, ListedImage
from microdit.errors import UserError

LARGEST_LIST = 32_000_000  # bytes
NAMES = (*LISTS, "metadata.parquet")
PARQUET = "caption list is a Parquet table, which is not read in archives: write it as metadata.jsonl or .csv"
LATE = "caption list stands after images in the tar: put it first, or unpack the archive"
SECOND = "archive has another caption list"


def is_list(name: str) -> bool:
    """Return whether a file in an archive is a caption list at its root."""
    return name.removeprefix("./") in NAMES


class CaptionList:
    """The captions that the list of an archive holds, by the image's name. `wanted` are the names of the captions."""

    def __init__(self, wanted: Sequence[str]):
        self._wanted = wanted
        self._by_file: dict[str, ListedImage] = {}
        self._broken: list[ListedImage] = []
        self._met: set[str] = set()  # of the images by name
        self._is_read = False

    def taken_from(self, members: Iterator[Member]) -> Iterator[Member]:
        """Read the list when it is met among the members, and yield all others, and also a list that cannot be used, with a problem."""
        met_image = False
        for member in members:
            met_image |= member.use == "image"
            if member.use != "list":
                self._met |= {member.name} & self._by_file.keys()
                yield member
            elif problem := member.problem or (LATE if met_image else self._read(member)):
                yield Member(member.name, "", "caption", problem=problem)

    def take(self, file: str) -> ListedImage | None:
        """Return the line of the list about an image."""
        return self._by_file.get(file)

    def rest(self, damaged: bool) -> Iterator[Record]:
        """Yield the broken lines, and those whose image was not met, unless it may lie behind the damage of the archive."""
        yield from (Record(item.key, {}, b"", item.problem) for item in self._broken)
        if not damaged:
            yield from (Record(item.key, item.captions, b"", NO_FILE) for name, item in self._by_file.items() if name not in self._met)

    def _read(self, member: Member) -> str:
        """Read the list. Returns the problem if it cannot be used, else ""."""
        if member.extension == "parquet" or self._is_read:
            return SECOND if self._is_read else PARQUET
        self._is_read = True
        with TemporaryDirectory() as folder:
            path = Path(folder, member.name)
            path.write_bytes(member.content)
            try:
                lines, digests = find_lines(path, self._wanted, step=1000)
                if tuple(self._wanted) == ("caption",):  # under whatever usual name
                    lines = replace(lines, caption_column=caption_name(lines))
                else:
                    check_captions(lines.names, self._wanted, str(path))
            except UserError as error:
                return str(error).replace(f"{folder}/", "")
            lines = replace(lines, repeated=np.flatnonzero(repeated_in(digests)))
            for item in lines.read(0, len(lines), self._wanted):
                name = Member(*split_name(item.file)).name
                if item.key == item.file and name not in self._by_file:
                    self._by_file[name] = item
                else:
                    self._broken.append(replace(item, problem=item.problem or "listed twice"))
        return ""
