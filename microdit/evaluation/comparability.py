"""May two figures stand beside each other? Rules, each with the sentence that says why not."""

from dataclasses import dataclass

from microdit.evaluation.geneval_rules import TASKS
from microdit.evaluation.published import Protocol
from microdit.evaluation.run_results import GenEvalResult, Measured
from microdit.formats import count

FRECHET = {"fid", "clip-fid"}  # whose expectation depends on the number of pictures
EMOJI = "emoji"  # how the fingerprint of the judge of emoji begins
GENEVAL_PROMPTS = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))  # of evaluation_metadata.jsonl, 553 in all
GENEVAL_SAMPLES = 4


@dataclass(frozen=True)
class Verdict:
    """`reasons` why figures are not comparable; if there are none, `unknown` says what nobody has told."""

    reasons: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    @property
    def comparable(self) -> bool:
        return not self.reasons


def metric_verdict(metric: str, measured: Measured, protocol: Protocol) -> Verdict:
    """The same network, reference, number of pictures and size as in `protocol`, whose networks name the metric?"""
    reasons = [
        _network(measured.network, protocol.networks[metric]),
        _reference(measured, protocol),
        _pictures(metric, measured.pictures, protocol.pictures),
    ]
    unknown = []
    here = "not told here" if measured.side is None else f"{measured.side} px here"
    if protocol.side is None:
        unknown.append(f"the size at which pictures were compared is not told there ({here})")
    elif measured.side != protocol.side:
        reasons.append(f"pictures of {protocol.side} px there, {here}")
    return Verdict(tuple(reason for reason in reasons if reason), tuple(unknown))


def geneval_verdict(result: GenEvalResult) -> Verdict:
    """The 553 prompts of the authors, four pictures of each? Prompts about emoji are others."""
    if result.judges.startswith(EMOJI):
        return Verdict(("prompts about emoji, judged by matching Twemoji, not GenEval's prompts and detector",))
    reasons = []
    if result.prompts != sum(GENEVAL_PROMPTS.values()):
        reasons.append(f"{count(result.prompts)} prompts, not {sum(GENEVAL_PROMPTS.values())}")
    if result.without_pictures:
        reasons.append(f"{count(result.without_pictures)} prompts have no picture")
    if result.pictures != {task: prompts * GENEVAL_SAMPLES for task, prompts in GENEVAL_PROMPTS.items()}:
        reasons.append(f"{count(sum(result.pictures.values()))} pictures, not {GENEVAL_SAMPLES} of each of the authors' prompts")
    return Verdict(tuple(reasons), ("objects were found by the Mask2Former of transformers here, by mmdetection's there",))


def _network(here: str | None, there: str | None) -> str | None:
    if there is None:
        return "the source does not say which network saw the pictures"
    if here is None:
        return "the run's file does not say which network saw the pictures"
    return None if there in here.rpartition("/")[2].lower() else f"features of {here}, not of {there.capitalize()}"


def _reference(measured: Measured, protocol: Protocol) -> str | None:
    if protocol.reference is None:
        return "the source does not say which pictures it compared with"
    if measured.reference is None:
        return "the run's file does not say which pictures it compared with"
    if measured.reference != protocol.reference:
        return f"compared with {measured.reference}, not with {protocol.reference}"
    pictures, needed = measured.reference_pictures, protocol.pictures
    if pictures is not None and needed is not None and pictures < needed:
        return f"compared with {count(pictures)} pictures of {protocol.reference}, a part of it"
    return None


def _pictures(metric: str, here: int | None, there: int | None) -> str | None:
    if there is None:
        return "the source does not say how many pictures were drawn"
    if here is None:
        return "the run's file does not say how many pictures were drawn"
    if here == there:
        return None
    bias = "" if metric not in FRECHET else f": the Frechet distance is biased {'upwards' if here < there else 'downwards'}"
    return f"{count(here)} pictures, not {count(there)}{bias}"
