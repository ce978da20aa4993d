import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import distributions
import pytest

from theia import registry
from theia.errors import ConfigError, PluginError, UnknownTeacherError

Install = Callable[..., None]

PLUGIN = """
import torch
from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec

class Plugin(Teacher):
    spec = TeacherSpec(name={name!r}, channels=2, grid_hw=(1, 1), licence="MIT", weights="none")

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(offset))

    def forward(self, images):
        return TeacherFeatures(self.offset.expand(len(images), 1, 2))
"""


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    registry.find.cache_clear()
    yield
    registry.find.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lays out an installed distribution that registers the class ``Plugin`` of a module with this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution: str, name: str, source: str | None = None) -> None:
        code = PLUGIN.format(name=name) if source is None else source
        distributions.install(tmp_path, distribution, registry.GROUP, name, code, "Plugin")

    return install


def test_a_plugin_is_listed_beside_the_built_in_teachers(install: Install) -> None:
    install("fox-teachers", "fox")
    names = registry.names()
    assert names == sorted(names)
    assert {"clip", "fox", "hog"} <= set(names)


def test_create_passes_options_and_freezes(install: Install) -> None:
    install("fox-teachers", "fox")
    teacher = registry.create("fox", {"offset": 1.5})
    assert teacher.offset.item() == 1.5
    assert not teacher.training
    assert not teacher.offset.requires_grad


def test_an_unknown_name_suggests_the_nearest_and_lists_the_installed(install: Install) -> None:
    install("fox-teachers", "arcticfox")
    with pytest.raises(UnknownTeacherError) as error:
        registry.find("articfox")
    message = str(error.value)
    assert "Did you mean 'arcticfox'?" in message
    assert ", ".join(registry.names()) in message


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(UnknownTeacherError) as error:
        registry.find("zzzzzz")
    assert "Did you mean" not in str(error.value)


def test_a_broken_plugin_is_named_with_its_cause_and_the_others_load(install: Install) -> None:
    install("broken-teachers", "broken", "import a_module_that_is_not_there\n")
    install("fox-teachers", "fox")
    found, broken = registry.find_all()
    assert {"color", "fox", "hog"} <= set(found)
    assert "broken" not in found
    message = str(broken["broken"])
    assert "broken-teachers 1.2" in message
    assert "ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in message


def test_one_name_from_two_distributions_names_both(install: Install) -> None:
    install("fox-teachers", "fox")
    install("other-foxes", "fox")
    with pytest.raises(PluginError) as error:
        registry.find("fox")
    assert "fox-teachers 1.2" in str(error.value)
    assert "other-foxes 1.2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("fox", PLUGIN.format(name="wolf"), "has a spec named 'wolf', but its entry point is named 'fox'"),
        ("fox", "class Plugin: pass\n", "is not a subclass of theia.Teacher"),
        ("fox", "def Plugin(): pass\n", "is not a subclass of theia.Teacher"),
        ("fox", "from theia.teacher import Teacher as Plugin\n", "has no class attribute 'spec'"),
        ("fox", "", "AttributeError: .* has no attribute 'Plugin'"),
        ("Red-Fox", PLUGIN.format(name="Red-Fox"), "needs another name"),
        ("image", PLUGIN.format(name="image"), "needs another name"),
    ],
)
def test_a_wrong_plugin_is_refused_with_the_reason(install: Install, name: str, source: str, reason: str) -> None:
    install("fox-teachers", name, source)
    with pytest.raises(PluginError, match=reason):
        registry.find(name)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_names_imports_no_plugin() -> None:
    listed = run(
        "import sys; from theia import registry; registry.names();"
        "print([name for name in sys.modules if name.startswith('theia_teachers.')])"
    )
    assert listed.strip() == "[]"


def test_loading_every_teacher_class_imports_no_model_library() -> None:
    heavy = run(
        "import sys; from theia import registry; registry.find_all();"
        "print({'segment_anything', 'skimage', 'timm', 'transformers'} & sys.modules.keys())"
    )
    assert heavy.strip() == "set()"


def test_an_option_that_a_teacher_does_not_have_is_named_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"'weights'.*none"):
        registry.create("hog", {"weights": 3})
    with pytest.raises(ConfigError, match=r"'wieghts'.*weights, revision, architecture"):
        registry.create("clip", {"wieghts": "random"})
