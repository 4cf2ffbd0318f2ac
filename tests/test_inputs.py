"""How ranks share a data set, and what OUT/tokens keeps of it."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks
from safetensors.numpy import save_file
from test_train import TOY

from data import encode
from formats.errors import DataError
from formats.tokenizer import Tokenizer
from runtime import inputs, tokens
from runtime.inputs import load_pairs, open_pairs
from runtime.settings import Settings
from runtime.tokens import Pairs, Tokenized

LINES = (TOY / "heldout.jsonl").read_text().splitlines()[:30]
RECORDS = [json.loads(line) for line in LINES]
TOKENIZER = Tokenizer(TOY / "checkpoint")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK", 4)


def write_list(path: Path) -> None:
    path.write_text(json.dumps(RECORDS))


def write_lines(path: Path) -> None:
    path.write_text("\n\n".join(LINES))  # blank lines are no records


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("\n".join(LINES).encode()))


def write_parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=7)


def write_parts(path: Path) -> None:
    """Write a folder of files whose records fill no blocks."""
    path.mkdir()
    for i in range(3):
        (path / f"train-0000{i}-of-00003.jsonl").write_text("\n".join(LINES[i * 10 : i * 10 + 10]))


WRITERS = {
    "pairs.json": write_list,
    "pairs.jsonl": write_lines,
    "pairs.jsonl.gz": write_gzip,
    "pairs.parquet": write_parquet,
    "folder": write_parts,
}


def contents(pairs: Pairs) -> list:
    return [
        (pair.prompt.tolist(), [r.tolist() for r in pair.responses], pair.where, pair.index)
        for pair in pairs
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_any_number_of_ranks_reads_the_same(monkeypatch, tmp_path, name):
    """Every rank gets the pairs of one rank, in the order of the file."""
    WRITERS[name](tmp_path / name)
    settings = Settings(model="m", data=str(tmp_path / name))

    def work() -> Tokenized:
        return load_pairs(settings.data, TOKENIZER, settings)

    [alone] = on_ranks(monkeypatch, 1, work)
    examples = [e for block in inputs.read_blocks(settings.data, settings) for e in block.examples]
    expected = encode(examples, TOKENIZER, 2048, 1800, inputs.Counter())
    assert [pair.where for pair in alone.pairs] == [pair.where for pair in expected]
    for pair, other in zip(alone.pairs, expected):
        arrays = zip((pair.prompt, *pair.responses), (other.prompt, *other.responses))
        assert all(np.array_equal(a, b) and a.dtype == np.int32 for a, b in arrays)
    for ranks in (2, 3):
        for found in on_ranks(monkeypatch, ranks, work):
            assert contents(found.pairs) == contents(alone.pairs)
            assert found.pairs.digest == alone.pairs.digest
            assert found.messages == alone.messages and found.counts == alone.counts


BAD = {
    "malformed": json.dumps({"prompt": "describe the fox .", "chosen": 1, "rejected": 2}),
    "refused": json.dumps(RECORDS[0] | {"prompt": [{"role": "narrator", "content": "x"}]}),
    "damaged": "{not json",
    "no object": "[1]",
}


@pytest.mark.parametrize("second", BAD)
@pytest.mark.parametrize("first", BAD)
def test_the_first_bad_record_is_named_on_every_rank(monkeypatch, tmp_path, first, second):
    """Whichever rank meets it, and whether it is found while reading or while rendering."""
    lines = list(LINES)
    lines[10], lines[15] = BAD[first], BAD[second]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines))
    settings = Settings(model="m", data=str(file))
    for ranks in (1, 2, 3):
        errors = on_ranks(monkeypatch, ranks, lambda: load_pairs(str(file), TOKENIZER, settings))
        assert len(errors) == ranks and {type(e) for e in errors} == {DataError}
        assert {str(e).partition(" ")[0].rstrip(":") for e in errors} == {f"{file}:11"}


def test_each_rank_parses_its_share(monkeypatch, tmp_path):
    """Of 30 records in blocks of four, two ranks parse 16 and 14."""
    write_lines(tmp_path / "pairs.jsonl")
    real, parsed = inputs.schemas.parse_record, []
    monkeypatch.setattr(
        inputs.schemas, "parse_record", lambda *args: parsed.append(args[1]) or real(*args)
    )
    settings = Settings(model="m", data=str(tmp_path / "pairs.jsonl"))
    on_ranks(monkeypatch, 2, lambda: load_pairs(settings.data, TOKENIZER, settings))
    assert len(parsed) == len(set(parsed)) == 30


# --------------------------------------------------------------------------------------------------
# OUT/tokens


@pytest.fixture
def kept(monkeypatch, tmp_path) -> tuple[Settings, Tokenizer, Tokenized]:
    """Return what has left its tokens in OUT: settings, tokenizer and pairs with a warning."""
    shutil.copytree(TOY / "checkpoint", tmp_path / "checkpoint")
    write_lines(tmp_path / "pairs.jsonl")
    out = tmp_path / "out"
    out.mkdir()
    data, model = str(tmp_path / "pairs.jsonl"), str(tmp_path / "checkpoint")
    settings = Settings(model=model, data=data, out=str(out), max_length=20, max_prompt_length=10)
    tokenizer = Tokenizer(tmp_path / "checkpoint")
    [(found, key)] = on_ranks(monkeypatch, 1, lambda: open_pairs("data", tokenizer, settings))
    tokens.save(out, "data", key, found)
    assert [path.name for path in (out / "tokens").iterdir()] == ["data.safetensors"]
    return settings, tokenizer, found


def reopened(monkeypatch, settings: Settings, tokenizer: Tokenizer, ranks: int = 1) -> bool:
    """Return whether OUT/tokens is used, by all ranks alike; check that the pairs are right."""
    real, read = inputs.load_pairs, []
    monkeypatch.setattr(inputs, "load_pairs", lambda *args: read.append(1) or real(*args))
    opened = on_ranks(monkeypatch, ranks, lambda: open_pairs("data", tokenizer, settings)[0])
    monkeypatch.setattr(inputs, "load_pairs", real)
    [anew] = on_ranks(monkeypatch, 1, lambda: load_pairs(settings.data, tokenizer, settings))
    for found in opened:
        assert contents(found.pairs) == contents(anew.pairs)
        assert found.pairs.digest == anew.pairs.digest
        assert found.counts == anew.counts and found.messages == anew.messages
    assert len(read) in (0, ranks)
    return not read


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restart_uses_what_is_kept(monkeypatch, capsys, kept, ranks):
    """The pairs are equal to the bit, and what was printed is printed again, once."""
    settings, tokenizer, first = kept
    assert "would keep 95 % whole" in capsys.readouterr().out
    monkeypatch.setattr(inputs, "load_pairs", None)
    opened = on_ranks(monkeypatch, ranks, lambda: open_pairs("data", tokenizer, settings)[0])
    assert all(contents(found.pairs) == contents(first.pairs) for found in opened)
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in first.messages)


def test_resume_path_uses_the_tokens_of_that_run(monkeypatch, tmp_path, kept):
    settings, tokenizer, _ = kept
    path = f"{settings.out}/checkpoints/step-000001"
    settings = replace(settings, out=str(tmp_path / "other"), resume=path)
    assert reopened(monkeypatch, settings, tokenizer)


def change_data(settings: Settings) -> Settings:
    Path(settings.data).write_text("\n".join(LINES[1:]))
    return settings


def change_tokenizer(settings: Settings) -> Settings:
    file = Path(settings.model) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"x": 1}))
    return settings


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
CHANGES = {
    "data": change_data,
    "tokenizer": change_tokenizer,
    "template": lambda settings: settings,
    "setting": lambda settings: replace(settings, max_length=21),
    "objective": lambda settings: replace(settings, objective="dpo"),
    "columns": lambda settings: replace(settings, skip_unusable=0.5),
    "package": lambda settings: settings,
    "moved data": lambda s: replace(s, data=shutil.move(s.data, s.data + ".moved.jsonl")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_made_of_something_else_is_not_used(monkeypatch, capsys, kept, what):
    settings, tokenizer, _ = kept
    settings = CHANGES[what](settings)
    template = TEMPLATE if what == "template" else None
    if what == "package":
        monkeypatch.setattr(tokens.importlib.metadata, "version", lambda name: "0")
    tokenizer = Tokenizer(tokenizer.folder, template)
    assert not reopened(monkeypatch, settings, tokenizer)
    assert "warning: " + settings.out not in capsys.readouterr().out


def test_the_day_is_part_of_it(monkeypatch, kept):
    """A template that asks for the day writes other tokens tomorrow."""
    settings, tokenizer, _ = kept
    source = TEMPLATE + "{# {{ strftime_now('%d') }} #}"
    keys = set()
    for day in ("2026-01-01", "2026-01-02"):
        dated = Tokenizer(tokenizer.folder, source, day)
        keys.add(tokens.key_of("data", dated, settings).sha256)
    assert len(keys) == 2


def test_what_shapes_no_tokens_is_not_part_of_it(monkeypatch, kept):
    settings, tokenizer, _ = kept
    other = replace(settings, log_every=7, microbatch_tokens=9, save_every=1)
    assert reopened(monkeypatch, other, tokenizer)


def flip(path: Path, at: float) -> None:
    """Flip a bit; `at` is the share of the file's bytes before it."""
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 4
    path.write_bytes(raw)


