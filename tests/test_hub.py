"""Test hub ids against a small local server, which speaks the part of the hub's API that we need.

The server's log says which files were downloaded. huggingface_hub reads the server's address when
it is imported, which each download does in a process of its own. Tests of local paths are in
tests/test_data.py.
"""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from formats.checkpoint import checkpoint_folder
from formats.errors import DataError
from formats.records import data_files

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parent.parent

# fmt: off
MODEL_FILES = {  # one file of every kind, named as in a Mistral repository
    name: name.encode() * 50
    for name in (
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "LICENSE",
    )
}
OTHER_FILES = {
    name: b"not to be fetched"
    for name in (
        "README.md", "pytorch_model.bin", "consolidated.safetensors", "modeling_custom.py",
        "onnx/model.onnx", "original/model.safetensors", "original/tokenizer.model",
        "training_args.bin", ".gitattributes", "model_fp8/x.safetensors",
        "tokenizer_2/tokenizer.json",
    )
}
# fmt: on
LINE = b'{"prompt": "Hi", "chosen": "a", "rejected": "%s"}\n'
PARTS = {
    f"data/{split}-0000{i}-of-00002-1f2e3d4c5b6a.jsonl": LINE % f"{split} {i}".encode()
    for split in ("train_prefs", "test_prefs", "train_sft")
    for i in (0, 1)
}
CONVERTED = {f"default/{split}/0000.jsonl": LINE % split.encode() for split in ("train", "test")}
NEW = {"config.json": b"{}", "model.safetensors": b"new" * 50}
REPOSITORIES = {  # kind/name → revision → files
    "models/owner/name": {"main": MODEL_FILES | OTHER_FILES, "v2": NEW},
    "models/owner/closed": {"main": NEW},
    "datasets/owner/prefs": {
        "main": PARTS | {"README.md": b"", "script.py": b""},
        "refs/convert/parquet": CONVERTED,
    },
    "datasets/owner/single": {"main": {"train.jsonl": LINE % b"b", "README.md": b""}},
}
UNREACHABLE = "no such file or folder on this machine, and the hub cannot be reached ("

# A download without the imports of the commands, which takes all files that the hub names.
BARE = """\
from formats.errors import DataError
from formats.hub import from_hub
try:
    print("got", from_hub("owner/name@v2", "model", lambda files: files))
except DataError as e:
    print("refused:", e)
"""


