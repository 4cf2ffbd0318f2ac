"""Check train.py: one loss on any ranks, DPO's first step, TRL's losses, settings, files, errors.

`run`, `fails` and the other helpers at the top serve the other tests that train, too.
"""

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import parity
import pytest
import torch

import model as llama
import train
from data import batches
from formats.checkpoint import load, save
from formats.tokenizer import Tokenizer
from methods import objectives
from runtime import inputs
from runtime.processes import multiplies_bf16
from runtime.settings import Settings, read_settings

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"


def arguments(out: Path, **flags) -> list[str]:
    """Return the flags of a short run on the toy; a flag that is None is left out."""
    defaults = {
        "model": TOY / "checkpoint",
        "data": TOY / "heldout.jsonl",
        "batch_size": 7,
        "max_steps": 3,
        "lr": 1e-3,
        "out": out,
    }
    words = []
    for name, value in (defaults | flags).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def rows_of(out: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(monkeypatch, out: Path, **flags) -> list[dict]:
    """Run `python train.py` in this process; return the rows of its metrics.jsonl."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(out, **flags)])
    train.main()
    return rows_of(out)


def fails(monkeypatch, capsys, out: Path, status: int, **flags) -> str:
    """Return the last line on stderr of a run that must exit with `status`."""
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, out, **flags)
    assert exit.value.code == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def write(path: Path, *records: dict) -> Path:
    """Write records as JSON lines; return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def first_lines(source: Path, count: int, path: Path) -> Path:
    """Copy the first lines of a file to `path`; return the path."""
    with source.open() as lines:
        path.write_text("".join(itertools.islice(lines, count)))
    return path


def few_pairs(folder: Path) -> dict:
    """Return flags to train and evaluate on 15 pairs in float64.

    In steps of 7 the last step has one pair, so one of two ranks has none.
    """
    few = first_lines(TOY / "heldout.jsonl", 15, folder / "few.jsonl")
    return {"data": few, "eval_data": few, "max_steps": 3, "dtype": "fp64"}


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def launch(folder: Path, runs: list[list[str]], *launchers: list[str]) -> None:
    """Run train.py with each list of flags, one run after another.

    launchers: the flags of each torchrun; several of them work together, like nodes.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    script = [ROOT / "tests" / "several_runs.py", folder / "runs.json"]
    started = []
    for flags in launchers:
        command = [sys.executable, "-m", "torch.distributed.run", *flags, *script]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, **output, env=environment))
    for launcher in started:
        output, _ = launcher.communicate()
        assert launcher.returncode == 0, output


# --------------------------------------------------------------------------------------------------
# One loss, however it is spread


OBJECTIVES = {  # objective: its flags; each is trained on two ranks, sharded
    "simpo": {"sft_weight": 0.1},
    "dpo": {"beta": 0.1},
    "rrhf": {},
    "slic": {},
    "ipo": {},
    "cpo": {"beta": 0.1},
    "kto": {"beta": 0.5},
    "orpo": {},
    "rdpo": {"beta": 0.1},
    "dpo-norm": {"objective": "dpo", "length_norm": True, "beta": 5.0},
    "alphapo": {},
    "simper": {},
    "repo": {},
    "apo_zero": {},
    "sft": {},
}
OBJECTIVES |= {name: {} for name in objectives.OBJECTIVES if name not in OBJECTIVES}  # yours
LAYOUTS = {  # every other way in which two ranks can share a run: its flags; for SimPO alone
    "copies": {"replicate": 2},
    "once": {"gather_once": True},
    "offload": {"offload": True},
    "copies, once": {"replicate": 2, "gather_once": True},
}
RUNS = {name: {"objective": name} | flags for name, flags in OBJECTIVES.items()}
RUNS |= {name: RUNS["simpo"] | flags for name, flags in LAYOUTS.items()}
MACHINE_METRICS = {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Train each of RUNS on two ranks with small micro-batches; return the folder of all runs."""
    folder = tmp_path_factory.mktemp("two")
    common = few_pairs(folder) | {"microbatch_tokens": 200}
    runs = [arguments(folder / name, **common, **flags) for name, flags in RUNS.items()]
    launch(folder, runs, ["--standalone", "--nproc-per-node=2"])
    return folder


@pytest.mark.parametrize(
    "name, objective", [(name, name) for name in OBJECTIVES] + [(name, "simpo") for name in LAYOUTS]
)
def test_same_losses_at_any_microbatch_size_and_on_two_ranks(
    monkeypatch, tmp_path, two_ranks, name, objective
):
    """Metrics and weights are the same in one micro-batch, in one per pair, and on two ranks."""
    # A mean of means, or a gradient averaged once too often, differs by the second step. In float64
    # rounding is a million times smaller than the tolerance of a test in float32.
    flags = few_pairs(tmp_path) | RUNS[objective]
    whole = run(monkeypatch, tmp_path / "whole", microbatch_tokens=10**6, **flags)
    assert len(losses(whole)) == 3
    alone = run(monkeypatch, tmp_path / "alone", microbatch_tokens=1, **flags)
    for other in (alone, rows_of(two_ranks / name)):
        for a, b in zip(whole, other, strict=True):
            assert a.keys() == b.keys()
            expected = {key: a[key] for key in a.keys() - MACHINE_METRICS}
            actual = {key: b[key] for key in expected}
            assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)
    weights = load(tmp_path / "whole" / "model").state_dict()
    for tensor, weight in load(two_ranks / name / "model").state_dict().items():
        # saved in float32, hence the tolerance
        torch.testing.assert_close(weight, weights[tensor], rtol=1e-6, atol=1e-7)


