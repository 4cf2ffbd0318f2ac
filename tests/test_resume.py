"""Check that a killed and resumed run ends like the unbroken run, bit by bit.

Checkpoints are complete or absent, and one that must not be resumed is refused. `bench/faults.py`
kills runs at random moments; the code is in `runtime/resume.py` and `runtime/run.py`.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faults
import forked_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import (
    ROOT,
    TOY,
    arguments,
    fails,
    few_pairs,
    first_lines,
    launch,
    losses,
    rows_of,
    run,
)

import train
from formats import checkpoint
from runtime import inputs, resume
from runtime.resume import checkpoints
from runtime.signals import RESUME_ME
from runtime.tokens import Key

COMMON = {"max_steps": 6, "epochs": 3, "save_every": 2, "keep": 9}
SIMPO = COMMON | {"objective": "simpo", "dtype": "fp32"}
WAYS = {
    "simpo": {"objective": "simpo"},
    "dpo": {"objective": "dpo", "reference": "cached"},
    "dpo, online": {"objective": "dpo", "reference": "online", "replicate": 1, "gather_once": True},
    "kto": {"objective": "kto", "beta": 0.5},
    "sft": {"objective": "sft"},
}


def at_step(monkeypatch, step: int, action: Callable[[], object]) -> None:
    """Call `action` once, at the start of a step (0-based)."""
    real, done = train.learning_rate, []

    def learning_rate(settings, current, steps):
        if current == step and not done:
            done.append(current)
            action()
        return real(settings, current, steps)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def interrupt() -> None:
    raise KeyboardInterrupt


def send(name: str) -> None:
    """Send this process a signal, by its name."""
    os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Train each of WAYS without a break, with checkpoints after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in WAYS.items():
            run(patch, folder / name, **few_pairs(folder) | COMMON | {"dtype": "fp32"} | flags)
    return folder


def assert_same(a: Path, b: Path) -> None:
    """Check that two runs have equal metrics and bit-equal weights."""
    (weights, rows), (other_weights, other_rows) = faults.results(a), faults.results(b)
    assert rows == other_rows
    assert weights == other_weights


def names_of(out: Path) -> list[str]:
    """Return the names of a run's complete checkpoints, oldest first."""
    return [path.name for path in checkpoints(out)]


def unfinished(unbroken: Path, tmp_path: Path) -> tuple[Path, dict]:
    """Copy the SimPO run as if it had stopped after step 4; return its folder and its flags."""
    out = tmp_path / "run"
    shutil.copytree(unbroken / "simpo", out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    return out, few_pairs(tmp_path) | SIMPO


# --------------------------------------------------------------------------------------------------
# Exact


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_and_resumed_is_the_unbroken_run(monkeypatch, capsys, tmp_path, unbroken, way):
    """After Ctrl-C, the same command resumes and ends like the unbroken run."""
    flags = few_pairs(tmp_path) | COMMON | {"dtype": "fp32"} | WAYS[way]
    out = tmp_path / "run"
    at_step(monkeypatch, 3, interrupt)
    line = fails(monkeypatch, capsys, out, 130, **flags)
    assert f"{out}/checkpoints/step-000002 is saved" in line and f"--out {out}" in line
    # The first evaluation and steps 1 to 3; step 3 is in no checkpoint and will be repeated.
    assert len(rows_of(out)) == 4
    run(monkeypatch, out, **flags)
    assert f"resumed from {out}/checkpoints/step-000002" in capsys.readouterr().out
    assert_same(unbroken / way, out)


def test_rows_that_are_few_are_not_lost(monkeypatch, tmp_path):
    """Rows survive two interruptions even if none is logged between them."""
    # The first rows come from the checkpoint, and must also be in the next one.
    flags = few_pairs(tmp_path) | COMMON | {"save_every": 1, "log_every": 3, "dtype": "fp32"}
    rows = run(monkeypatch, tmp_path / "unbroken", **flags)
    for step in (3, 4):
        at_step(monkeypatch, step, interrupt)
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path / "run", **flags)
    run(monkeypatch, tmp_path / "run", **flags)
    assert len(rows) == 4
    assert_same(tmp_path / "unbroken", tmp_path / "run")


