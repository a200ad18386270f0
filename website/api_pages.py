"""The pages of the Python interface: which objects mkdocstrings documents, by theme.

Everything that `import microdit` exports is here, and every part that docs/python.md and docs/extending.md import from its module.
"""

import re
from pathlib import Path

import microdit

DOCS = Path(__file__).parents[1] / "docs"
THEMES = {
    "Functions": ("microdit.api", "microdit.config.load", "microdit.data.sources.open"),
    "Models": ("microdit.models.config", "microdit.models.microdit"),
    "Diffusion": ("microdit.diffusion.edm", "microdit.diffusion.flow", "microdit.diffusion.objective"),
    "Pipeline and settings": ("microdit.pipelines.pipeline", "microdit.pipelines.settings"),
    "Recipes, data and errors": ("microdit.config.schema", "microdit.data.dataset", "microdit.errors"),
}
LEAD = "Of `import microdit`; [how they are used together](../python.md)."
ALIASES = {"edm_loss"}  # the same object as another name, said on that one's page
IMPORT = re.compile(r"^from (microdit\.\S+) import (.+)$", re.MULTILINE)


def _exports(modules: tuple[str, ...]) -> list[str]:
    return [name for name, module in microdit._EXPORTS.items() if module in modules and name not in ALIASES]


def parts() -> list[str]:
    """Return the parts that the pages import from their modules, as `module.name`."""
    found = [
        f"{module}.{name.strip()}"
        for page in ("python.md", "extending.md")
        for module, names in IMPORT.findall((DOCS / page).read_text())
        for name in names.split(",")
    ]
    return sorted({name for name in found if name.rpartition(".")[2] not in microdit._EXPORTS})


def _page(title: str, lead: str, names: list[str]) -> str:
    blocks = "\n".join(f"::: {name}\n" for name in names)
    return f"# {title}\n\n{lead}\n\n{blocks}"


EXPORTED = "Exported by `import microdit`. [How the names are used together](../python.md)."
IMPORTED = "Imported from their modules: [parts for your own models](../python.md#take-one-part), [extensions](../extending.md)."
API_PAGES = {
    f"api/{re.sub('[^a-z]+', '-', title.lower())}.md": (title, _page(title, EXPORTED, [f"microdit.{name}" for name in _exports(modules)]))
    for title, modules in THEMES.items()
}
API_PAGES["api/parts.md"] = ("Single parts", _page("Single parts", IMPORTED, parts()))