def test_two_launchers_with_a_copy_each_are_one_with_two(tmp_path, two_ranks):
    """Two torchruns with `--replicate 2` train like one torchrun with two ranks."""
    # as on two nodes with `--nnodes 2`, but over loopback
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    common.append(f"--master-port={port}")
    flags = few_pairs(tmp_path) | RUNS["copies"] | {"microbatch_tokens": 200}
    launchers = [[*common, f"--node-rank={rank}"] for rank in range(2)]
    launch(tmp_path, [arguments(tmp_path / "run", **flags)], *launchers)
    expected = losses(rows_of(two_ranks / "copies"))
    assert losses(rows_of(tmp_path / "run")) == pytest.approx(expected, rel=1e-9)


def test_loss_of_a_step_by_hand(monkeypatch, tmp_path):
    """A step's loss is the mean over its pairs; for SFT, the mean over its chosen tokens."""
    # The model is called for one response at a time, without packing or micro-batches. β = 2 and
    # γ = 1 are SimPO's defaults.
    few = few_pairs(tmp_path)["data"]
    flags = {"data": few, "batch_size": 15, "max_steps": 1, "microbatch_tokens": 200}
    [simpo] = run(monkeypatch, tmp_path / "simpo", **flags)
    [mixed] = run(monkeypatch, tmp_path / "mixed", sft_weight=0.3, **flags)
    [sft] = run(monkeypatch, tmp_path / "sft", objective="sft", **flags)
    tokenizer, model = Tokenizer(TOY / "checkpoint"), load(TOY / "checkpoint")

    @torch.no_grad()
    def logps_of(prompt: str, response: str) -> torch.Tensor:
        prompt_ids = tokenizer.backend.encode([f"<|user|> {prompt} <|end|> <|assistant|>"])[0]
        ids = torch.tensor(prompt_ids + tokenizer.backend.encode([response + " <|end|>"])[0])
        logps = logits_of(model, ids).log_softmax(-1)
        return logps[:-1].gather(1, ids[1:, None])[len(prompt_ids) - 1 :]

    pairs = [json.loads(line) for line in few.read_text().splitlines()]
    chosen = [logps_of(pair["prompt"], pair["chosen"]) for pair in pairs]
    rejected = [logps_of(pair["prompt"], pair["rejected"]) for pair in pairs]
    margins = [2 * float(w.mean() - l.mean()) for w, l in zip(chosen, rejected)]
    preference = sum(math.log(1 + math.exp(1 - margin)) for margin in margins) / 15
    likelihood = -float(torch.cat(chosen).mean())
    assert simpo["loss"] == pytest.approx(preference, rel=1e-5)
    assert sft["loss"] == pytest.approx(likelihood, rel=1e-5)
    assert mixed["loss"] == pytest.approx(preference + 0.3 * likelihood, rel=1e-5)
    assert simpo["lengths/chosen"] == pytest.approx(sum(map(len, chosen)) / 15)
    mean_sum = sum(float(l.sum()) for l in rejected) / 15
    assert simpo["logps/rejected"] == pytest.approx(mean_sum, rel=1e-5)