def commit(revision: str) -> str:
    """Return the commit that a revision stands for."""
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Answers GET and HEAD for file lists, revisions and files of `REPOSITORIES`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if self.server.hostile and self.server.hostile(self, path):
            return None
        api = r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?"
        if asked := re.fullmatch(api, path):
            kind, name, what, revision = asked.groups()
        elif asked := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, what = asked[1] or "models", asked[2], asked[3], asked[4]
        else:
            return self.answer(404)
        revisions = REPOSITORIES.get(f"{kind.strip('/')}/{name}")
        if revisions is None:
            missing = "Repository not found"
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message=missing)
        found = [r for r in revisions if (revision or "main") in (r, commit(r))]
        if not found:
            missing = "Invalid rev id"
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=missing)
        files, sha = revisions[found[0]], commit(found[0])
        if "/api/" in path:
            return self.answer_list(what, name, files, sha)
        if name == "owner/closed":
            closed = "Access to this model is restricted"
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message=closed)
        return self.answer_file(what, files[what], sha)

    def answer_list(self, what: str, name: str, files: dict[str, bytes], sha: str) -> None:
        """Answer with a repository's description, or with its files if `what` is "tree"."""
        tree = [
            {"type": "file", "path": file, "oid": digest(body), "size": len(body)}
            for file, body in files.items()
        ]
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "sha": sha, "private": False, "siblings": siblings}
        body = json.dumps(tree if what == "tree" else info).encode()
        self.answer(200, body, Content_Type="application/json")

    def answer_file(self, file: str, body: bytes, sha: str) -> None:
        """Answer with a file, or break off halfway through the one that `server.cut` names."""
        if self.command == "GET":
            self.server.log.append(file)
        headers = {"ETag": f'"{self.server.etag or digest(body)}"', "X_Repo_Commit": sha}
        if file == self.server.cut:
            headers["Content_Length"], body = str(len(body)), body[: len(body) // 2]
            self.close_connection = True
        self.answer(200, body, **headers)


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub():
    """Start the server. Its `log` lists the files it sent; `cut` names a file to break off.

    `hostile` is called before an answer, which it may give itself; `etag` replaces every file's.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.log, server.cut, server.hostile, server.etag = [], None, None, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """Return an environment in which downloads come from the server, into a cache of their own."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    return clean | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address}


@pytest.fixture
def ask(environment, monkeypatch, tmp_path):
    """Return a function that opens a model or a data set in this environment.

    It returns the names of the files that it got, or the one line of its error.
    """

    def ask(work: Callable[[], Path | list[Path]], **more: str) -> list[str] | str:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(os, "environ", environment | more)
            try:
                paths = work()
            except DataError as e:
                return str(e)
        if isinstance(paths, Path):
            paths = sorted(path for path in paths.rglob("*") if path.is_file())
        return ["/".join(path.parts[path.parts.index("snapshots") + 2 :]) for path in paths]

    return ask


@pytest.fixture
def refusal(environment, tmp_path):
    """Return a function that downloads whatever the hub names, and returns the error of that.

    It does so in a process without the imports of the commands, whose memory can be watched.
    """

    def refusal() -> str:
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
        path = {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", BARE], env=environment | path, **options)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        [line] = done.stdout.splitlines()
        return line.removeprefix("refused: ")

    return refusal


def model(name: str) -> Callable[[], Path]:
    return partial(checkpoint_folder, name)


def dataset(name: str) -> Callable[[], list[Path]]:
    return partial(data_files, name)


def test_model(hub, ask):
    """Only weights, configuration, tokenizer, template and license are downloaded, each once."""
    assert ask(model("owner/name")) == sorted(MODEL_FILES) == sorted(hub.log)
    assert ask(model("owner/name")) == sorted(MODEL_FILES)
    assert len(hub.log) == len(MODEL_FILES), "a file was downloaded again"
    hub.shutdown()
    assert ask(model("owner/name"), HF_HUB_OFFLINE="1") == sorted(MODEL_FILES)


def test_revision(hub, ask):
    """`owner/name@revision` takes a branch, tag or commit, and an unknown one is named."""
    assert ask(model("owner/name@v2")) == sorted(NEW) == sorted(hub.log)
    assert ask(model("owner/name@" + commit("v2"))) == sorted(NEW)
    missing = "owner/name@v3: the model has no revision 'v3' on the hub"
    assert ask(model("owner/name@v3")) == missing


def test_split(hub, ask):
    """Only the parts of the requested split are downloaded, not those of similarly named ones."""
    train = [name for name in PARTS if "train_prefs" in name]
    assert ask(dataset("owner/prefs:train_prefs")) == train == sorted(hub.log)
    assert ask(dataset("owner/prefs:train_prefs"), HF_HUB_OFFLINE="1") == train
    assert ask(dataset("owner/prefs:valid")) == (
        "owner/prefs:valid: no .jsonl, .json, .jsonl.gz, .parquet file of split 'valid' "
        "in owner/prefs: it has test_prefs, train_prefs, train_sft"
    )
    converted = ["default/train/0000.jsonl"]
    assert ask(dataset("owner/prefs:train@refs/convert/parquet")) == converted


def test_split_must_be_named(hub, ask):
    """A data set with several splits is refused before any download until one is named."""
    names = "holds several splits, test_prefs, train_prefs, train_sft: pass one as"
    assert ask(dataset("owner/prefs")) == f"owner/prefs: {names} owner/prefs:SPLIT"
    converted = "owner/prefs@refs/convert/parquet"
    assert "several splits, test, train" in ask(dataset(converted))
    assert hub.log == []
    assert ask(dataset("owner/single")) == ["train.jsonl"] == hub.log


def test_gated_and_missing(hub, ask):
    """The error of a closed or missing repository says what to do: accept its terms, or log in."""
    terms = "accept its terms at https://huggingface.co/owner/closed, then run `hf auth login`"
    assert ask(model("owner/closed")) == f"owner/closed: gated on the hub: {terms}"
    missing = (
        r"owner/nothing: no such file or folder on this machine, and no such (model|dataset) "
        r"on the hub \(or private: `hf auth login`\)"
    )
    for question in (model("owner/nothing"), dataset("owner/nothing:train")):
        assert re.fullmatch(missing, ask(question))
    assert hub.log == []


def test_out_of_reach(hub, ask):
    """Offline, or with the server down, the error is one line that comes without long retries."""
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        refused = ask(model("owner/name"), **settings)
        assert refused.startswith(f"owner/name: {UNREACHABLE}")
        assert refused.endswith("; download it where there is a network and pass the folder")
    assert hub.log == []


def test_interrupted(hub, ask):
    """A download that breaks off leaves no partial file, and only that file is downloaded again."""
    hub.cut = "model.safetensors"
    refused = ask(model("owner/name@v2"))
    advice = "run the same command again, complete files are kept"
    assert re.fullmatch(rf"owner/name@v2: the download broke off \(.*\): {advice}", refused)
    assert ask(model("owner/name@v2"), HF_HUB_OFFLINE="1") == ["config.json"]
    hub.cut, hub.log[:] = None, []
    assert ask(model("owner/name@v2")) == sorted(NEW)
    assert hub.log == ["model.safetensors"]


def test_half_a_split_is_not_trained_on(ask, hub, tmp_path):
    """A split with a part missing in the cache is refused, because half must not pass for all."""
    train = ask(dataset("owner/prefs:train_prefs"))
    [part] = (tmp_path / "hf").rglob(Path(train[1]).name)
    part.unlink()
    refused = ask(dataset("owner/prefs:train_prefs"), HF_HUB_OFFLINE="1")
    assert refused.startswith("owner/prefs:train_prefs: ")
    assert refused.endswith("1 of 2 parts are on this machine: complete the download or the copy")


def endless(part: str, pause: float = 0):
    """Return a hub that answers questions whose path holds `part` without end."""

    def answer(handler: Hub, path: str) -> bool:
        if part not in path or handler.command == "HEAD":
            return False
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b" " if pause else b" " * 2**20)
                time.sleep(pause)
        except OSError:
            handler.close_connection = True
        return True

    return answer


def later(status: int, **headers: str):
    """Return a hub that asks to wait before any file is downloaded."""

    def answer(handler: Hub, path: str) -> bool:
        if "resolve" in path:
            handler.answer(status, **headers)
        return "resolve" in path

    return answer


def misnamed(files: list[str], sha: str = commit("v2")):
    """Return a hub that lists these files for this commit."""

    def answer(handler: Hub, path: str) -> bool:
        if "/api/" in path:
            what = "tree" if "/tree/" in path else ""
            handler.answer_list(what, "owner/name", dict.fromkeys(files, b"evil"), sha)
        else:
            handler.answer_file("evil", b"evil", sha)
        return True

    return answer


HOSTILE = {  # a hub, and what is said about it
    "waits for a day": (later(429, Retry_After="100000"), "asks to wait 100001 seconds"),
    "waits for another": (later(408, Retry_After="86400"), "asks to wait 86401 seconds"),
    "a file without end": (endless("resolve"), "too large"),
    "a list without end": (endless("/api/"), "cannot be reached"),
    "a file of another folder": (misnamed(["../../../../../evil"]), "evil"),
    "an absolute file": (misnamed(["/tmp/evil-of-the-hub"]), "evil"),
    "a commit of another folder": (misnamed(["config.json"], "../../../../evil"), "evil"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_hub(hub, refusal, tmp_path, case):
    """What a hub says costs neither time, disk nor memory without bound, nor leads elsewhere."""
    hub.hostile, why = HOSTILE[case]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    refused = refusal()
    assert refused.startswith("owner/name@v2: ") and why in refused
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}
    assert not Path("/tmp/evil-of-the-hub").exists()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 2**26
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 2**20)


@pytest.mark.parametrize("etag", ["../../../../evil", "/tmp/evil-of-the-hub"])
def test_hub_that_names_its_blobs(hub, refusal, tmp_path, etag):
    """A file is written into the cache, whatever the hub calls its content."""
    hub.etag = etag
    assert "outside of the cache" in refusal()
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}
    assert not list(Path("/tmp").glob("evil-of-the-hub*"))


def test_hub_that_drips(hub, environment):
    """A hub that sends a byte at a time, never long enough apart, is left after some time."""
    hub.hostile = endless("resolve", pause=0.1)
    limits = "hub.SMALL = (2, 2**26, 2**34)"
    done = subprocess.run(
        [sys.executable, "-c", f"import formats.hub as hub; {limits}; hub.serve()"]
        + ["owner/name@v2", "model"],
        env=environment,
        cwd=ROOT,
        input=b'["config.json"]\n',
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == -signal.SIGALRM