def test_back_to_an_older_checkpoint(monkeypatch, tmp_path, unbroken):
    """Resuming from an older checkpoint deletes what will be repeated, and nothing else."""
    out, flags = unfinished(unbroken, tmp_path)
    older = out / "checkpoints" / "step-000002"
    run(monkeypatch, out, **flags, resume=older)
    assert_same(unbroken / "simpo", out)
    assert names_of(out) == ["step-000002", "step-000004", "step-000006"]
    run(monkeypatch, out, **flags, resume=older, overwrite=True)  # now the run is finished
    assert_same(unbroken / "simpo", out)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_at_the_end_of_the_step(monkeypatch, capsys, tmp_path, unbroken, name):
    """A signal ends the run after its current step, with a checkpoint and status 75."""
    flags, out = few_pairs(tmp_path) | SIMPO, tmp_path / "run"
    old_handler = signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 2, partial(send, name))
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, out, **flags | {"save_every": 0})
    assert exit.value.code == RESUME_ME == 75
    assert signal.getsignal(signal.SIGTERM) == old_handler
    assert names_of(out) == ["step-000003"]
    assert "step-000003; run the same command" in capsys.readouterr().out
    run(monkeypatch, out, **flags)
    assert_same(unbroken / "simpo", out)


def test_stopped_after_the_last_step(monkeypatch, tmp_path, unbroken):
    """A signal in the last step leaves no model; the same command then finishes the run."""
    flags, out = few_pairs(tmp_path) | SIMPO, tmp_path / "run"
    at_step(monkeypatch, 5, partial(send, "SIGTERM"))
    with pytest.raises(SystemExit):
        run(monkeypatch, out, **flags)
    assert not (out / "model").exists()
    run(monkeypatch, out, **flags)
    assert_same(unbroken / "simpo", out)


def test_resume_on_another_number_of_ranks(monkeypatch, capsys, tmp_path):
    """A run resumes from one rank on two and from two ranks on one, with the same metrics."""
    # In float64, so that a misplaced moment cannot hide behind rounding.
    flags = few_pairs(tmp_path) | COMMON | {"objective": "dpo", "reference": "cached"}
    one = run(monkeypatch, tmp_path / "one", **flags)
    of_one = tmp_path / "one" / "checkpoints" / "step-000002"
    runs = [arguments(tmp_path / "two", **flags)]
    runs += [arguments(tmp_path / "one-two", **flags, resume=of_one)]
    launch(tmp_path, runs, ["--standalone", "--nproc-per-node=2"])
    of_two = tmp_path / "two" / "checkpoints" / "step-000004"
    two_one = run(monkeypatch, tmp_path / "two-one", **flags, resume=of_two)
    shard, _ = sorted(of_two.glob("shard-*"))
    for rows in (rows_of(tmp_path / "one-two"), two_one):
        assert [row["step"] for row in rows] == [row["step"] for row in one]
        for row, expected in zip(rows, one):
            for name in ("loss", "eval_loss", "grad_norm"):
                assert (name in row) == (name in expected)
                if name in expected:
                    assert row[name] == pytest.approx(expected[name], rel=1e-9)
    # DCP alone fills the rows that the second rank had, and leaves those of the first as they are.
    shard.unlink()
    forge(of_two, lambda state: state["files"].pop(shard.name))
    line = fails(monkeypatch, capsys, tmp_path / "three", 1, **flags, resume=of_two)
    assert str(of_two) in line and "elements" in line


def test_a_worker_is_killed_and_torchrun_starts_it_again(tmp_path):
    """After SIGKILL to one of two workers, torchrun restarts them and the run ends the same."""
    # one case of the campaign in bench/faults.py, shorter: a real torchrun and a real SIGKILL
    few = first_lines(TOY / "heldout.jsonl", 60, tmp_path / "few.jsonl")
    shorter = [f"--model={TOY}/checkpoint", f"--data={few}", f"--eval-data={few}", "--lr=1e-3"]
    shorter += ["--batch-size=5", "--max-steps=12", "--eval-every=6"]
    out = tmp_path / "killed"
    with open(out.with_suffix(".log"), "w") as log:
        process = faults.start(out, 2, log, more=shorter)
        while not checkpoints(out) and process.poll() is None:
            time.sleep(0.05)
        faults.strike(process, "worker SIGKILL", random.Random(0))
        assert process.wait() == 0, out.with_suffix(".log").read_text()
    assert out.with_suffix(".log").read_text().count("resumed from") == 1
    forked_ranks.starts([[faults.flags_of(tmp_path / "unbroken", more=shorter), None]], tmp_path)
    assert_same(tmp_path / "unbroken", out)


