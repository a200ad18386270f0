"""Which model `microdit sample` draws with: the one that is named, or the demo model of this package."""

import os
from pathlib import Path

from microdit.errors import UserError

DEMO = Path(__file__).parents[1] / "demo_model"  # put there by: microdit export runs/emoji microdit/demo_model --dtype float16


def model_and_prompts(arguments: list[str], demo: Path = DEMO) -> tuple[str, list[str]]:
    """The model's place, and the prompts. A folder that is there, as the first argument, is the model; else all are prompts for the demo.

    Raises UserError for a first argument that looks like a path and is none, and if there is no demo model.
    """
    if arguments and os.path.isdir(arguments[0]):  # not Path.is_dir: "" is no folder, and what is too long for a name is none
        return arguments[0], arguments[1:]
    if arguments and _looks_like_a_path(arguments[0]):
        raise UserError(
            f"There is no folder {arguments[0]}: name a run or an exported model first, then the prompts; or prompts alone, for the demo "
            "model (a prompt with a slash needs a space, too)."
        )
    if not demo.is_dir():
        raise UserError(
            'This installation holds no demo model: name a model first, as in microdit sample runs/emoji "red heart"; `microdit train` '
            "makes one."
        )
    return str(demo), arguments


def _looks_like_a_path(text: str) -> bool:
    """Prompts may hold a slash, as in "a black/white cat"; paths rarely hold a space, and then begin like this."""
    separated = any(separator in text for separator in {"/", os.sep})
    return (
        text.startswith(("runs/", "./", "../", "/", "~")) or text in (".", "..") or (separated and " " not in text) or os.path.exists(text)
    )
