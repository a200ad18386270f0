"""Chips by name, prices, utilisation: given, measured, assumed."""

import json

import pytest

from microdit.errors import UserError
from microdit.planning.hardware import (
    ASSUMED_UTILISATION,
    CHIPS,
    PRICES,
    Measurement,
    Price,
    find_machine,
    keep_measurement,
    measurements_file,
    read_measurements,
)
from tests.damage import flips

MEASURED = Measurement("RTX 4090", 0.41, 165.2e12, "the vendor's figure", 300.0, "MicroDiT_Tiny_2", 256, "bfloat16", "2.13.0", "2026-11-24")


def find(tmp_path, chip="h100", count=8, price=None, utilisation=None, prices=None):
    return find_machine(chip, count, price, utilisation, prices, tmp_path / "bench.json")


def test_every_chip_has_a_price():
    assert set(PRICES) == {chip.name for chip in CHIPS}
    assert all(0.1 < price.dollars < 20 for price in PRICES.values())


def test_your_own_price_wins_over_the_file_and_the_file_over_the_table(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("h100: 1.5\nrtx4090: 0.4\n")
    assert find(tmp_path, price=2.0, prices=file).price.dollars == 2.0
    assert find(tmp_path, prices=file).price == Price(1.5, str(file))
    assert find(tmp_path, chip="l4", prices=file).price == PRICES["L4"]
    assert find(tmp_path).price == PRICES["H100 SXM"]
    assert find(tmp_path, prices=file).chip == find(tmp_path).chip


def test_a_chip_of_ones_own_is_found_by_its_name_as_people_write_it(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("RTX 5080: {teraflops: 112.6, memory_gb: 16, price: 0.3}\nh900: {teraflops: 5000, memory_gb: 400}\n")
    found = find(tmp_path, chip="rtx5080", prices=file)
    assert (found.chip.name, found.chip.teraflops, found.chip.memory_gb) == ("RTX 5080", 112.6, 16)
    assert found.price == Price(0.3, str(file))
    assert find(tmp_path, chip="rtx5080", price=0.1, prices=file).price.dollars == 0.1
    assert find(tmp_path, chip="h900", price=9.0, prices=file).chip.memory_gb == 400
    with pytest.raises(UserError, match=r"prices\.yaml has no price of h900: add one, .* or give --price"):
        find(tmp_path, chip="h900", prices=file)
    with pytest.raises(UserError, match=r"no chip named rtx5070 .* MI300X, RTX 5080, h900\. Another one is defined in a file for --prices"):
        find(tmp_path, chip="rtx5070", prices=file)


def test_single_figures_of_a_known_chip_are_overridden_and_the_others_stay(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("4090: {teraflops: 150}\nH100 SXM: {memory_gb: 96, price: 1.5}\n")
    ours, theirs = find(tmp_path, chip="rtx4090", prices=file), find(tmp_path, chip="rtx4090")
    assert (ours.chip.name, ours.chip.teraflops, ours.chip.memory_gb, ours.price) == ("RTX 4090", 150, 24, theirs.price)
    assert find(tmp_path, prices=file).chip.memory_gb == 96
    assert find(tmp_path, prices=file).flops_per_second == find(tmp_path).flops_per_second
    assert find(tmp_path, prices=file).price.dollars == 1.5


def test_a_measured_speed_does_not_change_with_the_peak_that_a_user_says(tmp_path):
    keep_measurement(MEASURED, tmp_path / "bench.json")
    file = tmp_path / "prices.yaml"
    file.write_text("rtx4090: {teraflops: 100}\n")
    ours, theirs = find(tmp_path, chip="rtx4090", prices=file), find(tmp_path, chip="rtx4090")
    assert ours.flops_per_second == pytest.approx(theirs.flops_per_second)
    assert ours.utilisation == pytest.approx(0.41 * 1.652)


def test_no_flipped_byte_changes_a_measurement(tmp_path):
    keep_measurement(MEASURED, tmp_path / "bench.json")
    for _ in flips(tmp_path / "bench.json"):
        with pytest.raises(UserError, match=r"bench\.json cannot be read .*: delete it, and run microdit bench again"):
            read_measurements(tmp_path / "bench.json")


def test_utilisation_is_given_measured_or_assumed_and_says_which(tmp_path):
    assert find(tmp_path, chip="4090").utilisation == ASSUMED_UTILISATION
    assert "assumed" in find(tmp_path, chip="4090").utilisation_source
    keep_measurement(MEASURED, tmp_path / "bench.json")
    found = find(tmp_path, chip="4090")
    assert found.utilisation == pytest.approx(0.41)
    assert "measured on 2026-11-24" in found.utilisation_source
    assert find(tmp_path, chip="4090", utilisation=0.3).utilisation == 0.3
    assert find(tmp_path, chip="h100").utilisation == ASSUMED_UTILISATION


def test_measurements_of_several_chips_are_kept_the_newest_of_each(tmp_path):
    file = tmp_path / "deep" / "bench.json"
    for chip, share in (("A", 0.2), ("B", 0.3), ("A", 0.4)):
        keep_measurement(Measurement(**{**MEASURED.__dict__, "chip": chip, "utilisation": share}), file)
    assert {name: item.utilisation for name, item in read_measurements(file).items()} == {"A": 0.4, "B": 0.3}


def test_the_file_lies_where_the_user_keeps_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert measurements_file() == tmp_path / "microdit" / "bench.json"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measurements_file() == tmp_path / ".local" / "state" / "microdit" / "bench.json"


@pytest.mark.parametrize(
    "content", ["[]", "{", json.dumps({"A": {"chip": "A"}}), json.dumps({"A": {**MEASURED.__dict__, "utilisation": 0}})]
)
def test_damaged_measurements_are_named(tmp_path, content):
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(UserError, match=r"bench\.json cannot be read .* run microdit bench again"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"chip": "h900"}, "There is no chip named h900 in our table; known are B200, "),
        ({"chip": ""}, "There is no chip named"),
        ({"price": -1.0}, "--price is -1.0, and must be the dollars of a GPU-hour"),
        ({"price": float("nan")}, "--price is nan"),
        ({"utilisation": 0.0}, r"--mfu is 0.0, and must lie in \(0, 1\]"),
        ({"utilisation": 1.1}, "--mfu is 1.1"),
        ({"utilisation": float("nan")}, "--mfu is nan"),
        ({"count": 0}, "--count is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        find(tmp_path, **settings)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("- 1", "must hold chips and dollars"),
        ("h900: 2", r"prices\.yaml: h900 is not a known chip, so its speed and memory must be given: .h900: .teraflops: 112"),
        ("h900: {teraflops: 5000, price: 2}", "h900 is not a known chip, so its speed and memory"),
        ("h100: cheap", "h100 is cheap"),
        ("h100:", "h100 is None, and must be the dollars"),
        (f"h100: {10**400}", "h100 is 10{400}, and must be the dollars"),
        ("h100: true", "h100 is true, and must be the dollars"),
        ("h100: {price: .nan}", "h100: price is .nan, and must be the dollars of a GPU-hour"),
        ("h100: {tflops: 900}", r"h100: tflops is no key of a chip: these are teraflops, memory_gb, price\."),
        ("h100: {teraflops: fast}", r"prices\.yaml: h100: teraflops is fast, and must be a number above 0\."),
        ("h100: {teraflops: 0}", "teraflops is 0.0, and"),
        ("h100: {teraflops: .inf}", "teraflops is .inf, and"),
        ("h100: {teraflops: true}", "teraflops is true, and"),
        ("h100: {memory_gb: -80}", "memory_gb is -80.0, and"),
        ("h100: {memory_gb: .nan}", "memory_gb is .nan, and"),
        ("h100: 2\nH100 SXM: {memory_gb: 90}", "names H100 SXM twice, the second time as H100 SXM: merge the entries"),
        ("a: [", "is not readable YAML"),
        ("h100: 2_2", "h100 is 2_2, and must be the dollars"),
        ("h100: 1:30", "h100 is 1:30, and must be the dollars"),
        ("x9: {teraflops: 1, memory_gb: 1}\nX 9: {teraflops: 2, memory_gb: 1}", "names X 9 twice"),
    ],
)
def test_a_bad_price_list_is_refused(tmp_path, content, sentence):
    file = tmp_path / "prices.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        find(tmp_path, prices=file)
    with pytest.raises(UserError, match="cannot be read"):
        find(tmp_path, prices=tmp_path / "nowhere.yaml")
