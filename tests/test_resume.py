"""Nothing lost: what is killed and resumed ends like the unbroken run, bit by bit; and what must not be gone on with is refused."""

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import model as llama
import train
from test_train import arguments, fails, few_pairs, launch, losses, rows_of, run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import faults  # noqa: E402

RUN = {"max_steps": 6, "epochs": 3, "save_every": 2, "keep": 9}


WAYS = {
    "simpo": {"objective": "simpo", "reference": "cached"},
    "dpo": {"objective": "dpo", "reference": "cached"},
    "dpo, online": {"objective": "dpo", "reference": "online", "replicate": 1, "gather_once": True},
    "kto": {"objective": "kto", "beta": 0.5},
    "sft": {"objective": "sft"},
}


def at_step(monkeypatch, step: int, what) -> None:
    """Do `what` at the beginning of a step, once."""
    real, done = train.learning_rate, []

    def learning_rate(settings, number, steps):
        if number == step and not done:
            done.append(number)
            what()
        return real(settings, number, steps)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def interrupt() -> None:
    raise KeyboardInterrupt


def tell(name: str):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Per objective, a whole run with its checkpoints after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in WAYS.items():
            run(patch, folder / name, **few_pairs(folder) | RUN | {"dtype": "fp32"} | flags)
    return folder


def assert_same(a: Path, b: Path) -> None:
    (weights, rows), (other, other_rows) = faults.results(a), faults.results(b)
    assert rows == other_rows
    assert weights == other


# ---------------------------------------------------------------------------------------------------------------------
# Exact


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_and_resumed_is_the_unbroken_run(monkeypatch, capsys, tmp_path, unbroken, way):
    flags = few_pairs(tmp_path) | RUN | {"dtype": "fp32"} | WAYS[way]
    at_step(monkeypatch, 3, interrupt)
    line = fails(monkeypatch, capsys, tmp_path / "run", 130, **flags)
    assert f"{tmp_path}/run/checkpoints/step-000002 is kept" in line and f"--out {tmp_path}/run" in line
    assert len(rows_of(tmp_path / "run")) == 4  # of before, and of steps 1 to 3: the last will be done again
    run(monkeypatch, tmp_path / "run", **flags)
    assert f"resumed from {tmp_path}/run/checkpoints/step-000002" in capsys.readouterr().out
    assert_same(unbroken / way, tmp_path / "run")


def test_rows_that_are_few_are_not_lost(monkeypatch, tmp_path):
    """Killed twice, with no row written between: the first rows come from the checkpoint, and must be in the next one."""
    flags = few_pairs(tmp_path) | RUN | {"save_every": 1, "log_every": 3, "dtype": "fp32"}
    rows = run(monkeypatch, tmp_path / "unbroken", **flags)
    for step in (3, 4):
        at_step(monkeypatch, step, interrupt)
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path / "run", **flags)
    run(monkeypatch, tmp_path / "run", **flags)
    assert len(rows) == 4
    assert_same(tmp_path / "unbroken", tmp_path / "run")


def test_back_to_an_older_checkpoint(monkeypatch, tmp_path, unbroken):
    """What is done again is taken away first, and nothing else."""
    out, flags = copy_of(unbroken, tmp_path)
    run(monkeypatch, out, **flags, resume=out / "checkpoints" / "step-000002")
    assert_same(unbroken / "simpo", out)
    assert [path.name for path in train.checkpoints(out)] == ["step-000002", "step-000004", "step-000006"]
    run(monkeypatch, out, **flags, resume=out / "checkpoints" / "step-000002", overwrite=True)  # and of a finished run
    assert_same(unbroken / "simpo", out)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_stop_saves_at_the_end_of_the_step(monkeypatch, capsys, tmp_path, unbroken, name):
    flags = few_pairs(tmp_path) | RUN | {"objective": "simpo", "reference": "cached", "dtype": "fp32"}
    before = signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 2, tell(name))
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, tmp_path / "run", **flags | {"save_every": 0})
    assert exit.value.code == train.RESUME_ME == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in train.checkpoints(tmp_path / "run")] == ["step-000003"]
    assert "step-000003 is kept" in capsys.readouterr().out
    run(monkeypatch, tmp_path / "run", **flags)
    assert_same(unbroken / "simpo", tmp_path / "run")


def test_stopped_after_the_last_step(monkeypatch, tmp_path, unbroken):
    flags = few_pairs(tmp_path) | RUN | {"objective": "simpo", "reference": "cached", "dtype": "fp32"}
    at_step(monkeypatch, 5, tell("SIGTERM"))
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", **flags)
    assert not (tmp_path / "run" / "model").exists()
    run(monkeypatch, tmp_path / "run", **flags)
    assert_same(unbroken / "simpo", tmp_path / "run")


