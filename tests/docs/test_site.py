"""The documentation builds without a warning, its links lead somewhere, and its commands have the options they name."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from theia.cli.main import main
from theia.errors import ImageError
from theia.probing.datasets import tasks_of

ROOT = Path(__file__).parents[2]
NAMES = (
    "theia.load", "theia.Encoder.translate", "theia.Teacher.forward", "theia.types.TeacherSpec",
    "theia.scoring.contract.Trained", "theia.data.datamodule.FeatureData", "theia.errors.ConfigError",
    "theia.training.distillation.Distillation", "theia.training.losses.cosine_loss", "theia.store.reader.FeatureStore",
    "theia.training.metrics.NormEntropy", "theia.analysis.measure.measure", "theia.utils.pictures.pca_colours",
    "theia.probing.dense_metrics.depth_metrics",
)  # fmt: skip


@dataclass
class Page:
    """What a page refers to, and what can be referred to in it."""

    anchors: set[str] = field(default_factory=set)
    targets: list[str] = field(default_factory=list)
    text: str = ""


@dataclass
class Site:
    """A folder, and its pages by path below it."""

    folder: Path
    pages: dict[Path, Page] = field(default_factory=dict)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.page.anchors.add(value)
            if name in ("href", "src") and value and not value.startswith("data:"):
                self.page.targets.append(value)

    def handle_data(self, data: str) -> None:
        self.page.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site, built with warnings as errors and without a way out to a network."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    site = Site(folder)
    for path in folder.rglob("*.html"):
        reader = _Reader()
        reader.feed(path.read_text())
        site.pages[path.relative_to(folder)] = reader.page
    return site


def test_every_page_is_there(site: Site) -> None:
    sources = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.with_suffix(".html") for path in sources} | {Path("look_inside.html")} <= site.pages.keys()


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_000


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site_resolve(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert targets
    assert not [target for target in targets if not (ROOT / target).is_file()]


def test_contributing_names_what_is_there(site: Site) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "To change X, touch Y" in site.pages[Path("CONTRIBUTING.html")].text
    rooms = {f"theia/{path.parent.name}" for path in (ROOT / "theia").glob("*/__init__.py")}
    named = set(re.findall(r"`((?:theia|teachers|benchmarks|examples|configs|docs|tests)(?:/[\w./]+)?)`", text))
    assert not rooms - named
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    # A file, and in brackets behind it what stands in it.
    for path, names in re.findall(r"`([\w/]+\.py)`(?: \(|: )([^;.]*`[^;.]*)", text):
        for name in re.findall(r"`(_?[A-Za-z]\w+)`", names):
            assert name in (ROOT / path).read_text(), f"{path} has no {name}"


def test_the_reference_has_the_public_names_with_their_docstrings(site: Site) -> None:
    pages = [page for path, page in site.pages.items() if path.parts[:1] == ("api",)]
    assert not set(NAMES) - set().union(*(page.anchors for page in pages))
    everything = " ".join(page.text for page in pages)
    assert "One minus the cosine of each sample's whole flattened feature map." in everything
    # Sphinx's markup, which means nothing here.
    assert not re.findall(r":(?:class|func|meth|attr|data|mod):", everything)


def test_internal_links_resolve(site: Site) -> None:
    broken = []
    for path, page in site.pages.items():
        # Its addresses are those of a server's root.
        for target in page.targets if path.name != "404.html" else ():
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            linked = path if not parts.path else Path(os.path.normpath(path.parent / unquote(parts.path)))
            if linked in site.pages:
                found = not parts.fragment or unquote(parts.fragment) in site.pages[linked].anchors
            else:
                found = (site.folder / linked).is_file() or (site.folder / linked / "index.html").is_file()
            if not found:
                broken.append(f"{path}: {target}")
    assert not broken


def test_nothing_is_fetched_by_a_reader(site: Site) -> None:
    tag = re.compile(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"?https?://[^>]*>")
    assert not [hit for path in site.pages for hit in tag.findall((site.folder / path).read_text())]


def _commands() -> list[str]:
    """Commands of ``theia`` in the code of the pages and READMEs, with continued lines joined."""
    found = []
    examples = (f"examples/{name}/README.md" for name in ("lerobot_policy_theia", "small_teachers"))
    others = ("README.md", "CONTRIBUTING.md", *examples)
    for path in [*(ROOT / "docs").rglob("*.md"), *(ROOT / other for other in others)]:
        text = path.read_text().replace("\\\n", " ")
        code = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
        lines = [line.strip() for block in code for line in block.splitlines()]
        found += [line for line in lines if re.match(r"(srun |torchrun .* -m )?theia [a-z]+ .*--", line)]
    return sorted(set(found))


@cache
def _help(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return said.getvalue()


@pytest.mark.parametrize("line", _commands())
def test_commands_have_the_options_that_the_pages_name(line: str) -> None:
    words = shlex.split(line[line.index("theia ") :], comments=True)[1:]
    two = words[0] in ("store", "probe") or words[:2] == ["ablate", "report"]
    command = " ".join(words[: 1 + two])
    known = set(re.findall(r"--([\w.]+)", _help(command))) | {"help"}
    assert len(known) > 1, f"theia {command} --help names no options"
    for option in (word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")):
        # Splits of the images, and the plugin of the tutorial, which is not installed.
        if option.startswith(("images.", "edges.")):
            continue
        # Options of a data class of the reader's own.
        if option.startswith("data.") and "--data" in words:
            continue
        # What a sweep passes on to its runs.
        passed_on = command == "ablate" and option.partition(".")[0] in ("data", "model", "trainer", "slurm", "options")
        assert option in known or passed_on, f"theia {command} has no --{option}"
        if passed_on and option.partition(".")[0] in ("data", "model", "trainer"):
            assert option in re.findall(r"--([\w.]+)", _help("fit")), f"theia fit has no --{option}"


def _options() -> list[str]:
    """Options of a training that the pages name by themselves, such as ``--model.registers``."""
    texts = [path.read_text() for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]]
    return sorted({name for text in texts for name in re.findall(r"--((?:model|trainer)\.\w+)", text)})


@pytest.mark.parametrize("option", _options())
def test_a_training_has_the_options_that_the_pages_name(option: str) -> None:
    assert option in re.findall(r"--([\w.]+)", _help("fit"))


def test_the_page_of_probes_shows_every_file_that_a_folder_may_hold(tmp_path: Path) -> None:
    layout = (ROOT / "docs" / "probing.md").read_text().partition("## Layout of a folder")[2]
    with pytest.raises(ImageError) as error:
        tasks_of(tmp_path)
    named = set(re.findall(r"rgb|depth|normals|labels|pose|[a-z]+\.txt", str(error.value)))
    assert len(named) == 7
    assert not [name for name in named if not re.search(rf"^    {re.escape(name)}\b", layout, re.MULTILINE)]
