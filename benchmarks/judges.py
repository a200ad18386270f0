"""How well the judges of the lab recognise real pictures that they were not trained on, beside chance.

    python benchmarks/judges.py

Each of the 106 held-out emoji, distorted (shifted, scaled, rotated, tinted, blurred, noisy) or coded by the icon autoencoder, should find
its own picture among all 1,913. Pictures of noise should find the one that they are told to find by chance only.
"""

import torch
from PIL import Image

from microdit.data.pixels import to_image, to_tensor
from microdit.data.sources.builtin import emoji_images
from microdit.encoders.autoencoder import load_autoencoder
from microdit.evaluation.features import EfficientNetFeatures, ImageFeatures, PixelFeatures
from microdit.evaluation.picture_classifier import SIDE, distorted, trained_classifier
from microdit.evaluation.recognition import Retrieval, retrieval

NOISE = 1000


def main() -> None:
    trained, held_out = ([row.image for row in emoji_images(split)] for split in ("train", "held_out"))
    judges: list[ImageFeatures] = [PixelFeatures(), trained_classifier(trained), EfficientNetFeatures()]
    print(f"{len(held_out)} held-out pictures among {len(trained) + len(held_out):,}: found as the nearest, and among the 10 nearest")
    print(f"{'':22}{'distorted':>18}{'coded at 64 px':>18}{f'{NOISE} of noise':>18}")
    for judge in judges:
        found = recognised(judge, trained, held_out)
        print(f"{judge.name:22}" + "".join(f"{f'{one.top_1:.1%}, {one.top_10:.1%}':>18}" for one in found))


def recognised(judge: ImageFeatures, trained: list[Image.Image], held_out: list[Image.Image]) -> tuple[Retrieval, Retrieval, Retrieval]:
    """Retrieve held-out pictures from distorted ones and from coded ones; and random pictures from noise."""
    generator = torch.Generator().manual_seed(7)
    real_MD = judge([*trained, *held_out])
    own_N = torch.arange(len(held_out)) + len(trained)
    views = [to_image(distorted(to_tensor(image, SIDE)[None], generator)[0]) for image in held_out]
    autoencoder = load_autoencoder("icon")
    coded = [to_image(pixels) for pixels in autoencoder.decode(autoencoder.encode(torch.stack([to_tensor(i, 64) for i in held_out])))]
    noise = [to_image(torch.randn(3, SIDE, SIDE, generator=generator)) for _ in range(NOISE)]
    any_N = torch.randint(len(real_MD), (NOISE,), generator=generator)
    return (
        retrieval(judge(views), real_MD, own_N),
        retrieval(judge(coded), real_MD, own_N),
        retrieval(judge(noise), real_MD, any_N),
    )


if __name__ == "__main__":
    main()
