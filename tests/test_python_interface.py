"""What `import microdit` offers: each name by itself, with an example that runs, and without libraries that it does not need."""

import ast
import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest

import microdit
from microdit.models.config import SIZES, resolve
from tests.python_examples import own_pictures

PACKAGE = Path(microdit.__file__).parent
HEAVY = ["torch", "numpy", "scipy", "PIL", "diffusers", "transformers", "datasets", "pyarrow", "rich", "typer", "matplotlib", "fastapi"]
ARRAYS, PICTURES = {"torch", "numpy"}, {"torch", "numpy", "PIL", "pyarrow"}
DIFFUSERS = PICTURES | {"scipy", "diffusers", "transformers"}  # diffusers brings scipy
FUNCTION = {"rich"}  # the lines of progress that may be handed in; the rest is imported when the function is called
NEEDED = {  # by what is imported: the libraries that may come along, of HEAVY
    "microdit": set(),
    "microdit:UserError": set(),
    "microdit:open_source": {"numpy", "pyarrow", "PIL"},
    "microdit:load_recipe": ARRAYS,  # a recipe's widths are checked with the model's own functions
    "microdit:Recipe": ARRAYS,
    "microdit:MicroDiT": ARRAYS,
    "microdit:ModelConfig": ARRAYS,
    "microdit:create_model": ARRAYS,
    "microdit:list_models": ARRAYS,
    "microdit:EDM": ARRAYS,
    "microdit:Flow": ARRAYS,
    "microdit:denoising_loss": ARRAYS,
    "microdit:edm_loss": ARRAYS,
    "microdit:SamplerSettings": PICTURES,
    "microdit:EncodedDataset": PICTURES | {"datasets"},  # whose folders `datasets` reads as well
    "microdit:MicroDiTPipeline": DIFFUSERS,
    "microdit:sample": FUNCTION,
    "microdit:train": FUNCTION,
    "microdit:evaluate": FUNCTION,
    "microdit:encode_dataset": FUNCTION,
    "microdit.models.routing:choose_kept": ARRAYS,
    "microdit.models.moe:ExpertChoice": ARRAYS,
    "microdit.diffusion.samplers:heun": ARRAYS,
    "microdit.evaluation.metrics.frechet:frechet_interval": ARRAYS,
}
IN_A_CHILD = """
import json, os, sys
heavy, needed = json.loads(sys.argv[1])
for place in sorted(needed, key=lambda place: "torch" in needed[place]):  # each in a process of its own
    if "torch" in needed[place]:
        import torch  # once for all that may bring it; what others bring is seen before it is here
    if os.fork() == 0:
        module, _, name = place.partition(":")
        imported = __import__(module, fromlist=["_"])
        if name:
            getattr(imported, name)
        os.write(1, (json.dumps([place, [each for each in heavy if each in sys.modules]]) + "\\n").encode())
        os._exit(0)
    _, status = os.wait()
    assert status == 0, place
"""


def test_each_name_is_imported_without_libraries_that_it_does_not_need():
    asked = json.dumps([HEAVY, {place: sorted(libraries) for place, libraries in NEEDED.items()}])
    done = subprocess.run([sys.executable, "-c", IN_A_CHILD, asked], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    brought = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(brought) == set(NEEDED)
    assert {place: sorted(set(brought[place]) - NEEDED[place]) for place in NEEDED} == {place: [] for place in NEEDED}


def test_all_names_are_exported_listed_and_known_to_type_checkers():
    names = set(microdit.__all__) - {"__version__"}
    assert names == set(microdit._EXPORTS) == {place.partition(":")[2] for place in NEEDED if place.startswith("microdit:")}
    assert names <= set(dir(microdit))
    (block,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == microdit._EXPORTS
    assert (PACKAGE / "py.typed").exists()


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'microdit' has no attribute 'MicroDot'"):
        _ = microdit.MicroDot


def test_the_example_of_every_name_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own_pictures(tmp_path / "my-pictures", 12)
    names = ["encode_dataset", "train", *(name for name in microdit.__all__ if name not in ("encode_dataset", "train", "__version__"))]
    for name in names:  # the examples of the first two make what others read
        value = getattr(microdit, name)
        module = sys.modules[value.__module__]
        tests = doctest.DocTestFinder(recurse=False).find(value, name, module=module, globs=vars(module).copy())
        assert any(test.examples for test in tests), f"{name} has no example"
        for test in tests:
            said: list[str] = []
            result = doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE).run(test, out=said.append)
            assert not result.failed, "".join(said)


def test_a_named_size_is_the_model_of_its_recipe():
    recipes = {"MicroDiT_Nano_2": "emoji-fast", "MicroDiT_Micro_2": "emoji-long", "MicroDiT_XL_2": "microdit-xl/1-256-masked"}
    for size, recipe in recipes.items():
        assert resolve(microdit.load_recipe(recipe).model) == resolve(SIZES[size]), size


def test_an_unknown_model_is_a_sentence():
    with pytest.raises(microdit.UserError, match=r"There is no model 'MicroDiT_S'\. Known: MicroDiT_Nano_2, "):
        microdit.create_model("MicroDiT_S")
