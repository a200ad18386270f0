import io
import re
from collections import Counter

import numpy as np
from PIL import Image

from microdit.data.sources.builtin import COUNTS, PLURALS, SIDE, draw, emoji_images, is_held_out, scene, scenes_source
from tests.data.pictures import keys_of, records_of

SCENES = [scene(i) for i in range(2000)]


def test_nothing_of_what_is_held_out_is_drawn():
    known = {row.caption for row in emoji_images("train")}
    assert set(PLURALS) <= known
    assert not any(is_held_out(name) for name in PLURALS)
    assert len(PLURALS) >= 60


def test_every_caption_is_true():
    kinds = Counter()
    for drawn in SCENES:
        names = [name for name, _ in drawn.objects]
        relation = re.fullmatch(r"(an?) (.+) (left of|right of|above|below) (an?) (.+)", drawn.caption)
        if relation is None:
            [name] = set(names)
            assert drawn.caption == f"{COUNTS[len(names)]} {PLURALS[name]}"
            kinds[len(names)] += 1
            continue
        for article, name in (relation.group(1, 2), relation.group(4, 5)):
            assert article == ("an" if name[0] in "aeiou" else "a")
        assert [relation[2], relation[5]] == names
        (left, top, right, bottom), (left2, top2, right2, bottom2) = (box for _, box in drawn.objects)
        true = {"left of": right < left2, "right of": right2 < left, "above": bottom < top2, "below": bottom2 < top}
        assert [word for word, holds in true.items() if holds] == [relation[3]]  # and no other
        kinds[relation[3]] += 1
    assert all(kinds[kind] > 0.08 * len(SCENES) for kind in (2, 3, 4, "left of", "right of", "above", "below"))
    assert len({name for drawn in SCENES for name, _ in drawn.objects}) == len(PLURALS)


def test_things_are_inside_apart_and_where_their_boxes_are():
    for drawn in SCENES:
        for n, (_, (left, top, right, bottom)) in enumerate(drawn.objects):
            assert min(left, top) >= 0
            assert max(right, bottom) <= SIDE
            assert right - left == bottom - top >= 40
            for _, (left2, top2, right2, bottom2) in drawn.objects[:n]:
                assert right < left2 or right2 < left or bottom < top2 or bottom2 < top
    for drawn in SCENES[:20]:
        pixels = np.asarray(draw(drawn)).copy()
        for _, (left, top, right, bottom) in drawn.objects:
            assert (pixels[top:bottom, left:right] < 230).any(axis=-1).mean() > 0.1
            pixels[top:bottom, left:right] = 255
        assert (pixels == 255).all()


def test_a_scene_depends_on_its_number_and_the_seed_alone():
    assert scene(5) == SCENES[5]
    assert scene(5, seed=1) != SCENES[5]
    assert len({drawn.caption for drawn in SCENES}) > 1000


def test_the_source_holds_the_scenes_as_png_in_parts_of_500():
    source = scenes_source(501)
    assert [len(keys_of(part)) for part in source.parts] == [500, 1]
    small = records_of(scenes_source(3))
    assert small == list(source.parts[0].records())[:3]
    assert [record.key for record in small] == ["scene-000000", "scene-000001", "scene-000002"]
    image = Image.open(io.BytesIO(small[2].image))
    assert (image.format, image.size) == ("PNG", (144, 144))
    assert image.tobytes() == draw(SCENES[2]).tobytes()
    assert small[2].captions == {"caption": SCENES[2].caption}
