"""What sampling costs, and what each way of saving it costs in quality.

    python benchmarks/sampling.py                        (the caches, on the paper's Tiny_2 at 256 px with random weights)
    python benchmarks/sampling.py --model runs/emoji     (and quality against cost, of a model trained on the emoji)

Base of both tables: 30 steps of Heun's method with guidance 5, or with --guidance. The first table times steps with the caption's work done
at every call, embedded once, and done once in whole, in turns, in one run. The second draws captions of the emoji's training pictures
with every solver and number of steps, guided everywhere, in an interval, between nearer noise levels, or between nearer ones still and a
quarter more strongly, and compares the pictures with all of the emoji, by EfficientNet-Lite0 features. The base more strongly guided is
drawn too, to see what of the last is the guidance's. The first table, and each setting and seed of the second, are a line in the file of
--progress when they are done; started again, the benchmark goes on behind them. Seconds are the fewest over rounds or seeds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microdit.data.sources.builtin import emoji_source
from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import guided_denoiser
from microdit.diffusion.objective import denoise
from microdit.diffusion.samplers import Denoiser, heun
from microdit.distributed import start_world
from microdit.evaluation.extraction import extract, feature_cache
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.metrics.frechet import fit_gaussian, sample_distance
from microdit.evaluation.metrics.kid import kid
from microdit.evaluation.recognition import spread_ids
from microdit.io.files import sha256_of, write_aside
from microdit.models.config import SIZES, resolve
from microdit.models.microdit import MicroDiT
from microdit.pipelines.open_model import open_model
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings

LATENTS, CAPTION = (4, 32, 32), (77, 1024)  # 256 px through the SDXL autoencoder; DFN5B-CLIP-H
Row = dict[str, Any]
WAYS: tuple[tuple[float, Row], ...] = (  # times the base's guidance, other settings
    (1, {}),
    (1, {"guidance_interval": (0.3, 2.0)}),
    (1, {"noise_range": (0.03, 30.0)}),
    (1.25, {"noise_range": (0.05, 20.0)}),
)
STEPS = {"heun": (6, 9, 12, 18, 30), "dpm": (8, 12, 16, 30), "euler": (18, 30)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="trained on the emoji: a run, or an exported folder such as microdit/demo_model")
    parser.add_argument("--size", choices=list(SIZES), default="MicroDiT_Tiny_2")
    parser.add_argument("--pictures", type=int, default=1, help="drawn at a time in the first table")
    parser.add_argument("--steps", type=int, default=30, help="of the base in both tables")
    parser.add_argument("--rounds", type=int, default=3, help="of the first table; the fastest counts")
    parser.add_argument("--guidance", type=float, default=5.0, help="of the base in both tables")
    parser.add_argument("--captions", type=int, default=512, help="drawn for each setting and seed in the second table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--solvers", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--few", type=int, help="only step counts up to this many, besides the base")
    parser.add_argument("--only", choices=("caches", "quality"), help="measure this table; the other stays in --out as it is")
    parser.add_argument("--progress", type=Path, default=Path("sampling.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/sampling.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/sampling.png"), help="of the second table")
    args = parser.parse_args()
    progress = Progress(args.progress)
    what = {"size": args.size, "pictures": args.pictures, "steps": args.steps, "rounds": args.rounds, "guidance": args.guidance}
    result: Row = json.loads(args.out.read_text()) if args.only else {}
    if args.only != "quality":
        result["caches"] = {"threads": torch.get_num_threads(), "rows": progress.once(what, lambda: time_caches(args))}
        print_rows(result["caches"]["rows"])
    if args.model and args.only != "caches":
        quality = result["quality"] = {"threads": torch.get_num_threads(), **measure_quality(args, progress)}
        print_rows(quality["alone"])
        print_rows(quality["rows"])
        plot(quality["rows"], args.plot)
    write_aside(args.out, json.dumps(result, indent=1).encode())


class Progress:
    """What is done already, by what it was asked, one JSON object a line."""

    def __init__(self, path: Path):
        self._path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self._done = {line["of"]: line["found"] for line in map(json.loads, lines)}

    def once(self, what: Row, measure: Callable[[], Any]) -> Any:
        """What `measure` finds, now or in an earlier run with as many threads."""
        of = json.dumps({**what, "threads": torch.get_num_threads()}, sort_keys=True)
        if of not in self._done:
            self._done[of] = measure()
            with self._path.open("a") as file:
                file.write(json.dumps({"of": of, "found": self._done[of]}) + "\n")
        return self._done[of]


def time_caches(args: argparse.Namespace) -> list[Row]:
    """Seconds of one picture with the caption's work done at every call, embedded once, and done once in whole."""
    torch.manual_seed(0)
    model = MicroDiT(resolve(SIZES[args.size])).eval().requires_grad_(False)
    text, noise = torch.randn(args.pictures, *CAPTION), torch.randn(args.pictures, *LATENTS)
    ways: dict[str, Callable[[], Denoiser]] = {
        "at every call": lambda: without_caches(model, text, args.guidance),
        "captions embedded once": lambda: embedded_once(model, text, args.guidance),
        "keys and values too": lambda: guided_denoiser(model, EDM(), text, guidance_scale=args.guidance),
        "and guidance for noise 0.3 to 2 only": lambda: guided_denoiser(
            model, EDM(), text, guidance_scale=args.guidance, interval=(0.3, 2.0)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):  # in turns, so that a noisy neighbour slows all
        for name, way in ways.items():
            started = time.perf_counter()
            with torch.no_grad():
                heun(way(), noise, EDM().noise_schedule(args.steps))
            seconds[name].append((time.perf_counter() - started) / args.pictures)
    base = min(seconds["at every call"])
    return [
        {"caption's work": name, "seconds a picture": round(min(took), 3), "times faster": round(base / min(took), 3)}
        for name, took in seconds.items()
    ]


def without_caches(model: MicroDiT, text_BLE: Tensor, scale: float) -> Denoiser:
    return lambda noisy, sigma: embedded_once(model, text_BLE, scale)(noisy, sigma)


def embedded_once(model: MicroDiT, text_BLE: Tensor, scale: float) -> Denoiser:
    """Plain classifier-free guidance; every block makes its keys and values at every call."""
    both = model.embed_caption(torch.cat([text_BLE, torch.zeros_like(text_BLE)]))

    def denoiser(noisy: Tensor, sigma: Tensor) -> Tensor:
        strong, weak = denoise(model, EDM(), torch.cat([noisy] * 2), torch.cat([sigma] * 2), both).chunk(2)
        return weak + scale * (strong - weak)

    return denoiser


def measure_quality(args: argparse.Namespace, progress: Progress) -> Row:
    """Every setting with every seed, those excepted that are done already."""
    opened = open_model(args.model, print)
    pipeline, weights = opened.pipeline, sha256_of(opened.weights_file) if opened.weights_file else args.model
    judge = Judge(opened.resolution, args.captions)
    settings = settings_of(args)
    chosen: list[list[Row]] = [[] for _ in settings]
    for seed in range(args.seeds):  # settings in turns, so that what else the machine does slows all
        for setting, of_seeds in zip(settings, chosen, strict=True):
            what = {"weights": weights, "captions": args.captions, "setting": asdict(setting), "seed": seed}
            of_seeds.append(progress.once(what, partial(judge, pipeline, setting, seed)))
    about = {"model": opened.name, "captions": args.captions, "seeds": args.seeds}
    rows = [summary(setting, of_seeds, chosen[0]) for setting, of_seeds in zip(settings, chosen, strict=True)]
    return {"of": about, "alone": [time_alone(pipeline, setting, args.rounds) for setting in settings], "rows": rows}


def time_alone(pipeline: MicroDiTPipeline, settings: SamplerSettings, rounds: int) -> Row:
    """One prompt, from its words to the picture. The first round, which warms up, does not count."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        pipeline.generate(["red heart"], settings)
        seconds.append(time.perf_counter() - started)
    return {
        **named(settings),
        "seconds of one picture alone": round(min(seconds[1:]), 4),
    }


def settings_of(args: argparse.Namespace) -> list[SamplerSettings]:
    """The base first."""
    base = SamplerSettings(args.steps, args.guidance)
    others = [
        replace(base, solver=solver, num_inference_steps=steps, guidance_scale=times * args.guidance, **way)
        for solver in args.solvers
        for steps in STEPS[solver]
        if args.few is None or steps <= args.few
        for times, way in WAYS
    ]
    stronger = replace(base, guidance_scale=WAYS[-1][0] * args.guidance)
    return list(dict.fromkeys([base, stronger, *others]))


class Judge:
    """Holds captions and features of the emoji; called, it draws and compares."""

    def __init__(self, side: int, count: int):
        self._network = EfficientNetFeatures()
        records = [record for part in emoji_source("train").parts for record in part.records()]
        self._captions = [records[i].captions["caption"] for i in spread_ids(len(records), count)]
        pictures = [lambda: (record.image for record in records)]
        found = extract(self._network, "emoji", pictures, side, feature_cache(), start_world("cpu"))
        self._real_MD = found.features_ND
        self._gaussian = fit_gaussian(self._real_MD)

    def __call__(self, pipeline: MicroDiTPipeline, settings: SamplerSettings, seed: int) -> Row:
        """Picture i of seed s begins with noise that no other picture begins with."""
        started = time.perf_counter()
        images = pipeline.generate(self._captions, settings, seed * len(self._captions))
        seconds = (time.perf_counter() - started) / len(images)
        drawn_ND = self._network(images)
        subset = min(len(drawn_ND), len(self._real_MD), 1000)
        return {
            "seconds": seconds,
            "frechet": sample_distance(drawn_ND, self._gaussian),
            "kid": kid(drawn_ND, self._real_MD, subset_size=subset, subsets=20).value,
        }


def summary(settings: SamplerSettings, of_seeds: list[Row], base: list[Row]) -> Row:
    """Means over seeds, half the range as their spread, and what the base costs against this."""
    fastest, fastest_base = (min(row["seconds"] for row in rows) for rows in (of_seeds, base))
    distances, kids = ([row[name] for row in of_seeds] for name in ("frechet", "kid"))
    return {
        **named(settings),
        "seconds a picture": round(fastest, 4),
        "times faster": round(fastest_base / fastest, 2),
        "frechet": round(statistics.mean(distances), 2),
        "frechet +-": round((max(distances) - min(distances)) / 2, 2),
        "kid": round(statistics.mean(kids), 5),
        "kid +-": round((max(kids) - min(kids)) / 2, 5),
    }


def named(settings: SamplerSettings) -> Row:
    """A row's first columns."""
    guided, drawn = settings.guidance_interval, settings.noise_range or (EDM.sigma_min, EDM.sigma_max)
    return {
        "solver": settings.solver,
        "steps": settings.num_inference_steps,
        "guidance": settings.guidance_scale,
        "guided at noise": "all" if guided is None else f"{guided[0]} to {guided[1]}",
        "drawn at noise": f"{drawn[0]} to {drawn[1]}",
    }


def print_rows(rows: list[Row]) -> None:
    """As a table of Markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    print()


def plot(rows: list[Row], path: Path) -> None:
    """Distance against seconds, a line for each solver and way, the base as a star."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(
            f"{row['solver']}, guidance {row['guidance']} at {row['guided at noise']}, drawn at {row['drawn at noise']}", []
        ).append(row)
    for name, points in lines.items():
        points.sort(key=lambda row: row["steps"])
        x = [1000 * point["seconds a picture"] for point in points]
        y, spread = ([point[key] for point in points] for key in ("frechet", "frechet +-"))
        axes.errorbar(x, y, spread, label=name, marker="o", markersize=3, capsize=2)
    axes.plot(1000 * rows[0]["seconds a picture"], rows[0]["frechet"], "k*", markersize=14, label="base")
    axes.set(xlabel="milliseconds a picture", ylabel="Frechet distance (EfficientNet-Lite0)", xlim=(0, None))
    axes.legend(fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, bbox_inches="tight")
    write_aside(path, content.getvalue())


if __name__ == "__main__":
    main()
