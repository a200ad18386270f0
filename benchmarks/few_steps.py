"""What distillation to few steps costs in quality: the captions of the emoji that are recognised, of the student and of its teacher.

    python benchmarks/few_steps.py TEACHER STUDENT [--captions 256 --seeds 3]

TEACHER and STUDENT are runs or exported folders, such as demo and runs/emoji-few-steps. The teacher draws with the settings of the bar (12
steps of dpm) and with as few steps as the student. All draw the same captions from the same noise. Takes minutes on a CPU.
"""

import argparse
import statistics
import sys

from microdit.data.pixels import to_image, to_tensor
from microdit.data.sources.builtin import emoji_images
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.recognition import retrieval, spread_ids
from microdit.pipelines.open_model import OpenedModel, open_model
from microdit.pipelines.settings import SamplerSettings, suited_to

BAR = 0.03  # of the captions: what the student may recognise less than the teacher in 12 steps of dpm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    teacher, student = (open_model(place, print) for place in (args.teacher, args.student))
    few = suited_to(student.pipeline.objective)
    steps = few.num_inference_steps
    rows, network = list(emoji_images("train")), EfficientNetFeatures()
    real_MD = network([to_image(to_tensor(row.image, teacher.resolution)) for row in rows])
    right_N = spread_ids(len(rows), args.captions)
    captions = [rows[number].caption for number in right_N]

    def recognised(name: str, model: OpenedModel, settings: SamplerSettings) -> float:
        found = []
        for seed in range(args.seeds):
            images = model.pipeline.generate(captions, settings, seed * args.captions, warn=print)
            found.append(retrieval(network(images), real_MD, right_N))
        shares = [one.top_10 for one in found]
        spread = statistics.stdev(shares) if args.seeds > 1 else float("nan")
        firsts = statistics.mean(one.top_1 for one in found)
        print(f"{name:40} {statistics.mean(shares):.1%} ± {spread:.1%} among the ten nearest, {firsts:.1%} the nearest", flush=True)
        return statistics.mean(shares)

    wanted = recognised("teacher, 12 steps of dpm, guidance 2", teacher, SamplerSettings(12, 2.0, "dpm"))
    recognised("teacher, 12 steps of heun, guidance 2", teacher, SamplerSettings(12, 2.0))
    recognised(f"teacher, {steps} steps of dpm, guidance 2", teacher, SamplerSettings(steps, 2.0, "dpm"))
    got = recognised(f"student, {steps} steps of euler", student, few)
    print(f"bar: at most {BAR:.0%} of the captions fewer than 12 steps of dpm; here {wanted - got:+.1%}")
    return int(wanted - got > BAR)


if __name__ == "__main__":
    sys.exit(main())
