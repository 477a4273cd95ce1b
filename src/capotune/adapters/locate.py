"""Where an adapter is: a folder of this machine, or of the hub's cache once its files were fetched."""

from __future__ import annotations

from pathlib import Path

from capotune.errors import AdapterError, HubError
from capotune.models.base import EMBEDDED, existing
from capotune.models.folder import ADAPTER
from capotune.models.hub import HubName, download, holds, hub_name

_WEIGHTS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_FILES = (
    ADAPTER,
    _WEIGHTS,
    "capotune.json",
    "config.json",
    "*.jinja",
    "tokenizer*.json",
)
"""What is fetched: nothing that can run code. ``config.json`` tells a model that lies beside an adapter."""


class _NowhereError(AdapterError):
    """There is no adapter of that name."""


def adapter_folder(name: str | Path) -> Path:
    """The folder of the adapter that ``name`` means: a folder, or a name on the hub (``models.hub.HubName``).

    A folder wins. Raises ``AdapterError``, which says that both were tried.
    """
    place = existing(str(name))
    if place is not None and place.is_dir():
        return place
    named = None if place is not None else _on_hub(name)
    if named is None:
        raise _nowhere(str(name), "")
    try:
        found = download(named, _FILES)
    except HubError as error:
        raise _nowhere(str(name), f", and {error.problem.rstrip('.')}", error.advice) from None
    if not (found / ADAPTER).is_file():
        raise _NowhereError(
            f"no such folder, and the hub's {named.repo} holds no {ADAPTER}"
            f"{' in ' + named.subfolder if named.subfolder else ''}.",
            where=str(name),
            advice="If it is in a folder there, give OWNER/NAME/FOLDER.",
        )
    if not (found / _WEIGHTS).is_file() and holds(named, _PICKLED):
        raise AdapterError(
            f"its weights on the hub are in {_PICKLED}, which can run code and is not fetched.",
            where=str(name),
            advice="Ask who made it for safetensors. Where you trust them, download and convert it: `torch.load` with "
            "weights_only=True, of PyTorch 2.10 or later.",
        )
    return found


def find_adapter(name: str | Path) -> Path | None:
    """The folder of the adapter that ``name`` means; None for a model, or a name that means nothing.

    A folder that holds a model's files too is the model's, unless this package wrote the adapter.
    """
    if str(name) in EMBEDDED:
        return None
    try:
        folder = adapter_folder(name)
    except _NowhereError:
        return None
    is_model = (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
    return folder if (folder / "capotune.json").is_file() or not is_model else None


def _on_hub(name: str | Path) -> HubName | None:
    """A name with an owner: a word alone is a folder that is not there."""
    named = hub_name(str(name))
    return named if named is not None and "/" in named.repo else None


def _nowhere(name: str, tried: str, advice: str | None = None) -> _NowhereError:
    made = "`capo train` and `capo compare` write one named adapter; on the hub it is OWNER/NAME."
    return _NowhereError(f"no such adapter folder{tried}.", where=name, advice=f"{advice} {made}" if advice else made)