def logits_of(model: llama.Llama, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, V] of one sequence, without `data.pack`."""
    positions, ends = torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
    attend = llama.PackedAttention(positions, ends, ends)
    return model.logits(model.model(ids, positions, attend))


@pytest.mark.parametrize(
    "objective", ["simpo", "dpo", "ipo", "cpo", "kto", "orpo", "dpo-norm", "alphapo", "apo_zero"]
)
def test_losses_are_trl_s(monkeypatch, tmp_path, objective):
    """Every step's loss is TRL's, with the same checkpoint, pairs, order and optimizer."""
    # recorded by `bench/parity.py --record`
    record = json.loads(parity.RECORD.read_text())["losses"][objective]
    parity.write_pairs(tmp_path / "pairs.jsonl")
    flags = {"data": tmp_path / "pairs.jsonl", **parity.settings_of(objective)}
    rows = run(monkeypatch, tmp_path / "run", **flags)
    assert len(record) == 8
    assert parity.losses_of(objective, rows) == pytest.approx(record, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# DPO's reference


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dpo_starts_at_ln2_with_both_references(monkeypatch, tmp_path, dtype):
    """DPO's first loss and first evaluation are ln 2, and both references give the same run."""
    runs = {}
    flags = {"objective": "dpo", "beta": 0.1, "dtype": dtype, "epochs": 1, "max_steps": 4}
    flags |= {"eval_data": first_lines(TOY / "heldout.jsonl", 40, tmp_path / "few.jsonl")}
    flags |= {"microbatch_tokens": 300}
    for reference in ("online", "cached"):
        rows = run(monkeypatch, tmp_path / reference, reference=reference, **flags)
        assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert rows[0]["eval_rewards/margins"] == 0
        assert rows[0]["eval_rewards/accuracies"] == pytest.approx(0.5)
        assert losses(rows)[0] == pytest.approx(math.log(2), abs=1e-7)
        assert rows[1]["rewards/margins"] == 0
        runs[reference] = losses(rows)
    assert runs["online"] == pytest.approx(runs["cached"], rel=1e-6)
    assert runs["online"][3] < 0.69


# --------------------------------------------------------------------------------------------------
# Learning

METRICS = {"step", "epoch", "loss", "learning_rate", "grad_norm"} | MACHINE_METRICS
METRICS |= {"rewards/accuracies", "rewards/margins"}
METRICS |= {
    f"{group}/{response}"
    for group in ("rewards", "logps", "avg_logps", "lengths")
    for response in ("chosen", "rejected")
}


def test_simpo_learns_and_the_folder_is_whole(monkeypatch, tmp_path):
    """SimPO's evaluations improve, and the run's folder holds all metrics, settings and weights."""
    flags = {"data": TOY / "train.jsonl", "eval_data": TOY / "heldout.jsonl", "eval_every": 5}
    flags |= {"batch_size": 32, "max_steps": 12, "beta": 10.0, "gamma_beta_ratio": 0.3}
    rows = run(monkeypatch, tmp_path / "run", **flags)
    evaluations = [row for row in rows if "eval_loss" in row]
    first, last = evaluations[0], evaluations[-1]
    assert [row["step"] for row in evaluations] == [0, 5, 10, 12]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"] + 0.2
    assert last["eval_rewards/accuracies"] > first["eval_rewards/accuracies"]
    assert rows[1].keys() == METRICS
    summary = json.loads((tmp_path / "run" / "config.json").read_text())
    assert summary["settings"]["gamma"] == 3.0 and summary["settings"]["dtype"] == "fp32"
    assert summary["data"]["records"] == len((TOY / "train.jsonl").open().readlines())
    assert summary["steps"] == 12
    trained, source = load(tmp_path / "run" / "model"), load(TOY / "checkpoint")
    assert not torch.equal(trained.head_weight, source.head_weight)
    assert Tokenizer(tmp_path / "run" / "model").template is not None