def edit(path: Path, key: str, value: object) -> None:
    """Change what the file says about itself."""
    with tokens.safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["about"]) | {key: value}
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    save_file(arrays, path, {"about": json.dumps(about)})


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "text": lambda path: path.write_text("tokens"),
    "folder": put_folder,
    "foreign": lambda path: save_file({"weight": np.zeros(3)}, path),
    "foreign metadata": lambda path: save_file({"a": np.zeros(3)}, path, {"about": "[]"}),
    "other counts": lambda path: edit(path, "counts", {"records": 9}),
    "other messages": lambda path: edit(path, "messages", ["all is well"]),
    **{f"bit at {at}": lambda path, at=at: flip(path, at) for at in np.linspace(0, 1, 12)},
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_again(monkeypatch, capsys, kept, damage, ranks):
    settings, tokenizer, _ = kept
    path = Path(settings.out) / "tokens" / "data.safetensors"
    DAMAGE[damage](path)
    assert not reopened(monkeypatch, settings, tokenizer, ranks)
    out = capsys.readouterr().out
    assert out.count(f"warning: {path} cannot be used, tokenizing again: ") == 1 or "bit" in damage


def test_what_one_rank_does_not_see_is_read_by_all(monkeypatch, kept):
    """On two nodes without a common file system, OUT is on one of them."""
    settings, tokenizer, _ = kept
    real = tokens.read
    monkeypatch.setattr(
        tokens, "read", lambda *args: real(*args) if inputs.dist.get_rank() == 0 else None
    )
    assert not reopened(monkeypatch, settings, tokenizer, ranks=2)


