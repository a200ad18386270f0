"""Metrics on tables of feature vectors, (N, D), and the input checks that all of them share."""

from torch import Tensor

from microdit.errors import UserError


def float64_features(features_ND: Tensor) -> Tensor:
    """Return the features as float64. Raises UserError unless they are finite and of shape (N, D) with N and D at least 1."""
    if features_ND.ndim != 2 or not features_ND.numel():
        raise UserError(
            f"Features must be a table of images by dimensions with at least one of each, not of shape {tuple(features_ND.shape)}."
        )
    broken = int((~features_ND.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(f"The features of {broken} of {len(features_ND)} images are not finite: leave these images out, or repair them.")
    return features_ND.detach().double()


def same_space(one_ND: Tensor, other_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets as float64. Raises UserError as `float64_features` does, or if their dimensions differ."""
    one_ND, other_MD = float64_features(one_ND), float64_features(other_MD)
    check_same_dimensions(one_ND.shape[1], other_MD.shape[1])
    return one_ND, other_MD


def check_same_dimensions(one: int, other: int) -> None:
    """Raise UserError if features of these dimensions cannot come from the same encoder."""
    if one != other:
        raise UserError(f"Features of {one} and {other} dimensions cannot be compared: they come from different encoders.")
