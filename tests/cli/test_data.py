import pytest

from tests.commands import microdit


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
