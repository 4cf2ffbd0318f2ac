"""Resolve names: a path on this machine, or an id on the Hugging Face hub.

This file owns the form `owner/name[@revision]`, every download and the errors of the hub. Whatever
a hub says, a download ends: it runs in a process of its own, within limits of time, bytes and
memory, and writes into the cache only. Read formats/records.py next for data sets,
formats/checkpoint.py for models.
"""

import glob
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from formats.errors import DataError
from formats.progress import Progress
from formats.sandbox import set_limit

# The data files that records.py reads. A name that ends like one is a misspelled path, not an id.
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")

UNREACHABLE = (
    "no such file or folder on this machine, and the hub cannot be reached ({}); "
    "download it where there is a network and pass the folder"
)
# (seconds, bytes of a file, bytes of memory) for the list of files, small files and the others
LIST, SMALL, LARGE = (120, 2**26, 2**29), (600, 2**26, 2**34), (86400, 2**36, 2**34)
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
    # -P keeps the working folder off the child's sys.path
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", "import formats.hub as hub; hub.serve()", name, kind],
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin and child.stdout
    try:
        answer = json.loads(child.stdout.readline() or "{}")
        if "files" in answer:
            child.stdin.write(json.dumps(choose(answer["files"])).encode() + b"\n")
            child.stdin.flush()
            answer = json.loads(child.stdout.readline() or "{}")
    finally:
        if sys.exc_info()[0]:
            child.kill()
        child.stdin.close()
        status = child.wait()
    if "path" not in answer:
        slow = "the hub takes too long" if status == -signal.SIGALRM else f"ended by {-status}"
        raise DataError(answer.get("error", f"{name}: {INTERRUPTED.format(slow)}"))
    return Path(answer["path"])


def serve() -> None:
    """Download for `from_hub`, in its child process. Each line is JSON.

    child → parent   {"files": the repository's}, or at once the last line
    parent → child   the files to download
    child → parent   {"path": the folder with them} or {"error": a message}
    """
    name, kind = sys.argv[1:]
    _limit(LIST)
    sys.dont_write_bytecode = True  # it would be written outside of the cache
    with Progress(f"downloading {name}, MB") as progress:
        answer = _download(name, kind, progress)
    print(json.dumps(answer), flush=True)
    os._exit(0)  # without waiting for threads that still download


def _download(name: str, kind: str, progress: Progress) -> dict[str, str]:
    """Return the last answer of `serve`, after the others."""
    import huggingface_hub
    from huggingface_hub import constants, utils

    class Bar(utils.tqdm):
        """Takes the bytes that huggingface_hub counts; its own bars are switched off."""

        def __init__(self, *args: Any, **options: Any):
            self.bytes = options.get("unit") == "B"
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.bytes and self.n > progress.done * 10**6:
                progress.done, progress.total = self.n // 10**6, (self.total or self.n) // 10**6

    _stay_in([constants.HF_HOME, constants.HF_HUB_CACHE])
    repository, _, revision = name.partition("@")
    repo: dict[str, Any] = {"repo_type": kind, "revision": revision or None}
    snapshot = partial(huggingface_hub.snapshot_download, repository, **repo, tqdm_class=Bar)
    answer, unknown = {}, UNREACHABLE
    try:
        try:
            info: Any = huggingface_hub.HfApi().repo_info(repository, **repo, timeout=20)
            print(json.dumps({"files": [file.rfilename for file in info.siblings or ()]}))
        except Exception as e:  # includes the HTTP library's, and which one that is may change
            try:
                answer = {"path": snapshot(local_files_only=True, allow_patterns=[])}
            except Exception:
                raise e from None
        else:
            sys.stdout.flush()
            unknown, wanted = INTERRUPTED, json.loads(sys.stdin.readline())
            large = [f for f in wanted if kind == "dataset" or f.endswith(".safetensors")]
            for limits, files in (SMALL, [f for f in wanted if f not in large]), (LARGE, large):
                _limit(limits)
                answer = {"path": snapshot(allow_patterns=[glob.escape(file) for file in files])}
    except Exception as e:
        answer = {"error": str(_hub_error(e, name, kind, unknown))}
    return answer


def _limit(limits: tuple[int, int, int]) -> None:
    """Give this process so many seconds, bytes per file and bytes of memory.

    A hub that asks to wait longer than a minute is not obeyed.
    """
    seconds, file_size, memory = limits
    signal.alarm(seconds)  # ends the process
    set_limit(resource.RLIMIT_FSIZE, file_size, resource.RLIM_INFINITY)
    set_limit(resource.RLIMIT_DATA, memory, resource.RLIM_INFINITY)

    def patient_sleep(seconds: float, sleep: Callable = time.sleep) -> None:
        if seconds > 60:
            raise TimeoutError(f"the hub asks to wait {seconds:.0f} seconds")
        sleep(seconds)

    time.sleep = patient_sleep  # type: ignore[assignment]


def _stay_in(folders: list[str]) -> None:
    """Refuse to write outside of `folders`: a hub chooses the names of files, blobs and commits."""
    roots = tuple(os.path.realpath(folder) + os.sep for folder in [*folders, os.devnull])
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    changes = ("open", "os.mkdir", "os.rename", "os.symlink", "os.link")

    def watch(event: str, arguments: tuple) -> None:
        if event not in changes or (event == "open" and not arguments[2] & writes):
            return
        named = arguments[: 1 if event in ("open", "os.mkdir") else 2]
        paths = [os.fsdecode(path) for path in named if not isinstance(path, int)]
        if event == "os.symlink":  # a relative link counts from where it is
            paths[0] = os.path.join(os.path.dirname(paths[1]), paths[0])
        for path in paths:
            if not (os.path.realpath(path) + os.sep).startswith(roots):
                raise PermissionError(f"the hub names a file outside of the cache: {path}")

    sys.addaudithook(watch)


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