def test_the_master_weights_are_saved(monkeypatch, tmp_path):
    """The saved weights are the float32 master weights, to the bit, after training in bfloat16."""
    # Evaluation leaves the root gathered in bfloat16; saving that would lose 16 bits per weight.
    pairs = few_pairs(tmp_path)["data"]
    flags = {"data": pairs, "eval_data": pairs, "max_steps": 1, "lr": 1e-30}
    run(monkeypatch, tmp_path / "run", dtype="bf16", **flags)
    source = load(TOY / "checkpoint").state_dict()
    for name, weight in load(tmp_path / "run" / "model").state_dict().items():
        assert torch.equal(weight, source[name]), name


@pytest.mark.parametrize("native", [True, False])
def test_bf16_in_software_is_warned_of(monkeypatch, tmp_path, capsys, native):
    """Training in bfloat16 prints a warning only if the CPU has no bfloat16 arithmetic."""
    monkeypatch.setattr(inputs, "multiplies_bf16", lambda device: native)
    flags = few_pairs(tmp_path) | {"dtype": "bf16", "max_steps": 1}
    run(monkeypatch, tmp_path / "run", **flags)
    assert ("no bfloat16 arithmetic" in capsys.readouterr().out) == (not native)


def test_order_epochs_and_what_is_logged(monkeypatch, tmp_path):
    """15 pairs in steps of 7 are 7, 7 and 1; --no-shuffle keeps the order of the file."""
    flags = few_pairs(tmp_path) | {"epochs": 2, "max_steps": 6, "shuffle": False, "log_every": 2}
    rows = [row for row in run(monkeypatch, tmp_path / "run", **flags) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["epoch"] for row in rows] == pytest.approx([14 / 15, 22 / 15, 2])
    steps = [step.tolist() for step in batches(5, 2, 1, seed=0, shuffle=False)]
    assert steps == [[0, 1], [2, 3], [4]]


def test_a_cached_reference_leaves_memory(monkeypatch, tmp_path):
    """Once its scores are cached, the reference model is gone from memory."""
    # FSDP's modules refer to each other in circles, so `del` alone frees nothing.
    built, alive, build = [], [], train.build_model

    def recording_build(*args, **flags):
        model = build(*args, **flags)
        built.append(weakref.ref(model))
        return model

    def look(*args):
        alive.append([model() is not None for model in built])
        return 0.0

    monkeypatch.setattr(train, "build_model", recording_build)
    monkeypatch.setattr(train, "learning_rate", look)
    flags = few_pairs(tmp_path) | {"objective": "dpo", "reference": "cached", "max_steps": 1}
    run(monkeypatch, tmp_path / "run", **flags)
    assert alive == [[True, False]]


def test_compiled_blocks_give_the_same_losses(monkeypatch, tmp_path):
    """Compiled blocks give the same losses, with one compilation for streams of any length."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    flags = few_pairs(tmp_path) | {"max_steps": 1, "microbatch_tokens": 200}
    flags |= {"activation_checkpointing": False}
    plain = run(monkeypatch, tmp_path / "plain", **flags)
    compiled = run(monkeypatch, tmp_path / "compiled", compile=True, **flags)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


def test_length_normalisation_is_a_switch(monkeypatch, tmp_path):
    """SimPO's margin compares sums without length normalisation, and averages with it."""
    flags = {"gamma_beta_ratio": 0.0, "beta": 0.5, "max_steps": 1}
    [row] = run(monkeypatch, tmp_path / "run", length_norm=False, **flags)
    difference = row["logps/chosen"] - row["logps/rejected"]
    assert row["rewards/margins"] == pytest.approx(0.5 * difference)
    [row] = run(monkeypatch, tmp_path / "normalised", **flags)
    difference = row["avg_logps/chosen"] - row["avg_logps/rejected"]
    assert row["rewards/margins"] == pytest.approx(0.5 * difference)


