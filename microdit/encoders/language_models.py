"""Language models as text encoders: hidden states of Qwen, Gemma, Llama and their relatives, and of the encoder of T5Gemma.

Which hidden states are taken, and what is written around a caption, is part of the encoder's name, as in the query of an address:

    Qwen/Qwen3-0.6B?layer=-2&tokens=512&template=Describe the picture: {caption}

Shape legend: B captions, L tokens, E channels of a token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

import torch
from torch import Tensor

from microdit.encoders.model_files import (
    DOWNLOAD_AGAIN,
    check_complete,
    find_folder,
    fingerprint_of,
    loading,
    weight_files,
    weight_patterns,
)
from microdit.errors import UserError
from microdit.io.files import read_json

DEFAULT_TOKENS, MOST_TOKENS = 256, 512
CAPTION = "{caption}"
DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")  # values of model_type
ENCODERS = ("t5gemma",)  # only the encoder is used


@dataclass(frozen=True)
class TextOptions:
    """What a name says of how captions are encoded.

    `layer` counts hidden states from 0, the embeddings, or backwards from -1, the last ones after the final norm. `template` holds
    `{caption}` once. `tokens` is the length at which captions are cut, template included.
    """

    layer: int = -1
    template: str = CAPTION
    tokens: int | None = None


def split_options(name: str) -> tuple[str, str]:
    """Return the place of a model and the rest of its name, which begins with a question mark or is empty."""
    place, mark, options = name.partition("?")
    return place, mark + options


def parse_options(name: str) -> TextOptions:
    """Return the options in a name, such as `folder?layer=-2&tokens=512`. Raises UserError for unknown ones and wrong values."""
    text = split_options(name)[1][1:]
    found: dict[str, str] = {}
    for item in text.split("&") if text else []:
        key, equals, value = item.partition("=")
        if key not in ("layer", "template", "tokens") or not equals or key in found:
            raise UserError(f"The text encoder {name} has the option {item}: known are layer=N, tokens=N and template=TEXT, once each.")
        found[key] = unquote(value)
    try:
        layer, tokens = int(found.get("layer", "-1")), int(found["tokens"]) if "tokens" in found else None
    except ValueError:
        raise UserError(f"The text encoder {name} has a layer or tokens that is no whole number: write layer=-2 or tokens=512.") from None
    template = found.get("template", CAPTION)
    if template.count(CAPTION) != 1:
        raise UserError(f"The text encoder {name} has the template {template}: it must hold {CAPTION} once.")
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise UserError(f"The text encoder {name} is to read {tokens} tokens: from 1 to {MOST_TOKENS} are possible.")
    return TextOptions(layer, template, tokens)


class LanguageModel:
    """A text encoder that returns hidden states of a language model. Vectors are float32, on the model's device, zero at padding."""

    def __init__(self, name: str, place: str):
        """Load the model of a folder or hub id, with the options of `name`. Raises UserError if it cannot be used."""
        options, folder = parse_options(name), find_folder(place, ["*.json", "*.txt", "*.model"])
        self.name = name
        self.model, self._tokenizer, files = _load(place, folder)
        self.fingerprint = fingerprint_of(files)
        table = self.model.get_input_embeddings()
        self.channels: int = table.embedding_dim
        if len(self._tokenizer) > table.num_embeddings:
            raise UserError(
                f"The tokenizer in {folder} has {len(self._tokenizer)} tokens, and the model {table.num_embeddings}: "
                "they do not belong together."
            )
        config = self.model.config.encoder if hasattr(self.model.config, "encoder") else self.model.config
        if not -config.num_hidden_layers - 1 <= options.layer <= config.num_hidden_layers:
            raise UserError(
                f"The text encoder {name} has no hidden states {options.layer}: they are 0 to {config.num_hidden_layers}, or -1 and below."
            )
        self._layer, self._template = options.layer, options.template
        self.max_tokens: int = min(options.tokens or DEFAULT_TOKENS, config.max_position_embeddings)
        self._kept_at_end = self._template_end()
        if self._kept_at_end >= self.max_tokens:
            raise UserError(
                f"The template of the text encoder {name} leaves no room for a caption in {self.max_tokens} tokens: shorten it."
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def tokenize(self, captions: list[str]) -> list[list[int]]:
        """Return the token ids of each caption in the template. Where that is too long, the end of the caption is cut."""
        return [self._cut(ids) for ids in self._ids(captions)]

    @torch.no_grad()
    def embed(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, L, E), zero at padding, and the mask (B, L), True at real tokens. The longest caption has L tokens."""
        return self._embed(ids, max(map(len, ids)))

    @torch.no_grad()
    def embed_full(self, ids: list[list[int]]) -> Tensor:
        """Return the vectors for the whole context, (B, max_tokens, E)."""
        return self._embed(ids, self.max_tokens)[0]

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokenize captions and return the vectors and the mask of `embed`."""
        return self.embed(self.tokenize(captions))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model. These models are trained in bfloat16 and overflow in float16, so they use float32 instead."""
        self.model.to(device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)
        return self

    def _embed(self, ids: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
        device = self.model.device
        ids_BL = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in ids], device=device)
        mask_BL = (torch.arange(length) < torch.tensor([len(tokens) for tokens in ids])[:, None]).to(device)
        output = self.model(input_ids=ids_BL, attention_mask=mask_BL.long(), output_hidden_states=self._layer != -1)
        states_BLE = output.last_hidden_state if self._layer == -1 else output.hidden_states[self._layer]
        return states_BLE.float().masked_fill(~mask_BL.unsqueeze(-1), 0), mask_BL

    def _ids(self, captions: list[str]) -> list[list[int]]:
        if not captions:
            return []
        ids: list[list[int]] = self._tokenizer([self._template.replace(CAPTION, caption) for caption in captions])["input_ids"]
        return [tokens or [0] for tokens in ids]  # an empty caption, if the tokenizer adds neither start nor end

    def _cut(self, ids: list[int]) -> list[int]:
        surplus = len(ids) - self.max_tokens
        if surplus <= 0:
            return ids
        end = len(ids) - self._kept_at_end
        return ids[: end - surplus] + ids[end:]

    def _template_end(self) -> int:
        """Return how many tokens follow the caption: those with which two different captions end alike."""
        one, other = self._ids(["a", "o"])
        alike = 0
        while alike < min(len(one), len(other)) and one[-1 - alike] == other[-1 - alike]:
            alike += 1
        return alike


def is_language_model(folder: Path) -> bool:
    """Return whether the folder holds a language model that can encode captions."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json", DOWNLOAD_AGAIN).get("model_type") in DECODERS + ENCODERS


def _load(place: str, folder: Path) -> tuple[Any, Any, list[Path]]:
    """Load model and tokenizer in float32, and return them with the weight files."""
    from transformers import AutoModel, AutoTokenizer, T5GemmaEncoderModel  # slow to import
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would report the head of a causal model as unused
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder} has no tokenizer: copy tokenizer.json into it from the model's source.")
    find_folder(place, weight_patterns("model", ".safetensors"))
    files = weight_files(folder, "model", ".safetensors")
    if not files:
        raise UserError(f"There are no weights in {folder} (no model.safetensors): download the whole folder again.")
    is_encoder = read_json(folder / "config.json", DOWNLOAD_AGAIN)["model_type"] in ENCODERS
    with loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = (T5GemmaEncoderModel if is_encoder else AutoModel).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # checked below, with the names of the weights
            output_loading_info=True,
            **({"is_encoder_decoder": False} if is_encoder else {"use_cache": False}),
        )
    check_complete(folder, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    return model.eval().requires_grad_(False), tokenizer, files
