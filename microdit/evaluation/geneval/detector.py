"""GenEval (Ghosh et al. 2023, arXiv 2310.11513) on a folder of images, without mmdetection.

- A Mask2Former detects objects and a CLIP names their colours, both from transformers; rules.py judges the detections.
- The folder has the authors' layout, `00000/samples/0000.png` with the prompt's number, and results.jsonl uses their keys.
- Each image's line is written as soon as it is judged; a later call judges only new and changed images.
- The authors used mmdetection's Mask2Former with Swin-S. A model with the same backbone and other weights may detect slightly
  different objects.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from microdit.data.decode import FORMATS
from microdit.encoders.model_files import load_network
from microdit.errors import UserError
from microdit.evaluation.features import load_beside
from microdit.evaluation.geneval.rules import (
    COLOURS,
    CONFIDENCE,
    TASKS,
    Detection,
    GenEvalPrompt,
    confident_objects,
    judge,
    parse_prompt,
    score,
)
from microdit.io.files import from_checked_json, sha256_of, to_checked_json, to_checked_lines, write_aside

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLASSIFIER = "openai/clip-vit-large-patch14"
MAX_DETECTIONS = 100  # per image
BACKGROUND = "#999"  # grey that replaces an object's surroundings
COLOUR_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")

# Names that GenEval's prompts use for some of COCO's classes.
GENEVAL_NAMES = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv", "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
}  # fmt: skip


class Detector(Protocol):
    """Finds objects of the classes `class_names`. `fingerprint` changes whenever its detections could."""

    fingerprint: str
    class_names: frozenset[str]

    def __call__(self, image: Image.Image) -> list[Detection]: ...


class ColourClassifier(Protocol):
    """Names the colour of an object, one of COLOURS. `fingerprint` changes whenever its answers could."""

    fingerprint: str

    def __call__(self, image: Image.Image, found: Detection) -> str: ...


def evaluate_geneval(
    pictures: Path,
    prompts: list[GenEvalPrompt],
    detector: Detector,
    classifier: ColourClassifier,
    out: Path,
    warn: Callable[[str], None],
    on_picture: Callable[[int, int], None] | None = None,
    rewritten_by: str | None = None,
) -> dict[str, Any]:
    """Judge every image; write results.jsonl and summary.json to the folder `out`, and return the summary.

    `rewritten_by` names the language model that rewrote the prompts for generation, which the summary says.

    `pictures` holds `00000/samples/*.png` for the first prompt, and so on. `on_picture(done, all)` is called after each image. Raises
    UserError if the folder does not belong to the prompts, or a prompt names a class that the detector does not know.
    """
    _check_known_classes(prompts, detector)
    found = list(_find_pictures(pictures, prompts))
    if not found:
        raise UserError(f"There are no images in {pictures}: it needs GenEval's layout, as in 00000/samples/0000.png.")
    without = len(prompts) - len({number for number, _ in found})
    if without:
        warn(f"{without} of {len(prompts)} prompts have no image in {pictures}: the scores leave them out.")
    judges = f"{detector.fingerprint} {classifier.fingerprint}"
    results = out / "results.jsonl"
    known = _known_results(results)
    lines = []
    write_aside(results, to_checked_lines(known.values()))  # drops a truncated last line
    with results.open("ab") as file:
        for done, (number, path) in enumerate(found, start=1):
            name = path.relative_to(pictures).as_posix()
            identity = {"filename": name, "metadata": prompts[number].metadata, "picture": sha256_of(path), "judges": judges}
            line = known.get(json.dumps(identity))
            if line is None:
                line = identity | _judge_picture(path, prompts[number], detector, classifier)
                file.write(to_checked_lines([line]))
                file.flush()
            lines.append(line)
            if on_picture is not None:
                on_picture(done, len(found))
    write_aside(results, to_checked_lines(lines))
    summary = _summarise(lines, len(prompts), without, judges)
    if rewritten_by is not None:
        summary["prompts_rewritten_by"] = rewritten_by
    write_aside(out / "summary.json", to_checked_json(summary))
    return summary


class Mask2Former:
    """Detects objects with masks by a Mask2Former for instance segmentation, from a folder or hub id `place`.

    Raises UserError if there is no such network, or its settings and weights do not match.
    """

    def __init__(self, place: str = DETECTOR, device: str = "cpu") -> None:
        if find_spec("scipy") is None:
            raise UserError("Mask2Former in transformers needs scipy: pip install scipy.")
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self._model, folder, self.fingerprint = load_network(place, ("mask2former",), Mask2FormerForUniversalSegmentation)
        self._model.to(device)
        self._prepare = load_beside(folder, "preprocessor_config.json", AutoImageProcessor)
        self._names = {n: GENEVAL_NAMES.get(name, name) for n, name in self._model.config.id2label.items()}
        self._device = device
        self.class_names = frozenset(self._names.values())

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[Detection]:
        """Score each query by its class probability times the mean probability of its mask, as the authors do."""
        inputs = prepared(self._prepare, image).to(self._device)
        output = self._model(**inputs)
        probability_QC = output.class_queries_logits[0].float().softmax(dim=-1)[:, :-1]  # the last class means no object
        top_K, ids_K = probability_QC.flatten().topk(min(MAX_DETECTIONS, len(probability_QC)))
        top_K, ids_K = top_K[top_K > CONFIDENCE], ids_K[top_K > CONFIDENCE]  # the mask can only lower a score
        if len(ids_K) == 0:
            return []
        queries_K, classes_K = ids_K // probability_QC.shape[1], ids_K % probability_QC.shape[1]
        logits_KHW = output.masks_queries_logits[0][queries_K].float()
        logits_KHW = F.interpolate(logits_KHW[None], size=(image.height, image.width), mode="bilinear", align_corners=False)[0]
        masks_KHW = logits_KHW > 0
        inside_K = masks_KHW.sum(dim=(1, 2))
        scores_K = top_K * (logits_KHW.sigmoid() * masks_KHW).sum(dim=(1, 2)) / (inside_K + 1e-6)
        return [
            _detection(self._names[int(classes_K[k])], float(scores_K[k]), masks_KHW[k].cpu().numpy())
            for k in range(len(ids_K))
            if scores_K[k] > CONFIDENCE
        ]


class ClipColours:
    """Names an object's colour by the closest of CLIP's text embeddings; the object is shown on grey. `place` is a folder or hub id.

    Raises UserError if there is no such network, or its settings, tokenizer and weights do not match.
    """

    def __init__(self, place: str = CLASSIFIER, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self._model, folder, self.fingerprint = load_network(place, ("clip",), CLIPModel)
        self._model.to(device)
        self._prepare = load_beside(folder, "preprocessor_config.json", AutoImageProcessor)
        self._tokenizer = load_beside(folder, "tokenizer.json", AutoTokenizer)
        self._device = device
        self._descriptions: dict[str, Tensor] = {}  # by class

    @torch.no_grad()
    def __call__(self, image: Image.Image, found: Detection) -> str:
        inputs = prepared(self._prepare, cut_out(image, found)).to(self._device)
        features_1D = self._model.visual_projection(self._model.vision_model(**inputs).pooler_output)
        similarity_C = F.normalize(features_1D, dim=-1)[0] @ self._described(found.class_name).T
        return COLOURS[int(similarity_C.argmax())]

    def _described(self, name: str) -> Tensor:
        """Return the mean direction of each colour's descriptions for objects of class `name`, (colours, D)."""
        if name not in self._descriptions:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in COLOUR_TEMPLATES]
            inputs = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self._device)
            features_ND = self._model.text_projection(self._model.text_model(**inputs).pooler_output)
            by_colour_CTD = F.normalize(features_ND, dim=-1).unflatten(0, (len(COLOURS), -1))
            self._descriptions[name] = F.normalize(by_colour_CTD.mean(dim=1), dim=-1)
        return self._descriptions[name]


