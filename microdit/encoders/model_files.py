"""Find and check the files of a frozen model, in a local folder or on the Hugging Face hub, from which they are downloaded once.

Weights are read from safetensors where possible. A `.bin` file is a pickle, which can run code when it is loaded: it is loaded as plain
tensors only, and refused if it holds anything else.
"""

import errno
import hashlib
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from microdit.errors import UserError
from microdit.io.files import read_json
from microdit.io.near_names import did_you_mean_path

DOWNLOAD_AGAIN = "Download it again."  # the advice for a damaged file of a model
_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # transformers unpickles nothing but tensors from the second
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w-][\w./-]*))?")  # owner/name, or owner/name:subfolder


def is_place(name: str) -> bool:
    """Return whether `name` is a folder, or has the form of a hub id."""
    return Path(name).is_dir() or _HUB_ID.fullmatch(name) is not None


def lasting_name(name: str) -> str:
    """Return a name that is valid in any working directory: the absolute path of a folder, or the hub id unchanged."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def find_folder(place: str, patterns: list[str]) -> Path:
    """Return the folder `place`, or a local copy of the hub's files under that id that match the patterns.

    Raises UserError if there is no such folder and the download fails.
    """
    if Path(place).is_dir():
        return Path(place)
    match = _HUB_ID.fullmatch(place)
    if match is None:
        raise UserError(f"There is no folder {place}.{did_you_mean_path(place)}")
    repository, subfolder = match[1], match[2] or ""
    inside = f"{subfolder.rstrip('/')}/" if subfolder else ""
    try:
        return Path(snapshot_download(repository, allow_patterns=[inside + pattern for pattern in patterns])) / subfolder
    except Exception as error:  # the network, the hub and the disk raise errors of many types
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOSPC):
            raise UserError(
                f"The files of {repository} cannot be stored ({first_line(error)}): set HF_HOME to a writable folder with enough space."
            ) from error
        raise UserError(
            f"There is no folder {place}.{did_you_mean_path(place)} The model {repository} could not be downloaded either "
            f"({first_line(error)}). Check the name and the network; or download the model's folder on another computer, and give the path "
            "of that folder."
        ) from error


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype argument of diffusers' `from_pretrained`: `dtype`, or `torch_dtype` for releases before 0.40."""
    major, minor = version("diffusers").split(".")[:2]
    return {"dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype": dtype}


def weight_patterns(stem: str, ending: str) -> list[str]:
    """Return the patterns of the names of weight files: a single file, or several with an index."""
    return [f"{stem}{ending}", f"{stem}{ending}.index.json", f"{stem}-*{ending}"]


def weight_files(folder: Path, stem: str, ending: str) -> list[Path]:
    """Return a model's weight files in the order of their names; empty if there are none. Raises UserError if some are missing."""
    single, index = folder / f"{stem}{ending}", folder / f"{stem}{ending}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    parts = read_json(index, DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(map(is_file_name, parts.values())):
        raise UserError(f"{index} lists no files of its folder (weight_map): download it again.")
    files = [folder / name for name in sorted(set(parts.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists: download the folder again.")
    return files


def is_file_name(name: object) -> bool:
    """Return whether `name`, from a file that may be anybody's, is that of a file without a path: it leads to no other folder."""
    return isinstance(name, str) and name != "" and Path(name).name == name


def fingerprint_of(files: list[Path]) -> str:
    """Return a fingerprint of the files' content: the first 16 hexadecimal digits of their SHA-256."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


@contextmanager
def loading(what: Path) -> Iterator[None]:
    """Turn whatever the libraries raise while loading a file into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} is refused: its .bin is damaged, or holds more than tensors, and could then run code. Use a safetensors version of it."
        ) from error
    except Exception as error:  # a damaged or unsuitable file can cause any error
        raise UserError(f"{what} cannot be loaded: {first_line(error)}. Download it again, or choose another.") from error


def check_complete(what: Path, missing: list[str]) -> None:
    """Check that no weights are missing. Raises UserError, where the libraries would continue with random weights."""
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        names = ", ".join(sorted(missing)[:8])
        raise UserError(f"{what} lacks the weights {names}{more}, or has them in other shapes than its config states: download it again.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error, with the second one if the first is only a heading."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".!")


def load_network(place: str, model_types: tuple[str, ...], model_class: Any) -> tuple[Any, Path, str]:
    """Load a network of transformers in float32; return it with its folder and the fingerprint of its weights and settings.

    `place` is a folder or hub id. From a complete CLIP, only the half that `model_class` implements is loaded. Raises UserError if the
    network's type is none of `model_types`, or weights are missing.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = find_folder(place, ["*.json", "*.txt"])
    settings = read_json(folder / "config.json", DOWNLOAD_AGAIN)
    model_type = settings.get("model_type")
    if model_type not in model_types:
        raise UserError(f"{folder / 'config.json'} has model_type {model_type}, but {' or '.join(model_types)} is needed.")
    files, ending = _find_weights(place, folder)
    with loading(folder):
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        if model_type == "clip" and model_class.config_class.model_type != "clip":
            config.projection_dim = settings["projection_dim"]  # of the shared space, which only the complete config holds
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=ending == ".safetensors",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # checked below, where the error names them
            output_loading_info=True,
        )
    check_complete(folder, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    return model.eval().requires_grad_(False), folder, fingerprint_of([*files, *sorted(folder.glob("*config.json"))])


def _find_weights(place: str, folder: Path) -> tuple[list[Path], str]:
    for stem, ending in _WEIGHTS:
        find_folder(place, weight_patterns(stem, ending))
        if files := weight_files(folder, stem, ending):
            return files, ending
    raise UserError(f"{folder} has no weights, neither model.safetensors nor pytorch_model.bin: download the complete folder again.")
