from PIL import Image

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
