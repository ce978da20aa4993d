"""What the site takes from elsewhere in the repository, so that nothing is said in two places."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_README = _ROOT / "README.md"
_NOTEBOOK = "look_inside"

_INCLUDE = re.compile(r"^\{readme: (.+)\}$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebook, as a page and as a file, and the files that the README links to."""
    for target in sorted(set(_LINK.findall(_README.read_text()))):
        if not target.startswith("docs/"):
            files.append(File.generated(config, target, abs_src_path=str(_ROOT / target)))
    path = _ROOT / "notebooks" / f"{_NOTEBOOK}.ipynb"
    files.append(File.generated(config, path.name, abs_src_path=str(path)))
    page, pictures = _notebook(json.loads(path.read_text())["cells"])
    files.append(File.generated(config, f"{_NOTEBOOK}.md", content=page))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Puts a section of the README in the place of ``{readme: HEADING}``; its first words stand under its title."""
    return _INCLUDE.sub(lambda found: _section(found[1].strip(), page.file.src_uri), markdown)


def _section(heading: str, page: str) -> str:
    parts = re.split(r"(?:\A#|^##) (.+)$", _README.read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading not in sections:
        raise PluginError(f"{page}: README.md has no section {heading!r}. It has: {', '.join(sections)}.")
    return _LINK.sub(lambda link: f"]({link[1].removeprefix('docs/')})", sections[heading]).strip()


def _notebook(cells: list[dict[str, Any]]) -> tuple[str, dict[str, bytes]]:
    """The cells as Markdown, and the pictures that were stored with them, by file name."""
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"])
        lines.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if text := "".join(output.get("text", ())):
                lines.append(f"```text\n{text.rstrip()}\n```")
            if encoded := output.get("data", {}).get("image/jpeg"):
                name = f"{_NOTEBOOK}-{len(pictures) + 1}.jpg"
                pictures[name] = base64.b64decode(encoded)
                lines.append(f"![Output]({name})")
    return "\n\n".join(lines) + "\n", pictures
