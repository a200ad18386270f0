"""axe-core's rules for accessible pages."""

import pytest

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
WIDTHS, SCHEMES = (360, 1440), ("light", "dark")


def findings(page) -> list[str]:
    """Return what axe-core finds at 360 and 1,440 pixels in both colour schemes, of what it calls serious or critical."""
    found = set()
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            violations = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
            serious = [rule for rule in violations if rule["impact"] in ("serious", "critical")]
            found |= {f"{width} {scheme} {rule['id']}: {node['html']}" for rule in serious for node in rule["nodes"]}
    return sorted(found)