def test_another_number_of_processes_goes_on(monkeypatch, tmp_path):
    """From one to two and from two to one, in float64, where a moment that went astray cannot hide behind rounding."""
    flags = few_pairs(tmp_path) | RUN | {"objective": "dpo", "reference": "cached"}
    from_one = f"{tmp_path}/one/checkpoints/step-000002"
    one = run(monkeypatch, tmp_path / "one", **flags)
    runs = [arguments(tmp_path / "two", **flags), arguments(tmp_path / "one-two", **flags, resume=from_one)]
    launch(tmp_path, runs, ["--standalone", "--nproc-per-node=2"])
    two_one = run(monkeypatch, tmp_path / "two-one", **flags, resume=tmp_path / "two/checkpoints/step-000004")
    assert len(list((tmp_path / "two/checkpoints/step-000004").glob("shard-*"))) == 2
    for rows in (rows_of(tmp_path / "one-two"), two_one):
        assert [row["step"] for row in rows] == [row["step"] for row in one]
        for row, expected in zip(rows, one):
            for name in ("loss", "eval_loss", "grad_norm"):
                assert row.get(name) == (pytest.approx(expected[name], rel=1e-9) if name in expected else None)


def test_a_worker_is_killed_and_torchrun_starts_it_again(tmp_path):
    """A case like those of the campaign in bench/faults.py: real torchrun, a real SIGKILL, on two processes."""
    runs = {}
    for name in ("unbroken", "killed"):
        out = tmp_path / name
        with open(out.with_suffix(".log"), "w") as log:
            runs[name] = faults.start(out, 2, log)
            while name == "killed" and not train.checkpoints(out) and runs[name].poll() is None:
                time.sleep(0.05)
            if name == "killed":
                faults.strike(runs[name], "worker SIGKILL", random.Random(0))
            assert runs[name].wait() == 0, out.with_suffix(".log").read_text()
    assert out.with_suffix(".log").read_text().count("resumed from") == 1
    assert_same(tmp_path / "unbroken", tmp_path / "killed")


# ---------------------------------------------------------------------------------------------------------------------
# Whole or absent


def test_only_the_newest_are_kept_and_what_is_not_whole_is_no_checkpoint(monkeypatch, tmp_path):
    flags = few_pairs(tmp_path) | RUN | {"save_every": 1, "keep": 2}
    stale = tmp_path / "run" / "checkpoints" / "step-000099.incomplete"
    stale.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    rows = run(monkeypatch, tmp_path / "run", **flags)
    assert sum("loss" in row for row in rows) == 6
    assert sorted(path.name for path in stale.parent.iterdir()) == ["step-000005", "step-000006"]