def prepared(prepare: Any, image: Image.Image) -> Any:
    """Apply an image processor of transformers, with the same result whether torchvision is installed or not.

    The image is passed as an array with an explicit channel axis: that axis cannot be inferred for an image three pixels high, and with
    torchvision a PIL image would be rotated by its EXIF data first.
    """
    return prepare(images=np.array(image), input_data_format="channels_last", return_tensors="pt")


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """Crop the object's box, with the pixels outside its mask replaced by grey."""
    if found.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(found.mask))
    left, top, right, bottom = (round(edge) for edge in found.box)
    return image.crop((left, top, right, bottom))


def _check_known_classes(prompts: list[GenEvalPrompt], detector: Detector) -> None:
    """Raise UserError if a prompt names a class that the detector does not know."""
    named = {required.class_name for prompt in prompts for required in (*prompt.include, *prompt.exclude)}
    unknown = sorted(named - detector.class_names)
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise UserError(f"The detector does not know {', '.join(unknown[:8])}{more}: choose one trained on the prompts' classes.")


def _find_pictures(pictures: Path, prompts: list[GenEvalPrompt]) -> Iterator[tuple[int, Path]]:
    """Yield (number of the prompt, image file), sorted."""
    if not pictures.is_dir():
        raise UserError(f"There is no folder {pictures}.")
    for folder in sorted(path for path in pictures.iterdir() if path.is_dir() and path.name.isdecimal()):
        number = int(folder.name)
        if number >= len(prompts):
            raise UserError(f"{folder} belongs to prompt number {number}, but there are only {len(prompts)}, counted from 0.")
        metadata = folder / "metadata.jsonl"
        if metadata.is_file() and parse_prompt(metadata.read_bytes(), str(metadata)) != prompts[number]:
            raise UserError(f"{metadata} differs from prompt number {number}: the images were generated from other prompts.")
        for path in sorted(folder.glob("samples/*.png")):
            if re.fullmatch(r"\d+", path.stem):
                yield number, path


def _known_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results of an earlier call by the identity of what was judged. Truncated and damaged lines are skipped."""
    known = {}
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = from_checked_json(text)
            if line["tag"] not in TASKS or type(line["correct"]) is not bool:
                continue
            known[json.dumps({key: line[key] for key in ("filename", "metadata", "picture", "judges")})] = line
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _judge_picture(path: Path, prompt: GenEvalPrompt, detector: Detector, classifier: ColourClassifier) -> dict[str, Any]:
    try:
        image = ImageOps.exif_transpose(Image.open(path, formats=FORMATS)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}. Generate it again, or remove it.") from error
    detections = detector(image)
    result = judge(prompt, detections, lambda found: classifier(image, found))
    boxes = {name: [[*found.box, found.score] for found in objects] for name, objects in confident_objects(detections, prompt.tag).items()}
    return {
        "tag": prompt.tag,
        "prompt": prompt.text,
        "correct": result.correct,
        "reason": "\n".join(result.reasons),
        "details": json.dumps(boxes),
    }


def _summarise(lines: list[dict[str, Any]], prompts: int, without: int, judges: str) -> dict[str, Any]:
    scores = asdict(score((line["tag"], line["correct"]) for line in lines))
    pictures = {task: sum(line["tag"] == task for line in lines) for task in TASKS}
    return scores | {"pictures_of_tasks": pictures, "prompts": prompts, "prompts_without_pictures": without, "judges": judges}


def _detection(name: str, score: float, mask: Any) -> Detection:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Detection(name, score, (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)), mask)