def test_learning_rate():
    """The rate rises linearly over 10 % of the steps to its peak, then decays to just above 0."""
    settings = Settings(lr=1.0, beta=1.0, warmup_ratio=0.1)
    rates = [train.learning_rate(settings, step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[11] == pytest.approx(0.5)  # half way between 2 and 20
    assert 0 < rates[-1] < 0.01 and all(a >= b for a, b in itertools.pairwise(rates[1:]))
    settings.lr_schedule = "linear"
    assert train.learning_rate(settings, 11, 20) == pytest.approx(0.5)
    settings.lr_schedule = "constant"
    assert train.learning_rate(settings, 19, 20) == 1.0


def test_a_template_passed_goes_into_the_folder(monkeypatch, tmp_path):
    """A chat template from a file is saved with the model, and so is its end of turn."""
    # A checkpoint must answer with the template that it was trained with.
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} <|user|> {% endfor %}")
    run(monkeypatch, tmp_path / "run", chat_template=template, max_steps=1)
    folder = tmp_path / "run" / "model"
    saved = Tokenizer(folder)
    assert saved.prompt_text("describe the fox .", "") == "describe the fox . <|user|> "
    assert saved.end_id == saved.backend.token_to_id("<|user|>")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, saved.end_id]


def test_a_real_checkpoint_and_real_pairs(monkeypatch, tmp_path):
    """SmolLM2 trains alike on parquet and JSONL, and transformers computes the same logits."""
    pairs = ROOT.parent / "shared" / "data" / "alpaca-eval-prefs"
    checkpoint = Path(os.environ.get("SIMPO_SMOLLM2", "absent"))
    if not checkpoint.exists() or not pairs.exists():
        pytest.skip("needs SIMPO_SMOLLM2=FOLDER with SmolLM2-135M-Instruct, and ../shared/data")
    transformers = pytest.importorskip("transformers")
    # bfloat16 in software would take minutes
    dtype = "bf16" if multiplies_bf16(torch.device("cpu")) else "fp32"
    flags = {"model": checkpoint, "max_length": 96, "max_prompt_length": 48, "batch_size": 2}
    flags |= {"max_steps": 2, "dtype": dtype, "lr": 1e-5}
    jsonl, parquet = (
        run(monkeypatch, tmp_path / suffix, data=pairs / f"test.{suffix}", **flags)
        for suffix in ("jsonl", "parquet")
    )
    assert losses(jsonl) == losses(parquet)
    folder = tmp_path / "parquet" / "model"
    ids = torch.tensor(Tokenizer(folder).encode_prompts(["The capital of France is"])[0])
    ours = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        torch.testing.assert_close(logits_of(ours, ids), expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"batch_size": 0}, ["--batch-size:", "positive number"]),
        ({"batch_size": "many"}, ["--batch-size:", "int", "'many'"]),
        ({"objective": "ppo"}, ["--objective:", "'ppo'", "choose from", "simpo"]),
        ({"label_smoothing": 0.5}, ["--label-smoothing:", "from 0 to below 0.5"]),
        ({"lr": "nan"}, ["--lr:", "finite number"]),
        (
            {"max_length": 100, "max_prompt_length": 100},
            ["--max-prompt-length 100", "no room for a response", "--max-length 100"],
        ),
        ({"eval_every": 5}, ["--eval-every", "needs --eval-data"]),
        ({"data": ""}, ["--data:", "empty"]),
        ({"leraning_rate": 1}, ["unrecognized", "--leraning-rate=1"]),
    ],
)
def test_usage_errors(monkeypatch, capsys, tmp_path, flags, words):
    """A wrong flag ends the run with status 2 and one line that names it; nothing is written."""
    line = fails(monkeypatch, capsys, tmp_path / "run", status=2, **flags)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "gama-beta-ratio = 0.3",
            ["recipe.toml:", "'gama-beta-ratio'", "did you mean 'gamma_beta_ratio'?"],
        ),
        ("lr = '1e-6'", ["recipe.toml:", "lr = '1e-6'", "float"]),
        ("batch_size = 1.5", ["recipe.toml:", "batch_size = 1.5", "int"]),
        ("objective = 'ppo'", ["--objective:", "'ppo'", "simpo, dpo, rrhf"]),
        ("lr = ", ["recipe.toml:", "cannot be read"]),
    ],
)
def test_toml_errors(monkeypatch, capsys, tmp_path, text, words):
    """A wrong TOML file ends the run with status 2 and one line that names file and key."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    line = fails(monkeypatch, capsys, tmp_path / "run", status=2, config=recipe)
    assert all(word in line for word in words), line


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    """A flag overrides the TOML file, and the file overrides the default."""
    recipe = tmp_path / "recipe.toml"
    lines = ['model = "m"', 'data = "d"', "lr = 3", "beta = 4.0", "batch-size = 5"]
    recipe.write_text("\n".join([*lines, "length_norm = false", ""]))
    settings = read_settings(["--config", str(recipe), "--beta", "6", "--length-norm"])
    assert (settings.lr, settings.beta, settings.batch_size) == (3.0, 6.0, 5)
    assert (settings.length_norm, settings.epochs) == (True, 1)
    assert settings.gamma == pytest.approx(3.0)


def test_defaults_are_the_paper_s():
    """The defaults are those of arXiv 2405.14734, section 3 and appendix B."""
    # The published settings give γ as a ratio to β.
    settings = read_settings(["--model", "m", "--data", "d"])
    published = {
        "objective": "simpo",
        "beta": 2.0,
        "gamma_beta_ratio": 0.5,
        "lr": 1e-6,
        "batch_size": 128,
        "epochs": 1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "max_length": 2048,
        "max_prompt_length": 1800,
    }
    assert {name: getattr(settings, name) for name in published} == published
    assert read_settings(["--model", "m", "--data", "d", "--objective", "dpo"]).beta == 0.01


# --------------------------------------------------------------------------------------------------
# What a user can get wrong: one line, status 1, nothing written


GOOD = {
    "prompt": "describe the fox .",
    "chosen": "the fox runs away .",
    "rejected": "the fox fades away .",
}


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["pairs.jsonl:", "no such file or folder"]),
        ("", ["pairs.jsonl:", "nothing to learn from", "empty"]),
        (json.dumps(GOOD) + "\n{oops\n", ["pairs.jsonl:2:", "not JSON"]),
        (json.dumps({"prompt": "x", "rejected": "y"}), ["pairs.jsonl:1:", "'chosen'"]),
        (
            json.dumps(GOOD | {"rejected": GOOD["chosen"]}),
            [
                "nothing to learn from",
                "1 records",
                "chosen equal to rejected (1)",
                "pairs.jsonl:1:",
            ],
        ),
        (
            json.dumps(GOOD | {"chosen": ""}),
            ["nothing to learn from", "1 records", "an empty response (1)", "pairs.jsonl:1:"],
        ),
        (
            json.dumps(GOOD | {"prompt": [{"role": "system", "content": "x"}]}),
            ["pairs.jsonl:1:", "chat template"],
        ),
    ],
)
def test_bad_data(monkeypatch, capsys, tmp_path, content, words):
    """Unusable data ends the run with one line that names file, line and field."""
    pairs = tmp_path / "pairs.jsonl"
    if content is not None:
        pairs.write_text(content)
    error = fails(monkeypatch, capsys, tmp_path / "run", status=1, data=pairs)
    assert error.startswith("train.py: error: ")
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_dropped_and_cut_are_counted(monkeypatch, capsys, tmp_path):
    """config.json counts the records that were read, cut and dropped; the first one is printed."""
    same, empty = GOOD | {"chosen": GOOD["rejected"]}, GOOD | {"rejected": ""}
    long = GOOD | {"chosen": " ".join(["the fox runs away ."] * 40)}
    pairs = write(tmp_path / "pairs.jsonl", GOOD, same, long, empty)
    run(monkeypatch, tmp_path / "run", data=pairs, max_length=100, max_prompt_length=50)
    counts = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert counts == {
        "records": 4,
        "format: explicit": 2,
        "dropped: chosen equal to rejected": 1,
        "dropped: an empty response": 1,
        "responses cut at their end": 1,
        "used": 2,
    }
    assert "the first, " in capsys.readouterr().out


def test_the_tokenizer_must_fit_the_embedding(monkeypatch, capsys, tmp_path):
    """A tokenizer with more tokens than the embedding has rows is refused."""
    checkpoint = tmp_path / "checkpoint"
    save(load(TOY / "checkpoint"), TOY / "checkpoint", checkpoint, torch.float32)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zebra"] = 5000
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = fails(monkeypatch, capsys, tmp_path / "run", status=1, model=checkpoint)
    assert "the tokenizer has 5001 tokens, the embedding" in error


def test_a_finished_run_is_not_overwritten(monkeypatch, capsys, tmp_path):
    """A finished run stays as it is, unless --overwrite is passed."""
    out = tmp_path / "run"
    first = run(monkeypatch, out, max_steps=1)
    weights = (out / "model" / "model.safetensors").read_bytes()
    line = fails(monkeypatch, capsys, out, status=1, max_steps=1)
    assert f"{out} holds a finished run" in line and "pass --overwrite" in line
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    again = run(monkeypatch, out, max_steps=1, overwrite=True, lr=1e-2)
    assert losses(again) == losses(first)
    assert (out / "model" / "model.safetensors").read_bytes() != weights


def test_a_folder_of_something_else_is_not_touched(monkeypatch, capsys, tmp_path):
    """A folder that holds no run is refused even with --overwrite."""
    (tmp_path / "config.json").write_text("mine")
    line = fails(monkeypatch, capsys, tmp_path, status=1, overwrite=True)
    assert f"{tmp_path} " in line and "holds no run of ours" in line
    assert (tmp_path / "config.json").read_text() == "mine"


def test_not_a_number_stops_before_the_optimizer(monkeypatch, capsys, tmp_path):
    """A NaN loss ends the run before the optimizer's step, and names that step's pairs."""
    # One NaN weight must not make all weights NaN.
    checkpoint = tmp_path / "checkpoint"
    model = load(TOY / "checkpoint")
    model.model.norm.weight.data[3] = math.nan
    save(model, TOY / "checkpoint", checkpoint, torch.float32)
    flags = {"model": checkpoint, "batch_size": 2}
    error = fails(monkeypatch, capsys, tmp_path / "run", status=1, **flags)
    assert "step 1: loss nan" in error and error.count("heldout.jsonl:") == 2
    assert not (tmp_path / "run" / "model").exists()


# A stand-in for the package: it records what would be sent.
WANDB = """
import contextlib
rows, opened = [], []
class Run:
    def log(self, row, step): rows.append((step, row))
