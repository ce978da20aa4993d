"""Progress where standard error is no terminal, as in the log of a job."""

import logging

import pytest

from theia.utils import progress
from theia.utils.progress import Progress


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    caplog.set_level(logging.INFO, "theia")
    return caplog


def test_a_log_file_gets_lines_with_what_is_said_about_the_part(lines: pytest.LogCaptureFixture) -> None:
    with Progress("train", 8, unit="step") as shown:
        shown.describe("epoch 1/2", "loss 0.5")
        shown.advance(2)
    first, last = lines.messages
    for line in (first, last):
        assert line.startswith("epoch 1/2:  25% 2/8 [")
        assert line.endswith("step/s, loss 0.5]")


def test_time_left_is_that_of_the_work_done_now(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    resumed = Progress("train", 100, unit="step", done=50)
    resumed.advance(10)  # in 10 seconds, so that 40 more take 40
    assert lines.messages == ["train:  60% 60/100 [00:10<00:40,  1.00step/s]"]


def test_other_processes_and_failed_work_leave_no_last_line(lines: pytest.LogCaptureFixture) -> None:
    Progress("train", 8, shown=False).close()
    with pytest.raises(ValueError, match="broken"), Progress("train", 8):
        raise ValueError("broken")
    assert not lines.messages
