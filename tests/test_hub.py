import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from events import PATIENCE_S
from huggingface_hub import constants, hf_hub_download, utils

from theia import hub
from theia.errors import WeightsError

# An old client of the hub keeps, for a thread's whole life, a connection that was made offline. Its name changed.
forget_connection = getattr(utils, "close_session", None) or utils.reset_sessions


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The hub's address: a port of this machine that is taken, and that nothing listens on."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", PATIENCE_S)
    remembered = hub._silence
    remembered.cache_clear()
    forget_connection()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield address
    remembered.cache_clear()
    forget_connection()


def test_a_hub_that_does_not_answer_is_said_at_once(tmp_path: Path, nowhere: str) -> None:
    said = f"'a/b' are not on this machine.*{nowhere} cannot be reached"
    with pytest.raises(WeightsError, match=said), hub.known_to_answer("a/b"):
        hf_hub_download("a/b", "config.json", cache_dir=tmp_path)
    assert constants.HF_HUB_OFFLINE is False


def test_offline_mode_is_the_same_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_silence", lambda address: pytest.fail("asked"))
    said = "'a/b' are not on this machine, .*, and the model hub .* is not asked, as HF_HUB_OFFLINE is set"
    with pytest.raises(WeightsError, match=said), hub.known_to_answer("a/b"):
        hf_hub_download("a/b", "config.json", cache_dir=tmp_path)
    assert constants.HF_HUB_OFFLINE is True


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    file = repository / "snapshots" / ("0" * 40) / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with hub.known_to_answer("a/b"):
        assert Path(hf_hub_download("a/b", "config.json", cache_dir=tmp_path)).read_text() == "{}"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(KeyError), hub.known_to_answer("a/b"):
        raise KeyError("a")


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with hub.known_to_answer("a/b"):
            assert constants.HF_HUB_OFFLINE is False
        server.shutdown()


@pytest.mark.parametrize("weights", ["random", "none", "."])
def test_without_need_the_hub_is_not_asked(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_silence", lambda address: pytest.fail("asked"))
    with hub.known_to_answer(weights):
        assert constants.HF_HUB_OFFLINE is False
