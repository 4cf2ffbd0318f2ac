"""Checks `auto`, which fits a run to the memory that is free, and what follows where it was wrong.

A rank that runs out of memory leaves; the same command, or torchrun, then takes half.
"""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import forked_ranks
import pytest
import torch
from test_train import MACHINE_METRICS, arguments, fails, few_pairs, rows_of, run

import train
import workload
from data import Pair
from formats.checkpoint import load, read_config
from model import Config
from runtime import plan, processes, resume, signals
from runtime import run as runs
from runtime.settings import Settings, read_command, read_settings

GIB = 2**30
AUTO = {"microbatch_tokens": "auto"}


def config_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs have the same metrics and weights, up to rounding in float64."""
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        expected = {key: a[key] for key in a.keys() - MACHINE_METRICS}
        assert {key: b[key] for key in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    weights = [dict(load(out / "model").named_parameters()) for out in (one, other)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name])


# What is chosen.


@pytest.fixture
def shape(tmp_path) -> Config:
    shape = workload.MODELS["llama3-8b"] | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return read_config(tmp_path)


def chosen(shape: Config, gib: float, gpus: int = 8, **flags) -> tuple[Settings, float]:
    """Return the settings without auto for steps of 128 pairs, and the planned memory in GiB."""
    prompt, response = torch.zeros(120).numpy(), torch.zeros(290).numpy()
    pairs = [Pair(prompt, (response, response))] * 128
    machine = plan.Machine("cuda", "", gpus, gib * GIB, None)
    settings = plan.resolve_auto(shape, Settings(**flags, dtype="bf16"), machine, [pairs])
    step = plan.Load.of(shape, pairs)
    load = step.times(settings.microbatch_tokens / step.tokens)
    return settings, sum(plan.worst(plan.memory(shape, settings, machine, load)).values()) / GIB


@pytest.mark.parametrize(
    "gib, kept", [(22, "all"), (20, "all"), (18, "attention"), (16, "none"), (12, "none")]
)
def test_auto_takes_what_the_plan_says_fits(shape, gib, kept):
    """Products before tokens; a GPU too small for anything gets one pair at a time."""
    found, planned = chosen(shape, gib, microbatch_tokens="auto", keep_products="auto")
    assert found.keep_products == kept
    if gib == 12:
        assert found.microbatch_tokens == 700 and planned > 0.8 * gib
        return
    assert planned <= 0.8 * gib
    whole = 128 * 700 // 8 + 700
    more, planned = chosen(shape, gib * 1.01, microbatch_tokens="auto", keep_products=kept)
    assert found.microbatch_tokens == whole or found.microbatch_tokens < more.microbatch_tokens


def test_what_is_given_is_kept(shape):
    """A number with auto beside it stays, and decides how many products fit."""
    few, _ = chosen(shape, 18, microbatch_tokens=1024, keep_products="auto")
    many, _ = chosen(shape, 18, microbatch_tokens=16384, keep_products="auto")
    assert (few.microbatch_tokens, many.microbatch_tokens) == (1024, 16384)
    assert few.keep_products == "all" and many.keep_products == "none"
    settings, _ = chosen(shape, 18)
    assert settings.microbatch_tokens == 8192 and settings.keep_products == "none"


def test_every_rank_takes_the_smallest(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, mine / 3, mine / 2])
    assert 0 < processes.free_memory(torch.device("cpu")) < 2**50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    assert processes.free_memory(torch.device("cuda")) == 10


@pytest.mark.parametrize("flag", ["--microbatch-tokens", "--batch-size", "--lr"])
def test_auto_is_a_word_of_two_flags_alone(flag, tmp_path, capsys):
    toml = tmp_path / "settings.toml"
    toml.write_text(f'{flag[2:]} = "auto"\n')
    for argv in ([flag, "auto"], ["--config", str(toml)]):
        argv += ["--model=m", "--data=d"]
        if flag == "--microbatch-tokens":
            assert read_settings(argv).microbatch_tokens == "auto"
        else:
            with pytest.raises(SystemExit):
                read_settings(argv)
            assert "auto" in capsys.readouterr().err


def test_the_plan_says_what_auto_means(capsys):
    flags = ["--plan", "--gpus=1", "--gpu-memory=80", "--keep-products=auto"]
    plan.print_plan(*read_command([*flags, "--microbatch-tokens=auto"]))
    said = capsys.readouterr().out
    assert re.search("with --microbatch-tokens [0-9]+ --keep-products all\n", said)


# What becomes of it.


def test_a_resumed_run_keeps_the_number(monkeypatch, tmp_path, capsys):
    """Although less is free now; with another device or other settings, it chooses anew."""
    flags = few_pairs(tmp_path) | AUTO | {"save_every": 1, "keep_products": "auto"}
    original = resume.save_checkpoint

    def stop(out, tensors, state, keep):
        original(out, tensors, state, keep)
        raise KeyboardInterrupt

    monkeypatch.setattr(resume, "save_checkpoint", stop)
    fails(monkeypatch, capsys, tmp_path / "run", 130, **flags)
    monkeypatch.setattr(resume, "save_checkpoint", original)
    first = config_of(tmp_path / "run")["settings"]
    assert first["microbatch_tokens"] > 100 and first["keep_products"] == "all"
    monkeypatch.setattr(plan, "free_memory", lambda device: 1.0)
    hardware = {"processes": 1, "device": runs.name_of(torch.device("cpu"))}
    auto = {"microbatch_tokens", "keep_products"}
    for change, kept in (({}, True), ({"device": "H100"}, False), ({"processes": 2}, False)):
        settings = read_settings(arguments(tmp_path / "run", **flags)).resolved("cpu")
        found, _ = runs.chosen_before(settings, auto, hardware | change)
        assert found == ({name: first[name] for name in auto} if kept else {})
    settings.activation_checkpointing = False
    assert runs.chosen_before(settings, auto, hardware) == ({}, None)
    settings = read_settings(arguments(tmp_path / "run", **flags)).resolved("cpu")
    settings.microbatch_tokens = 65536  # the products that were kept fit beside fewer tokens
    assert runs.chosen_before(settings, {"keep_products"}, hardware) == ({}, None)
    run(monkeypatch, tmp_path / "run", **flags)
    last = config_of(tmp_path / "run")["settings"]
    assert last["microbatch_tokens"] == first["microbatch_tokens"]


def halves(half: Path, monkeypatch, out: Path, flags: dict) -> None:
    """Assert that a run has taken half, and ended like one that took it from the start."""
    found = config_of(out)
    tokens = found["settings"]["microbatch_tokens"]
    assert tokens == found["too_many_tokens"] // 2 > 100
    run(monkeypatch, half, **flags | {"microbatch_tokens": tokens})
    same_run(out, half)


@pytest.mark.parametrize(
    "place, call, more",
    [("forward", 2, {"objective": "dpo", "beta": 0.1}), ("evaluation", 1, {"save_every": 1})],
)
def test_the_same_command_takes_half(monkeypatch, tmp_path, capsys, place, call, more):
    """In a forward pass with nothing saved, or in the evaluation before the first step."""
    flags, out = few_pairs(tmp_path) | more, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "response_logps", train.response_logps)  # undo later
        forked_ranks.exhaust(0, place, call)
        fails(monkeypatch, capsys, out, 1, **flags | AUTO)
    run(monkeypatch, out, **flags | AUTO)
    halves(tmp_path / "half", monkeypatch, out, flags)


CASES = {  # [rank, place, call], more flags
    "backward": ([1, "backward", 2], {"save_every": 1}),
    "a later evaluation": ([0, "evaluation", 2], {"eval_every": 1}),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Start each case twice on two ranks, the first time with too little memory on one."""
    folder = tmp_path_factory.mktemp("two")
    common = few_pairs(folder) | {"device": "cpu"}
    starts = []
    for name, (fault, more) in CASES.items():
        flags = arguments(folder / name, **common, **AUTO, **more)
        starts += [[flags, fault], [flags, None]]
    forked_ranks.starts(starts, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_rank_without_memory_halves_it_for_all(monkeypatch, tmp_path, two_ranks, name):
    flags = few_pairs(tmp_path) | CASES[name][1]
    halves(tmp_path / "half", monkeypatch, two_ranks / name, flags)


def exhaust(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_is_said_without_memory(monkeypatch, tmp_path, capsys):
    """The first time what the next start takes, the second time that half is too much, too."""
    flags, out = few_pairs(tmp_path) | AUTO, tmp_path / "run"
    monkeypatch.setattr(runs, "WORD", word := tmp_path / "word")
    monkeypatch.setattr(signals, "MAX_RESTARTS", 1)
    monkeypatch.setattr(train, "backward", exhaust)
    said = [fails(monkeypatch, capsys, out, 1, **flags) for _ in range(2)]
    most = config_of(out)["too_many_tokens"]
    assert f"--out {out} will take --microbatch-tokens {most // 2} instead of {most}" in said[0]
    assert f"half of --microbatch-tokens {most} is too much, too" in said[1]
    word.unlink()
    given = fails(monkeypatch, capsys, tmp_path / "given", 1, **flags | {"microbatch_tokens": 300})
    assert "lower --microbatch-tokens" in given and word.exists()


@pytest.mark.parametrize(
    "error, lacks",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),  # pinned memory of the host
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_has_many_names(error, lacks):
    assert bool(processes.out_of_memory(error)) == lacks


@pytest.mark.parametrize("limit, gib", [(str(3 * GIB), 2.5), ("max", 8), (None, 8)])
def test_a_container_s_limit_counts(monkeypatch, tmp_path, limit, gib):
    """Free on a CPU is what both the machine and the control group leave."""
    (tmp_path / "memory.current").write_text(str(GIB))
    (tmp_path / "memory.stat").write_text(f"active_file 7\ninactive_file {GIB // 2}\n")
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(processes, "Path", lambda path: tmp_path)
    machine = io.StringIO(f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    monkeypatch.setattr(processes, "open", lambda path: machine, raising=False)
    monkeypatch.setattr(processes, "gather", lambda thing: [thing])
    assert processes.free_memory(torch.device("cpu")) == gib * GIB


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_does_not_inherit_the_peak_of_the_one_that_started_it():
    """As `getrusage` does, in whose eyes a notebook's memory is that of a run which it starts."""
    program = "import resource as r, sys; print(r.getrusage(r.RUSAGE_SELF).ru_maxrss, flush=True); "
    command = [sys.executable, "-c", program + "sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        inherited = 1024 * int(child.stdout.readline())
        assert 0 < processes.peak_resident(child.pid) < 2**26 < 2**27 < inherited
        child.communicate()