# --------------------------------------------------------------------------------------------------
# Complete or absent


def test_only_the_newest_complete_checkpoints_are_kept(monkeypatch, tmp_path):
    """A run keeps --keep checkpoints and deletes incomplete ones."""
    flags = few_pairs(tmp_path) | COMMON | {"save_every": 1, "keep": 2}
    stale = tmp_path / "run" / "checkpoints" / "step-000099.incomplete"
    stale.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    rows = run(monkeypatch, tmp_path / "run", **flags)
    assert sum("loss" in row for row in rows) == 6
    names = sorted(path.name for path in stale.parent.iterdir())
    assert names == ["step-000005", "step-000006"]


def test_the_last_step_is_saved_too(monkeypatch, tmp_path):
    """A checkpoint follows the last step, whatever --save-every says."""
    # Evaluating and writing the model come after it, and may fail.
    flags = few_pairs(tmp_path) | COMMON | {"save_every": 4}
    run(monkeypatch, tmp_path / "run", **flags)
    assert names_of(tmp_path / "run") == ["step-000004", "step-000006"]


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(
    monkeypatch, capsys, tmp_path, unbroken
):
    """On a full disk the run ends with one line, and resumes later from the older checkpoint."""
    # The disk is full in that no file may grow beyond 200 kB from step 4 on.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags, out = few_pairs(tmp_path) | SIMPO, tmp_path / "run"
    fill_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (200_000, hard))
    at_step(monkeypatch, 3, fill_disk)
    try:
        line = fails(monkeypatch, capsys, out, 1, **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = out / "checkpoints"
    assert line.startswith(f"train.py: error: {folder}/step-000004: cannot be saved: ")
    assert "File too large" in line
    assert line.endswith(f"{folder}/step-000002 is complete")
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    run(monkeypatch, out, **flags)
    assert_same(unbroken / "simpo", out)


# --------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    "change, words",
    [
        ({"beta": 3.0}, "beta 2.0 (now 3.0)"),
        ({"max_steps": 5}, "max-steps 6 (now 5)"),
        ({"dtype": "bf16"}, "dtype 'fp32' (now 'bf16')"),
        ({"data": ROOT / "toy" / "heldout.jsonl"}, "data '15 with sha256"),
        ({"eval_data": ROOT / "toy" / "heldout.jsonl"}, "eval-data '15 with sha256"),
        ({"seed": 1}, "seed 42 (now 1), steps '6 with sha256"),
        ({"shuffle": False}, "shuffle True (now False), steps '6 with sha256"),
    ],
)
def test_other_settings_are_refused_by_name(monkeypatch, capsys, tmp_path, unbroken, change, words):
    """A checkpoint of other settings or data is refused, with both values, and stays as it is."""
    out, flags = unfinished(unbroken, tmp_path)
    rows = rows_of(out)
    line = fails(monkeypatch, capsys, out, 1, **flags | change)
    assert "step-000004 is of another run" in line and words in line
    assert rows_of(out) == rows and len(checkpoints(out)) == 2


def test_what_does_not_affect_the_result_may_change(monkeypatch, tmp_path, unbroken):
    """A run resumes with other settings that leave the result the same up to rounding."""
    out, flags = unfinished(unbroken, tmp_path)
    moved = shutil.copy(flags["data"], tmp_path / "moved.jsonl")
    free = {"data": moved, "save_every": 0, "microbatch_tokens": 300, "log_every": 1}
    free |= {"activation_checkpointing": False}
    rows = run(monkeypatch, out, **flags | free)
    assert losses(rows) == pytest.approx(losses(rows_of(unbroken / "simpo")), rel=1e-5)


def swap(shard: Path, kind: str, other: str) -> None:
    """Swap the bytes of two tensors of one shape in a shard."""
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (
        slice(*(start + i for i in header[f"{k}.{name}"]["data_offsets"])) for k in (kind, other)
    )
    data[a], data[b] = data[b], data[a]
    shard.write_bytes(data)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


