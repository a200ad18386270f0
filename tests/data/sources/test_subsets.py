"""Fractions and held-out shares, chosen by the hashes of keys."""

import hashlib
import pickle
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sources.open import open_source
from microdit.data.sources.subsets import HoldOut, split_off
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from tests.data.pictures import picture, records_of, write_file, write_tar
from tests.data.sources.test_base import fill, keys


def test_a_fraction_is_stable_and_contained_in_larger_ones(tmp_path):
    folder = str(fill(tmp_path / "set", 400))
    everything = keys(folder)
    kept = {fraction: keys(folder, None, fraction) for fraction in (0.1, 0.5, 1.0)}
    assert kept[1.0] == everything
    assert set(kept[0.1]) < set(kept[0.5]) < set(everything)
    assert 15 < len(kept[0.1]) < 75
    assert 150 < len(kept[0.5]) < 250
    by_hand = [key for key in everything if int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < 2**63]
    assert kept[0.5] == by_hand
    for key in kept[0.5][:100]:  # whatever else is there
        (tmp_path / "set" / key).unlink()
    assert keys(folder, None, 0.5) == kept[0.5][100:]


def test_a_fraction_never_hides_that_an_archive_is_damaged(tmp_path):
    write_file(tmp_path / "a.tar", b"x" * 1000)
    assert keys(str(tmp_path / "a.tar"), None, 1e-9) == ["a.tar#end"]


@pytest.mark.parametrize("fraction", [0, -0.5, 1.1, float("nan")])
def test_a_fraction_lies_between_0_and_1(fraction):
    with pytest.raises(UserError, match=r"must lie in \(0, 1\]"):
        open_source("emoji", None, fraction)


def split(source, words):
    """The keys to train on and the held-out ones."""
    return [[record.key for record in records_of(side)] for side in split_off(source, HoldOut.parse(words))]


def test_a_held_out_share_is_stable_and_grows(tmp_path):
    folder = str(fill(tmp_path / "set", 400))
    source = open_source(folder)
    training, held_out = split(source, "25%")
    assert sorted(training + held_out) == keys(folder)
    assert 60 < len(held_out) < 140
    assert set(split(source, "5%")[1]) < set(held_out)
    for key in training[:100]:  # whatever else is there
        (tmp_path / "set" / key).unlink()
    assert split(open_source(folder), "25%") == [training[100:], held_out]
    tenth = open_source(folder, None, 0.1)  # chosen by another hash, so that a fraction is held out in the same share
    assert 0 < len(split(tenth, "25%")[1]) < len(keys(folder, None, 0.1)) / 2


def test_a_number_is_held_out_of_the_usable_records(tmp_path):
    folder = fill(tmp_path / "set", 30)
    (tmp_path / "set" / "003.txt").unlink()
    source = open_source(str(folder))
    for count in (1, 7, 28):
        training, held_out = split(source, str(count))
        assert len([key for key in held_out if key != "003.jpg"]) == count
        assert sorted(training + held_out) == keys(str(folder))
    with pytest.raises(UserError, match="--hold-out 29 leaves nothing to train on: set has 29 usable pictures"):
        split(source, "29")


@pytest.mark.parametrize("words", ["", "5 %x", "-5%", "0%", "0", "100%", "2.5", "5%%", "half"])
def test_what_is_no_share_and_no_number_is_refused(words):
    with pytest.raises(UserError, match="write a share, such as 5%, or a number of pictures, such as 500"):
        HoldOut.parse(words)


def test_both_sides_can_be_sent_to_other_processes(tmp_path):
    source = open_source(str(fill(tmp_path / "set", 5)))
    for side in split_off(source, HoldOut.parse("40%")):
        for part in side.parts:
            assert list(pickle.loads(pickle.dumps(part)).records()) == list(part.records())


def test_the_parts_of_the_two_sides_and_of_other_shares_are_told_apart(tmp_path):
    source = open_source(str(fill(tmp_path / "set", 5)))
    sides = [side for words in ("40%", "50%") for side in split_off(source, HoldOut.parse(words))]
    assert len({side.parts[0].fingerprint() for side in [source, *sides]}) == 5
    assert len({side.name for side in [source, *sides]}) == 5


FILES = st.lists(
    st.tuples(st.sampled_from(["png", "txt", "mp4", "seg.png", "broken.jpg"]), st.integers(0, 30)), unique=True, min_size=1, max_size=60
)


@settings(max_examples=12)
@given(FILES, st.sampled_from(["20%", "50%", "80%"]), st.booleans())
def test_everything_that_is_met_is_kept_held_out_rejected_or_passed_over(text_encoder, files, words, cut_off):
    with TemporaryDirectory() as name:
        place = Path(name)
        contents = {"png": picture(), "seg.png": picture(1), "txt": b"words", "mp4": b"film", "broken.jpg": b"no picture"}
        usable = [(f"usable-{n}.{kind}", contents[kind]) for n in range(20) for kind in ("png", "txt")]  # some on each side
        write_tar(place / "a.tar", usable + [(f"{number}.{kind}", contents[kind]) for kind, number in files])
        if cut_off:
            write_file(place / "a.tar", (place / "a.tar").read_bytes()[:-10_240] + b"x" * 1024)
        source = open_source(str(place / "a.tar"))
        records = records_of(source)
        met, passed = len(records), sum((Counter(record.passed_over) for record in records), Counter(source.passed_over))
        kept = rejected = 0
        passed_over: Counter[str] = Counter()
        for number, side in enumerate(split_off(source, HoldOut.parse(words))):
            manifest = encode_source(side, place / str(number), EncodeSettings((8,), min_side=8), Pixels(), text_encoder)
            assert len(EncodedDataset(place / str(number))) == manifest["rows"]
            kept, rejected = kept + manifest["rows"], rejected + sum(manifest["rejected"].values())
            passed_over += Counter(manifest["passed_over"])
        assert kept + rejected == met
        assert passed_over == passed
