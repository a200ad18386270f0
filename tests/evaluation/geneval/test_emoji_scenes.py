import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microdit.data.sources.builtin import COUNTS, PLURALS, draw, emoji_images, scene
from microdit.evaluation.geneval.detector import evaluate_geneval
from microdit.evaluation.geneval.emoji_scenes import SHAPES, EmojiColours, EmojiDetector, emoji_prompts, made_false, true_picture
from microdit.evaluation.geneval.rules import COLOURS, TASKS, Detection, judge, overlap


@pytest.fixture(scope="module")
def detector() -> EmojiDetector:
    return EmojiDetector()


def test_prompts_are_worded_like_the_captions_and_are_the_same_for_a_seed():
    prompts = emoji_prompts(40, seed=3)
    assert [prompt.text for prompt in prompts] == [prompt.text for prompt in emoji_prompts(40, seed=3)]
    assert [prompt.text for prompt in prompts] != [prompt.text for prompt in emoji_prompts(40, seed=4)]
    captions = {row.caption for row in emoji_images("train")}
    numbers, colours = "|".join(COUNTS.values()), "|".join(COLOURS)
    shape = f"({colours}) ({'|'.join(SHAPES)})"
    forms = {
        "two_object": "(an?) .+ and (an?) .+",
        "counting": f"({numbers}) ({'|'.join(PLURALS.values())})",
        "position": "(an?) .+ (left of|right of|above|below) (an?) .+",
        "color_attr": f"(an?) {shape} and (an?) {shape}",
    }
    for prompt in prompts:
        if prompt.tag in forms:
            assert re.fullmatch(forms[prompt.tag], prompt.text)
        else:
            assert prompt.text in captions  # what is drawn alone is an emoji of the training set
    assert [sum(prompt.tag == task for prompt in prompts) for task in TASKS] == [40] * 6


def test_the_judge_tells_true_pictures_from_false_ones(detector: EmojiDetector):
    generator, colours = np.random.default_rng(5), EmojiColours()
    right = []
    for prompt in emoji_prompts(3, seed=5):
        image = true_picture(prompt, generator)
        found = detector(image)
        for asked, expected in ((prompt, True), (made_false(prompt, generator), False)):
            right.append(judge(asked, found, lambda one, image=image: colours(image, one)).correct == expected)
    assert np.mean(right) >= 0.95


def test_a_false_prompt_asks_for_something_else_of_the_same_kind():
    generator = np.random.default_rng(0)
    for prompt in emoji_prompts(10):
        false = made_false(prompt, generator)
        assert false.tag == prompt.tag
        assert false.include != prompt.include
        assert [wanted.count for wanted in false.exclude] == [wanted.count + 1 for wanted in false.include if prompt.exclude]


def test_all_things_of_the_training_scenes_are_found_where_they_are(detector: EmojiDetector):
    for i in range(6):
        truth = scene(i)
        found = detector(draw(truth))
        assert len(found) == len(truth.objects)
        for name, box in truth.objects:
            expected = "heart" if name == "red heart" else name
            assert any(one.class_name == expected and overlap(one.box, box) > 0.6 for one in found)


def test_a_coarse_picture_of_another_size_is_read_too(detector: EmojiDetector):
    truth = scene(1)
    [*found] = detector(draw(truth).resize((64, 64)))
    assert sorted(one.class_name for one in found) == sorted(name for name, _ in truth.objects)
    assert all(max(one.box) <= 64 and min(one.box) >= 0 for one in found)


def test_nothing_is_found_in_white_in_noise_and_in_most_other_emoji(detector: EmojiDetector):
    assert detector(Image.new("RGB", (64, 64), "white")) == []
    assert detector(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))) == []
    others = [row.image for row in emoji_images("train") if row.caption not in PLURALS and "heart" not in row.caption][:400:40]
    assert sum(detector(image) != [] for image in others) <= 1


def test_every_shape_has_its_colour():
    colours, pictures = EmojiColours(), {row.caption: row.image for row in emoji_images("train")}
    known = [(colour, shape) for colour in COLOURS for shape in SHAPES if colour != "white" and f"{colour} {shape}" in pictures]
    assert len(known) >= 20
    for colour, shape in known:
        blurred = pictures[f"{colour} {shape}"].resize((20, 20))
        assert colours(blurred, Detection(shape, 0.99, (0, 0, 20, 20))) == colour


def test_a_folder_of_true_pictures_scores_full_marks(detector: EmojiDetector, tmp_path: Path):
    generator, prompts = np.random.default_rng(6), emoji_prompts(1, seed=6)
    for n, prompt in enumerate(prompts):
        samples = tmp_path / "pictures" / f"{n:05d}" / "samples"
        samples.mkdir(parents=True)
        true_picture(prompt, generator).save(samples / "0000.png")
    heard: list[str] = []
    summary = evaluate_geneval(tmp_path / "pictures", prompts, detector, EmojiColours(), tmp_path / "out", heard.append)
    assert summary["overall"] == 1.0
    assert heard == []
