"""Resolve names: a path on this machine, or an id on the Hugging Face hub.

This file owns the form `owner/name[@revision]`, every download and the errors of the hub. Read
formats/records.py next for data sets, formats/checkpoint.py for models.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from formats.errors import DataError

# The data files that records.py reads. A name that ends like one is a misspelled path, not an id.
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")

UNREACHABLE = (
    "no such file or folder on this machine, and the hub cannot be reached ({}); "
    "download it where there is a network and pass the folder"
)
INTERRUPTED = "the download broke off ({}): run the same command again, complete files are kept"


def local_path(name: str, kind: str, patterns: Iterable[str] = ("*",)) -> Path:
    """Return the local path of `name`, which is an existing path or an id `owner/name[@revision]`.

    Given an id, download the repository's top-level files that match `patterns` into
    huggingface_hub's cache. `kind` is "model" or "dataset".

    Raises:
        DataError: neither a path nor a repository has that name, or the download failed.
    """

    def choose(files: list[str]) -> list[str]:
        top_level = [file for file in files if "/" not in file]
        return [f for f in top_level if any(fnmatchcase(f, pattern) for pattern in patterns)]

    path = Path(os.path.expanduser(name))
    return path if path.exists() else from_hub(name, kind, choose)


def from_hub(name: str, kind: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """Download files of the repository `owner/name[@revision]` and return the folder with them.

    `choose` gets the names of all files in the repository and returns the ones to download. Files
    that huggingface_hub's cache already holds are not downloaded again. If the hub cannot be
    reached, the cached folder is returned as it is.

    Raises:
        DataError: `name` is no id, or the hub refuses it. Also if the download breaks off, or if
            the hub cannot be reached and nothing is cached.
    """
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or name.endswith(SUFFIXES):
        raise DataError(f"{name}: no such file or folder")
    import huggingface_hub  # slow to import, and only ids need it

    repo: dict[str, Any] = {"repo_type": kind, "revision": revision or None}
    snapshot = partial(huggingface_hub.snapshot_download, repository, **repo)
    try:
        info: Any = huggingface_hub.HfApi().repo_info(repository, **repo, timeout=20)
        files = [file.rfilename for file in info.siblings or ()]
    except Exception as e:  # includes the HTTP library's, and which one that is may change
        try:
            return Path(snapshot(local_files_only=True, allow_patterns=[]))
        except Exception:
            raise _hub_error(e, name, kind, UNREACHABLE) from None
    wanted = [glob.escape(file) for file in choose(files)]
    try:
        return Path(snapshot(allow_patterns=wanted))
    except Exception as e:
        raise _hub_error(e, name, kind, INTERRUPTED) from None


def _hub_error(e: Exception, name: str, kind: str, otherwise: str) -> DataError:
    """Explain an exception of huggingface_hub, and say what to do.

    An exception without an explanation of its own gets `otherwise`, with its first line for {}.
    """
    import huggingface_hub.errors as hub

    repository, _, revision = name.partition("@")
    url = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    match e:
        case hub.HFValidationError():
            problem = "no such file or folder"
        case hub.GatedRepoError():  # derives from RepositoryNotFoundError, so it comes first
            problem = f"gated on the hub: accept its terms at {url}, then run `hf auth login`"
        case hub.RepositoryNotFoundError():
            problem = (
                f"no such file or folder on this machine, and no such {kind} on the hub "
                "(or private: `hf auth login`)"
            )
        case hub.RevisionNotFoundError():
            problem = f"the {kind} has no revision {revision!r} on the hub"
        case _:
            first_line = next(iter(str(e).splitlines()), "")
            problem = otherwise.format(first_line or type(e).__name__)
    return DataError(f"{name}: {problem}")


def at_hand(name: str) -> bool:
    """Return True if the path, or for NAME:SPLIT the path NAME, exists on this machine.

    Return False if it may be a hub id.

    Raises:
        DataError: it does not exist and does not have the form of a hub id.
    """
    data_set = name.partition("@")[0].partition(":")[0]
    if any(os.path.exists(os.path.expanduser(path)) for path in (name, data_set)):
        return True
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?", name)
    if not hub_id or name.endswith(SUFFIXES):
        raise DataError(f"{name}: no such file or folder")
    return False