def init(**settings):
    opened.append(settings)
    return contextlib.nullcontext(Run())
"""


def test_metrics_go_to_wandb_too(monkeypatch, capsys, tmp_path):
    """W&B gets every row, with settings and an id that lets a resumed run continue."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(WANDB)
    line = fails(monkeypatch, capsys, tmp_path / "run", 2, wandb=True)
    assert "package wandb is not installed" in line
    monkeypatch.syspath_prepend(tmp_path)
    rows = run(monkeypatch, tmp_path / "run", wandb=True, **few_pairs(tmp_path))
    wandb = sys.modules.pop("wandb")
    assert wandb.rows == [(row["step"], row) for row in rows] and len(rows) == 5
    [opened] = wandb.opened
    assert opened["resume"] == "allow" and opened["config"]["lr"] == 1e-3


def test_metrics_go_to_tensorboard_too(monkeypatch, tmp_path):
    """TensorBoard gets every step's loss."""
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(monkeypatch, tmp_path / "run", tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    values = [event.value for event in board.Scalars("loss")]
    assert values == pytest.approx(losses(rows))


def test_weight_decay_leaves_norm_gains_alone(monkeypatch, tmp_path):
    """One step of AdamW shrinks every matrix by lr · weight decay, and no gain."""
    flags = few_pairs(tmp_path) | {"max_steps": 1, "lr": 1e-3}
    for name, decay in (("plain", 0.0), ("decayed", 10.0)):
        run(monkeypatch, tmp_path / name, **flags, weight_decay=decay)
    source = load(TOY / "checkpoint").state_dict()
    plain, decayed = (load(tmp_path / n / "model").state_dict() for n in ("plain", "decayed"))
    for name, weight in source.items():
        expected = plain[name] - (1e-3 * 10 * weight if weight.dim() > 1 else 0)
        torch.testing.assert_close(decayed[name], expected, rtol=1e-5, atol=1e-6)