@pytest.mark.parametrize("why", ["a file in its place", "a full disk", "changed data"])
def test_what_cannot_be_kept_costs_no_run(monkeypatch, capsys, kept, why):
    """Nothing half-written is left, and one line says why."""
    settings, _, found = kept
    path = Path(settings.out) / "tokens" / "data.safetensors"
    key = tokens.key_of("data", kept[1], settings)
    path.unlink()
    if why == "a file in its place":
        path.parent.rmdir()
        path.parent.write_text("")
    elif why == "a full disk":

        def full(arrays, temporary, *args):
            temporary.write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(tokens, "save_file", full)
    else:
        Path(settings.data).touch()
    tokens.save(Path(settings.out), "data", key, found)
    assert not path.exists() and not list(path.parent.glob("*"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"warning: {path} is not kept") != (why == "changed data")


def test_what_was_mapped_is_not_written_again(kept):
    settings, tokenizer, _ = kept
    path = Path(settings.out) / "tokens" / "data.safetensors"
    key = tokens.key_of("data", tokenizer, settings)
    before = path.stat()
    tokens.save(Path(settings.out), "data", key, tokens.read(path, key))
    assert path.stat().st_ino == before.st_ino


def test_an_objective_that_takes_fewer_responses_finds_no_pairs(monkeypatch, kept):
    """Its own author may change it, under the same name."""
    settings, tokenizer, _ = kept
    now = tokens.OBJECTIVES[settings.objective]
    monkeypatch.setitem(tokens.OBJECTIVES, settings.objective, replace(now, responses=1))
    assert not reopened(monkeypatch, settings, tokenizer)
