"""Uploading exported weights to the Hugging Face Hub, where a user asks for it."""

from __future__ import annotations

import re
from pathlib import Path

from cca_ds.config.recipes import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def require_token(name: str) -> None:
    """Raise ConfigError for a name that is no repository's, or without a token, before anything is written."""
    from huggingface_hub import get_token

    if not _NAME.fullmatch(name):
        raise ConfigError([f"--push_to_hub {name[:80]}: write OWNER/NAME of a model repository"])
    if get_token() is None:
        raise ConfigError([f"--push_to_hub {name}: no token; `hf auth login` stores one, or set HF_TOKEN"])


def push(name: str, files: list[Path]) -> str:
    """Upload files into a model repository in one commit; a new one is private, and its owner may publish it.

    Returns:
        One line with the repository's address.

    Raises:
        OSError: what the Hub answers, or that it cannot be reached, in one line.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in files]
        api.create_commit(name, operations, commit_message="Weights, model card and config from cca-export")
    except Exception as error:  # huggingface_hub raises its HTTP library's errors, and its own
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = {401: "the token is not valid", 403: "the token may not write there"}.get(status)
        reason = reason or " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(f"--push_to_hub {name}: {reason}; the files are in {files[0].parent}") from None
    return f"pushed to {api.endpoint}/{name}: {', '.join(file.name for file in files)}"
