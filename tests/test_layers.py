"""Imports point downward only, as docs/architecture.md says."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "microdit"
# Each room may import the rooms below it. Rooms of one line do not know each other, except for the pairs in FRIENDS.
LAYERS = [
    ("__main__",),
    ("cli",),
    ("api",),
    ("serve",),
    ("lab",),
    ("training",),
    ("planning",),
    ("evaluation",),
    ("pipelines",),
    ("config", "reports"),
    ("checkpoint", "data", "diffusion"),
    ("encoders", "models"),
    ("io",),
    ("distributed",),
    ("devices", "process_limits"),
    ("errors", "ranges", "splitmix"),
]
FRIENDS: set[tuple[str, str]] = set()
PURE = {"models": {"torch", "numpy"}, "diffusion": {"torch", "diffusers"}}  # what may come from outside besides the standard library


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_downward():
    level = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
    upward = []
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        for name in imports_of(path):
            if name.startswith("microdit."):
                other = name.split(".")[1]
                if other != room and level[other] <= level[room] and (room, other) not in FRIENDS:
                    upward.append(f"{path.name} imports {name}")
    assert upward == []


def test_the_model_and_the_diffusion_know_no_library_of_input_and_output():
    import sys

    foreign = []
    for room, allowed in PURE.items():
        for path in (PACKAGE / room).rglob("*.py"):
            tops = {name.split(".")[0] for name in imports_of(path)} - {"microdit"} - allowed
            foreign += [f"{path.name} imports {top}" for top in tops if top not in sys.stdlib_module_names]
    assert foreign == []


def test_the_architecture_page_names_every_file_and_no_other():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("## The model")[0]
    modules = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    missing = [str(path.relative_to(PACKAGE)) for path in modules if f"{path.name}`" not in page]
    assert missing == []
    named = set(re.findall(r"`(?:[a-z_]+/)*([a-z_0-9]+\.py)`", page))
    assert named <= {path.name for path in modules}