# Beside the damages of the campaign; each gets a shard of the newest checkpoint.
DAMAGES = faults.DAMAGES | {
    "no state": lambda shard, *_: shard.with_name("state.json").unlink(),
    "not a state": lambda shard, *_: shard.with_name("state.json").write_text('{"version": 2}'),
    "a list": lambda shard, *_: shard.with_name("state.json").write_text("[]"),
    "a pickle": lambda shard, *_: torch.save({}, shard),
    "a folder": lambda shard, *_: as_folder(shard),
    "an empty shard": lambda shard, *_: os.truncate(shard, 0),
    "a longer shard": lambda shard, *_: shard.write_bytes(shard.read_bytes() + b"0"),
    "swapped moments": lambda shard, *_: swap(shard, "optimizer.exp_avg", "optimizer.exp_avg_sq"),
    "another row": lambda shard, *_: shard.with_name("metrics.jsonl").write_text("{}\n"),
    "a note": lambda shard, *_: shard.with_name("README").write_text("mine"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused(monkeypatch, capsys, tmp_path, unbroken, kind):
    """It is refused by its path, the older whole one is offered by name, and nothing changes."""
    out, flags = unfinished(unbroken, tmp_path)
    monkeypatch.setattr(faults, "DAMAGES", DAMAGES)
    older = faults.damage(out, kind, random.Random(kind))
    before = faults.contents(out)
    line = fails(monkeypatch, capsys, out, 1, **flags)
    assert f"error: {out}/checkpoints/step-000004" in line
    assert line.endswith(f"; step-000002 is whole: pass --resume {older}")
    assert faults.contents(out) == before
    if kind in ("a missing shard", "swapped moments"):
        run(monkeypatch, out, **flags, resume=older)
        assert_same(unbroken / "simpo", out)


def test_a_damaged_older_checkpoint_is_not_offered(monkeypatch, capsys, tmp_path, unbroken):
    out, flags = unfinished(unbroken, tmp_path)
    for path in checkpoints(out):
        [shard] = path.glob("*.safetensors")
        faults.flip_bit(shard, random.Random(0), "model.")
    line = fails(monkeypatch, capsys, out, 1, **flags)
    assert (
        "step-000004" in line and "no older one is whole: pass --resume never --overwrite" in line
    )
    run(monkeypatch, out, **flags, resume="never", overwrite=True)
    assert_same(unbroken / "simpo", out)


@pytest.mark.parametrize("named", ["link", "a million steps", "pruned"])
def test_the_older_one_is_offered_whatever_the_name(monkeypatch, capsys, tmp_path, unbroken, named):
    """A link is followed, steps are ordered as numbers, and a missing checkpoint is damaged."""
    out, flags = unfinished(unbroken, tmp_path)
    folder, link = out / "checkpoints", tmp_path / "latest"
    older, newest = checkpoints(out)
    if named == "a million steps":
        older = older.rename(folder / "step-999999")
        newest = newest.rename(folder / "step-1000000")
    (newest / "metrics.jsonl").unlink()
    link.symlink_to(newest)
    path = {"link": link, "pruned": folder / "step-000004"}.get(named, newest)
    if named == "pruned":
        shutil.rmtree(newest)
    line = fails(monkeypatch, capsys, out, 1, **flags, resume=path)
    assert line.endswith(f"; {older.name} is whole: pass --resume {older}")


def forge(path: Path, change: Callable[[dict], object]) -> None:
    """Change state.json so that its digest is right again."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    state["sha256"] = resume._digest_of_state(state)
    (path / "state.json").write_text(json.dumps(state))


def test_a_checkpoint_of_another_version_is_refused(monkeypatch, capsys, tmp_path, unbroken):
    """The first version had no list of files, so nothing says whether one is whole."""
    out, flags = unfinished(unbroken, tmp_path)
    for version in (None, 3):
        for path in checkpoints(out):
            forge(path, lambda state: state.update(version=version))
        line = fails(monkeypatch, capsys, out, 1, **flags)
        assert (
            f"step-000004/state.json: version {version}, this program resumes from version 2"
            in line
        )


def test_a_write_that_the_disk_changed_is_found(monkeypatch, capsys, tmp_path):
    """Digests are of the bytes that were meant to be written, not of those that arrived."""
    real = resume._DigestedFile.flush

    def flush(file) -> None:
        real(file)
        if file.size:
            os.pwrite(file.fileno(), b"!", file.size - 1)

    flags, out = few_pairs(tmp_path) | SIMPO, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(resume._DigestedFile, "flush", flush)
        at_step(patch, 2, interrupt)
        with pytest.raises(SystemExit):
            run(patch, out, **flags)
    assert "is not what was saved" in fails(monkeypatch, capsys, out, 1, **flags)


def test_a_shard_on_the_disk_of_another_node(monkeypatch, capsys, tmp_path):
    """Where nodes do not share OUT, rank 0 sees only its own files: nothing is called complete."""
    elsewhere = {"shard-00002.safetensors": {"bytes": 8, "sha256": ""}}
    monkeypatch.setattr(resume, "gather", lambda files: [files, elsewhere])
    flags = few_pairs(tmp_path) | SIMPO
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, **flags)
    assert "shard-00002.safetensors of another rank is not there" in line
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def scale(folder: Path) -> None:
    """Multiply one weight matrix by 1.05."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(name: str, **values) -> Callable[[Path], None]:
    """Return what changes keys of a JSON file in a folder."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | values))

    return change


def change_template(folder: Path) -> None:
    """Let the checkpoint's own template say the same in other bytes."""
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"chat_template": "', '"chat_template": "{# new #}'))


CONTENTS = {
    "model.safetensors": scale,
    "config.json": edit("config.json", rope_theta=20000.0),
    "generation_config.json": edit("generation_config.json", temperature=0.5),
    "tokenizer_config.json": edit("tokenizer_config.json", model_max_length=77),
    "chat template": change_template,
    "special_tokens_map.json": lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_run_goes_on_only_from_the_content_it_began_with(
    monkeypatch, capsys, tmp_path, unbroken, name
):
    """Another path of the same bytes is the same model; other bytes under the same path are not."""
    out, flags = unfinished(unbroken, tmp_path)
    moved = shutil.copytree(ROOT / "toy" / "checkpoint", tmp_path / "moved")
    times = {path: path.stat() for path in moved.iterdir()}
    CONTENTS[name](moved)
    for path, status in times.items():  # an editor that restores the times hides nothing
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    line = fails(monkeypatch, capsys, out, 1, **flags, model=moved)
    assert f"step-000004 is of another run: {name} " in line
    shutil.rmtree(moved)
    shutil.copytree(ROOT / "toy" / "checkpoint", moved)
    if name == "model.safetensors":
        run(monkeypatch, out, **flags, model=moved)
        assert_same(unbroken / "simpo", out)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "added_tokens.json"])
@pytest.mark.parametrize("moment", ["load_pairs", "build_model"])
def test_a_source_that_changes_while_it_is_read(monkeypatch, capsys, tmp_path, moment, name):
    """A run is not known by a content that it did not read."""
    moved = shutil.copytree(ROOT / "toy" / "checkpoint", tmp_path / "moved")
    change = CONTENTS.get(name, lambda folder: (folder / name).write_text("{}"))
    where = inputs if moment == "load_pairs" else train
    real, struck = getattr(where, moment), []

    def strike(*args, **options):
        result = real(*args, **options)
        if not struck:
            struck.append(change(moved))
        return result

    monkeypatch.setattr(where, moment, strike)
    flags = few_pairs(tmp_path) | SIMPO | {"model": moved}
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, **flags)
    assert f"{moved / name} was changed while it was read" in line
    assert not checkpoints(tmp_path / "run")


def test_the_model_is_saved_with_what_the_run_began_with(monkeypatch, tmp_path, unbroken):
    """A source that changes or disappears under a run changes nothing."""
    moved = shutil.copytree(ROOT / "toy" / "checkpoint", tmp_path / "moved")

    def strike() -> None:
        CONTENTS["config.json"](moved)
        (moved / "generation_config.json").unlink()

    at_step(monkeypatch, 3, strike)
    run(monkeypatch, tmp_path / "run", **few_pairs(tmp_path) | SIMPO, model=moved)
    ours, expected = (
        faults.contents(folder / "model") for folder in (tmp_path / "run", unbroken / "simpo")
    )
    assert list(ours.values()) == list(expected.values())


def test_the_model_is_digested_once(monkeypatch, tmp_path, unbroken):
    """A resumed run digests only the checkpoint: the model's files have not changed."""
    out, flags = unfinished(unbroken, tmp_path)
    monkeypatch.setattr(inputs, "key_of", lambda *args: Key("of no tokens", {}))
    real, read = hashlib.file_digest, []
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: read.append(file.name) or real(file, name)
    )
    run(monkeypatch, out, **flags)
    assert read and all(str(name).startswith(str(out)) for name in read)


