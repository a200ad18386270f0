"""Each rule, one by one, on a figure that breaks no other."""

from dataclasses import replace

import pytest

from microdit.evaluation.compare import GENEVAL_PROMPTS, GENEVAL_SAMPLES, dpg_comparability, geneval_comparability, metric_comparability
from microdit.evaluation.geneval.emoji_scenes import EmojiColours, EmojiDetector
from microdit.evaluation.published import Protocol
from microdit.evaluation.run_results import DPGResult, GenEvalResult, Measured

COCO = Protocol("FID-30K", {"fid": "inception", "clip-score": None}, "coco2014", 30000, 256)
AS_PUBLISHED = Measured(14.2, "inception-2015-12-05", "coco2014", 40504, 30000, 256)
OFFICIAL = GenEvalResult(
    {"overall": 0.5}, {task: prompts * GENEVAL_SAMPLES for task, prompts in GENEVAL_PROMPTS.items()}, 553, 0, "ab12 cd34"
)


def test_the_same_protocol_is_comparable():
    found = metric_comparability("fid", AS_PUBLISHED, COCO)
    assert found.comparable
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"network": "efficientnet-lite0"}, "features of efficientnet-lite0, not of Inception"),
        ({"network": None}, "the run's file does not state the feature network"),
        ({"reference": "emoji"}, "compared with emoji, not with coco2014"),
        ({"reference": None}, "the run's file does not state the reference set"),
        ({"reference_pictures": 2000}, "compared with only 2,000 images of coco2014"),
        ({"pictures": 512}, "512 images, not 30,000: the Frechet distance is biased upwards"),
        ({"pictures": 50000}, "50,000 images, not 30,000: the Frechet distance is biased downwards"),
        ({"pictures": None}, "the run's file does not state the number of generated images"),
        ({"side": 512}, "images of 256 px there, 512 px here"),
        ({"side": None}, "images of 256 px there, unknown here"),
    ],
)
def test_each_difference_is_a_reason_of_its_own(change, reason: str):
    assert metric_comparability("fid", replace(AS_PUBLISHED, **change), COCO).reasons == (reason,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"networks": {"fid": None}}, "the source does not state the feature network"),
        ({"reference": None}, "the source does not state the reference set"),
        ({"pictures": None}, "the source does not state the number of generated images"),
    ],
)
def test_what_the_source_keeps_to_itself_is_a_reason(change, reason: str):
    assert metric_comparability("fid", AS_PUBLISHED, replace(COCO, **change)).reasons == (reason,)


def test_a_size_that_the_source_does_not_tell_is_said_but_no_reason():
    found = metric_comparability("fid", AS_PUBLISHED, replace(COCO, side=None))
    assert found.comparable
    assert found.unknown == ("the source does not state the image size (256 px here)",)


def test_the_number_of_pictures_biases_no_mean():
    protocol = replace(COCO, networks={"clip-score": "clip"})
    reasons = metric_comparability("clip-score", replace(AS_PUBLISHED, network="clip-vit-large", pictures=512), protocol).reasons
    assert reasons == ("512 images, not 30,000",)


def test_all_reasons_are_told_at_once():
    assert len(metric_comparability("fid", Measured(1.0, "efficientnet-lite0", "emoji", 1807, 512, 64), COCO).reasons) == 4


def test_the_authors_553_prompts_are_comparable_but_for_the_detector():
    assert sum(GENEVAL_PROMPTS.values()) == 553
    found = geneval_comparability(OFFICIAL)
    assert found.comparable
    assert "mmdetection" in found.unknown[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompts": 552}, "552 prompts, not 553"),
        ({"without_pictures": 3}, "3 prompts have no image"),
        ({"pictures": {**OFFICIAL.pictures, "colors": 94}}, "1,930 images, not 4 of each of the authors' prompts"),
        ({"rewritten_by": "words"}, "prompts were rewritten by words"),
        ({"judges": f"{EmojiDetector.fingerprint} {EmojiColours().fingerprint}"}, "prompts about emoji, judged by matching Twemoji, "
         "not GenEval's prompts and detector"),
    ],
)  # fmt: skip
def test_other_prompts_pictures_and_judges_are_not_genevals(change, reason: str):
    assert geneval_comparability(replace(OFFICIAL, **change)).reasons == (reason,)


def test_dpg_bench_is_comparable_with_all_prompts_and_the_authors_judge_alone():
    assert dpg_comparability(DPGResult(84.2, 1065, "mPLUG-large")).comparable
    assert dpg_comparability(DPGResult(84.2, 50, "gpt-4o")).reasons == (
        "50 prompts, not 1,065",
        "questions answered by gpt-4o, not by mPLUG-large",
    )
