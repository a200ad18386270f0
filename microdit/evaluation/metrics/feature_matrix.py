"""Tables of feature vectors, (N, D): what every metric asks of them."""

from torch import Tensor

from microdit.errors import UserError


def float64_features(features_ND: Tensor) -> Tensor:
    """As float64. Raises UserError unless they are (N, D) with N and D from 1, and finite."""
    if features_ND.ndim != 2 or not features_ND.numel():
        raise UserError(
            f"Features must be a table of pictures by dimensions, at least one of each; these have the shape {tuple(features_ND.shape)}."
        )
    broken = int((~features_ND.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(
            f"The features of {broken} of {len(features_ND)} pictures are not finite: leave these pictures out, or repair them."
        )
    return features_ND.detach().double()


def same_space(one_ND: Tensor, other_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64. Raises UserError as `float64_features` does, or if they are of different encoders."""
    one_ND, other_MD = float64_features(one_ND), float64_features(other_MD)
    refuse_other_dimensions(one_ND.shape[1], other_MD.shape[1])
    return one_ND, other_MD


def refuse_other_dimensions(one: int, other: int) -> None:
    if one != other:
        raise UserError(f"Features of {one} and of {other} dimensions cannot be compared: they are of different encoders.")


def few_samples_warning(count: int, dimensions: int) -> str | None:
    """A sentence if there are so few samples that a Frechet distance says more of their number than of the pictures."""
    if count > dimensions:
        return None
    return (
        f"{count} samples are too few for {dimensions} features: the covariance is singular, and the Frechet distance far too high, "
        f"its extrapolation a guess. "
        f"Compare only distances of equally many samples, take more than {dimensions} of them, or use KID."
    )
