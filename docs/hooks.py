"""Files from elsewhere in the repository that are part of the site: the notebook, and what the pages link to."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_NOTEBOOK = "look_inside"
_CONTRIBUTING = "CONTRIBUTING.md"

# Pages lie in docs/, from where the rest of the repository is one folder up; in the site, all have one root.
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
_INSIDE = re.compile(r"\]\(docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebook, as a page and as a file, CONTRIBUTING.md as a page, and the files that the pages link to."""
    linked = {target for page in (_ROOT / "docs").glob("*.md") for target in _OUTSIDE.findall(page.read_text())}
    for target in sorted(linked | {_CONTRIBUTING}):
        files.append(File.generated(config, target, abs_src_path=str(_ROOT / target)))
    path = _ROOT / "notebooks" / f"{_NOTEBOOK}.ipynb"
    files.append(File.generated(config, path.name, abs_src_path=str(path)))
    page, pictures = _notebook(json.loads(path.read_text())["cells"])
    files.append(File.generated(config, f"{_NOTEBOOK}.md", content=page))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Makes links that hold in the repository hold in the site."""
    if page.file.src_uri == _CONTRIBUTING:
        return _INSIDE.sub("](", markdown)
    return _OUTSIDE.sub(r"](\1", markdown) if "/" not in page.file.src_uri else markdown


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
