"""The recipes that come with microdit: YAML files in `microdit/recipes/`, found by name from any folder."""

from pathlib import Path

from microdit.errors import UserError
from microdit.io.near_names import did_you_mean, did_you_mean_path

RECIPES = Path(__file__).parents[1] / "recipes"


def find_recipe(name: Path | str, folder: str = "") -> Path:
    """Return the path of a recipe, a study, or a folder of recipes.

    A path that exists is returned as it is. Anything else is looked up among the recipes that come with microdit, with or without
    `recipes/` in front, `folder` (lab, for studies) below it, and `.yaml` at the end. Raises UserError if there is none.

    >>> find_recipe("emoji-fast") == find_recipe("recipes/emoji-fast.yaml")
    True
    """
    path = Path(name)
    if path.is_file() or any(path.glob("*.yaml")):
        return path
    parts = path.parts[1:] if path.parts[:1] == ("recipes",) else path.parts
    if parts and not path.is_absolute() and ".." not in parts:
        for place in (RECIPES / folder, RECIPES):
            for found in (place.joinpath(*parts), place.joinpath(*parts[:-1], f"{parts[-1]}.yaml")):
                if found.exists():
                    return found
    if path.is_dir():
        raise UserError(f"There is no recipe (*.yaml) in {path}.")
    near = did_you_mean_path(path) or did_you_mean(
        path.as_posix(), [f"{folder}/{stem}" if folder else stem for stem in list_recipes(folder)]
    )
    raise UserError(
        f"There is no recipe at {path}, and none of that name comes with microdit.{near} 'microdit recipes' lists those that do, and "
        "'microdit new FOLDER' writes one for your pictures."
    )


def list_recipes(folder: str = "") -> dict[str, str]:
    """Return a one-line summary of each bundled recipe by its name: its first comment line, or a study's question with folder="lab".

    >>> [name for name in list_recipes() if name.startswith("emoji")]
    ['emoji', 'emoji-fast', 'emoji-few-steps', 'emoji-flow', 'emoji-long']
    """
    summaries = {}
    for path in sorted((RECIPES / folder).iterdir(), key=lambda path: path.stem):
        if path.is_file():
            summaries[path.stem] = _summary(path)
        elif path.name != "lab":
            summaries[path.name] = _summary(min(path.glob("*.yaml")))
    return summaries


def _summary(path: Path) -> str:
    lines = path.read_text().splitlines()
    question = next((line for line in lines if line.startswith("question: ")), None)
    return question.removeprefix("question: ") if question else lines[0].removeprefix("# ")
