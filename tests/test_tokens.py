"""Check the token explorer: its numbers, its page, and that texts of strangers stay texts."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

import train
from formats import checkpoint
from formats.tokenizer import Tokenizer
from study import analyze, tokens

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
HOSTILE = "</script><!-- <img src=x onerror=alert(1)>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects tags, addresses and script texts."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.addresses, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)


def values_of(text: str) -> dict:
    return json.loads(Reader(text).scripts[0])


def command(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study/tokens.py", *map(str, words)])
    tokens.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a copy of the toy whose weights have changed."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(TOY / "checkpoint", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.1 * w for name, w in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def words(trained, tmp_path) -> list[object]:
    policies = ["--policy", f"{HOSTILE}={trained}", "--policy", f"γ=0={TOY / 'checkpoint'}"]
    rest = ["--reference", TOY / "checkpoint", "--data", TOY / "heldout.jsonl", "--limit", "12"]
    return [*policies, *rest, "--out", tmp_path / "new" / "page.html"]


@pytest.fixture
def page(monkeypatch, words) -> str:
    command(monkeypatch, *words)
    return words[-1].read_text(encoding="utf-8")


def test_numbers_are_those_that_training_sees(page, trained):
    """Each token's log-probability is what it adds to the response's; rewards are SimPO's."""
    values, tokenizer = values_of(page), Tokenizer(TOY / "checkpoint")
    pairs, _ = analyze.read_pairs(str(TOY / "heldout.jsonl"), tokenizer, 2048, 1800, limit=12)
    assert len(values["pairs"]) == len(pairs) == 12
    for folder, of in ((TOY / "checkpoint", "before"), (trained, 0), (TOY / "checkpoint", 1)):
        logps, lengths = train.response_logps(checkpoint.load(folder), pairs)
        for entry, sums, counts in zip(values["pairs"], logps.tolist(), lengths.tolist()):
            table = entry["before"] if of == "before" else entry["after"][of]
            assert [len(row) for row in table] == counts == [len(t) for t in entry["tokens"]]
            for row, total, n in zip(table, sums, counts):
                assert sum(row) / 1000 == pytest.approx(total, abs=0.0005 * n + 1e-4)
        if of == 0:
            rewards = (2.0 * logps / lengths).tolist()  # SimPO's, at the default β
            assert np.allclose(values["runs"][0]["rewards"], rewards, atol=2e-4)
    first, table = pairs[0], values["pairs"][0]["after"][0][1]
    for n in range(1, 4):  # the rejected response, cut after n tokens
        cut = [train.Pair(first.prompt, (first.responses[0], first.responses[1][:n]))]
        total = train.response_logps(checkpoint.load(trained), cut)[0][0, 1].item()
        assert sum(table[:n]) / 1000 == pytest.approx(total, abs=0.002)
    assert "".join(values["pairs"][0]["tokens"][0]).startswith("the cloud attracts visitors .")
    assert values["runs"][1]["name"] == "γ=0" and values["pairs"][0]["where"] == "heldout.jsonl:1"


def test_a_page_is_whole_small_and_alone(page):
    """It has no address to load from, and a text that looks like HTML adds no tag."""
    reader = Reader(page)
    assert reader.tags.count("script") == 2 and "img" not in reader.tags
    assert reader.addresses == [] and "@import" not in page and "url(" not in page
    assert [line for line in page.splitlines() if "://" in line and "w3.org" not in line] == []
    assert values_of(page)["runs"][0]["name"] == HOSTILE
    assert len(page.encode()) < 50_000
    assert "prefers-color-scheme: dark" in page and "innerHTML" not in page


@pytest.mark.parametrize("text", [HOSTILE, "<!--<script>", "\u2028 \\u003c \x00", "\ud800", "DATA"])
def test_texts_of_strangers_stay_texts(text):
    value = {"pairs": [{"prompt": text}]}
    html = tokens.page(value).encode(errors="replace").decode()
    reader = Reader(html)
    assert reader.tags == Reader(tokens.page({})).tags
    assert json.loads(reader.scripts[0]) == {"pairs": [{"prompt": text.replace("\ud800", "?")}]}


