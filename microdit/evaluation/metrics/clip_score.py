"""CLIP score: the cosine similarity of an image's and its caption's CLIP embeddings (Hessel et al. 2021, arXiv 2104.08718).

Following text-to-image papers, the score is the mean of 100 max(0, cos); the original paper uses the factor 2.5.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.encoders.model_files import find_folder, lasting_name, load_network, loading
from microdit.errors import UserError
from microdit.evaluation.features import BATCH
from microdit.evaluation.metrics import float64_features
from microdit.evaluation.metrics.bootstrap import Interval, bootstrap_interval

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]


def clip_scores(images_ND: Tensor, captions_ND: Tensor) -> Tensor:
    """Return the score of each image and the caption in the same row, (N,) float64 from 0 to 100. Embeddings need not be normalised.

    Raises UserError if the shapes differ, or an embedding is zero or not finite.
    """
    images_ND, captions_ND = float64_features(images_ND), float64_features(captions_ND)
    if images_ND.shape != captions_ND.shape:
        raise UserError(
            f"Each image needs one caption, embedded by the same CLIP: the image embeddings have shape {tuple(images_ND.shape)}, "
            f"the caption embeddings {tuple(captions_ND.shape)}."
        )
    for name, embeddings_ND in (("image", images_ND), ("caption", captions_ND)):
        empty = int((embeddings_ND == 0).all(dim=1).sum())
        if empty:
            raise UserError(f"The embeddings of {empty} {name}s are zero and have no direction: embed them again.")
    return 100 * F.cosine_similarity(images_ND, captions_ND, dim=1, eps=0).clamp(min=0)


def clip_score(images_ND: Tensor, captions_ND: Tensor, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean of `clip_scores` with its bootstrap interval. Raises UserError as `clip_scores` and `bootstrap_interval` do."""
    return bootstrap_interval(lambda scores_N: float(scores_N.mean()), clip_scores(images_ND, captions_ND), resamples, confidence, seed)


class ClipCaptions:
    """Projected caption embeddings of a CLIP from transformers, in the same space as `ClipFeatures` of the same `place`."""

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """Load from `place`, a folder or hub id. Raises UserError if it is no CLIP, or has no tokenizer beside the weights."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection  # slow to import

        self._model, folder, self.fingerprint = load_network(place, ("clip", "clip_text_model"), CLIPTextModelWithProjection)
        self._model.to(device)
        self.name = lasting_name(place)
        find_folder(place, _TOKENIZER_FILES)
        if not any(all((folder / name).is_file() for name in names) for names in (_TOKENIZER_FILES[:1], _TOKENIZER_FILES[3:])):
            raise UserError(f"{folder} has no tokenizer: copy tokenizer.json from the model's source into it.")
        with loading(folder):
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @torch.no_grad()
    def __call__(self, captions: list[str], on_captions: Callable[[int], None] | None = None) -> Tensor:
        """Return embeddings (B, D), float32 on the CPU. Captions are truncated to CLIP's 77 tokens. `on_captions(n)` reports n more."""
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
