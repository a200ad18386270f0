import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from microdit.io.tensor_files import NO_PIECES, Rows, assembled, fill, pieces_of, read_header, within, write_rows

WHOLE = {
    "model/w": torch.arange(30.0).reshape(10, 3),
    "model/b": torch.arange(5, dtype=torch.bfloat16),
    "model/s": torch.tensor(7.0),
    "optimizer/codes": torch.arange(20, dtype=torch.uint8).reshape(10, 2),
}


def deal(folder, whole, processes):
    """As so many processes write it: rows in equal numbers, the last ones fewer or none, scalars once."""
    paths = []
    for rank in range(processes):
        share = {}
        for name, tensor in whole.items():
            size = -(-(len(tensor) if tensor.dim() else 1) // processes)
            part = tensor[rank * size : (rank + 1) * size] if tensor.dim() else tensor
            if part.numel() and (tensor.dim() or rank == 0):
                share[name] = Rows(rank * size, part)
        paths.append(folder / f"shard-{rank}.safetensors")
        write_rows(paths[-1], share)
    return paths


@pytest.mark.parametrize(("written", "read"), [(1, 1), (1, 4), (4, 1), (4, 3), (7, 4), (3, 16)])
def test_rows_of_any_number_of_files_are_found_by_any_number_of_readers(tmp_path, written, read):
    paths = deal(tmp_path, WHOLE, written)
    numbers = {name: number for number, name in enumerate(WHOLE)}
    pieces = np.concatenate([pieces_of(read_header(path), number, numbers) for number, path in enumerate(paths)])
    for rank in range(read):
        wanted = []
        for tensor in WHOLE.values():
            size = -(-(len(tensor) if tensor.dim() else 1) // read)
            wanted.append(
                Rows(rank * size, torch.zeros_like(tensor[rank * size : (rank + 1) * size])) if tensor.dim() else Rows(0, torch.zeros(()))
            )
        spans = np.array([(rows.first, rows.first + rows.length) for rows in wanted])
        fill(wanted, within(pieces, spans), paths)
        for (first, values), tensor in zip(wanted, WHOLE.values(), strict=True):
            assert values.equal(tensor[first : first + len(values)] if tensor.dim() else tensor)
    part = assembled(paths, "model")
    assert part.keys() == {"w", "b", "s"}
    assert all(tensor.equal(WHOLE[f"model/{name}"]) for name, tensor in part.items())


def test_they_are_safetensors(tmp_path):
    (path,) = deal(tmp_path, WHOLE, 1)
    assert all(tensor.equal(WHOLE[name]) for name, tensor in load_file(path).items())
    save_file(WHOLE, tmp_path / "other.safetensors")  # as one that says nothing of rows
    assert assembled([tmp_path / "other.safetensors"], "model")["w"].equal(WHOLE["model/w"])


def test_strided_and_low_precision_memory_is_read_into_too(tmp_path):
    paths = deal(tmp_path, WHOLE, 3)
    into = torch.zeros(3, 10).T
    pieces = np.concatenate([pieces_of(read_header(path), number, {"model/w": 0}) for number, path in enumerate(paths)])
    fill([Rows(0, into)], pieces, paths)
    assert into.equal(WHOLE["model/w"])


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_rows_in_no_file_or_in_two_are_noticed(tmp_path, lost):
    paths = deal(tmp_path, WHOLE, 3)
    for files in ([path for number, path in enumerate(paths) if number != lost], [*paths, paths[lost]]):
        pieces = [pieces_of(read_header(path), number, {"model/w": 0}) for number, path in enumerate(files)]
        with pytest.raises(ValueError, match="some rows are in no file"):
            fill([Rows(0, torch.zeros(10, 3))], np.concatenate([*pieces, NO_PIECES]), files)
    with pytest.raises(ValueError, match="some rows are in no file, or in two"):
        assembled([*paths, paths[lost]], "model")


def header(path, **changes):
    about = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    text = json.dumps({"w": about}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F99"},
        {"dtype": []},
        {"shape": [2, 3]},
        {"shape": [2**40, 2**40]},
        {"shape": [-2, -2]},
        {"shape": 4},
        {"data_offsets": [16, 32]},  # behind the file's end
        {"data_offsets": [0]},
        {"data_offsets": [16, 0]},
        {"data_offsets": None},
    ],
)
def test_headers_that_promise_what_is_not_there_are_refused(tmp_path, changes):
    assert read_header(header(tmp_path / "whole"))["w"].rows == 2
    with pytest.raises(ValueError, match="cannot be understood"):
        read_header(header(tmp_path / "strange", **changes))


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**60), struct.pack("<Q", 9) + b"[1, 2, 3]", struct.pack("<Q", 4) + b"{{{{"]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"is no safetensors file|cannot be understood"):
        read_header(tmp_path / "file")
