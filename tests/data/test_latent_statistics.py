import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source, unfinished
from microdit.data.latent_statistics import LatentSums, common_std, statistics_of_shards
from microdit.data.sources.base import Record
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json
from tests.data.pictures import picture
from tests.data.test_encode import source_of

LATENTS = arrays(np.float32, (6, 3, 2, 2), elements=st.floats(-50, 50, width=32))


def sums_of(*batches: np.ndarray) -> LatentSums:
    sums = LatentSums()
    for batch in batches:
        sums.add(batch)
    return sums


@given(LATENTS, st.integers(0, 6), st.integers(0, 6))
def test_the_sums_of_parts_add_up_to_those_of_the_whole(latents, first, second):
    cuts = sorted((first, second))
    entries = [sums_of(part).entry() for part in np.split(latents, cuts) if len(part)]
    read_back = [{"latent_sums": {"64": json.loads(json.dumps(entry))}} for entry in entries]
    found = statistics_of_shards([{"latent_sums": {}}, *read_back])["64"]
    assert found["mean"] == pytest.approx(latents.mean(axis=(0, 2, 3), dtype=np.float64), abs=2e-6)
    assert found["std"] == pytest.approx(latents.std(axis=(0, 2, 3), dtype=np.float64), abs=1e-4)


@given(LATENTS, LATENTS, st.floats(0.1, 10))
def test_the_common_deviation_is_that_of_all_values_together(one, two, weight):
    sets = [(weight, sums_of(one).statistics()), (1.0, sums_of(two).statistics())]
    values = np.concatenate([one.ravel(), two.ravel()]).astype(np.float64)
    weights = np.repeat([weight, 1.0], one.size)
    mean = np.average(values, weights=weights)
    assert common_std(sets) == pytest.approx(np.sqrt(np.average((values - mean) ** 2, weights=weights)), abs=1e-3)


def records(*numbers: int) -> list[Record]:
    return [Record(str(n), {"caption": f"picture {n}"}, picture(n, "PNG", (40, 24))) for n in numbers]


def test_an_encoded_set_records_the_statistics_of_its_latents(tmp_path, text_encoder):
    source = source_of(records(*range(9)), [], records(*range(9, 12)))
    settings = EncodeSettings((16, 8), "fp16", "fp16", batch_size=2)
    encode_source(source, tmp_path / "set", settings, Pixels(), text_encoder)
    for resolution in (8, 16):
        data = EncodedDataset(tmp_path / "set", resolution)
        latents = data.latents([data.read(0, row)[0] for row in range(12)], 0).numpy()
        assert data.latent_statistics["mean"] == pytest.approx(latents.mean(axis=(0, 2, 3)), abs=1e-3)
        assert data.latent_statistics["std"] == pytest.approx(latents.std(axis=(0, 2, 3)), abs=1e-3)
    assert "latent_sums" not in data.manifest["shards"][0]


def test_a_resumed_encoding_and_several_ranks_record_the_same(tmp_path, text_encoder):
    whole = encode_source(source_of(*map(records, range(6))), tmp_path / "whole", EncodeSettings((16,)), Pixels(), text_encoder)
    for rank in (2, 1, 0):
        last = encode_source(
            source_of(*map(records, range(6))), tmp_path / "three", EncodeSettings((16,)), Pixels(), text_encoder, (rank, 3)
        )
    assert last["latents"] == whole["latents"]
    broken = source_of(*map(records, range(5)), [Record("5", {"caption": "c"}, b"")], [])

    def fails():
        raise OSError("the disk is gone")

    object.__setattr__(broken.parts[6], "records", fails)
    with pytest.raises(UserError, match="the disk is gone"):
        encode_source(broken, tmp_path / "resumed", EncodeSettings((16,)), Pixels(), text_encoder)
    object.__setattr__(broken.parts[6], "records", lambda: iter(records(5)))
    assert encode_source(broken, tmp_path / "resumed", EncodeSettings((16,)), Pixels(), text_encoder)["latents"] == whole["latents"]


def test_shards_of_an_earlier_version_leave_the_statistics_out(tmp_path, text_encoder):
    encode_source(source_of(records(0), records(1)), tmp_path / "set", EncodeSettings((16,)), Pixels(), text_encoder, (0, 2))
    for path in unfinished(tmp_path / "set").glob("shard-*.json"):
        entry = from_checked_json(path.read_bytes())
        path.write_bytes(to_checked_json({key: value for key, value in entry.items() if key != "latent_sums"}))
    encode_source(source_of(records(0), records(1)), tmp_path / "set", EncodeSettings((16,)), Pixels(), text_encoder, (1, 2))
    data = EncodedDataset(tmp_path / "set")
    assert (len(data), data.latent_statistics, "latents" in data.manifest) == (2, None, False)
