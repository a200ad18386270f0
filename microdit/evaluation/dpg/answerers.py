"""Vision models that answer yes-or-no questions about pictures: of transformers, or behind any endpoint with OpenAI's chat API.

The authors of DPG-Bench ask mPLUG-large, which transformers does not have: scores by other models are comparable among themselves only.
"""

import io
import re
from typing import Any, Protocol

import torch
from PIL import Image

from microdit.encoders.model_files import DOWNLOAD_AGAIN, find_folder, lasting_name, load_network
from microdit.errors import UserError
from microdit.evaluation.chat.client import ChatClient, image_part, text_part
from microdit.evaluation.chat.request_log import Answer, Exchange
from microdit.evaluation.features import load_beside
from microdit.io.files import read_json
from microdit.io.untrusted_text import parse_json

ANSWERER = "Salesforce/blip-vqa-capfilt-large"
INSTRUCTIONS = "{question} Answer with one word: yes or no."
LONGEST_REPLY = 16  # tokens that a local model may write


class Answerer(Protocol):
    """Answers questions about pictures. `name` changes whenever its answers could; `concurrency` questions may be asked at a time."""

    concurrency: int

    @property
    def name(self) -> str: ...

    def __call__(self, question: str, png: bytes, exchange: Exchange) -> None:
        """Ask once, and add the answer to the exchange."""
        ...


def read_yes_or_no(answer: str) -> bool | None:
    """Read an answer that begins or ends with yes or no, such as "Yes, it is." or {"answer": "no"}; None for anything else."""
    answer = answer.rpartition("</think>")[2]
    for found in reversed(re.findall(r"\{[^{}]*\}", answer)):
        try:
            values = [value for value in parse_json(found).values() if isinstance(value, str)]
        except ValueError:
            continue
        answer = "\n".join(values)
    lines = [line for line in answer.splitlines() if re.search(r"\w", line)] or [""]
    found_words = [match[1].lower() for line in (lines[-1], lines[0]) if (match := _LINE.match(line.strip()))]
    return found_words[0] == "yes" if found_words else None


_LINE = re.compile(r"\W*(?:(?:the |my )?(?:final )?answer(?: is)?\W*)?(yes|no)\b", re.IGNORECASE)


class EndpointAnswerer(ChatClient):
    """A vision model behind an endpoint."""

    who = "The vision model"
    concurrency = 4

    @property
    def name(self) -> str:
        return self.model

    def __call__(self, question: str, png: bytes, exchange: Exchange) -> None:
        self.complete([text_part(INSTRUCTIONS.format(question=question)), image_part(png)], exchange)


class TransformersAnswerer:
    """A vision model of transformers, from a folder or hub id: BLIP or ViLT for questions, or any that chats about a picture."""

    concurrency = 1

    def __init__(self, place: str = ANSWERER, device: str = "cpu") -> None:
        """Load the model. Raises UserError if there is none, or its settings, processor and weights do not match."""
        from transformers import AutoProcessor

        model_type = str(read_json(find_folder(place, ["*.json", "*.txt"]) / "config.json", DOWNLOAD_AGAIN).get("model_type"))
        self._model, folder, fingerprint = load_network(place, (model_type,), _model_class(model_type, place))
        find_folder(place, ["*.model", "*.jinja"])
        names = ("preprocessor_config.json", "processor_config.json")  # recent versions of transformers write the second alone
        self._processor = load_beside(folder, next((name for name in names if (folder / name).is_file()), names[0]), AutoProcessor)
        self._ask = {"vilt": self._classify, "blip": self._generate}.get(model_type, self._chat)
        self._model.to(device)
        self.name = f"{lasting_name(place)} {fingerprint}"

    @torch.no_grad()
    def __call__(self, question: str, png: bytes, exchange: Exchange) -> None:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            answer = self._ask(image.convert("RGB"), question)
        exchange.sending()
        exchange.answered(Answer(answer, 0))

    def _classify(self, image: Image.Image, question: str) -> str:
        inputs = self._processor(images=image, text=question, truncation=True, return_tensors="pt").to(self._model.device)
        return str(self._model.config.id2label[int(self._model(**inputs).logits[0].argmax())])

    def _generate(self, image: Image.Image, question: str) -> str:
        inputs = self._processor(images=image, text=question, truncation=True, return_tensors="pt").to(self._model.device)
        ids_1L = self._model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=LONGEST_REPLY)
        return str(self._processor.decode(ids_1L[0, 1:], skip_special_tokens=True))  # the first token starts the answer

    def _chat(self, image: Image.Image, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTIONS.format(question=question)}]
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self._processor(images=image, text=text, return_tensors="pt").to(self._model.device)
        ids_1L = self._model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=LONGEST_REPLY)
        return str(self._processor.decode(ids_1L[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _model_class(model_type: str, place: str) -> Any:
    """Return the class for models of this type. Raises UserError if they answer no questions about pictures."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    own = {"vilt": "ViltForQuestionAnswering", "blip": "BlipForQuestionAnswering"}
    name = own.get(model_type) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UserError(
            f"{place} is a model of the type {model_type}, which answers no questions about pictures: name one such as {ANSWERER}, or an "
            "endpoint with --judge-url."
        )
    return getattr(transformers, name)
