import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.errors import UserError
from microdit.io.flax_msgpack import read_flax
from tests.io.msgpack_writer import packed

# What flax.serialization.msgpack_serialize({"a": np.arange(3, dtype=np.float32)}) is by the two specifications, byte by byte.
BY_HAND = (
    b"\x81\xa1a"  # a map of one, the text "a"
    + b"\xc7\x19\x01"  # an extension of 25 bytes, of type 1
    + b"\x93\x91\x03\xa7float32"  # a list of three: a list of 3, the text "float32",
    + b"\xc4\x0c"  # and 12 bytes
    + struct.pack("<3f", 0, 1, 2)
)


def read(tmp_path, content: bytes):
    (tmp_path / "x.msgpack").write_bytes(content)
    return read_flax(tmp_path / "x.msgpack")


def test_an_array_as_flax_writes_it(tmp_path):
    assert BY_HAND[4] == len(BY_HAND) - 6
    assert torch.equal(read(tmp_path, BY_HAND)["a"], torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool])
def test_every_dtype_and_shape_is_read(tmp_path, dtype):
    tensors = {
        "whole": torch.arange(24).view(2, 3, 4).to(dtype),
        "one": torch.ones((), dtype=dtype),
        "none": torch.empty(0, 3, dtype=dtype),
    }
    found = read(tmp_path, packed({"params": {"net": tensors}}))["params"]["net"]
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=40),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=40), inner, max_size=4),
        max_leaves=20,
    )
)
def test_any_tree_comes_back(tmp_path_factory, tree):
    assert read(tmp_path_factory.mktemp("tree"), packed({"tree": tree})) == {"tree": tree}


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"\xff", -1),
        (b"\xe0", -32),
        (b"\xcc\xff", 255),
        (b"\xcd\x01\x00", 256),
        (b"\xce\x00\x01\x00\x00", 65536),
        (b"\xcf" + b"\x00" * 7 + b"\x07", 7),
        (b"\xd0\x80", -128),
        (b"\xd1\xff\x00", -256),
        (b"\xd2\xff\xff\xff\xff", -1),
        (b"\xca\x3f\x80\x00\x00", 1.0),
        (b"\xd9\x02hi", "hi"),
        (b"\xda\x00\x02hi", "hi"),
        (b"\x92\x01\x02", [1, 2]),
        (b"\xdc\x00\x01\x05", [5]),
        (b"\xde\x00\x01\xa1k\x05", {"k": 5}),
        (b"\xd4\x02\x00", None),  # a complex number
    ],
)
def test_every_form_of_the_specification(tmp_path, content, value):
    assert read(tmp_path, b"\x81\xa1a" + content) == {"a": value}


def test_an_array_in_parts_is_joined(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    parts = {"0": whole.flatten()[:4], "1": whole.flatten()[4:]}
    tree = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": parts}
    assert torch.equal(read(tmp_path, packed({"a": tree}))["a"], whole)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x81",
        b"\x05",
        BY_HAND + b"\x00",
        BY_HAND.replace(b"float32", b"object0"),
        BY_HAND.replace(b"\x91\x03", b"\x91\x04"),
        BY_HAND.replace(b"\x91\x03", b"\x91\xff"),
        b"\xdf\xff\xff\xff\xff",  # four billion pairs
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a" + b"\x91" * 100_000,
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\x01\x02",
        b"\x81\xa1a\xc1",
        b"\x81\xa1\xff\x01",
        b"\x81\xa1a\xc7\x01\x01\x05",
        packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"1": torch.ones(2)}}}),
        packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": torch.ones(2)}}}),
    ],
)
def test_what_is_damaged_or_something_else_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"x\.msgpack is no checkpoint of Flax, or it is damaged"):
        read(tmp_path, content)


@settings(max_examples=40)
@given(st.data())
def test_a_file_cut_off_anywhere_is_refused(tmp_path_factory, data):
    content = packed({"params": {"net": {"a": torch.ones(3), "b": [1, 2.0, "x" * 40]}}})
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path_factory.mktemp("cut"), content[: data.draw(st.integers(0, len(content) - 1))])
