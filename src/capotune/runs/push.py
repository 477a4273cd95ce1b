"""An adapter put on the hub: a copy without what belongs to this machine, read back before it is sent in one commit."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from capotune.adapters.card import base_on_hub
from capotune.adapters.store import StoredAdapter, read_adapter
from capotune.conversion_settings import PushSettings
from capotune.errors import AdapterError, HubError, SettingError, needs_extra
from capotune.events import Reporter, Stage
from capotune.models.base import EMBEDDED
from capotune.models.hub import LOG_IN, HubName, hub_name, told_plainly
from capotune.runs.publish import Published, public_base, publish


def push(settings: PushSettings, report: Reporter) -> dict[str, Any]:
    """Put ``settings.adapter`` into the repository ``settings.repo``, which is made where it is missing.

    Returns the commit's address, the files, and what of the folder stayed here. Raises ``SettingError``,
    ``AdapterError`` and ``HubError``; nothing is sent then, but for a repository that is there and empty.
    """
    repo = hub_name(settings.repo)
    if repo is None or repo.revision or repo.subfolder:
        raise SettingError("no name of a repository.", setting="repo", given=settings.repo, allowed="OWNER/NAME")
    stored = read_adapter(settings.adapter)
    base = public_base(stored, settings.model)
    _check_token()
    report(Stage(text="checking what would be pushed"))
    copy = publish(stored, repo.repo, base, _licence(base))
    _read_back(stored, copy)
    report(Stage(text=f"pushing to {repo.repo}"))
    return {"adapter": settings.adapter, "base": base, **_send(settings, repo, copy), "left_out": copy.left_out}


def _check_token() -> None:
    with needs_extra("hub"):
        from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed.", advice="Unset it, and push again.")
    if get_token() is None:
        raise HubError("no token of the hub is here, and pushing needs one.", advice=LOG_IN)


def _licence(base: str) -> str | None:
    """The base's licence, by the hub's short name; None where the hub does not say."""
    if base in EMBEDDED:
        return EMBEDDED[base].licence
    from huggingface_hub import HfApi

    named = HubName(base_on_hub(base) or base)
    try:
        with told_plainly(named):
            data = HfApi().model_info(named.repo).card_data
    except HubError:
        return None
    licence = None if data is None else data.get("license")
    return licence if isinstance(licence, str) else None


def _read_back(stored: StoredAdapter, copy: Published) -> None:
    """``AdapterError`` unless the copy is read as the adapter that it was made from."""
    with TemporaryDirectory(prefix="capotune-push-") as folder:
        for name, content in copy.files.items():
            (Path(folder) / name).write_bytes(content)
        found = read_adapter(folder)
    same = found.tensors.keys() == stored.tensors.keys() and all(
        torch.equal(tensor, stored.tensors[key]) for key, tensor in found.tensors.items()
    )
    if not same or found.settings != stored.settings:
        raise AdapterError(
            "the copy to push is not read as the adapter is; nothing was pushed.", where=str(stored.folder)
        )


def _send(settings: PushSettings, named: HubName, copy: Published) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with told_plainly(named):
        repo = api.create_repo(named.repo, private=settings.private or None, exist_ok=True).repo_id
        if settings.private and not api.model_info(repo).private:
            raise HubError(f"{repo} is there already and is public; nothing was pushed.", advice="Choose another name.")
        if settings.revision is not None:
            api.create_branch(repo, branch=settings.revision, exist_ok=True)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in copy.files.items()],
            commit_message=settings.message or f"Push {copy.record['method']} adapter with Capotune",
            revision=settings.revision,
        )
    return {"repo": repo, "url": commit.commit_url, "commit": commit.oid, "files": sorted(copy.files)}