def test_the_last_step_is_saved_too(monkeypatch, tmp_path):
    """Evaluating and writing the model come after it, and may fail."""
    run(monkeypatch, tmp_path / "run", **few_pairs(tmp_path) | RUN | {"save_every": 4})
    assert [path.name for path in train.checkpoints(tmp_path / "run")] == ["step-000004", "step-000006"]


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(monkeypatch, capsys, tmp_path, unbroken):
    """Full: no file may grow beyond 200 kB from step 4 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = few_pairs(tmp_path) | RUN | {"objective": "simpo", "reference": "cached", "dtype": "fp32"}
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard)))
    try:
        line = fails(monkeypatch, capsys, tmp_path / "run", 1, **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "run" / "checkpoints"
    assert line.startswith(f"train.py: error: {folder}/step-000004: cannot be saved: ") and "File too large" in line
    assert line.endswith(f"{folder}/step-000002 is whole")
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    run(monkeypatch, tmp_path / "run", **flags)
    assert_same(unbroken / "simpo", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def copy_of(unbroken: Path, tmp_path: Path) -> tuple[Path, dict]:
    """A run that did not finish, with its checkpoints, and the flags to go on with."""
    out = tmp_path / "run"
    shutil.copytree(unbroken / "simpo", out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-000006")
    return out, few_pairs(tmp_path) | RUN | {"objective": "simpo", "reference": "cached", "dtype": "fp32"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"beta": 3.0}, "beta 2.0 (now 3.0)"),
        ({"max_steps": 5}, "max-steps 6 (now 5)"),
        ({"dtype": "bf16"}, "dtype 'fp32' (now 'bf16')"),
        ({"data": ROOT / "toy" / "heldout.jsonl"}, "data '15 with sha256"),
    ],
)
def test_other_settings_are_refused_by_name(monkeypatch, capsys, tmp_path, unbroken, change, words):
    out, flags = copy_of(unbroken, tmp_path)
    rows = rows_of(out)
    line = fails(monkeypatch, capsys, out, 1, **flags | change)
    assert "step-000004 is of another run" in line and words in line
    assert rows_of(out) == rows and len(train.checkpoints(out)) == 2


def test_what_does_not_change_the_mathematics_may_change(monkeypatch, tmp_path, unbroken):
    out, flags = copy_of(unbroken, tmp_path)
    moved = shutil.copy(flags["data"], tmp_path / "moved.jsonl")
    free = {"data": moved, "save_every": 0, "microbatch_tokens": 300, "activation_checkpointing": False, "keep_products": "all",
            "log_every": 1}  # fmt: skip
    rows = run(monkeypatch, out, **flags | free)
    assert losses(rows) == pytest.approx(losses(rows_of(unbroken / "simpo")), rel=1e-5)


@pytest.mark.parametrize("damage", ["cut", "missing", "state", "no state", "pickle", "no rows"])
def test_a_damaged_checkpoint_is_refused(monkeypatch, capsys, tmp_path, unbroken, damage):
    out, flags = copy_of(unbroken, tmp_path)
    path = out / "checkpoints" / "step-000004"
    [shard] = path.glob("*.safetensors")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "missing":
        shard.unlink()
    elif damage == "state":
        (path / "state.json").write_text('{"step": "four"}')
    elif damage == "no state":
        (path / "state.json").unlink()
    elif damage == "no rows":
        (path / "metrics.jsonl").unlink()
    else:
        torch.save({}, shard)
    rows, config = (out / "metrics.jsonl").read_text(), (out / "config.json").read_text()
    line = fails(monkeypatch, capsys, out, 1, **flags)
    assert str(path) in line
    assert (rows, config) == ((out / "metrics.jsonl").read_text(), (out / "config.json").read_text())


def test_never_does_not_wipe_out_checkpoints(monkeypatch, capsys, tmp_path, unbroken):
    out, flags = copy_of(unbroken, tmp_path)
    assert "holds checkpoints" in fails(monkeypatch, capsys, out, 1, **flags, resume="never")
    assert len(train.checkpoints(out)) == 2
    run(monkeypatch, out, **flags, resume="never", overwrite=True)
    assert_same(unbroken / "simpo", out)


def test_two_runs_into_one_folder(monkeypatch, capsys, tmp_path, unbroken):
    out, flags = copy_of(unbroken, tmp_path)
    with open(out / "metrics.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # enough to keep out whoever wants it alone
        assert fails(monkeypatch, capsys, out, 1, **flags).endswith(f"{out}: another run is writing there")
    run(monkeypatch, out, **flags)


def test_not_a_number_leaves_the_last_good_checkpoint(monkeypatch, capsys, tmp_path, unbroken):
    flags = few_pairs(tmp_path) | RUN | {"objective": "simpo", "reference": "cached", "dtype": "fp32"}
    real = train.pair_losses
    calls = iter(range(10**6))
    monkeypatch.setattr(train, "pair_losses", lambda *a: tuple(x * float("nan") if next(calls) > 8 and i == 0 else x for i, x in enumerate(real(*a))))  # fmt: skip
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, **flags | {"eval_data": flags["data"], "microbatch_tokens": 10**6})
    assert "few.jsonl:" in line and "loss nan" in line
    saved = train.checkpoints(tmp_path / "run")
    assert saved and all(torch.isfinite(w).all() for p in saved for w in weights_of(p))


def weights_of(checkpoint: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for shard in checkpoint.glob("*.safetensors") for tensor in load_file(shard).values()]


def test_a_checkpoint_holds_what_the_run_saves(unbroken):
    """The very weights and step: not those of a forward pass in another precision."""
    last = train.checkpoints(unbroken / "simpo")[-1]
    assert json.loads((last / "state.json").read_text())["step"] == 6
    names = {name for name, _ in llama.load(unbroken / "simpo" / "model").named_parameters()}
    from safetensors.torch import load_file

    [shard] = last.glob("*.safetensors")
    saved = load_file(shard)
    assert {f"{kind}.{name}" for name in names for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")} == saved.keys()


def test_the_slurm_script_goes_on_while_it_gets_further(tmp_path, unbroken):
    """With a Slurm of two lines: `srun` runs its command here, `scontrol` names this host and notes what it is asked for."""
    out, flags = copy_of(unbroken, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    fake = {"scontrol": f'echo "$@" >> {tmp_path}/asked; echo localhost', "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}  # fmt: skip
    for name, line in fake.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}
    env = os.environ | slurm | {"PATH": f"{tools}:{os.environ['PATH']}"}
    words = [word for word in arguments(out, **flags) if not word.startswith("--out")]
    further = f"cp -r {out}/checkpoints/step-000004 {out}/checkpoints/step-000005; exit 1;"
    for more, first, done, queued in (["--beta=3"], "", False, False), ([], further, False, True), ([], "", True, False):
        (tools / "srun").write_text(f'#!/bin/bash\nshift 2; {first} exec "$@"\n')  # refused; saved, then stopped; done
        (tools / "srun").chmod(0o755)
        subprocess.run([ROOT / "recipes/slurm.sh", out, *words, *more], env=env, cwd=ROOT, capture_output=True)
        assert (out / "model").exists() == done
        assert ("requeue 7" in (tmp_path / "asked").read_text()) == queued
        (tmp_path / "asked").unlink()
    assert_same(unbroken / "simpo", out)
