"""Hub ids, against a small server here that speaks as much of the hub's API as huggingface_hub asks for.

What is fetched is what the server's log says. huggingface_hub reads its address when it is imported, so every question is
put in a process of its own."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import model as llama

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parent.parent

MODEL_FILES = {  # as Mistral's repository holds them, every kind once
    name: name.encode() * 50
    for name in ("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "chat_template.jinja",
                 "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "LICENSE",
                 "tokenizer_config.json", "special_tokens_map.json")
}  # fmt: skip
OTHER_FILES = {
    name: b"not to be fetched"
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "modeling_custom.py", "onnx/model.onnx",
                 "original/model.safetensors", "original/tokenizer.model", "training_args.bin", ".gitattributes", "model_fp8/x.safetensors", "tokenizer_2/tokenizer.json")
}  # fmt: skip
LINE = b'{"prompt": "Hi", "chosen": "a", "rejected": "%s"}\n'
PARTS = {f"data/{split}-0000{i}-of-00002-1f2e3d4c5b6a.jsonl": LINE % f"{split} {i}".encode()
         for split in ("train_prefs", "test_prefs", "train_sft") for i in (0, 1)}  # fmt: skip
CONVERTED = {f"default/{split}/0000.jsonl": LINE % split.encode() for split in ("train", "test")}
NEW = {"config.json": b"{}", "model.safetensors": b"new" * 50}
REPOSITORIES = {  # kind/name → revision → files
    "models/owner/name": {"main": MODEL_FILES | OTHER_FILES, "v2": NEW},
    "models/owner/closed": {"main": NEW},
    "datasets/owner/prefs": {"main": PARTS | {"README.md": b"", "script.py": b""}, "refs/convert/parquet": CONVERTED},
    "datasets/owner/single": {"main": {"train.jsonl": LINE % b"b", "README.md": b""}},
}


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of lists, revisions and files."""

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
        if asked := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path):
            kind, name, what, revision = asked.groups()
        elif asked := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, what = asked[1] or "models", asked[2], asked[3], asked[4]
        else:
            return self.answer(404)
        revisions = REPOSITORIES.get(f"{kind.strip('/')}/{name}")
        if revisions is None:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        found = [r for r in revisions if (revision or "main") in (r, commit(r))]
        if not found:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        files, sha = revisions[found[0]], commit(found[0])
        tag = lambda file: hashlib.sha1(files[file]).hexdigest()
        if "/api/" in path:
            tree = [{"type": "file", "path": f, "oid": tag(f), "size": len(files[f])} for f in files]
            info = {"id": name, "sha": sha, "private": False, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(200, json.dumps(tree if what == "tree" else info).encode(), Content_Type="application/json")
        if name == "owner/closed":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
        if self.command == "GET":
            self.server.log.append(what)
        body, headers = files[what], {"ETag": f'"{tag(what)}"', "X_Repo_Commit": sha}
        if what == self.server.cut:  # promises everything, and hangs up half way
            headers["Content_Length"], body = str(len(body)), body[: len(body) // 2]
            self.close_connection = True
        return self.answer(200, body, **headers)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.log, server.cut = [], None  # the files sent; one whose connection breaks
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(hub, tmp_path):
    """What a new process with an own cache answers: the paths that it got, or the error's one line."""

    def ask(expression: str, **environment: str) -> list[str] | str:
        script = f"""import data
try:
    paths = {expression}
    paths = sorted(p for p in paths.rglob("*") if p.is_file()) if hasattr(paths, "rglob") else paths
    print(*("/".join(p.parts[p.parts.index("snapshots") + 2:]) for p in paths), sep="\\n")
except data.DataError as e:
    print("refused:", e)"""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        address = f"http://127.0.0.1:{hub.server_address[1]}"
        settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT)} | environment
        done = subprocess.run([sys.executable, "-c", script], env=clean | settings, capture_output=True, text=True,
                              timeout=120, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        lines = done.stdout.splitlines()
        return lines[0].removeprefix("refused: ") if lines[0].startswith("refused: ") and len(lines) == 1 else lines

    return ask


def model(name: str) -> str:
    return f"data.local_path({name!r}, 'model', {llama.CHECKPOINT_FILES!r})"


def dataset(name: str) -> str:
    return f"data.data_files({name!r})"


def test_model(hub, ask):
    """Weights once, configuration, tokenizer, template, licence: no pickle, no code, no second copy of the weights."""
    assert ask(model("owner/name")) == sorted(MODEL_FILES) == sorted(hub.log)
    assert ask(model("owner/name")) == sorted(MODEL_FILES) and len(hub.log) == len(MODEL_FILES), "nothing twice"
    hub.shutdown()
    assert ask(model("owner/name"), HF_HUB_OFFLINE="1") == sorted(MODEL_FILES)


def test_revision(hub, ask):
    assert ask(model("owner/name@v2")) == sorted(NEW) == sorted(hub.log)
    assert ask(model("owner/name@" + commit("v2"))) == sorted(NEW)
    assert ask(model("owner/name@v3")) == "owner/name@v3: the model has no revision 'v3' on the hub"


def test_split(hub, ask):
    """`train_prefs` is neither `test_prefs` nor `train_sft`, and only its parts come."""
    train = [name for name in PARTS if "train_prefs" in name]
    assert ask(dataset("owner/prefs:train_prefs")) == train == sorted(hub.log)
    assert ask(dataset("owner/prefs:train_prefs"), HF_HUB_OFFLINE="1") == train
    refused = ask(dataset("owner/prefs:valid"))
    assert refused == ("owner/prefs:valid: no .jsonl, .json, .jsonl.gz, .parquet file of split 'valid' in owner/prefs: "
                       "it has test_prefs, train_prefs, train_sft")  # fmt: skip
    assert ask(dataset("owner/prefs:train@refs/convert/parquet")) == ["default/train/0000.jsonl"]


def test_split_must_be_named(hub, ask):
    """A repository with test data beside training data is asked which, before anything is fetched."""
    names = "holds several splits, test_prefs, train_prefs, train_sft: pass one as owner/prefs:SPLIT"
    assert ask(dataset("owner/prefs")) == f"owner/prefs: {names}"
    converted = "owner/prefs@refs/convert/parquet"
    assert "several splits, test, train" in ask(dataset(converted))
    assert hub.log == []
    assert ask(dataset("owner/single")) == ["train.jsonl"] == hub.log


def test_gated_and_missing(hub, ask):
    """What to do is in the line: the hub's own page of terms, or to log in."""
    gated = "gated on the hub: accept its terms at https://huggingface.co/owner/closed, then run `hf auth login`"
    assert ask(model("owner/closed")) == f"owner/closed: {gated}"
    for question in (model("owner/nothing"), dataset("owner/nothing:train")):
        assert re.fullmatch(r"owner/nothing: no such file or folder here, and no such (model|dataset) on the hub "
                            r"\(or private: `hf auth login`\)", ask(question))  # fmt: skip
    assert hub.log == []


def test_out_of_reach(hub, ask):
    """Offline, or the server is down: one line, and no minutes of retries."""
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        refused = ask(model("owner/name"), **settings)
        assert refused.startswith("owner/name: no such file or folder here, and the hub cannot be reached (")
        assert refused.endswith("; download it where there is a network and pass the folder")
    assert hub.log == []


def test_interrupted(hub, ask):
    """A connection that breaks in the middle of a file, every time: one line, no half file under its name; the next
    attempt fetches that file alone."""
    hub.cut = "model.safetensors"
    broken = r"owner/name@v2: the download broke off \(.*\): run the same command again, files that came whole are kept"
    assert re.fullmatch(broken, ask(model("owner/name@v2")))
    assert ask(model("owner/name@v2"), HF_HUB_OFFLINE="1") == ["config.json"]
    hub.cut, hub.log[:] = None, []
    assert ask(model("owner/name@v2")) == sorted(NEW) and hub.log == ["model.safetensors"]


def test_half_a_split_is_not_trained_on(ask, hub, tmp_path):
    """Of two parts one is here (an interrupted download, then no network): half the data must not pass for all of it."""
    train = ask(dataset("owner/prefs:train_prefs"))
    [part] = (tmp_path / "hf").rglob(Path(train[1]).name)
    part.unlink()
    refused = ask(dataset("owner/prefs:train_prefs"), HF_HUB_OFFLINE="1")
    assert refused.startswith("owner/prefs:train_prefs: ") and refused.endswith("1 of 2 parts are here")
