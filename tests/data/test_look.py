from microdit.data.look import look
from microdit.data.sources.base import Part, Record, Source
from tests.data.pictures import picture


def source_of(*parts):
    return Source("test", [Part(str(n), lambda part=part: iter(part)) for n, part in enumerate(parts)], {"caption": 0.3, "alt": 0.7})


def record(n, caption="a caption", size=(12, 12), problem="", image=None):
    return Record(
        str(n),
        {"caption": caption} if caption else {},
        picture(n if isinstance(n, int) else 0, "PNG", size) if image is None else image,
        problem,
    )


def test_numbers_are_of_every_record():
    records = [
        record(0, "one", (10, 20)),
        record(1, "one two three", (30, 20)),
        record(2, "one", (20, 20)),
        record(3, "one two three four", (24, 20), image=picture(2, "PNG", (20, 20))),
        record(4, problem="listed twice"),
        record(5, problem="listed twice"),
        record(6, caption=""),
        record(7, image=b"no picture"),
    ]
    pictures, captions, numbers = look(source_of(records[:5], records[5:]))
    assert captions == ["one", "one two three", "one", "one two three four"]
    assert [image.size for image in pictures] == [(10, 20), (30, 20), (20, 20), (20, 20)]
    more = {key: numbers.pop(key) for key in ("languages", "near_duplicates", "examples", "warnings", "is_sample")}
    assert more["examples"]["listed twice"] == ["4", "5"]
    [unknown] = set(numbers["problems"]) - {"listed twice", "no caption"}
    assert numbers == {
        "records": 8,
        "usable": 4,
        "problems": {"listed twice": 2, "no caption": 1, unknown: 1},
        "passed_over": {},
        "width": {"min": 10, "median": 20, "max": 30},
        "height": {"min": 20, "median": 20, "max": 20},
        "aspect_ratios": {"portrait": 1, "square": 2, "landscape": 1},
        "caption_words": {"min": 1, "median": 2, "mean": 2.2, "max": 4},
        "duplicate_images": 1,
        "duplicate_captions": 1,
    }


def test_the_heaviest_caption_counts():
    both = Record("0", {"caption": "light", "alt": "heavy", "unused": "x"}, picture())
    assert look(source_of([both]))[1] == ["heavy"]


def test_pictures_are_spread_over_the_source_and_the_limit_holds():
    source = source_of(*[[record(n, f"{part} {n}") for n in range(30)] for part in range(50)])
    pictures, captions, numbers = look(source, sample=16, limit=200)
    assert numbers["records"] == 200
    assert len(pictures) == len(captions) == len(set(captions)) == 16
    shown_from = sorted({int(caption.split()[0]) for caption in captions})
    assert len(shown_from) >= 10
    assert (shown_from[0] < 5, shown_from[-1] > 40) == (True, True)
    assert look(source, sample=16, limit=200)[1] == captions


def test_a_short_part_leaves_its_share_to_the_next():
    assert look(source_of([record(0)], [record(n) for n in range(100)]), limit=50)[2]["records"] == 50


def test_large_pictures_are_shrunk_only_after_they_were_measured():
    [shown], _, numbers = look(source_of([record(0, size=(2048, 1024))]))
    assert shown.size == (512, 256)
    assert numbers["width"]["max"] == 2048


def test_nothing_usable_gives_no_pictures_and_says_why():
    for source in (source_of(), source_of([]), source_of([record(0, problem="no image")])):
        pictures, captions, numbers = look(source)
        assert (pictures, captions, numbers["usable"], numbers["width"]) == ([], [], 0, {})


def test_a_record_that_encode_rejects_is_a_problem_here_too():
    records = [
        *(record(0), record(0)),
        record(1, caption=" \n\t "),
        record(2, caption="a \ud800 b"),
        record("x" * 1001),
        record("\udcff"),
    ]
    numbers = look(source_of([*records]))[2]
    assert (numbers["records"], numbers["usable"]) == (6, 1)
    assert numbers["problems"] == {"no caption": 2, "duplicate key": 1, "file name is too long": 1, "file name is not UTF-8": 1}


def test_a_word_without_an_end_is_cut_as_encode_cuts_it():
    _, [caption], numbers = look(source_of([record(0, caption="w" * 10_000_000)]))
    assert len(caption) == 4000
    assert numbers["caption_words"]["max"] == 1
