import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from microdit.errors import UserError
from microdit.evaluation.geneval.detector import ClipColours, Mask2Former, cut_out, evaluate_geneval
from microdit.evaluation.geneval.rules import COLOURS, Detection, GenEvalPrompt, read_prompts
from microdit.io.files import from_checked_json
from tests.encoders.tiny_models import make_busy, save_clip_tokenizer

CLASSES = ["person", "tvmonitor", "mouse"]
SIDE = 64


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mask2Former whose six queries all see a television, each somewhere else."""
    folder = tmp_path_factory.mktemp("models") / "mask2former"
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=stages)
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"), 32)
    depths = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    config = Mask2FormerConfig(backbone_config=swin, id2label=dict(enumerate(CLASSES)), **widths, **depths)
    model = Mask2FormerForUniversalSegmentation(config)
    make_busy(model)
    with torch.no_grad():
        model.class_predictor.weight.mul_(0.5)  # so that the bias decides
        model.class_predictor.bias.copy_(torch.tensor([0.0, 4.0, 0.0, 0.0]))
    model.save_pretrained(folder)
    save_image_processor(folder, "Mask2FormerImageProcessor", size={"shortest_edge": SIDE, "longest_edge": 96}, size_divisor=32)
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    tokenizer: CLIPTokenizer = save_clip_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8}, projection_dim=8))
    make_busy(model)
    model.save_pretrained(folder)
    crop = {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    save_image_processor(folder, "CLIPImageProcessor", size={"shortest_edge": 16}, **crop)
    return folder


def save_image_processor(folder: Path, kind: str, **settings: object) -> None:
    """As published models have it; the class that reads it has other names in other releases of transformers."""
    try:
        _ = AutoImageProcessor.from_pretrained
    except ImportError:
        pytest.skip("this version of transformers makes no image processor without torchvision")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **settings}))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture
def prompts(tmp_path: Path) -> list[GenEvalPrompt]:
    """Of each task one. The last has no picture below."""
    television, remote = {"class": "tv", "count": 1}, {"class": "computer mouse", "count": 1}
    lines = [
        {"tag": "single_object", "include": [television], "prompt": "a photo of a tv"},
        {"tag": "two_object", "include": [television, remote], "prompt": "a photo of a tv and a computer mouse"},
        {"tag": "colors", "include": [television | {"color": "red"}], "prompt": "a photo of a red tv"},
        {"tag": "counting", "include": [television], "exclude": [{"class": "tv", "count": 2}], "prompt": "a photo of one tv"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return read_prompts(path)


@pytest.fixture
def pictures(tmp_path: Path, picture: Image.Image) -> Path:
    folder = tmp_path / "pictures"
    for number in range(3):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        for n in range(2):
            picture.rotate(90 * n).save(samples / f"{n:04d}.png")
    (folder / "00000" / "grid.png").write_bytes(b"not looked at")
    return folder


class Known:
    """Sees one television at the left, whatever the picture, and counts how often it is asked."""

    def __init__(self, fingerprint: str = "known") -> None:
        self.fingerprint, self.class_names = fingerprint, frozenset({"tv", "computer mouse"})
        self.asked, self.limit = 0, 1000

    def __call__(self, image: Image.Image) -> list[Detection]:
        if self.asked == self.limit:
            raise KeyboardInterrupt
        self.asked += 1
        return [Detection("tv", 0.95, (0, 0, 20, 20))]


class Red:
    fingerprint = "red"

    def __call__(self, image: Image.Image, found: Detection) -> str:
        return "red"


def quiet(sentence: str) -> None:
    pass


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_real_models_judge_a_folder_end_to_end(
    tmp_path: Path, pictures: Path, prompts: list[GenEvalPrompt], detector_folder: Path, classifier_folder: Path
):
    out, heard = tmp_path / "out", []
    detector, classifier = Mask2Former(str(detector_folder)), ClipColours(str(classifier_folder))
    summary = evaluate_geneval(pictures, prompts, detector, classifier, out, heard.append)
    lines = lines_of(out)
    assert [line["filename"] for line in lines[:3]] == ["00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png"]
    assert [line["correct"] for line in lines[:4]] == [True, True, False, False]
    assert lines[2]["reason"] == "Expected at least 1 of computer mouse, found 0."
    assert all(line["correct"] or line["reason"].startswith("Expected 1 red of tv, found 1 ") for line in lines[4:])
    assert set(json.loads(lines[0]["details"])) == {"tv"}
    assert summary["tasks"].keys() == {"single_object", "two_object", "colors"}
    assert (summary["pictures"], summary["prompts_without_pictures"], summary["overall"]) == (6, 1, None)
    assert from_checked_json((out / "summary.json").read_bytes()) == summary
    assert len(heard) == 1
    assert "1 of 4 prompts have no image" in heard[0]


def test_objects_are_those_of_the_models_own_rule(detector_folder: Path, picture: Image.Image):
    """At 384 x 384 the rule of transformers, which works at that size, gives the same scores and masks."""
    large = picture.resize((384, 384))
    found = Mask2Former(str(detector_folder))(large)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    prepare = AutoImageProcessor.from_pretrained(detector_folder)
    with torch.no_grad():
        output = model(**prepare(images=large, return_tensors="pt"))
    expected = prepare.post_process_instance_segmentation(output, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True)[0]
    masks = {round(info["score"], 4): mask.numpy() for info, mask in zip(expected["segments_info"], expected["segmentation"], strict=True)}
    assert len(found) == len(masks) > 1
    for one in found:
        assert one.class_name == "tv"
        assert one.mask is not None
        assert (one.mask == masks[round(one.score, 4)]).all()
        left, top, right, bottom = map(int, one.box)
        assert one.mask[top:bottom, left:right].sum() == one.mask.sum()
        assert all(edge.any() for edge in (one.mask[top], one.mask[bottom - 1], one.mask[:, left], one.mask[:, right - 1]))


def test_masks_have_the_size_of_the_picture(detector_folder: Path, picture: Image.Image):
    for one in Mask2Former(str(detector_folder))(picture.resize((50, 33))):
        assert one.mask is not None
        assert one.mask.shape == (33, 50)
        assert one.box[2] <= 50
        assert one.box[3] <= 33


def test_colours_are_those_of_clips_own_similarities(classifier_folder: Path, picture: Image.Image):
    model = CLIPModel.from_pretrained(classifier_folder).eval()
    tokenizer, prepare = CLIPTokenizer.from_pretrained(classifier_folder), AutoImageProcessor.from_pretrained(classifier_folder)
    classify = ClipColours(str(classifier_folder))
    named = set()
    for n in range(12):
        found = Detection("cat", 0.9, (n, n, 40 + n, 30 + n))
        similarities = []
        for colour in COLOURS:
            texts = [f"a photo of a {colour} cat", f"a photo of a {colour}-colored cat", f"a photo of a {colour} object"]
            pixels = prepare(images=picture.crop((n, n, 40 + n, 30 + n)), return_tensors="pt")
            with torch.no_grad():
                output = model(**tokenizer(texts, padding=True, return_tensors="pt"), **pixels)
            mean = output.text_embeds.mean(dim=0)
            similarities.append(float(output.image_embeds[0] @ mean / mean.norm()))
        assert classify(picture, found) == COLOURS[int(np.argmax(similarities))]
        named.add(classify(picture, found))
    assert len(named) > 1
    assert classify(picture, Detection("cat", 0.9, (5, 5, 40, 6))) in COLOURS  # one row of pixels


def test_an_object_is_cut_out_and_set_before_grey():
    image = Image.new("RGB", (10, 8), "red")
    mask = np.zeros((8, 10), dtype=bool)
    mask[2:5, 3:6] = True
    mask[2, 3] = False
    pixels = np.asarray(cut_out(image, Detection("cat", 0.9, (3.0, 2.0, 6.0, 5.0), mask)))
    assert pixels.shape == (3, 3, 3)
    assert pixels[0, 0].tolist() == [0x99] * 3
    assert (pixels[1:] == [255, 0, 0]).all()
    whole = np.asarray(cut_out(image, Detection("cat", 0.9, (3.0, 2.0, 6.0, 5.0))))
    assert (whole == [255, 0, 0]).all()


def test_who_is_stopped_goes_on_with_what_is_missing(tmp_path: Path, pictures: Path, prompts: list[GenEvalPrompt]):
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = evaluate_geneval(pictures, prompts, Known(), Red(), whole, quiet)
    stopped = Known()
    stopped.limit = 4
    with pytest.raises(KeyboardInterrupt):
        evaluate_geneval(pictures, prompts, stopped, Red(), out, quiet)
    results = out / "results.jsonl"
    assert len(lines_of(out)) == 4
    damaged = b'\xff\n{"tag": []}\n'
    results.write_bytes(damaged + results.read_bytes()[:-20])  # the last line cut off
    again, heard = Known(), []
    summary = evaluate_geneval(pictures, prompts, again, Red(), out, quiet, lambda done, count: heard.append((done, count)))
    assert again.asked == 3
    assert summary == expected
    assert results.read_text() == (whole / "results.jsonl").read_text()
    assert heard == [(n, 6) for n in range(1, 7)]


def test_what_has_changed_is_judged_again(tmp_path: Path, pictures: Path, prompts: list[GenEvalPrompt]):
    out = tmp_path / "out"

    def asked(known: Known) -> int:
        evaluate_geneval(pictures, prompts, known, Red(), out, quiet)
        assert len(lines_of(out)) == 6
        return known.asked

    assert asked(Known()) == 6
    assert asked(Known()) == 0
    Image.new("RGB", (30, 30), "blue").save(pictures / "00001" / "samples" / "0001.png")
    assert asked(Known()) == 1
    assert asked(Known(fingerprint="another")) == 6


def test_pictures_of_other_prompts_are_refused(tmp_path: Path, pictures: Path, prompts: list[GenEvalPrompt]):
    known, out = Known(), tmp_path / "out"
    metadata = pictures / "00001" / "metadata.jsonl"
    metadata.write_text(json.dumps(dict(reversed(json.loads(prompts[1].metadata).items()))))
    evaluate_geneval(pictures, prompts, known, Red(), out, quiet)  # in another order, but the same
    metadata.write_text(prompts[0].metadata)
    with pytest.raises(UserError, match="generated from other prompts"):
        evaluate_geneval(pictures, prompts, known, Red(), out, quiet)
    metadata.unlink()
    with pytest.raises(UserError, match="only 2, counted from 0"):
        evaluate_geneval(pictures, prompts[:2], known, Red(), out, quiet)


def test_empty_and_missing_folders_and_broken_pictures_are_refused(tmp_path: Path, pictures: Path, prompts: list[GenEvalPrompt]):
    known, out = Known(), tmp_path / "out"
    (pictures / "00002" / "samples" / "0001.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0001\.png cannot be read"):
        evaluate_geneval(pictures, prompts, known, Red(), out, quiet)
    assert len(lines_of(out)) == 5
    shutil.rmtree(pictures)
    with pytest.raises(UserError, match="no folder"):
        evaluate_geneval(pictures, prompts, known, Red(), out, quiet)
    pictures.mkdir()
    with pytest.raises(UserError, match="There are no images"):
        evaluate_geneval(pictures, prompts, known, Red(), out, quiet)


def test_a_class_that_the_detector_does_not_know_is_refused(tmp_path: Path, pictures: Path, prompts: list[GenEvalPrompt]):
    known = Known()
    known.class_names = frozenset({"tv"})
    with pytest.raises(UserError, match="does not know computer mouse"):
        evaluate_geneval(pictures, prompts, known, Red(), tmp_path / "out", quiet)


def test_a_folder_with_another_model_or_half_of_one_is_refused(tmp_path: Path, detector_folder: Path, classifier_folder: Path):
    with pytest.raises(UserError, match="model_type mask2former, but clip is needed"):
        ClipColours(str(detector_folder))
    broken = tmp_path / "broken"
    shutil.copytree(classifier_folder, broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ClipColours(str(broken))
    shutil.copytree(detector_folder, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        Mask2Former(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="There is no folder"):
        Mask2Former("/nowhere/at/all")


def test_a_fingerprint_is_that_of_weights_and_settings(tmp_path: Path, detector_folder: Path):
    before = Mask2Former(str(detector_folder))
    assert before.class_names == {"person", "tv", "computer mouse"}
    shutil.copytree(detector_folder, tmp_path / "copy")
    assert Mask2Former(str(tmp_path / "copy")).fingerprint == before.fingerprint
    settings = tmp_path / "copy" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("96", "128"))
    assert Mask2Former(str(tmp_path / "copy")).fingerprint != before.fingerprint