def test_a_character_of_several_tokens_is_shown_once(tmp_path):
    """A byte-level tokenizer without merges splits é into two tokens and an emoji into four."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = "aé 🙂\n"
    ids = backend.encode(text).ids
    found = tokens.pieces(type("T", (), {"backend": backend}), np.array(ids))
    assert found == ["a", "", "é", " ", "", "", "", "🙂", "\n"] and "".join(found) == text
    cut = tokens.pieces(type("T", (), {"backend": backend}), np.array(ids[:5]))
    assert cut[:4] == ["a", "", "é", " "] and cut[4] == "\ufffd"  # cut within a character


def test_pairs_beyond_two_megabytes_are_left_out(monkeypatch, capsys, words):
    monkeypatch.setattr(tokens, "LARGEST", 2000)
    command(monkeypatch, *words)
    values = values_of(words[-1].read_text(encoding="utf-8"))
    count = len(values["pairs"])
    assert 0 < count < 12 and f"{count} of 12 pairs fill a page" in capsys.readouterr().out
    assert [len(run["rewards"]) for run in values["runs"]] == [count] * 2


@pytest.mark.parametrize(
    "changes, status, parts",
    [
        ({"--reference": None}, 1, ["--reference", "started from"]),
        ({"--policy": TOY / "checkpoint"}, 1, ["--policy", "NAME=DIR"]),
        ({"--policy": "x=nowhere/at/all"}, 1, ["nowhere"]),
        ({"--data": "nowhere.jsonl"}, 1, ["nowhere.jsonl"]),
        ({"--limit": "0"}, 2, ["--limit", "positive"]),
        ({"--objective": "sft"}, 2, ["--objective"]),
        ({"--objective": "dpo", "--reference": None}, 1, ["--reference"]),
        ({"--out": TOY}, 1, ["toy"]),
    ],
)
def test_errors_in_one_line(monkeypatch, capsys, tmp_path, changes, status, parts):
    flags = {"--policy": TOY / "checkpoint", "--reference": TOY / "checkpoint"}
    flags |= {"--data": TOY / "heldout.jsonl", "--limit": "2", "--out": tmp_path / "page.html"}
    twice = ["--policy", TOY / "checkpoint"] if "NAME=DIR" in parts else []
    given = [word for item in (flags | changes).items() if item[1] is not None for word in item]
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, *given, *twice)
    message = e.value.code if status == 1 else capsys.readouterr().err.splitlines()[-1]
    assert "error: " in message and "\n" not in message.strip()
    assert all(part in message for part in parts) and (status == 1 or e.value.code == 2)


def test_other_tokens_and_numbers_that_are_none_are_refused(monkeypatch, tmp_path, trained, words):
    """A policy with another template cannot be compared token by token."""
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("+ ' <|end|> '", "+ ' . <|end|> '")
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="--policy x: reads .* as other tokens"):
        command(monkeypatch, *words[4:], "--policy", f"x={other}")
    weights = load_file(trained / "model.safetensors")
    bad = Path(shutil.copytree(trained, tmp_path / "bad"))
    weights["model.norm.weight"] *= torch.nan
    save_file(weights, bad / "model.safetensors")
    with pytest.raises(SystemExit, match="bad: gives log-probabilities that are not finite"):
        command(monkeypatch, *words[4:], "--policy", f"x={bad}")


SHIM = """
const made = {}, listeners = {};
function node(tag) {
  const self = { tag, attributes: {}, children: [], on: {}, dataset: {}, text: "",
    classList: { toggle() {} },
    setAttribute(name, value) { self.attributes[name] = String(value); },
    append(...more) { self.children.push(...more); },
    replaceChildren(...more) { self.children = []; self.append(...more); },
    addEventListener(event, f) { self.on[event] = f; },
    get textContent() { return self.text; }, set textContent(x) { self.text = x; },
    all() { return [self, ...self.children.flatMap((c) => c.all ? c.all() : [])]; } };
  return self;
}
const document = { createElement: node, createElementNS: (_, tag) => node(tag),
  getElementById: (id) => (made[id] ??= node(id)), querySelectorAll: () => [],
  addEventListener: (event, f) => (listeners[event] = f) };
made.data = node("script");
made.data.text = require("fs").readFileSync(0, "utf8");
"""
CHECKS = """
const shown = () => made.runs.children.flatMap((c) => c.all()).filter((n) => n.dataset.at);
const press = (key) => listeners.keydown({ key, preventDefault() {} });
const count = (i) => page.runs.length * page.pairs[i].tokens.flat().length;
const found = [made.where.text, shown().length === count(0)];
press("ArrowLeft"); found.push(made.where.text);
press("ArrowRight"); found.push(made.where.text, shown().length === count(1));
press("End"); press("ArrowRight"); found.push(made.where.text);
shown()[0].on.focus(); found.push(made.detail.all().length > 20);
made.back.on.click(); found.push(made.where.text);
found.push(made.runs.children[0].children[0].children[0], shown()[0].attributes);
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_keys_and_tokens_of_the_page(page):
    """The page's own script, with a stand-in for the browser's document."""
    data, script = Reader(page).scripts
    done = subprocess.run(
        ["node", "-e", SHIM + script + CHECKS], input=data, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, all_shown, still, second, all_of_second, last, detail, back, name, attributes = (
        json.loads(done.stdout)
    )
    assert first == still == "pair 1 of 12, heldout.jsonl:1" and second.startswith("pair 2 of 12")
    assert last.startswith("pair 12 of") and back.startswith("pair 11 of")
    assert all_shown and all_of_second and detail and name == HOSTILE
    assert attributes["tabindex"] == "0" and attributes["class"].split()[1] in ("up", "down")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_a_browser_shows_every_token(page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    done = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=60)
    count = sum(map(len, values_of(page)["pairs"][0]["tokens"]))
    assert done.stdout.count("data-at=") == 2 * count


def test_the_committed_page_is_what_the_command_writes():
    text = (ROOT / "docs" / "tokens.html").read_text(encoding="utf-8")
    values = values_of(text)
    assert text == tokens.page(values), "make it again, see docs/guide.md"
    assert [run["name"] for run in values["runs"]] == ["SimPO", "no length norm", "DPO"]
    assert len(text.encode()) < 200_000 and len(values["pairs"]) >= 20
    for i, change in enumerate((0.3, -3.1, -0.6)):  # what README says of the end of the answer
        ends = [p["after"][i][r][-1] - p["before"][r][-1] for p in values["pairs"] for r in (0, 1)]
        assert sum(ends) / len(ends) / 1000 == pytest.approx(change, abs=0.05)
        assert i != 1 or max(ends) < 0 and len(ends) == 100
    sources = (ROOT / "study" / f"tokens.{end}" for end in ("py", "html"))
    assert sum(len(path.read_text().splitlines()) for path in sources) < 400