def test_a_resumed_run_reads_no_data(monkeypatch, tmp_path, unbroken):
    """Its pairs are in OUT/tokens, of which the path of the data is a part."""
    out, flags = unfinished(unbroken, tmp_path)
    run(monkeypatch, tmp_path / "first", **flags)
    shutil.copytree(tmp_path / "first" / "tokens", out / "tokens", dirs_exist_ok=True)
    monkeypatch.setattr(inputs, "load_pairs", None)
    run(monkeypatch, out, **flags)
    assert_same(unbroken / "simpo", out)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 9},  # --max-steps ends it before
        {"max_steps": None, "epochs": 2},
        {"max_steps": 6, "epochs": 2},
    ],
)
def test_the_same_steps_are_the_same_run(monkeypatch, tmp_path, unbroken, change):
    """15 pairs in steps of 7 make 3 steps an epoch: --epochs 2 and --max-steps 6 are the same."""
    out, flags = unfinished(unbroken, tmp_path)
    run(monkeypatch, out, **flags | change)
    assert_same(unbroken / "simpo", out)


def test_never_does_not_wipe_out_checkpoints(monkeypatch, capsys, tmp_path, unbroken):
    """--resume never deletes existing checkpoints only together with --overwrite."""
    out, flags = unfinished(unbroken, tmp_path)
    line = fails(monkeypatch, capsys, out, 1, **flags, resume="never")
    assert f"{out} holds checkpoints" in line
    assert len(checkpoints(out)) == 2
    run(monkeypatch, out, **flags, resume="never", overwrite=True)
    assert_same(unbroken / "simpo", out)


