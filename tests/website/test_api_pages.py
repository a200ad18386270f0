"""The Python interface is on the pages that document it, each name once."""

import re

import microdit
from website.api_pages import ALIASES, API_PAGES, parts


def test_every_exported_name_is_on_one_page():
    documented = [name for _, text in API_PAGES.values() for name in re.findall(r"^::: microdit\.(\w+)$", text, re.MULTILINE)]
    assert sorted(documented) == sorted(set(microdit.__all__) - {"__version__"} - ALIASES)
    assert all(getattr(microdit, name) in [getattr(microdit, other) for other in documented] for name in ALIASES)


def test_every_part_that_the_pages_import_is_documented():
    assert {
        "microdit.models.routing.choose_kept",
        "microdit.models.moe.ExpertChoice",
        "microdit.evaluation.metrics.registry.METRICS",
    } <= set(parts())
    assert not any(part.rpartition(".")[2] in microdit.__all__ for part in parts())
