"""A model's config.json from the Hugging Face Hub: `hf:org/name`, or `hf:org/name@revision`."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from parsim.errors import ParsimError

PREFIX = "hf:"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"({_PART}(?:/{_PART})?)(?:@({_PART}))?")
BY_HAND = "download its config.json where there is a network, and give its path"


def _reached(endpoint: str, timeout_s: float = 5.0) -> bool:
    """Whether the Hub takes connections; huggingface_hub would try for half a minute to find out."""
    address = urlsplit(endpoint)
    if address.scheme in getproxies():
        return True  # the proxy's to know
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def hub_config(text: str) -> tuple[Path, str]:
    """The downloaded (or cached) config.json, and what to call it in messages.

    Raises ParsimError where the name is none, huggingface_hub is not installed, the Hub does not have
    the file or does not give it without permission, or the network does not reach it.
    """
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    if found is None or ".." in text:
        raise ParsimError(
            "this is no name of a repository", where="--model", got=text,
            expected="hf:ORG/NAME or hf:ORG/NAME@REVISION, such as hf:Qwen/Qwen3-8B",
        )  # fmt: skip
    repository, revision = found.groups()
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ParsimError(
            "models from the Hub need huggingface_hub", where=text,
            hint=f"pip install 'parsim[hf]', or {BY_HAND}",
        ) from None  # fmt: skip
    try:
        path = huggingface_hub.hf_hub_download(
            repository,
            "config.json",
            revision=revision,
            local_files_only=not _reached(huggingface_hub.constants.ENDPOINT),
        )
    except errors.GatedRepoError:
        what, hint = "the Hub gives this model to accepted users only", "hf auth login, after acceptance"
    except errors.RepositoryNotFoundError:
        what, hint = "the Hub has no such model, or it is private", "look it up on huggingface.co/models"
    except errors.RevisionNotFoundError:
        what, hint = "this model has no such revision", f"hf:{repository} takes the newest"
    except errors.LocalEntryNotFoundError:
        what, hint = "cannot reach the Hub, and this model is not in its cache here", BY_HAND
    except errors.EntryNotFoundError:
        what, hint = "this repository has no config.json", "parsim reads models in transformers' format"
    except (errors.HfHubHTTPError, OSError) as error:
        what, hint = f"the Hub did not answer as it should: {str(error).splitlines()[0][:160]}", BY_HAND
    else:
        return Path(path), f"{PREFIX}{repository}/config.json"
    raise ParsimError(what, where=text, hint=hint)
