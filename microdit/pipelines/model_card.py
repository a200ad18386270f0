"""Model cards: the README.md of a pipeline's folder, written from its record. Nothing is claimed that the record does not hold."""

import json
import shlex
from typing import Any

import yaml

from microdit.io.untrusted_text import block, code, one_line, plain, printable
from microdit.reports.formats import count, figure, hours, money

_HEAD = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["text-to-image", "diffusers", "microdit"]}


def card_of_run(name: str, record: dict[str, Any]) -> str:
    """Return the card of an exported run, as Markdown, for the folder `name`."""
    prompts = record["recipe"].get("record", {}).get("sample_prompts") or ["red heart"]
    parts = [
        _front_matter({}),
        f"# {plain(name)}\n\nA text-to-image diffusion transformer, trained from scratch by "
        f"[microdit](https://arxiv.org/abs/2407.15811) (recipe {code(record['name'])}).",
        "## Training\n\n" + _table(_training(record)),
        "## Data\n\n" + _data(record),
        "## Figures\n\n" + _figures(record["figures"]),
        usage(name, prompts[0], 2.0),
        "## Recipe\n\n" + block(yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True), "yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def card_of_official(name: str, record: dict[str, Any]) -> str:
    """Return the card of the authors' weights: what the file shows, and who made it."""
    rows = {key.replace("_", " "): record[key] for key in ("file", "sha256", "parameters", "latent_channels", "latent_size", "dtype")}
    rows |= {key.replace("_", " "): record[key] for key in ("text_encoder", "autoencoder")}
    parts = [
        _front_matter({"license": "apache-2.0"}),
        f"# {plain(name)}\n\nWeights of *Stretching Each Dollar: Diffusion Training from Scratch on a Micro-Budget* "
        "([arXiv 2407.15811](https://arxiv.org/abs/2407.15811)), released by its authors under Apache 2.0, in a form that diffusers and "
        "microdit load. They were converted bit for bit but for the type of their numbers, not trained anew.",
        "## The checkpoint\n\n" + _table(rows),
        usage(name, "a photograph of an astronaut riding a horse", 5.0),
    ]
    return "\n\n".join(parts) + "\n"


def card_of_minit2i(name: str, record: dict[str, Any]) -> str:
    """Return the card of MiniT2I's weights: what the file shows, and who made it."""
    rows = {key.replace("_", " "): record[key] for key in ("file", "sha256", "parameters", "resolution", "dtype", "text_encoder")}
    parts = [
        _front_matter({"license": "mit"}),
        f"# {plain(name)}\n\nWeights of [MiniT2I](https://github.com/PeppaKing8/minit2i-jax), released by its authors, whose code is under "
        "the MIT licence, in a form that diffusers and microdit load. They were converted bit for bit but for the type of their numbers, "
        "not trained anew.",
        "## The checkpoint\n\n" + _table(rows),
        usage(name, "a photograph of an astronaut riding a horse", 6.0),
    ]
    return "\n\n".join(parts) + "\n"


def usage(name: str, prompt: str, guidance_scale: float) -> str:
    """Say how to draw with it, from Python and from the command line. Both are safe to paste, whatever the prompt."""
    words, options = f"{shlex.quote(one_line(name))} {shlex.quote(one_line(prompt))}", f"--guidance {guidance_scale:g} --out picture.png"
    words = f"{options} -- {words}" if "-" in (name[:1], prompt.strip()[:1]) else f"{words} {options}"
    return f"""## Use

    from microdit.pipelines.pipeline import MicroDiTPipeline

    pipeline = MicroDiTPipeline.from_pretrained({_python(name)})  # this folder, or its id of the hub
    pipeline({_python(prompt)}, guidance_scale={guidance_scale}).images[0].save("picture.png")

or, on the command line:

    microdit sample {words}"""


def _python(text: str) -> str:
    """Return a string literal of Python, in one line."""
    return printable(json.dumps(" ".join(text.split()), ensure_ascii=False))


def _front_matter(more: dict[str, Any]) -> str:
    return "---\n" + yaml.safe_dump({**_HEAD, **more}, sort_keys=False).strip() + "\n---"


def _training(record: dict[str, Any]) -> dict[str, Any]:
    flops = record.get("flops")
    rows = {
        "parameters": count(record["parameters"]),
        "steps": count(record["step"]),
        "images seen": count(record.get("images_seen")),
        "FLOPs": None if flops is None else f"{figure(flops / 1e15, 3)} PFLOPs, those of the matrix products",
        "time": f"{hours(record.get('gpu_hours'))} hours of processes or GPUs",
        "cost": None if record.get("dollars") is None else money(record["dollars"]),
        "machine": record.get("device"),
        "weights": f"{record['weights']}, {record['dtype']}",
        "code": record.get("git_commit") and f"commit {record['git_commit']}",
    }
    return {key: value for key, value in rows.items() if value is not None}


def _data(record: dict[str, Any]) -> str:
    lines = [
        f"- {plain(name)}: {count(one['rows'])} encoded pictures from {plain(one['source'] or 'a source that is no longer here')}, "
        f"licence: {plain(one['license'] or 'not recorded; say here what it is before you share the model')}"
        for name, one in record["sets"].items()
    ]
    data = record["data"]
    encoders = (
        f"Pictures of {data['resolution']} px by the autoencoder {plain(data['autoencoder']['name'])}, "
        f"captions by {plain(data['text_encoder']['name'])}."
    )
    return "\n".join(lines) + f"\n\n{encoders}"


def _figures(figures: dict[str, Any]) -> str:
    lines = []
    if retrieval := figures.get("emoji", {}).get("retrieval"):
        lines.append(
            f"- recognised: {retrieval['top_10']:.1%} of {count(retrieval['captions'])} training captions' pictures are among the 10 "
            f"nearest of all training pictures, {retrieval['top_1']:.1%} the nearest (`microdit evaluate`)"
        )
    against = figures.get("reference", {})
    for metric, entry in against.get("metrics", {}).items():
        source = against.get("reference", {}).get("source")
        by = f"{plain(entry['network'])}, {count(against['pictures'])} pictures against {plain(source)}"
        lines.append(f"- {plain(metric)}: {figure(entry['value'])} by {by}")
    return "\n".join(lines) or "Not measured: `microdit evaluate RUN` before the export puts figures here."


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {plain(key)} | {plain(value)} |" for key, value in rows.items())])
