import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import distributions
import pytest

from theia.errors import PluginError, UnknownScorerError
from theia.scoring.contract import GROUP, find_scorer, scorer_names

Install = Callable[..., None]

SCORER = "def plugin(trained):\n    return {'score': 1.0}\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lays out an installed distribution that registers ``plugin`` of a module with this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution: str, name: str, source: str = SCORER) -> None:
        distributions.install(tmp_path, distribution, GROUP, name, source, "plugin")

    return install


def test_a_plugin_stands_beside_the_built_in_scorers(install: Install) -> None:
    install("fox-scorers", "fox")

    assert {"classification", "fox", "readout"} <= set(scorer_names())
    assert find_scorer("fox")(None) == {"score": 1.0}


def test_an_unknown_name_suggests_the_nearest_and_lists_the_installed() -> None:
    with pytest.raises(UnknownScorerError) as error:
        find_scorer("raedout")

    message = str(error.value)
    assert "Did you mean 'readout'?" in message
    assert ", ".join(scorer_names()) in message
    assert "theia.scorers" in message


def test_one_name_from_two_distributions_names_both(install: Install) -> None:
    install("fox-scorers", "fox")
    install("other-foxes", "fox")

    with pytest.raises(PluginError, match=r"(?=.*fox-scorers 1\.2)(?=.*other-foxes 1\.2)"):
        find_scorer("fox")


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("fox", "import a_module_that_is_not_there\n", "ModuleNotFoundError: No module named 'a_module"),
        ("fox", "", "AttributeError: .* has no attribute 'plugin'"),
        ("fox", "plugin = 3\n", "is not a function"),
        ("red/fox", SCORER, "needs another name"),
    ],
)
def test_a_wrong_plugin_is_refused_with_the_reason(install: Install, name: str, source: str, reason: str) -> None:
    install("fox-scorers", name, source)

    with pytest.raises(PluginError, match=rf"Scorer '{name}' of fox-scorers 1\.2 .*{reason}"):
        find_scorer(name)


def test_names_imports_neither_scorers_nor_torch() -> None:
    code = "import sys; from theia.scoring.contract import scorer_names; scorer_names(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
