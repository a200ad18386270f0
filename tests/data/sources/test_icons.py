"""The source `icons`, on small sets in the real format, and on the real ones where npm has installed them above this folder."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from microdit.data.decode import decode
from microdit.data.sources.builtin import emoji_images, emoji_source
from microdit.data.sources.icons import STYLES, icons_source
from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import OWL, RED_HEART, keys_of, problems_of, records_of, write_file, write_icons, write_json

BLUE = '<path fill="#00f" d="M0 0h16v16h-16z"/>'


@pytest.fixture
def place(tmp_path):
    """Two styles: one whole, one with a drawing that is broken."""
    icons = {"red-heart": RED_HEART, "owl": OWL, "keycap-1": BLUE, "flag-japan": BLUE, "red-apple": BLUE, "thumbs-up-light": BLUE}
    write_icons(tmp_path, "twemoji", icons)
    write_icons(tmp_path, "fluent-emoji-flat", {**icons, "owl": '<image href="/picture.png"/>', "keycap-1": {"body": 7}})
    return tmp_path


def captions_of(source):
    """Captions by key, known without rendering."""
    return {key: caption for part in source.parts for key, caption, _ in json.loads(part.known())}


def test_captions_name_the_emoji_and_the_style(place):
    assert captions_of(icons_source("train", folder=place)) == {
        f"{style}/{key}": f"{name}, {style} style"
        for style in ("twemoji", "flat")
        for key, name in {
            "31-20e3": "keycap 1",
            "2764": "red heart",
            "1f1ef-1f1f5": "flag of Japan",
            "1f34e": "red apple",
            "1f989": "owl",
        }.items()
    }


def test_icons_are_in_the_order_of_their_code_points_style_by_style(place):
    keys = ["31-20e3", "2764", "1f1ef-1f1f5", "1f34e", "1f989"]
    assert list(captions_of(icons_source("train", folder=place))) == [f"{style}/{key}" for style in ("twemoji", "flat") for key in keys]


def test_styles_alone_are_named_where_a_name_would_give_the_picture_away(place):
    named, styles = icons_source("train", folder=place), icons_source("train", named=False, folder=place)
    assert set(captions_of(styles).values()) == {"an icon, twemoji style", "an icon, flat style"}
    assert list(captions_of(styles)) == list(captions_of(named))


def test_the_same_names_are_held_out_as_of_the_emoji(tmp_path):
    names = {image.key: image.caption for split in ("train", "held_out") for image in emoji_images(split)}
    held_out = {image.caption for image in emoji_images("held_out")}
    set_folder = write_icons(tmp_path, "noto", {})
    padded = {"-".join(code.rjust(4, "0") for code in key.split("-") if code != "fe0f"): name for key, name in names.items()}
    write_json(set_folder / "chars.json", padded)
    for split in ("train", "held_out"):
        for named in (True, False):
            keys = captions_of(icons_source(split, named, tmp_path))
            assert {key.removeprefix("noto/") for key in keys} == {
                key for key, name in names.items() if (name in held_out) == (split == "held_out")
            }
    captions = captions_of(icons_source("held_out", folder=tmp_path)).values()
    assert {caption.removesuffix(", noto style") for caption in captions} == held_out


def test_the_source_is_opened_by_its_name(place, monkeypatch):
    (place / "below" / "it").mkdir(parents=True)
    monkeypatch.chdir(place / "below" / "it")  # as Node.js, it looks in the folders above
    for choice in ("", "held_out", "styles", "styles_held_out"):
        name = f"icons:{choice}".removesuffix(":")
        source = open_source(name)
        assert source.name == name
        assert captions_of(source) == captions_of(open_source(f"{name}:{place}"))
    assert captions_of(open_source(f"icons:{place}")) == captions_of(open_source("icons:train")) == captions_of(open_source("icons"))
    assert open_source("icons").license == "twemoji by Somebody: CC BY 4.0; flat by Somebody: CC BY 4.0"
    with pytest.raises(UserError, match="icons has no caption named text; it has caption"):
        open_source("icons", {"text": 1.0})


def test_styles_that_are_not_installed_are_named(place):
    assert icons_source("train", folder=place).note == (
        "These styles of icons are not installed and are left out: noto, openmoji. "
        "npm install @iconify-json/noto @iconify-json/openmoji adds them."
    )
    for package in STYLES.values():
        write_icons(place, package, {})
    assert icons_source("train", folder=place).note == ""


def test_without_any_package_the_command_to_run_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as refusal:
            open_source(f"icons:{folder}")
        assert str(refusal.value) == (
            f"There are no icons in {folder}: run npm install @iconify-json/twemoji @iconify-json/noto @iconify-json/openmoji "
            "@iconify-json/fluent-emoji-flat there."
        )


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000])
@pytest.mark.parametrize("name", ["chars.json", "info.json", "icons.json"])
def test_a_damaged_set_is_a_sentence(tmp_path, name, content):
    path = write_file(write_icons(tmp_path, "noto", {}) / name, content)
    with pytest.raises(UserError, match=rf"{path} is damaged \(.*\): run npm install --force @iconify-json/noto again"):
        records_of(icons_source("train", folder=tmp_path))


def test_the_licence_is_made_harmless_and_must_be_there(tmp_path):
    path = write_icons(tmp_path, "noto", {}) / "info.json"
    write_json(path, {"author": {"name": "\x1b[31mA\n" + "x" * 999}, "license": {"title": "MIT"}})
    assert icons_source("train", folder=tmp_path).license.startswith("noto by \\u001b[31mA xxx")
    assert len(icons_source("train", folder=tmp_path).license) < 200
    write_json(path, {"author": None, "license": {"title": "MIT"}})
    with pytest.raises(UserError, match="it names no author and licence"):
        icons_source("train", folder=tmp_path)


@pytest.mark.parametrize(
    ("icon", "reason"),
    [
        ("<path", "drawing is not valid XML"),
        ('<image href="/picture.png"/>', "drawing has an element that is not supported"),
        ({"body": 7}, "no drawing of that name"),
        ({"body": BLUE, "width": "16"}, "size of the drawing is not a number"),
        ({"body": BLUE, "height": 1e300}, "size of the drawing is not a number"),
        ({"body": BLUE, "height": 10**400}, "size of the drawing is not a number"),
        ({"body": BLUE, "left": True}, "size of the drawing is not a number"),
        ({"body": BLUE, "width": 0}, "drawing is smaller than one unit"),
    ],
)
def test_a_broken_drawing_is_a_rejected_record(tmp_path, icon, reason):
    pytest.importorskip("resvg_py")
    write_icons(tmp_path, "noto", {"owl": icon, "red-heart": RED_HEART})
    problems = problems_of(records_of(icons_source("train", folder=tmp_path)))
    missing = dict.fromkeys(["noto/31-20e3", "noto/1f1ef-1f1f5", "noto/1f34e"], "no drawing of that name")
    assert problems == {**missing, "noto/2764": "", "noto/1f989": reason}


def test_records_are_pictures_of_256_pixels_on_transparency(place):
    pytest.importorskip("resvg_py")
    records = {record.key: record for record in records_of(icons_source("train", folder=place))}
    assert {key for key, record in records.items() if record.problem} == {"flat/1f989", "flat/31-20e3"}
    heart = Image.open(io.BytesIO(records["flat/2764"].image))
    assert (heart.format, heart.mode, heart.size) == ("PNG", "RGBA", (256, 256))
    assert decode(records["flat/2764"].image).getpixel((2, 2)) == (255, 255, 255)


def test_a_drawing_may_have_a_size_of_its_own(tmp_path):
    pytest.importorskip("resvg_py")
    wide = {"body": '<path fill="#f00" d="M8 0h16v8h-16z"/>', "left": 8, "height": 8}
    write_icons(tmp_path, "noto", {"owl": wide})
    owl = next(record for record in records_of(icons_source("train", folder=tmp_path)) if record.key == "noto/1f989")
    assert Image.open(io.BytesIO(owl.image)).getbbox() == (0, 64, 256, 192)


def test_a_changed_set_changes_the_fingerprint_of_its_parts_only(place):
    before = [part.fingerprint() for part in icons_source("train", folder=place).parts]
    write_icons(place, "fluent-emoji-flat", {"owl": OWL})
    after = [part.fingerprint() for part in icons_source("train", folder=place).parts]
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.fixture(scope="module")
def installed():
    """The real packages."""
    pytest.importorskip("resvg_py")
    try:
        source = open_source("icons")
    except UserError:
        pytest.skip("no icons are installed: npm install @iconify-json/twemoji ...")
    if source.note:
        pytest.skip(source.note)
    return source


def test_the_real_sets_hold_thousands_of_icons(installed):
    captions = captions_of(installed) | captions_of(open_source("icons:held_out"))
    counts = {style: sum(key.startswith(f"{style}/") for key in captions) for style in STYLES}
    assert counts["twemoji"] >= 1900
    assert counts["openmoji"] >= 1900
    assert counts["noto"] >= 1600
    assert counts["flat"] >= 1500
    assert len(set(captions.values())) == len(captions)
    assert {key.removeprefix("twemoji/") for key in captions_of(installed) if key.startswith("twemoji/")} >= set(
        keys_of(emoji_source("train").parts[0])
    )
    licenses = {"twemoji": "CC BY 4.0", "noto": "Apache 2.0", "openmoji": "CC BY-SA 4.0", "flat": "MIT"}
    assert {part.partition(" by ")[0]: part.rpartition(": ")[2] for part in installed.license.split("; ")} == licenses


def test_the_real_icons_show_what_their_captions_say(installed, tmp_path):
    """Of each real set, three icons: the others would take minutes."""
    colours = {"2764": (1, 0, 0), "1f49a": (0, 1, 0), "1f535": (0, 0, 1)}  # red heart, green heart, blue circle
    for real in {file.parent for part in installed.parts for file in part.files()}:
        names = json.loads((real / "chars.json").read_text())
        write_icons(tmp_path, real.name, {})
        write_json(tmp_path / "node_modules" / "@iconify-json" / real.name / "chars.json", {code: names[code] for code in colours})
        write_file(tmp_path / "node_modules" / "@iconify-json" / real.name / "icons.json", (real / "icons.json").read_bytes())
    records = {record.key: record for part in icons_source("train", folder=tmp_path).parts for record in part.records()}
    assert len(records) == 12
    for key, record in records.items():
        assert not record.problem
        pixels_HW4 = np.asarray(Image.open(io.BytesIO(record.image)))
        opaque_HW = pixels_HW4[..., 3] == 255
        assert opaque_HW.mean() > 0.2
        assert np.argmax(pixels_HW4[opaque_HW, :3].mean(axis=0)) == np.argmax(colours[key.partition("/")[2]]), key
