"""What mkdocs does not know of this project: pages of commands and of the Python interface, and files outside docs/.

`docs/` is plain Markdown that reads well in a repository's browser, so its links lead to files of the repository. Files outside `docs/`
that it links to get pages of their own: README.md and its like as they are, a notebook with its outputs, recipes as listings.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from website.api_pages import API_PAGES
from website.command_pages import command_page, commands, tables, with_tables
from website.notebook_page import notebook_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Markdown and notebooks outside docs/ that are pages of the site.
OUTSIDE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "microdit/demo_model/README.md": "demo-model.md",
    "examples/first_hour.ipynb": "first-hour.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
LISTED = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".cff": "yaml"}  # files whose text becomes a page
CODE = re.compile(r"^(```.*?^```|(?: {4}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made here in their places of the navigation."""
    made = {
        "COMMANDS": [{f"microdit {command.name}": f"commands/{command.file}"} for command in commands()],
        "STUDIES": [{path.parent.name: path.relative_to(DOCS).as_posix()} for path in sorted(DOCS.glob("lab/*/README.md"))],
        "API": [{title: uri} for uri, (title, _) in API_PAGES.items()],
    }
    config.nav = _filled(config.nav, made)
    return config


def _filled(item: object, made: dict[str, list[dict[str, str]]]) -> object:
    """Return the navigation with each word of `made` replaced by its pages."""
    if isinstance(item, list):
        return [inner for entry in item for inner in (made[entry] if isinstance(entry, str) and entry in made else [_filled(entry, made)])]
    return {title: _filled(inner, made) for title, inner in item.items()} if isinstance(item, dict) else item


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here: commands, the Python interface, and what docs/ links to outside of itself."""
    for command in commands():
        files.append(File.generated(config, f"commands/{command.file}", content=command_page(command)))
    for uri, (_, text) in API_PAGES.items():
        files.append(File.generated(config, uri, content=text))
    for name, uri in OUTSIDE.items():
        text = (ROOT / name).read_text()
        content = notebook_page(text) if name.endswith(".ipynb") else _without_front_matter(text)
        files.append(File.generated(config, uri, content=content))
    sources = {ROOT / name for name in OUTSIDE} | {DOCS / file.src_uri for file in files.documentation_pages() if not file.generated_by}
    for path in sorted({target for source in sources for target in _targets(source) if _is_listed(target)}):
        page = File.generated(config, _listing_uri(path), content=_listing(path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    uri = page.file.src_uri
    if uri == "commands.md":
        markdown = with_tables(markdown, tables("commands"))
    source = next((ROOT / name for name, own in OUTSIDE.items() if own == uri), DOCS / uri)
    parts = CODE.split(markdown)
    return "".join(part if place % 2 else LINK.sub(lambda link: _linked(link, source, uri), part) for place, part in enumerate(parts))


def _linked(link: re.Match[str], source: Path, uri: str) -> str:
    target = _resolved(source, link[2])
    if target is None:
        return link[0]
    name = target.relative_to(ROOT).as_posix()
    if name in OUTSIDE:
        own = OUTSIDE[name]
    elif target.is_relative_to(DOCS):
        own = target.relative_to(DOCS).as_posix()
    elif _is_listed(target):
        own = _listing_uri(target)
    else:
        return link[0]  # mkdocs warns of it
    return f"{link[1]}{os.path.relpath(own, os.path.dirname(uri) or '.')}{link[3] or ''}{link[4]}"


def _targets(source: Path) -> list[Path]:
    return [target for link in LINK.finditer(source.read_text()) if (target := _resolved(source, link[2]))]


def _resolved(source: Path, link: str) -> Path | None:
    """Return the file or folder of the repository that a link of `source` leads to, if it is one."""
    target = Path(os.path.normpath(source.parent / link))
    return target if ":" not in link and target.exists() and target.is_relative_to(ROOT) else None


def _is_listed(target: Path) -> bool:
    if target.is_relative_to(DOCS) or target.relative_to(ROOT).as_posix() in OUTSIDE:
        return False
    return target.is_dir() or target.suffix in LISTED or not target.suffix


def _listing_uri(target: Path) -> str:
    return f"files/{target.relative_to(ROOT).as_posix()}.md"


def _listing(target: Path) -> str:
    """Return a page with the text of a file, or of the files of a folder."""
    files = sorted(path for path in target.iterdir() if path.suffix in LISTED) if target.is_dir() else [target]
    lines = [f"# {target.relative_to(ROOT).as_posix()}", ""]
    for path in files:
        lines += [f"## {path.name}", ""] if target.is_dir() else []
        lines += [f"````{LISTED.get(path.suffix, 'text')}", path.read_text().rstrip(), "````", ""]
    return "\n".join(lines)


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
