"""Does a picture show what its caption says? The cosine of its CLIP embedding and the caption's (Hessel et al. 2021, arXiv 2104.08718).

Text-to-image papers report 100 max(0, cos), averaged; the paper itself weighs with 2.5 instead of 100.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.encoders.model_files import find_folder, lasting_name, loading
from microdit.errors import UserError
from microdit.evaluation.features import BATCH, load_network
from microdit.evaluation.metrics.bootstrap import Interval, bootstrap_interval
from microdit.evaluation.metrics.feature_matrix import float64_features

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]


def clip_scores(images_ND: Tensor, captions_ND: Tensor) -> Tensor:
    """(N,) float64, 0 to 100: of each picture's embedding and that of its caption, in the same row, of any length but 0.

    Raises UserError if the two are not of one shape, not finite, or 0.
    """
    images_ND, captions_ND = float64_features(images_ND), float64_features(captions_ND)
    if images_ND.shape != captions_ND.shape:
        raise UserError(
            f"Each picture needs one caption, embedded by the same CLIP; the pictures' embeddings have the shape {tuple(images_ND.shape)}, "
            f"the captions' {tuple(captions_ND.shape)}."
        )
    for name, embeddings_ND in (("picture", images_ND), ("caption", captions_ND)):
        empty = int((embeddings_ND == 0).all(dim=1).sum())
        if empty:
            raise UserError(f"The embeddings of {empty} {name}s are 0 and point nowhere: embed them again.")
    return 100 * F.cosine_similarity(images_ND, captions_ND, dim=1, eps=0).clamp(min=0)


def clip_score(images_ND: Tensor, captions_ND: Tensor, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean of `clip_scores`, with its bootstrap interval. Raises UserError as `clip_scores` and `bootstrap_interval` do."""
    return bootstrap_interval(lambda scores_N: float(scores_N.mean()), clip_scores(images_ND, captions_ND), resamples, confidence, seed)


class ClipCaptions:
    """Projected caption embeddings of a CLIP from transformers, which lie in the space of `ClipFeatures` of the same place."""

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """`place` is a folder or an id of the hub, with a tokenizer beside the weights. Raises UserError."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection  # slow to import

        self._model, folder, self.fingerprint = load_network(place, ("clip", "clip_text_model"), CLIPTextModelWithProjection)
        self._model.to(device)
        self.name = lasting_name(place)
        find_folder(place, _TOKENIZER_FILES)
        if not any(all((folder / name).is_file() for name in names) for names in (_TOKENIZER_FILES[:1], _TOKENIZER_FILES[3:])):
            raise UserError(f"{folder} has no tokenizer: put tokenizer.json into it, from where the model comes from.")
        with loading(folder):
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @torch.no_grad()
    def __call__(self, captions: list[str], on_captions: Callable[[int], None] | None = None) -> Tensor:
        """(B, D) float32 on the CPU. Captions beyond CLIP's 77 tokens are cut, as it was trained. `on_captions(n)`: after n more."""
        if not captions:
            raise UserError("There are no captions to embed.")
        limit = self._model.config.max_position_embeddings
        embeddings = []
        for start in range(0, len(captions), BATCH):
            tokens = self._tokenizer(
                captions[start : start + BATCH], padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
            ).to(self._model.device)
            embeddings.append(self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds.float().cpu())
            if on_captions:
                on_captions(len(embeddings[-1]))
        return torch.cat(embeddings)