def test_two_runs_into_one_folder(monkeypatch, capsys, tmp_path, unbroken):
    """A folder that another run is writing to is refused until that run has ended."""
    out, flags = unfinished(unbroken, tmp_path)
    with open(out / "metrics.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # a shared lock is enough to refuse an exclusive one
        line = fails(monkeypatch, capsys, out, 1, **flags)
        assert line.endswith(f"{out}: another run is writing there")
    run(monkeypatch, out, **flags)


def test_not_a_number_leaves_the_last_good_checkpoint(monkeypatch, capsys, tmp_path):
    """A NaN loss ends the run with its pairs named, and every saved checkpoint is finite."""
    flags = few_pairs(tmp_path) | SIMPO | {"microbatch_tokens": 10**6}
    real, calls = train.pair_losses, itertools.count()

    def nan_at_step_5(*args):  # call 0 is the first evaluation
        step_losses, report = real(*args)
        return step_losses * (math.nan if next(calls) >= 5 else 1.0), report

    monkeypatch.setattr(train, "pair_losses", nan_at_step_5)
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, **flags)
    assert "few.jsonl:" in line and "loss nan" in line
    saved = checkpoints(tmp_path / "run")
    assert saved and all(torch.isfinite(w).all() for path in saved for w in tensors_of(path))


def tensors_of(path: Path) -> list[torch.Tensor]:
    """Return all tensors of a checkpoint of a run."""
    shards = path.glob("*.safetensors")
    return [tensor for shard in shards for tensor in load_file(shard).values()]


def test_a_checkpoint_holds_what_the_run_saves(unbroken):
    """A checkpoint holds the step, and weights and both moments of every parameter."""
    last = checkpoints(unbroken / "simpo")[-1]
    assert json.loads((last / "state.json").read_text())["step"] == 6
    model = checkpoint.load(unbroken / "simpo" / "model")
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    names = {f"{kind}.{name}" for name, _ in model.named_parameters() for kind in kinds}
    [shard] = last.glob("*.safetensors")
    assert names == load_file(shard).keys()


# --------------------------------------------------------------------------------------------------
# Slurm


def write_script(path: Path, line: str) -> None:
    """Write an executable bash script of one line."""
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


