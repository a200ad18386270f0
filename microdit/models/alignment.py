"""Representation alignment: a block's tokens are drawn towards the features of a frozen vision encoder (REPA, 2410.06940).

A projector, which is trained beside the denoiser and has no part in sampling, maps the tokens of one block to the features' width. The loss
is the negative mean cosine similarity with the features at the same places of the image.

Notable:
- with tokens dropped, only those that the block sees are aligned;
- the projector is REPA's MLP, or the 3 x 3 convolution of iREPA (2512.10794), to which dropped tokens are zeros;
- `spatial_norm` standardises each channel of the features over the image, also of iREPA: what places have in common is left out.

Shape legend: B batch, T tokens, K tokens that the block sees, D their width, E channels of features, Y X rows and columns of features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microdit.models.routing import put_tokens, take_tokens

ProjectorKind = Literal["mlp", "conv"]
KERNEL = 3


@dataclass(frozen=True)
class ProjectorShape:
    """A projector from tokens of width `dim` to features of `channels`. `width` is that of the MLP's two hidden layers."""

    kind: ProjectorKind
    dim: int
    width: int
    channels: int


class Alignment(nn.Module):
    """The projector, and the similarity that it is trained for.

    `block` is the number of the backbone's block, from 1, whose tokens it is given, and `weight` that of the similarity in the loss.

    >>> import torch
    >>> alignment = Alignment(ProjectorShape("mlp", dim=64, width=128, channels=1280), block=2)
    >>> tokens_BTD, features_BEYX = torch.randn(2, 16, 64), torch.randn(2, 1280, 4, 4)
    >>> alignment(tokens_BTD, features_BEYX, grid=(4, 4)).shape
    torch.Size([2])
    """

    def __init__(self, shape: ProjectorShape, block: int, weight: float = 0.5, spatial_norm: bool = False):
        super().__init__()
        self.shape, self.block, self.weight, self.spatial_norm = shape, block, weight, spatial_norm
        dim, width, channels = shape.dim, shape.width, shape.channels
        self.projector: nn.Module
        if shape.kind == "conv":
            self.projector = nn.Conv2d(dim, channels, KERNEL, padding=KERNEL // 2)
        else:
            layers = nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, channels)
            self.projector = nn.Sequential(*layers)

    def forward(self, tokens_BKD: Tensor, features_BEYX: Tensor, grid: tuple[int, int], keep_ids_BK: Tensor | None = None) -> Tensor:
        """Return the mean cosine similarity of each sample's projected tokens with the features in their places, (B,).

        `grid` is the number of rows and columns of all T patches; `keep_ids_BK` says which of them the tokens are, if not all.
        """
        target_BTE = self.targets(features_BEYX, grid)
        target_BKE = target_BTE if keep_ids_BK is None else take_tokens(target_BTE, keep_ids_BK)
        projected_BKE = self._project(tokens_BKD, grid, keep_ids_BK)
        projected_BKE = F.normalize(projected_BKE.to(torch.promote_types(projected_BKE.dtype, torch.float32)), dim=2)
        return (projected_BKE * F.normalize(target_BKE, dim=2)).sum(dim=2).mean(dim=1)

    def targets(self, features_BEYX: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the features of all patches, (B, T, E), interpolated to their grid."""
        if self.spatial_norm:
            deviation_BE11, mean_BE11 = torch.std_mean(features_BEYX, dim=(2, 3), keepdim=True, correction=0)
            features_BEYX = (features_BEYX - mean_BE11) / (deviation_BE11 + 1e-6)
        if features_BEYX.shape[-2:] != grid:
            features_BEYX = F.interpolate(features_BEYX, grid, mode="bilinear", align_corners=False, antialias=True)
        return features_BEYX.flatten(2).mT

    def _project(self, tokens_BKD: Tensor, grid: tuple[int, int], keep_ids_BK: Tensor | None) -> Tensor:
        if not isinstance(self.projector, nn.Conv2d):
            return self.projector(tokens_BKD)
        B, _, D = tokens_BKD.shape
        tokens_BTD = tokens_BKD
        if keep_ids_BK is not None:
            tokens_BTD = put_tokens(tokens_BKD, keep_ids_BK, tokens_BKD.new_zeros(B, grid[0] * grid[1], D))
        projected_BTE = self.projector(tokens_BTD.mT.unflatten(2, grid)).flatten(2).mT
        return projected_BTE if keep_ids_BK is None else take_tokens(projected_BTE, keep_ids_BK)
