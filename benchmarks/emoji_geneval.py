"""How often is the emoji GenEval right? On pictures whose truth is known, and on the same made as coarse as a small model's.

    python benchmarks/emoji_geneval.py

For each prompt a picture that fulfils it is drawn and judged twice: by the prompt (correct), and by one that it does not fulfil (not
correct).
"""

import argparse
from collections import Counter

import numpy as np
import torch
from PIL import Image

from microdit.data.sources.builtin import PLURALS, draw, emoji_images, scene
from microdit.evaluation.geneval.emoji_scenes import SHAPES, EmojiColours, EmojiDetector, emoji_prompts, made_false, true_picture
from microdit.evaluation.geneval.rules import COLOURS, TASKS, Detection, judge, overlap
from microdit.evaluation.recognition import spread_ids

BAR = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-task", type=int, default=50)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--others", type=int, default=200)
    args = parser.parse_args()
    detector = EmojiDetector()
    for side in (144, 64):
        print(f"pictures of {side} x {side}")
        print_tasks(detector, args.per_task, side)
        print_scenes(detector, args.scenes, side)
        print_others(detector, args.others, side)


def print_tasks(detector: EmojiDetector, per_task: int, side: int) -> None:
    """Per task: true prompts judged correct, false ones judged not correct, and both."""
    generator, colours = np.random.default_rng(1), EmojiColours()
    said_true, said_false = Counter[str](), Counter[str]()
    for prompt in emoji_prompts(per_task, seed=1):
        image = coarse(true_picture(prompt, generator), side)
        found = detector(image)

        def colour_of(one: Detection, image: Image.Image = image) -> str:
            return colours(image, one)

        said_true[prompt.tag] += judge(prompt, found, colour_of).correct
        said_false[prompt.tag] += not judge(made_false(prompt, generator), found, colour_of).correct
    for task in TASKS:
        print(f"  {task:15} true {said_true[task] / per_task:6.1%}   false {said_false[task] / per_task:6.1%}")
    right = (said_true.total() + said_false.total()) / (2 * per_task * len(TASKS))
    print(f"  {'all':15} {right:.1%} right (bar: {BAR:.0%})")


def print_scenes(detector: EmojiDetector, count: int, side: int) -> None:
    """The share of the training scenes in which exactly the things that are there are found, each in its place."""
    right = 0
    for i in range(count):
        truth = scene(i)
        found = detector(coarse(draw(truth), side).resize((144, 144)))
        left = [(name.removeprefix("red ") if name == "red heart" else name, box) for name, box in truth.objects]
        for one in found:
            left = [(name, box) for name, box in left if name != one.class_name or overlap(box, one.box) < 0.5]
        right += not left and len(found) == len(truth.objects)
    print(f"  {'scenes':15} {right / count:.1%} with all found and nothing else")


def print_others(detector: EmojiDetector, count: int, side: int) -> None:
    """The share of pictures of things that no prompt names in which nothing is found. Some do show a heart or a circle."""
    known = {*PLURALS, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)}
    others = [row.image for row in emoji_images("train") if row.caption not in known]
    chosen = [others[int(n)] for n in spread_ids(len(others), count)]
    nothing = sum(not detector(coarse(image, side)) for image in chosen)
    print(f"  {'other emoji':15} {nothing / len(chosen):.1%} with nothing found")


def coarse(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
