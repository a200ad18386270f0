"""The recipe's data sets, opened and mixed as its phases say."""

from collections.abc import Callable
from pathlib import Path

from microdit.data.latents import EncodedSet, Mixture
from microdit.data.order import PhaseOrder
from microdit.distributed import World
from microdit.errors import UserError
from microdit.recipe import PhaseRecipe, Recipe


def open_mixture(recipe: Recipe, warn: Callable[[str], None], world: World | None = None) -> Mixture:
    """Raises UserError if a set is missing, damaged, encoded by other encoders than the recipe or the other sets say, or empty.

    The processes of `world` must all call this.
    """
    data = recipe.data
    sets = {name: EncodedSet(Path(item.path), data.resolution, world) for name, item in data.named_sets.items()}
    for encoded in sets.values():
        for key, wanted in (("autoencoder", data.autoencoder), ("text_encoder", data.text_encoder)):
            found = encoded.card[key]["name"]
            if wanted is not None and found != wanted:
                raise UserError(
                    f"data.{key} is {wanted}, but {encoded.folder} was encoded with {found}: encode it again with the right one."
                )
    repeats = tuple(item.repeat for item in data.named_sets.values())
    phases = [_order_of(phase, list(sets), repeats) for phase in recipe.phases]
    return Mixture(list(sets.values()), phases, recipe.seed, data.horizontal_flip, data.on_damage, warn)


def _order_of(phase: PhaseRecipe, names: list[str], repeats: tuple[int, ...]) -> PhaseOrder:
    weights = None if phase.weights is None else tuple(phase.weights.get(name, 0.0) for name in names)
    return PhaseOrder(phase.steps, phase.batch_size, repeats, weights)
