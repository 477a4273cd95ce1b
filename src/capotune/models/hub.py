"""Names on the Hugging Face hub, and the files behind them.

Endpoint, token, cache and offline mode are huggingface_hub's own: ``HF_ENDPOINT``, ``hf auth login`` or ``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE``. What is fetched is named by pattern; nothing of it is executed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from capotune.errors import HubError, needs_extra

_PART = r"[A-Za-z0-9_][\w.-]*"
_NAME = re.compile(
    rf"(?P<repo>{_PART}(?:/{_PART})?)(?P<subfolder>(?:/{_PART})*)(?:@(?P<revision>{_PART}(?:/{_PART})*))?", re.ASCII
)
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."


@dataclass(frozen=True)
class HubName:
    """``owner/name``, ``owner/name@revision``, ``owner/name/subfolder@revision``."""

    repo: str
    revision: str | None = None
    """A branch, a tag or a commit; None: the main branch."""
    subfolder: str = ""


def hub_name(name: str) -> HubName | None:
    """The parts of a name as the hub has them; None for what cannot be one, such as ``./folder`` or ``a b``."""
    found = _NAME.fullmatch(name)
    return None if found is None else HubName(found["repo"], found["revision"], found["subfolder"].strip("/"))


def peft_base(name: str) -> dict[str, str]:
    """How PEFT's ``adapter_config.json`` names a base: a revision stands apart."""
    found = hub_name(name)
    if found is None or found.revision is None:
        return {"base_model_name_or_path": name}
    return {"base_model_name_or_path": found.repo, "revision": found.revision}


def holds(name: HubName, file: str) -> bool:
    """Whether ``name`` holds the file on the hub; False where the hub does not say."""
    from huggingface_hub import HfApi

    path = f"{name.subfolder}/{file}" if name.subfolder else file
    try:
        with told_plainly(name):
            return bool(HfApi().file_exists(name.repo, path, revision=name.revision))
    except HubError:
        return False


def download(name: HubName, allowed: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder in the hub's cache that holds the files of ``name`` whose path matches a pattern of ``allowed``.

    Without a network it is what was fetched before. The folder may lack files, or be missing, where nothing matches.
    Raises ``HubError``.
    """
    with needs_extra("hub"):
        from huggingface_hub import snapshot_download

    front = f"{name.subfolder}/" if name.subfolder else ""
    with told_plainly(name), _bars_on_terminals():
        folder = snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=[front + pattern for pattern in allowed],
            ignore_patterns=[front + pattern for pattern in ignored],
        )
    return Path(folder) / name.subfolder


@contextmanager
def told_plainly(name: HubName) -> Iterator[None]:
    """Around calls of huggingface_hub: what it raises becomes one ``HubError``."""
    from huggingface_hub.errors import HTTPError  # of whichever library it speaks HTTP with

    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _told(name, error) from None


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """No progress bar where standard error is a file or a pipe."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    as_it_is = sys.stderr.isatty() or are_progress_bars_disabled()
    if as_it_is:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _told(name: HubName, error: BaseException) -> HubError:
    from huggingface_hub import constants, errors

    is_transport = isinstance(error, (errors.HTTPError, OSError))
    while error.__cause__ is not None and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__  # where the library says what it could not do, and this says why
    if isinstance(error, errors.HFValidationError):
        return HubError("not a valid hub id.")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return HubError("the hub asks for a token, and there is none here.", advice=LOG_IN)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"the hub's {name.repo} has no revision '{name.revision}'.")
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{name.repo} is given to those alone whom its owner lets in.", advice=f"Ask for it: {_page(name)}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            "no such repository on the hub, or none that you may see.", advice=f"If it is private: {LOG_IN}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(name, error.response.status_code, error.server_message)
    if constants.HF_HUB_OFFLINE:
        return HubError("it was not fetched before, and HF_HUB_OFFLINE is set: the hub cannot be reached.")
    if is_transport:
        return HubError(f"the hub cannot be reached ({_first_line(error)}).")
    return HubError(f"the hub does not take it: {_first_line(error)}")


def _refused(name: HubName, status: int, said: str | None) -> HubError:
    """What an HTTP status means; ``said`` is the hub's own message."""
    if status == 401:
        return HubError("the hub does not know the token, or it has ended.", advice=LOG_IN)
    if status == 403:
        return HubError(
            f"the token may not do this in {name.repo}.",
            advice="Take a token that may write there, and a name of yours.",
        )
    if status == 404:
        return HubError("no such repository on the hub, or none that you may see.", advice=LOG_IN)
    why = f": {' '.join(said.split())}" if said else ""
    return HubError(f"the hub answered with the error {status}{why.rstrip('.')}.")


def _page(name: HubName) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name.repo}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
