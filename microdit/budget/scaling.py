"""How large a model a given amount of compute asks for, by two published findings, and the ladder of sizes to choose from.

Sizes are compared by what they cost, since experts and width scaling make the number of parameters say little: the *equivalent size* is
that of a dense transformer with the same FLOPs, N = FLOPs / (6 x patches) for a whole 256 px picture. XL_2 has 1,165 M parameters and an
equivalent size of 465 M.
"""

from dataclasses import dataclass

from microdit.model.sizes import SIZES, Size

SMALL, LARGE = SIZES["MicroDiT_Tiny_2"], SIZES["MicroDiT_XL_2"]
WIDTHS = (256, 384, 512, 640, 768, 896, 1024, 1280, 1536)
PATCHES = 256  # of 256 px, which equivalent sizes are reckoned at
FITTED = (1e17, 6e18)  # FLOPs of the runs that 2410.08184 fits


@dataclass(frozen=True)
class Wanted:
    """Equivalent sizes that two rules ask for. `middle` is their geometric mean."""

    by_fit: float
    by_paper: float

    @property
    def middle(self) -> float:
        return (self.by_fit * self.by_paper) ** 0.5


def wanted_size(flops: float, paper_flops: float, paper_size: float) -> Wanted:
    """For training with `flops`; the published run did `paper_flops` on an equivalent size of `paper_size`.

    By the fit of Liang et al. (2410.08184) to diffusion transformers trained on text and images: N = 0.0009 C^0.5681. (The exponent and
    the factor are as we know them, the paper's text was not at hand; tests compare them with the abstract's point of 1 B at about 1e21.)
    By the published run (2407.15811) as one good point, and N growing as the square root of C from there, as it does for language
    models (Hoffmann et al. 2022, 2203.15556).
    """
    return Wanted(0.0009 * flops**0.5681, paper_size * (flops / paper_flops) ** 0.5)


def size_of_width(dim: int) -> Size:
    """The paper's two sizes at 512 and 1,024; between and beyond them on the straight line; below, Tiny_2 made smaller in proportion."""
    for known in (SMALL, LARGE):
        if dim == known.dim:
            return known
    if dim < SMALL.dim:
        part = dim / SMALL.dim
        return Size(dim, round(SMALL.depth * part), SMALL.head_dim, dim, round(SMALL.mixer_depth * part))
    at = (dim - SMALL.dim) / (LARGE.dim - SMALL.dim)
    mixer_dim = round(_between(SMALL.mixer_dim, LARGE.mixer_dim, at) / LARGE.head_dim) * LARGE.head_dim
    depth, mixer_depth = (round(_between(*pair, at)) for pair in ((SMALL.depth, LARGE.depth), (SMALL.mixer_depth, LARGE.mixer_depth)))
    return Size(dim, depth, LARGE.head_dim, mixer_dim, mixer_depth)


def _between(low: float, high: float, at: float) -> float:
    return low + (high - low) * at