def test_the_slurm_script_requeues_while_the_run_progresses(tmp_path, unbroken):
    """recipes/slurm.sh requeues its job only if the run saved something new and did not finish."""
    # A Slurm of two lines: `srun` runs its command on this machine, `scontrol` names this host and
    # notes what it is asked for.
    out, flags = unfinished(unbroken, tmp_path)
    tools, asked = tmp_path / "bin", tmp_path / "asked"
    tools.mkdir()
    write_script(tools / "scontrol", f'echo "$@" >> {asked}; echo localhost')
    write_script(tools / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    slurm |= {"SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}
    environment = os.environ | slurm | {"PATH": f"{tools}:{os.environ['PATH']}"}
    words = [word for word in arguments(out, **flags) if not word.startswith("--out")]
    folder = out / "checkpoints"
    progress = f"cp -r {folder}/step-000004 {folder}/step-000005; exit 1;"
    for more, before_run, finished, requeued in (
        (["--beta=3"], "", False, False),  # refused
        ([], progress, False, True),  # saved a checkpoint, then stopped
        ([], "", True, False),  # finished
    ):
        write_script(tools / "srun", f'shift 2; {before_run} exec "$@"')
        command = [ROOT / "recipes" / "slurm.sh", out, *words, *more]
        subprocess.run(command, env=environment, cwd=ROOT, capture_output=True)
        assert (out / "model").exists() == finished
        assert ("requeue 7" in asked.read_text()) == requeued
        asked.unlink()
    assert_same(unbroken / "simpo", out)


def test_the_slurm_script_does_not_requeue_for_ever(tmp_path):
    """A job that is stopped again and again before it saves anything is requeued three times."""
    tools, asked, out = tmp_path / "bin", tmp_path / "asked", tmp_path / "run"
    tools.mkdir()
    write_script(tools / "scontrol", f'echo "$@" >> {asked}; echo localhost')
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NODELIST": "", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1"}

    def requeued(status: int, before_run: str = "") -> bool:
        write_script(tools / "srun", f"{before_run} exit {status}")
        asked.unlink(missing_ok=True)
        command = ["bash", ROOT / "recipes" / "slurm.sh", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        found = "requeue 7" in asked.read_text()
        assert found or status == 1 or "stopped four times" in done.stderr
        return found

    assert [requeued(75), requeued(143), requeued(1), requeued(138)] == [True, True, False, True]
    assert not requeued(75)  # an error between them has not begun the count again
    assert [requeued(1, 'touch "$TRAIN_STOPPED";'), requeued(75)] == [True, True]  # sent anew
    saves = f"mkdir -p {out}/checkpoints/step-000008;"
    assert requeued(1, saves)
    assert [requeued(75) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("moment", ["read", "build", "report"])
def test_ctrl_c_outside_the_loop_says_what_is_saved(
    monkeypatch, capsys, tmp_path, unbroken, moment
):
    """While reading, a user who resumes must not be told that everything is lost."""
    out, flags = unfinished(unbroken, tmp_path)
    name = {"read": "open_inputs", "build": "build_model", "report": "report"}[moment]
    monkeypatch.setattr(train, name, lambda *args, **options: interrupt())
    line = fails(monkeypatch, capsys, out, 130, **flags)
    if moment == "report":
        assert f"{out} holds a finished run" in line
    else:
        assert f"{out}/checkpoints/step-000004 is saved" in line and f"--out {out}" in line


@pytest.mark.parametrize("optimizer", ["SGD", "NAdam", "Adadelta", "RMSprop"])
def test_another_optimizer_resumes_too(monkeypatch, tmp_path, optimizer):
    """Swapped in that one line, its state is saved by its own keys, tensors and numbers alike."""
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    make = getattr(torch.optim, optimizer)
    monkeypatch.setattr(
        train, "make_optimizer", lambda policy, s: make(policy.parameters(), s.lr, **options)
    )
    flags = few_pairs(tmp_path) | SIMPO
    run(monkeypatch, tmp_path / "unbroken", **flags)
    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        with pytest.raises(SystemExit):
            run(patch, tmp_path / "run", **flags)
    run(monkeypatch, tmp_path / "run", **flags)
    assert_same(tmp_path / "unbroken", tmp_path / "run")


def test_the_state_of_another_optimizer_is_refused(monkeypatch, capsys, tmp_path, unbroken):
    """Plain SGD wants nothing but weights, and would drop AdamW's moments without a word."""
    out, flags = unfinished(unbroken, tmp_path)
    monkeypatch.setattr(
        train, "make_optimizer", lambda policy, s: torch.optim.SGD(policy.parameters(), s.lr)
    )
    line = fails(monkeypatch, capsys, out, 1, **flags)
    assert "step-000004" in line and "AdamW" in line and "SGD" in line
