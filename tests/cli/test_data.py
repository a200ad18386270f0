import json
import shutil

import pytest

from tests.commands import microdit
from tests.data.pictures import picture, write_file, write_photographs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "cuda:7"], "The device is to be cuda:7"),
        (["--device", "cpu", "--dtype", "float16"], "float16 is slow and narrow on a CPU"),
        (["--device", "cpu", "--dtype", "int4"], "There is no dtype 'int4'"),
        (["--device", "cpu", "--out", "file/set"], "or choose another --out"),
    ],
)
def test_what_the_machine_does_not_have_is_refused_in_a_sentence(tmp_path, options, sentence):
    (tmp_path / "file").write_text("a file, no folder")
    done = microdit("data", "encode", "emoji:held_out", "--out", "set", "--autoencoder", "pixels", *options, cwd=tmp_path)
    assert done.returncode == 1
    output = " ".join(done.output.split())
    assert sentence in output
    assert "Traceback" not in output
    assert not (tmp_path / "set").exists()


def test_the_line_of_device_and_dtype_and_an_encoding_in_bfloat16(tmp_path):
    options = [
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        "--resolutions",
        "16",
        "--autoencoder",
        "pixels",
        "--workers",
        "0",
        "--fraction",
        "0.1",
    ]
    done = microdit("data", "encode", "emoji:held_out", "--out", "set", *options, cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "Encoding on CPU" in done.output
    assert "bfloat16." in done.output
    assert '"dtype": "bfloat16"' in (tmp_path / "set" / "card.json").read_text()


def fill(folder):
    """Write five pictures of which one lacks a caption, files of other kinds, and a file with other captions."""
    for number in range(5):
        write_file(folder / "set" / f"{number}.png", picture(number, "PNG", (48, 32 + 8 * number)))
        write_file(folder / "set" / f"{number}.txt", f"Stock photo of number {number}".encode())
    (folder / "set" / "4.txt").unlink()
    for name in ("logo.psd", "film.mp4", "second.psd", ".hidden"):
        write_file(folder / "set" / name, b"")
    rows = [{"key": f"{number}.png", "llava": f"long number {number}"} for number in (0, 1, 9)]
    write_file(folder / "new.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return folder


def test_every_file_of_a_folder_is_accounted_for_and_captions_are_edited(tmp_path):
    options = ["--device", "cpu", "--resolutions", "64", "--min-side", "16", "--autoencoder", "pixels", "--workers", "0", "--buckets"]
    done = microdit("data", "encode", "set", "--out", "out", *options, "--caption-drop", "stock photo of ", cwd=fill(tmp_path))
    assert done.returncode == 0, done.output
    output = " ".join(done.output.split())
    assert "4 of 5 records kept at 64 px" in output
    assert "rejected 1: no caption" in output
    assert "passed over: 2 .psd, 1 .mp4, 1 hidden file" in output
    assert "5 aspect ratios, as height x width: 48 x 80, 48 x 96, 64 x 64, 80 x 48, 96 x 48" in output
    assert b"number 3" in b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.arrow"))
    assert b"tock photo" not in b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.arrow"))


def test_a_share_is_held_out_as_a_second_set_and_the_same_command_goes_on(tmp_path):
    for number in range(40):
        write_file(tmp_path / "set" / f"{number}.png", picture(number, "PNG", (16, 16)))
        write_file(tmp_path / "set" / f"{number}.txt", f"number {number}".encode())
    (tmp_path / "set" / "7.txt").unlink()
    command = ["data", "encode", "set", "--out", "out", "--resolutions", "16", "--autoencoder", "pixels", "--workers", "0"]
    done = microdit(*command, "--hold-out", "9", cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "30 to train on + 9 held out + 1 rejected = 40 records" in done.output
    assert "data.held_out: out-held-out" in done.output
    before = (tmp_path / "out" / "shard-00000.arrow").read_bytes()
    shutil.rmtree(tmp_path / "out")  # as if it had been stopped between the two
    again = microdit(*command, "--hold-out", "9", cwd=tmp_path)
    assert again.returncode == 0, again.output
    assert "out-held-out is encoded already." in again.output
    assert (tmp_path / "out" / "shard-00000.arrow").read_bytes() == before
    shutil.rmtree(tmp_path / "out")
    other = microdit(*command, "--hold-out", "20%", cwd=tmp_path)
    assert other.returncode == 1
    assert "out-held-out exists already: delete it" in other.output


def test_look_joins_captions_and_writes_a_page(tmp_path):
    fill(tmp_path)
    done = microdit("data", "look", "set", "--captions", "new.jsonl:key:llava", "--html", "look.html", cwd=tmp_path)
    assert done.returncode == 0, done.output
    output = " ".join(done.output.split())
    assert "captions of new.jsonl: 2 of 5 pictures found theirs; 1 of its rows found no picture" in output
    assert "passed over: 4 .txt, 2 .psd, 1 .mp4, 1 hidden file" in output
    assert "long number 1" in (tmp_path / "look.html").read_text()
    assert (tmp_path / "look.png").is_file()
    done = microdit("data", "look", "set", "--captions", "new.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "new.jsonl has no column with captions under a usual name. Its columns are key, llava. Name both" in " ".join(
        done.output.split()
    )


def test_photographs_do_not_go_through_the_icon_autoencoder_without_a_word(tmp_path):
    write_photographs(tmp_path / "photos", 16)
    looked = microdit("data", "look", "photos", "--autoencoder", "icon", "--html", "look.html", cwd=tmp_path)
    assert looked.returncode == 0, looked.output
    encoded = microdit("data", "encode", "photos", "--out", "set", "--device", "cpu", "--workers", "0", cwd=tmp_path)
    assert encoded.returncode == 0, encoded.output
    for done in (looked, encoded):
        output = " ".join(done.output.split())
        assert "16 pictures through the autoencoder icon: PSNR" in output
        assert "of 16 pictures are poor" in output
        assert "no training makes pictures better than these" in output
    assert (tmp_path / "look-reconstructions.png").is_file()
    assert (tmp_path / "set" / "reconstructions.png").is_file()
    assert "<h2>Reconstructions</h2>" in (tmp_path / "look.html").read_text()
