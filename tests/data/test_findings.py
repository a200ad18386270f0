"""What a preview warns of, and the records it names."""

import io
import json

import pytest
from PIL import Image, ImageDraw, ImageFilter

from microdit.data.findings import Seen, histogram, language_of, languages, near_duplicates, warnings_of
from microdit.data.look import TextLimit, look
from microdit.data.sources.base import Part, Record, Source
from microdit.reports.look_page import write_look_page
from tests.data.pictures import picture


def drawing(number: int, size: int = 128) -> Image.Image:
    image = Image.effect_noise((16, 16), 120).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((number * 9, 10, number * 9 + 30, 90), fill=(number * 40 % 256, 90, 200))
    return image


def content(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def source_of(*records: Record) -> Source:
    return Source("test", [Part("0", lambda: iter(records))])


def seen(number: int, caption: str = "words", size: tuple[int, int] = (100, 100), tokens: int = 3) -> Seen:
    return Seen(f"{number}.png", caption, *size, shape=0, colour=(0, 0, 0), tokens=tokens)


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("a cat is on the mat with two dogs", "English"),
        ("eine Katze liegt auf der Matte", "German"),
        ("un chat est sur le tapis", "French"),
        ("un gato en el tejado de la casa", "Spanish"),
        ("\u732b\u304c\u5ea7\u3063\u3066\u3044\u308b", "Chinese or Japanese"),
        ("\u043a\u043e\u0448\u043a\u0430 \u0441\u0438\u0434\u0438\u0442", "Cyrillic"),
        ("red heart", ""),
        ("", ""),
    ],
)
def test_languages_are_told_by_script_and_commonest_words(caption, language):
    assert language_of(caption) == language


@pytest.mark.parametrize("caption", ["a photo of a garden", "a drawing of a red heart", "a cat and a dog", "a sign that says a"])
def test_english_with_two_articles_is_english(caption):
    assert language_of(caption) in ("English", "")


def test_mixed_languages_are_warned_of_with_names():
    items = [seen(n, "a cat is on the mat") for n in range(40)] + [seen(40 + n, "eine Katze liegt auf der Matte") for n in range(6)]
    assert languages(items) == {"English": 40, "German": 6}
    (sentence,) = warnings_of(items, [], "minilm", 256)
    assert sentence == (
        "The captions are in several languages: English in 40, German in 6. "
        "They are (not English) 40.png, 41.png, 42.png, 43.png, 44.png and 1 more."
    )
    assert warnings_of(items[:40], [], "minilm", 256) == []


def test_captions_that_will_be_cut_are_counted_and_named():
    lengths = [3, 8, 9, 31, 32, 32]
    assert histogram(lengths, 32) == {
        "0-3": 1,
        "4-7": 0,
        "8-11": 2,
        "12-15": 0,
        "16-19": 0,
        "20-23": 0,
        "24-27": 0,
        "28-31": 1,
        "32 and cut": 2,
    }
    assert sum(histogram(range(1, 300), 77).values()) == 299
    (sentence,) = warnings_of([seen(n, tokens=length) for n, length in enumerate(lengths)], [], "minilm", 32)
    assert sentence == "2 captions are longer than the 32 tokens that minilm reads, and will be cut. They are 4.png, 5.png."


def test_small_and_odd_pictures_are_named():
    items = [seen(n, size=(500, 400)) for n in range(20)] + [seen(20, size=(90, 500)), seen(21, size=(400, 1300))]
    small, odd = warnings_of(items, [], "", 0)
    assert small == "1 pictures have a side of less than 100 pixels. They are 20.png."
    assert odd == "2 pictures are more than 3 times as wide as high, or as high as wide. They are 20.png, 21.png."


def test_copies_in_other_sizes_and_qualities_are_near_duplicates():
    first, second = drawing(1), drawing(5)
    files = {
        "a": content(first),
        "small": content(first.resize((60, 60), Image.Resampling.LANCZOS)),
        "poor": content(first, "JPEG", quality=60),
        "blurred": content(first.filter(ImageFilter.GaussianBlur(1))),
        "b": content(second),
        "plain": picture(0, "PNG"),
        "plain too": picture(1, "PNG"),
    }
    records = [Record(key, {"caption": "words"}, image) for key, image in files.items()]
    numbers = look(source_of(*records))[2]
    assert numbers["near_duplicates"] == 3
    assert numbers["warnings"][-1] == "3 pictures nearly repeat another one: a and small; a and poor; a and blurred."
    assert near_duplicates([]) == []


def test_tokens_are_counted_by_the_text_encoder(text_encoder):
    limit = TextLimit("minilm", text_encoder.max_tokens, lambda caption: len(text_encoder.tokenize([caption])[0]))
    records = [Record("short", {"caption": "a red heart"}, picture(1)), Record("long", {"caption": "heart " * 600}, picture(2))]
    numbers = look(source_of(*records), text=limit)[2]
    assert numbers["caption_tokens"][f"{text_encoder.max_tokens} and cut"] == 1
    assert sum(numbers["caption_tokens"].values()) == 2
    assert any("1 captions are longer than" in sentence and "They are long." in sentence for sentence in numbers["warnings"])


def test_a_sample_is_said_to_be_one():
    records = [Record(str(n), {"caption": "words"}, picture(n)) for n in range(5)]
    assert look(source_of(*records), limit=5)[2]["is_sample"]
    assert not look(source_of(*records), limit=6)[2]["is_sample"]


def test_the_page_shows_captions_in_any_script_and_runs_nothing(tmp_path):
    records = [
        Record("0", {"caption": "\u732b <script>alert(1)</script>"}, picture(0)),
        Record("bad <b>", {"caption": "x"}, b"no picture"),
    ]
    pictures, captions, numbers = look(source_of(*records))
    write_look_page("my <set>", pictures, captions, numbers, tmp_path / "look.html")
    page = (tmp_path / "look.html").read_text()
    assert "\u732b &lt;script&gt;" in page
    assert "<script" not in page
    assert "bad &lt;b&gt;" in page
    assert page.count("data:image/webp;base64,") == 1
    assert json.dumps("http") not in page
