import hashlib
import io

import numpy as np
from PIL import Image

from microdit.data.decode import decode
from microdit.data.sources.builtin import emoji_images, emoji_source
from tests.data.pictures import keys_of, records_of


def test_the_embedded_set_is_large_unique_and_split_for_good():
    train, held_out = list(emoji_images("train")), list(emoji_images("held_out"))
    captions = [row.caption for row in train + held_out]
    assert len(captions) == len(set(captions))
    assert len(captions) > 1850
    assert 0.03 < len(held_out) / len(captions) < 0.07
    for rows, held in ((train, False), (held_out, True)):
        assert all((int(hashlib.sha256(r.caption.encode()).hexdigest()[:8], 16) % 20 == 0) == held for r in rows)


def test_captions_are_words_and_skin_tones_are_left_out():
    captions = {row.caption for split in ("train", "held_out") for row in emoji_images(split)}
    assert {"red heart", "cat face", "flag of Japan"} <= captions
    assert not any("skin tone" in caption or "_" in caption or ":" in caption for caption in captions)


def test_pictures_stand_on_white():
    row = next(row for row in emoji_images("train") if row.caption == "red apple")
    assert row.image.mode == "RGB"
    assert row.image.size == (72, 72)
    assert row.image.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = row.image.getpixel((36, 40))
    assert red > 180
    assert max(green, blue) < 100


def test_the_source_holds_the_same_pictures_as_files_in_parts_of_500():
    for split in ("train", "held_out"):
        source = emoji_source(split)
        rows = list(emoji_images(split))
        records = records_of(source)
        assert [(record.key, record.captions) for record in records] == [(row.key, {"caption": row.caption}) for row in rows]
        assert {len(keys_of(part)) for part in source.parts[:-1]} <= {500}
        assert source.license == "CC-BY 4.0"
        assert not any(record.problem for record in records)
    image = Image.open(io.BytesIO(records[0].image))
    assert (image.format, image.size) == ("PNG", (72, 72))
    assert np.array_equal(np.asarray(decode(records[0].image)), np.asarray(rows[0].image))  # transparency is laid on white
