import pytest
from PIL import Image, ImageDraw, ImageFont

from microdit.reports.grids import CELL, LONGEST, _drawable, draw_grid, save_png


def test_pictures_and_captions_are_where_they_belong(tmp_path):
    colours = ["red", "green", "blue", "yellow", "black"]
    images = [Image.new("RGB", (4, 4), colour) for colour in colours]
    grid = draw_grid(images, colours, columns=3)
    places = [(x, y) for y in (CELL // 2, CELL // 2 + (grid.height - 8) // 2) for x in (CELL // 2, CELL * 3 // 2, CELL * 5 // 2)]
    for place, image in zip(places, images, strict=False):
        assert grid.getpixel(place) == image.getpixel((0, 0))
    under_first = grid.crop((8, 8 + CELL, 8 + CELL, 8 + CELL + 20))
    assert min(under_first.convert("L").tobytes()) < 100  # words
    save_png(grid, tmp_path / "deep" / "grid.png")
    assert Image.open(tmp_path / "deep" / "grid.png").size == grid.size


def test_long_captions_stay_inside_their_cell():
    grid = draw_grid([Image.new("RGB", (4, 4))], ["word " * 100])
    assert grid.width < 2 * CELL


def test_endless_captions_are_cut_and_control_characters_are_harmless():
    drawn = _drawable("x" * 10_000_000)
    assert len(drawn) < 2 * LONGEST
    assert drawn.startswith("x" * 100)
    assert _drawable("a\x1b[2J\n\u202e\tb") == r"a\u001b[2J \u202e b"
    endless = draw_grid([Image.new("RGB", (4, 4))], ["x" * 10_000_000], title="y" * 10_000_000)
    assert endless.size == draw_grid([Image.new("RGB", (4, 4))], ["x"], title="y").size


def ink(caption: str) -> bytes:
    """What is drawn below an empty picture."""
    grid = draw_grid([Image.new("RGB", (4, 4), "white")], [caption])
    return grid.crop((0, 8 + CELL, grid.width, grid.height)).tobytes()


@pytest.mark.parametrize(
    "caption", ["b\u00e4r", "\u0442\u0438\u0433\u0440", "\u03c4\u03af\u03b3\u03c1\u03b7\u03c2", "\u0646\u0645\u0631", "\u05e0\u05de\u05e8"]
)
def test_captions_in_other_scripts_are_drawn_in_their_letters(caption):
    assert _drawable(caption) == caption
    assert ink(caption) != ink("\ufffd" * len(caption))
    assert len({ink(letter) for letter in caption if letter != "\u0440"}) == len(set(caption) - {"\u0440"})  # Cyrillic er looks like p


def test_letters_that_the_font_lacks_are_seen_to_be_missing():
    assert _drawable("a \u8001\u864e") == "a \ufffd\ufffd"
    assert ink("\u8001") == ink("\ufffd") != ink("")


def test_english_is_drawn_as_ever():
    """In Pillow's own font, so that committed pictures stay the same."""
    plain = Image.new("RGB", (8 + CELL + 8, 3 * 15 + 8), "white")
    ImageDraw.Draw(plain).text((8, 2), "red heart", "black", ImageFont.load_default(12))
    assert ink("red heart")[: plain.width * 3 * 20] == plain.tobytes()[: plain.width * 3 * 20]
