"""The files of a frozen model: in a local folder, or on the Hugging Face hub, from where they are downloaded once.

Weights are safetensors wherever they can be. A `.bin` is a pickle, which can run code while it is read: it is only ever read as bare
tensors, and refused if it holds more.
"""

import errno
import hashlib
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from microdit.errors import UserError
from microdit.io.files import read_json

DOWNLOAD_AGAIN = "Download it again."  # for a file of a model that makes no sense
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w-][\w./-]*))?")  # owner/name, or owner/name:subfolder


def is_place(name: str) -> bool:
    """Whether `name` is a folder, or could be an id of the hub."""
    return Path(name).is_dir() or _HUB_ID.fullmatch(name) is not None


def lasting_name(name: str) -> str:
    """`name`, so that it is found again from any working directory."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def find_folder(place: str, patterns: list[str]) -> Path:
    """The folder `place`, or a copy of what the hub has under that id: those of its files that match the patterns.

    Raises UserError if there is no such folder and the hub does not give it.
    """
    if Path(place).is_dir():
        return Path(place)
    match = _HUB_ID.fullmatch(place)
    if match is None:
        raise UserError(f"There is no folder {place}.")
    repository, subfolder = match[1], match[2] or ""
    inside = f"{subfolder.rstrip('/')}/" if subfolder else ""
    try:
        return Path(snapshot_download(repository, allow_patterns=[inside + pattern for pattern in patterns])) / subfolder
    except Exception as error:  # the network, the hub and the disk each have their own
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC):
            raise UserError(
                f"The files of {repository} cannot be kept ({_first_line(error)}): set HF_HOME to a writable folder with room."
            ) from error
        raise UserError(
            f"There is no folder {place}, and the hub did not give the model {repository} ({_first_line(error)}). Check the spelling and "
            "the network; or download the model's folder on another computer, and give the path of that folder."
        ) from error


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument by which `from_pretrained` of diffusers takes a dtype: `dtype`, which releases before 0.40 call `torch_dtype`."""
    major, minor = version("diffusers").split(".")[:2]
    return {"dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype": dtype}


def weight_patterns(stem: str, ending: str) -> list[str]:
    """What the files with a model's weights are called: one file, or many with an index."""
    return [f"{stem}{ending}", f"{stem}{ending}.index.json", f"{stem}-*{ending}"]


def weight_files(folder: Path, stem: str, ending: str) -> list[Path]:
    """The files with a model's weights, in the order of their names; none if there are none. Raises UserError if a part is missing."""
    single, index = folder / f"{stem}{ending}", folder / f"{stem}{ending}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    parts = read_json(index, DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise UserError(f"{index} lists no files (weight_map): download it again.")
    files = [folder / str(name) for name in sorted(set(parts.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists: download the folder again.")
    return files


def fingerprint_of(files: list[Path]) -> str:
    """16 hexadecimal digits of the files' content."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


@contextmanager
def loading(what: Path) -> Iterator[None]:
    """Turns whatever the libraries raise at a file that does not fit into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} is refused: its .bin is damaged, or holds more than tensors, and could then run code. Use a safetensors version of it."
        ) from error
    except Exception as error:  # what a strange file leads to is not foreseeable
        raise UserError(f"{what} cannot be loaded: {_first_line(error)}. Download it again, or choose another.") from error


def check_complete(what: Path, missing: list[str]) -> None:
    """Raises UserError if weights are missing or misshapen: the libraries would go on with random ones."""
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        names = ", ".join(sorted(missing)[:8])
        raise UserError(f"{what} lacks the weights {names}{more}, or has them in other shapes than its settings say: download it again.")


def _first_line(error: BaseException) -> str:
    """What an error says at first: its first line, with the second if that is only a heading."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".!")
