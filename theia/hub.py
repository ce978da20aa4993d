"""Access to the model hub, without a minute of retries by its client where the hub cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from theia.errors import WeightsError


class UnreachableError(WeightsError):
    """Weights are not on this machine, and the hub that has them does not answer.

    Attributes:
        reason: The message without the name of the weights.
    """

    def __init__(self, weights: str, hub: str) -> None:
        self.reason = f"{hub}. Check the network, or fetch the weights elsewhere and give their path"
        super().__init__(
            f"The weights of {weights!r} are not on this machine, neither in a file or folder of that name "
            f"nor in the hub's cache, and {self.reason}."
        )


@contextmanager
def known_to_answer(weights: str) -> Iterator[None]:
    """Takes weights that the block loads from the hub if it answers, and otherwise from its cache on disk, at once.

    The hub's client tries each file six times, half a minute in all, before it says that there is no network.

    Args:
        weights: Weights to load. The hub is not asked about a path, ``"random"`` or ``"none"``.

    Raises:
        UnreachableError: If the cache lacks something, and the hub does not answer or ``HF_HUB_OFFLINE`` is set.
    """
    if weights in ("random", "none") or Path(weights).expanduser().exists():
        yield
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = constants.HF_HUB_OFFLINE
    silence = None if offline else _silence(constants.ENDPOINT)
    if not offline and silence is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True  # as the environment variable of this name, which is read at import only
    try:
        yield
    except Exception as error:
        if not any(isinstance(each, LocalEntryNotFoundError | OfflineModeIsEnabled) for each in _chain(error)):
            raise
        said = f"cannot be reached ({silence})" if silence else "is not asked, as HF_HUB_OFFLINE is set"
        raise UnreachableError(weights, f"the model hub {constants.ENDPOINT} {said}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


@cache
def _silence(address: str) -> str | None:
    """Reason why a hub does not answer; ``None`` if it does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # re-exported in every version

    try:
        # Uses the user's proxy, if there is one, and the client's own timeout, which users can set.
        get_session().head(address, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        # The HTTP library differs between versions of the client.
        return f"{type(error).__name__}: {error}".rstrip(": .")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
