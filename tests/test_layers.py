"""Imports point downward only, as docs/architecture.md says."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "microdit"
# Each room may import the rooms to its right. Rooms of one tuple do not know each other, except what is listed under FRIENDS.
LAYERS = [
    ("__main__",),
    ("cli",),
    ("cli_app", "cli_budget", "cli_compare", "cli_data", "cli_evaluation", "cli_hub", "cli_lab", "cli_pictures"),
    ("app",),
    ("lab", "budget"),
    ("training",),
    ("evaluation", "sweep"),
    ("hub",),
    ("pipeline", "recipe_file", "report", "runs", "trajectory"),
    ("checkpoint", "prompts", "recipe", "grids", "curves", "run_folder", "page"),
    ("data", "diffusion", "encoders"),
    ("model",),
    (
        "files",
        "shard_files",
        "locks",
        "memory",
        "folder_lock",
        "errors",
        "formats",
        "terminal",
        "distributed",
        "devices",
        "markdown",
        "open_files",
    ),
    ("ranges", "yaml_file", "typed_yaml"),
    ("printable", "command_line", "foreign_json"),
]
FRIENDS = {
    ("data", "encoders"),
    ("files", "errors"),
    ("locks", "errors"),
    ("folder_lock", "errors"),
    ("folder_lock", "files"),
    ("folder_lock", "locks"),
    ("folder_lock", "distributed"),
    ("distributed", "errors"),
    ("devices", "errors"),
    ("distributed", "devices"),
    ("distributed", "open_files"),
    ("open_files", "errors"),
    ("yaml_file", "errors"),
    ("typed_yaml", "errors"),
    ("typed_yaml", "ranges"),
    ("typed_yaml", "yaml_file"),
}  # data/encode.py drives the frozen encoders
PURE = {"model": {"torch", "numpy"}, "diffusion": {"torch", "diffusers"}}  # what may come from outside besides the standard library


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
