"""Exported files onto the Hugging Face Hub (or the one that HF_ENDPOINT names), through `huggingface_hub`.

Nothing is sent but by --push_to_hub. The name, the token and what is there already are checked before any weights are
read; every refusal is one line.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class HubError(ValueError):
    """The name, the token or what the Hub allows is wrong; one line with the remedy."""


class HubUnreachable(HubError):
    """The Hub does not answer, or fails: the same command may succeed later."""

    exit_code = 1


@dataclass(frozen=True)
class Repository:
    """A model's repository on the Hub, which may not be there yet.

    Attributes:
        api: `huggingface_hub.HfApi` with the user's token.
        name: USER/NAME.
        public: whether it is to be made public where it is made.
    """

    api: Any
    name: str
    public: bool

    def push(self, files: list[Path], message: str) -> str:
        """Upload the files in one commit, under their own names; the repository is made where it is not there.

        Returns:
            A line with the address. Raises HubError; the files stay where they are.
        """
        from huggingface_hub import CommitOperationAdd

        with _clear_errors(self.name, self.api.endpoint, f"; {files[0]} is written, the same command sends it again"):
            address = self.api.create_repo(self.name, private=not self.public, exist_ok=True)
            additions = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in files]
            self.api.create_commit(self.name, additions, commit_message=message)
            seen_by = "private" if self.api.model_info(self.name).private else "public"
        return f"pushed to {address} ({seen_by}): {', '.join(file.name for file in files)}"


def open_repository(name: str, public: bool = False) -> Repository:
    """The repository to push to, once it is known that the token and the name are accepted.

    Args:
        name: USER/NAME, or NAME for one of the token's own user.
        public: make it public; and accept one that is public already.

    Raises:
        HubError: a malformed name, no token or one that is not accepted, a repository that everybody can read without
            `public`. HubUnreachable: no answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise HubError(
            f"--push_to_hub {name}: not a name of a repository; give USER/NAME of letters, digits, '-', '_' and '.'"
        ) from None
    if (token := get_token()) is None:
        raise HubError(
            f"--push_to_hub {name}: no token; log in by `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = HfApi(token=token)
    with _clear_errors(name, api.endpoint):
        user = api.whoami()["name"]
        name = name if "/" in name else f"{user}/{name}"
        try:
            private = api.model_info(name).private
        except RepositoryNotFoundError:
            private = True
    if not private and not public:
        raise HubError(f"--push_to_hub {name}: everybody can read this repository; add --public if that is meant")
    return Repository(api, name, public)


@contextlib.contextmanager
def _clear_errors(name: str, endpoint: str, kept: str = "") -> Iterator[None]:
    """Turn what the Hub, the network or the library raises into a HubError of one line, which `kept` ends."""
    from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled

    # the HTTP library's own errors are not named, since huggingface_hub has changed it: its error has their base
    network = (*HfHubHTTPError.__bases__, OSError)
    begin = f"--push_to_hub {name}: "
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError(f"{begin}HF_HUB_OFFLINE is set; unset it to push{kept}") from None
    except (*network, RuntimeError, ValueError) as error:
        cause = error
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of an upload, within its progress bar
            cause = error.__cause__
            print(file=sys.stderr)
        status = getattr(getattr(cause, "response", None), "status_code", None)
        text = " ".join((getattr(cause, "server_message", None) or str(cause)).split())[:300]
        if status is None and isinstance(cause, ValueError):
            raise HubError(f"{begin}refused by the Hub: {text}{kept}") from error
        if status == 401:
            raise HubError(
                f"{begin}the Hub does not accept the token (401); log in by `hf auth login`, or set HF_TOKEN{kept}"
            ) from error
        if status == 403:
            raise HubError(
                f"{begin}the token may not write there (403: {text}); take a token that may write, and a name of your "
                f"own user or organisation{kept}"
            ) from error
        if status is not None and status < 500 and status != 429:
            raise HubError(f"{begin}refused by the Hub ({status}: {text}){kept}") from error
        what = f"fails ({status}: {text})" if status else f"cannot be reached ({text or type(cause).__name__})"
        raise HubUnreachable(f"{begin}{endpoint} {what}; try again later{kept}") from error
