"""The run: the same loss however it is spread, DPO's first step, TRL's losses, settings, files, errors."""

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

import pytest
import torch

import data
import model as llama
import train

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"


def arguments(out: Path, **flags) -> list[str]:
    """The command line of a short run on the toy."""
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
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}={value}"]
    return words


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(monkeypatch, out: Path, **flags) -> list[dict]:
    """`python train.py` in this process; the rows of its metrics.jsonl."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(out, **flags)])
    train.main()
    return rows_of(out)


def fails(monkeypatch, capsys, out: Path, status: int, **flags) -> str:
    """The last line on stderr of a run that must exit with `status`."""
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, out, **flags)
    assert exit.value.code == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


# ---------------------------------------------------------------------------------------------------------------------
# One loss, however it is spread


SPREAD = {"simpo": {"sft_weight": 0.1}, "dpo": {"beta": 0.1}, "rrhf": {}, "slic": {}, "ipo": {}, "cpo": {"beta": 0.1}, "kto": {"beta": 0.5},
          "orpo": {}, "rdpo": {"beta": 0.1}, "sft": {}}  # fmt: skip  # each on two processes, sharded
WAYS = {  # and the first in every other way that two processes can share it
    name: {"objective": "simpo", "sft_weight": 0.1} | flags
    for name, flags in {"copies": {"replicate": 2}, "once": {"gather_once": True}, "offload": {"offload": True},
                        "copies, once": {"replicate": 2, "gather_once": True}}.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder with a run of each of SPREAD on two processes with small micro-batches."""
    folder = tmp_path_factory.mktemp("two")
    wanted = {objective: {"objective": objective} | flags for objective, flags in SPREAD.items()} | WAYS
    pairs = few_pairs(folder)
    runs = [arguments(folder / name, microbatch_tokens=200, **pairs, **flags) for name, flags in wanted.items()]
    launch(folder, runs, ["--standalone", "--nproc-per-node=2"])
    return folder


def launch(folder: Path, runs: list[list[str]], *launchers: list[str]) -> None:
    """The runs on the processes of one torchrun, or of several that know of each other."""
    (folder / "runs.json").write_text(json.dumps(runs))
    script = [ROOT / "tests" / "several_runs.py", folder / "runs.json"]
    started = [
        subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *flags, *script], stdout=subprocess.PIPE, text=True,
                         stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for flags in launchers
    ]  # fmt: skip
    for launcher in started:
        output, _ = launcher.communicate()
        assert launcher.returncode == 0, output


def few_pairs(folder: Path) -> dict:
    """15 pairs to train and evaluate on. In steps of 7 the last step has one pair, so one of two processes has none."""
    (folder / "few.jsonl").write_text("".join((TOY / "heldout.jsonl").open().readlines()[:15]))
    return {"data": folder / "few.jsonl", "eval_data": folder / "few.jsonl", "max_steps": 3, "dtype": "fp64"}


@pytest.mark.parametrize("name, objective", [(name, name) for name in SPREAD] + [(name, "simpo") for name in WAYS])
def test_same_losses_at_any_microbatch_size_and_on_two_processes(monkeypatch, tmp_path, two_processes, name, objective):
    """A mean of means, or a gradient averaged once too often, differs by the second step. In float64, where rounding is
    a million times smaller than the tolerance of a float32 test."""
    flags = few_pairs(tmp_path) | {"objective": objective} | SPREAD[objective]
    whole = run(monkeypatch, tmp_path / "whole", microbatch_tokens=10**6, **flags)
    assert len(losses(whole)) == 3
    alone = run(monkeypatch, tmp_path / "alone", microbatch_tokens=1, **flags)
    for other in (alone, rows_of(two_processes / name)):
        for a, b in zip(whole, other, strict=True):
            assert a.keys() == b.keys()
            shared = a.keys() - {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}
            assert {name: b[name] for name in shared} == pytest.approx(
                {name: a[name] for name in shared}, rel=1e-9, abs=1e-9
            )
    weights = llama.load(tmp_path / "whole" / "model").state_dict()
    for tensor, weight in llama.load(two_processes / name / "model").state_dict().items():
        torch.testing.assert_close(weight, weights[tensor], rtol=1e-6, atol=1e-7)  # of float32, which they are saved in


def test_two_launchers_with_a_copy_each_are_one_with_two(tmp_path, two_processes):
    """As on two nodes: `--nnodes 2 --replicate 2`, here over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    run = arguments(tmp_path / "run", microbatch_tokens=200, **few_pairs(tmp_path), **WAYS["copies"])
    launch(tmp_path, [run], *([*common, f"--node-rank={rank}"] for rank in range(2)))
    assert losses(rows_of(tmp_path / "run")) == pytest.approx(losses(rows_of(two_processes / "copies")), rel=1e-9)


def test_loss_of_a_step_by_hand(monkeypatch, tmp_path):
    """Against the model called one response at a time, outside of any packing and planning: the mean over pairs with β = 2
    and γ = 1, the defaults, and for SFT the mean over tokens."""
    few = few_pairs(tmp_path)["data"]
    flags = {
        "data": few,
        "batch_size": 15,
        "max_steps": 1,
        "microbatch_tokens": 200,
    }
    [simpo] = run(monkeypatch, tmp_path / "simpo", **flags)
    [mixed] = run(monkeypatch, tmp_path / "mixed", sft_weight=0.3, **flags)
    [sft] = run(monkeypatch, tmp_path / "sft", objective="sft", **flags)
    tokenizer, model = data.Tokenizer(TOY / "checkpoint"), llama.load(TOY / "checkpoint")

    @torch.no_grad()
    def logps_of(prompt: str, response: str) -> torch.Tensor:
        prompt_ids = tokenizer.backend.encode(f"<|user|> {prompt} <|end|> <|assistant|>").ids
        ids = torch.tensor(prompt_ids + tokenizer.backend.encode(response + " <|end|>").ids)
        everything, ends = torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden = model.model(ids, everything, llama.PackedAttention(everything, ends, ends))
        return model.logits(hidden).log_softmax(-1)[:-1].gather(1, ids[1:, None])[len(prompt_ids) - 1 :]

    pairs = [json.loads(line) for line in few.read_text().splitlines()]
    chosen = [logps_of(pair["prompt"], pair["chosen"]) for pair in pairs]
    rejected = [logps_of(pair["prompt"], pair["rejected"]) for pair in pairs]
    preference = sum(math.log(1 + math.exp(1 - 2 * float(w.mean() - l.mean()))) for w, l in zip(chosen, rejected)) / 15
    likelihood = -float(torch.cat(chosen).mean())
    assert simpo["loss"] == pytest.approx(preference, rel=1e-5)
    assert sft["loss"] == pytest.approx(likelihood, rel=1e-5)
    assert mixed["loss"] == pytest.approx(preference + 0.3 * likelihood, rel=1e-5)
    assert simpo["lengths/chosen"] == pytest.approx(sum(map(len, chosen)) / 15)
    assert simpo["logps/rejected"] == pytest.approx(sum(float(l.sum()) for l in rejected) / 15, rel=1e-5)


@pytest.mark.parametrize("objective", ["simpo", "dpo", "ipo", "cpo", "kto", "orpo"])
def test_losses_are_trl_s(monkeypatch, tmp_path, objective):
    """TRL's losses on the same checkpoint, pairs, order and AdamW, recorded by `bench/parity.py --record`."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import parity

    record = json.loads(parity.RECORD.read_text())["losses"][objective]
    parity.write_pairs(tmp_path / "pairs.jsonl")
    rows = run(monkeypatch, tmp_path / "run", data=tmp_path / "pairs.jsonl", **parity.settings_of(objective))
    assert len(record) == 8
    assert parity.losses_of(objective, rows) == pytest.approx(record, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# DPO's reference


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dpo_starts_at_ln2_with_both_references(monkeypatch, tmp_path, dtype):
    """Exactly, at the first step and at the first evaluation; and both references give the same run."""
    runs = {}
    for reference in ("online", "cached"):
        rows = run(monkeypatch, tmp_path / reference, objective="dpo", beta=0.1, reference=reference, dtype=dtype, epochs=1, max_steps=4,
                   eval_data=TOY / "heldout.jsonl", microbatch_tokens=300)  # fmt: skip
        assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert rows[0]["eval_rewards/margins"] == 0
        assert rows[0]["eval_rewards/accuracies"] == pytest.approx(0.5)
        assert losses(rows)[0] == pytest.approx(math.log(2), abs=1e-7)
        assert rows[1]["rewards/margins"] == 0
        runs[reference] = losses(rows)
    assert runs["online"] == pytest.approx(runs["cached"], rel=1e-6)
    assert runs["online"][3] < 0.69


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def test_simpo_learns_and_the_folder_is_whole(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path / "run", data=TOY / "train.jsonl", eval_data=TOY / "heldout.jsonl", batch_size=32, max_steps=12, beta=10.0,
               gamma_beta_ratio=0.3, eval_every=5)  # fmt: skip
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 5, 10, 12]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert evaluations[-1]["eval_rewards/margins"] > evaluations[0]["eval_rewards/margins"] + 0.2
    assert evaluations[-1]["eval_rewards/accuracies"] > evaluations[0]["eval_rewards/accuracies"]
    names = {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "pairs_per_second",
        "peak_memory_gib",
    }
    names |= {
        f"{group}/{which}" for group in ("rewards", "logps", "avg_logps", "lengths") for which in ("chosen", "rejected")
    }
    assert rows[1].keys() == names | {"rewards/accuracies", "rewards/margins"}
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["settings"]["gamma"] == 3.0 and record["settings"]["dtype"] == "fp32"
    assert record["data"]["records"] == len((TOY / "train.jsonl").open().readlines()) and record["steps"] == 12
    trained, source = llama.load(tmp_path / "run" / "model"), llama.load(TOY / "checkpoint")
    assert not torch.equal(trained.head_weight, source.head_weight)
    assert data.Tokenizer(tmp_path / "run" / "model").template is not None


def test_what_is_saved_are_the_master_weights(monkeypatch, tmp_path):
    """Evaluation leaves a root gathered in bfloat16: saved like that, a float32 checkpoint would lose 16 bits of it."""
    pairs = few_pairs(tmp_path)["data"]
    run(monkeypatch, tmp_path / "run", dtype="bf16", data=pairs, eval_data=pairs, max_steps=1, lr=1e-30)
    source = llama.load(TOY / "checkpoint").state_dict()
    for name, weight in llama.load(tmp_path / "run" / "model").state_dict().items():
        assert torch.equal(weight, source[name]), name


@pytest.mark.parametrize("native", [True, False])
def test_bf16_in_software_is_warned_of(monkeypatch, tmp_path, capsys, native):
    monkeypatch.setattr(train, "multiplies_bf16", lambda device: native)
    run(monkeypatch, tmp_path / "run", **few_pairs(tmp_path) | {"dtype": "bf16", "max_steps": 1})
    assert ("in software" in capsys.readouterr().out) == (not native)


def test_order_epochs_and_what_is_logged(monkeypatch, tmp_path):
    """15 pairs in steps of 7 are 7, 7 and 1; --no-shuffle takes them as they stand in the file."""
    flags = few_pairs(tmp_path) | {"epochs": 2, "max_steps": 6, "shuffle": False, "log_every": 2}
    rows = [row for row in run(monkeypatch, tmp_path / "run", **flags) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["epoch"] for row in rows] == pytest.approx([14 / 15, 22 / 15, 2])
    assert [step.tolist() for step in data.batches(5, 2, 1, seed=0, shuffle=False)] == [[0, 1], [2, 3], [4]]


def test_a_cached_reference_leaves_memory(monkeypatch, tmp_path):
    """FSDP's modules hold each other in circles, so `del` alone frees nothing."""
    built, alive, build = [], [], train.build_model

    def building(*args, **flags):
        model = build(*args, **flags)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(train, "build_model", building)
    monkeypatch.setattr(train, "learning_rate", lambda *_: alive.append([ref() is not None for ref in built]) or 0.0)
    run(
        monkeypatch,
        tmp_path / "run",
        **few_pairs(tmp_path) | {"objective": "dpo", "reference": "cached", "max_steps": 1},
    )
    assert alive == [[True, False]]


def test_compiled_blocks_give_the_same_losses(monkeypatch, tmp_path):
    """Streams of several lengths through one compilation."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    flags = few_pairs(tmp_path) | {"max_steps": 1, "microbatch_tokens": 200, "activation_checkpointing": False}
    plain = run(monkeypatch, tmp_path / "plain", **flags)
    compiled = run(monkeypatch, tmp_path / "compiled", compile=True, **flags)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


def test_length_normalisation_is_a_switch(monkeypatch, tmp_path):
    """Off, SimPO's reward is β · log π, and its margin that of the sums; on, that of the averages."""
    [row] = run(monkeypatch, tmp_path / "run", length_norm=False, gamma_beta_ratio=0.0, beta=0.5, max_steps=1)
    assert row["rewards/margins"] == pytest.approx(0.5 * (row["logps/chosen"] - row["logps/rejected"]))
    [row] = run(monkeypatch, tmp_path / "normalised", gamma_beta_ratio=0.0, beta=0.5, max_steps=1)
    assert row["rewards/margins"] == pytest.approx(0.5 * (row["avg_logps/chosen"] - row["avg_logps/rejected"]))


def test_learning_rate():
    """Up in a line over 10 % of the steps, which end at the peak; then a cosine that ends just above 0."""
    settings = train.Settings(lr=1.0, beta=1.0, warmup_ratio=0.1)
    rates = [train.learning_rate(settings, step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[11] == pytest.approx(0.5)  # half way between 2 and 20
    assert 0 < rates[-1] < 0.01 and all(a >= b for a, b in itertools.pairwise(rates[1:]))
    settings.lr_schedule = "linear"
    assert train.learning_rate(settings, 11, 20) == pytest.approx(0.5)
    settings.lr_schedule = "constant"
    assert train.learning_rate(settings, 19, 20) == 1.0


def test_a_template_passed_goes_into_the_folder(monkeypatch, tmp_path):
    """Trained with another template, the checkpoint must answer with it: template and end of turn are saved."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} <|user|> {% endfor %}")
    run(monkeypatch, tmp_path / "run", chat_template=template, max_steps=1)
    saved = data.Tokenizer(tmp_path / "run" / "model")
    assert saved.prompt_text("describe the fox .", "") == "describe the fox . <|user|> "
    assert saved.end_id == saved.backend.token_to_id("<|user|>")
    assert json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())["eos_token_id"] == [
        0,
        saved.end_id,
    ]


def test_a_real_checkpoint_and_real_pairs(monkeypatch, tmp_path):
    """SmolLM2 on UltraFeedback-like pairs: parquet and JSONL give the same run, transformers the same logits."""
    pairs, checkpoint = (
        ROOT.parent / "shared" / "data" / "alpaca-eval-prefs",
        Path(os.environ.get("SIMPO_SMOLLM2", "absent")),
    )
    if not checkpoint.exists() or not pairs.exists():
        pytest.skip("needs SIMPO_SMOLLM2=FOLDER with SmolLM2-135M-Instruct, and ../shared/data")
    transformers = pytest.importorskip("transformers")
    dtype = "bf16" if train.multiplies_bf16(torch.device("cpu")) else "fp32"  # in software it would take minutes
    runs = [run(monkeypatch, tmp_path / suffix, model=checkpoint, data=pairs / f"test.{suffix}", max_length=96, max_prompt_length=48, batch_size=2,
                max_steps=2, dtype=dtype, lr=1e-5) for suffix in ("jsonl", "parquet")]  # fmt: skip
    assert losses(runs[0]) == losses(runs[1])
    folder = tmp_path / "parquet" / "model"
    ids = torch.tensor(data.Tokenizer(folder).encode_prompts(["The capital of France is"])[0])
    everything, ends = torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
    ours = llama.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = ours.logits(ours.model(ids, everything, llama.PackedAttention(everything, ends, ends)))
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    "flags, line",
    [
        ({"batch_size": 0}, "--batch-size: expected a positive number"),
        ({"batch_size": "many"}, "argument --batch-size: invalid int value: 'many'"),
        ({"objective": "ppo"}, "argument --objective: invalid choice: 'ppo' (choose from"),
        ({"label_smoothing": 0.5}, "--label-smoothing: expected a number from 0 to below 0.5"),
        ({"lr": "nan"}, "--lr: not a finite number"),
        (
            {"max_length": 100, "max_prompt_length": 100},
            "--max-prompt-length 100 leaves no room for a response in --max-length 100",
        ),
        ({"eval_every": 5}, "--eval-every goes with --eval-data"),
        ({"data": ""}, "--data: is empty"),
        ({"leraning_rate": 1}, "unrecognized arguments: --leraning-rate=1"),
    ],
)
def test_usage_errors(monkeypatch, capsys, tmp_path, flags, line):
    assert line in fails(monkeypatch, capsys, tmp_path / "run", status=2, **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, line",
    [
        ("gama-beta-ratio = 0.3", "unknown key 'gama-beta-ratio'; did you mean 'gamma_beta_ratio'?"),
        ("lr = '1e-6'", "lr = '1e-6': expected float"),
        ("batch_size = 1.5", "batch_size = 1.5: expected int"),
        ("objective = 'ppo'", "--objective: 'ppo' is not one of simpo, dpo, rrhf"),
        ("lr = ", "cannot be read: "),
    ],
)
def test_toml_errors(monkeypatch, capsys, tmp_path, text, line):
    (tmp_path / "recipe.toml").write_text(text)
    assert line in fails(monkeypatch, capsys, tmp_path / "run", status=2, config=tmp_path / "recipe.toml")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "m"\ndata = "d"\nlr = 3\nbeta = 4.0\nbatch-size = 5\nlength_norm = false\n')
    settings = train.read_settings(["--config", str(recipe), "--beta", "6", "--length-norm"])
    assert (settings.lr, settings.beta, settings.batch_size, settings.length_norm, settings.epochs) == (
        3.0,
        6.0,
        5,
        True,
        1,
    )
    assert settings.gamma == pytest.approx(3.0)


def test_defaults_are_the_paper_s():
    """arXiv 2405.14734 section 3 and appendix B; γ is a ratio there in the published settings."""
    settings = train.read_settings(["--model", "m", "--data", "d"])
    wanted = {"batch_size": 128, "epochs": 1, "adam_beta1": 0.9, "adam_beta2": 0.999, "lr_schedule": "cosine", "warmup_ratio": 0.1, "max_grad_norm": 1.0,
              "max_length": 2048, "max_prompt_length": 1800, "beta": 2.0, "gamma_beta_ratio": 0.5, "lr": 1e-6, "objective": "simpo"}  # fmt: skip
    assert {name: getattr(settings, name) for name in wanted} == wanted
    assert train.read_settings(["--model", "m", "--data", "d", "--objective", "dpo"]).beta == 0.01


# ---------------------------------------------------------------------------------------------------------------------
# What a user can get wrong: one line, status 1, nothing written


GOOD = {"prompt": "describe the fox .", "chosen": "the fox runs away .", "rejected": "the fox fades away ."}


@pytest.mark.parametrize(
    "content, line",
    [
        (None, "pairs.jsonl: no such file or folder"),
        ("", "nothing to learn from: it is empty"),
        (json.dumps(GOOD) + "\n{oops\n", "pairs.jsonl:2: not JSON"),
        (json.dumps({"prompt": "x", "rejected": "y"}), "pairs.jsonl:1: no 'chosen' field"),
        (
            json.dumps(GOOD | {"rejected": GOOD["chosen"]}),
            "nothing to learn from: 1 records, dropped: chosen equal to rejected (1); the first",
        ),
        (
            json.dumps(GOOD | {"chosen": ""}),
            "nothing to learn from: 1 records, dropped: an empty response (1); the first",
        ),
        (
            json.dumps(GOOD | {"prompt": [{"role": "system", "content": "x"}]}),
            "pairs.jsonl:1: the chat template refuses this conversation",
        ),
    ],
)
def test_bad_data(monkeypatch, capsys, tmp_path, content, line):
    pairs = tmp_path / "pairs.jsonl"
    if content is not None:
        pairs.write_text(content)
    error = fails(monkeypatch, capsys, tmp_path / "run", status=1, data=pairs)
    assert error.startswith("train.py: error: ") and line in error
    assert not (tmp_path / "run").exists()


def test_dropped_and_cut_are_counted(monkeypatch, capsys, tmp_path):
    long = " ".join(["the fox runs away ."] * 40)
    pairs = write(
        tmp_path / "pairs.jsonl",
        GOOD,
        GOOD | {"chosen": GOOD["rejected"]},
        GOOD | {"chosen": long},
        GOOD | {"rejected": ""},
    )
    run(monkeypatch, tmp_path / "run", data=pairs, max_length=100, max_prompt_length=50)
    counts = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert counts == {"records": 4, "format: explicit": 2, "dropped: chosen equal to rejected": 1, "dropped: an empty response": 1,
                      "responses cut at their end": 1, "used": 2}  # fmt: skip
    assert "the first, " in capsys.readouterr().out


def test_the_tokenizer_must_fit_the_embedding(monkeypatch, capsys, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    llama.save(llama.load(TOY / "checkpoint"), TOY / "checkpoint", checkpoint, torch.float32)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zebra"] = 5000
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = fails(monkeypatch, capsys, tmp_path / "run", status=1, model=checkpoint)
    assert "the tokenizer has 5001 tokens, the embedding" in error


def test_a_finished_run_is_not_overwritten(monkeypatch, capsys, tmp_path):
    first = run(monkeypatch, tmp_path / "run", max_steps=1)
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert "holds a finished run: pass --overwrite" in fails(
        monkeypatch, capsys, tmp_path / "run", status=1, max_steps=1
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == weights
    again = run(monkeypatch, tmp_path / "run", max_steps=1, overwrite=True, lr=1e-2)
    assert losses(again) == losses(first)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() != weights


def test_a_folder_of_something_else_is_not_touched(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    assert "holds no run of ours" in fails(monkeypatch, capsys, tmp_path, status=1, overwrite=True)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_not_a_number_stops_before_the_optimizer(monkeypatch, capsys, tmp_path):
    """A NaN in a weight must not become a NaN in all of them, and the pairs of that step are named."""
    checkpoint = tmp_path / "checkpoint"
    model = llama.load(TOY / "checkpoint")
    model.model.norm.weight.data[3] = math.nan
    llama.save(model, TOY / "checkpoint", checkpoint, torch.float32)
    error = fails(monkeypatch, capsys, tmp_path / "run", status=1, model=checkpoint, batch_size=2)
    assert "step 1: loss nan" in error and error.count("heldout.jsonl:") == 2
    assert not (tmp_path / "run" / "model").exists()


def test_metrics_go_to_wandb_too(monkeypatch, capsys, tmp_path):
    """With a stand-in for the package: every row, under the run's own id, which stays the same when it goes on."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("""
import contextlib
rows, opened = [], []
class Run:
    def log(self, row, step): rows.append((step, row))
def init(**settings):
    opened.append(settings)
    return contextlib.nullcontext(Run())
""")
    assert "package wandb is not installed" in fails(monkeypatch, capsys, tmp_path / "run", 2, wandb=True)
    monkeypatch.syspath_prepend(tmp_path)
    rows = run(monkeypatch, tmp_path / "run", wandb=True, **few_pairs(tmp_path))
    wandb = sys.modules.pop("wandb")
    assert wandb.rows == [(row["step"], row) for row in rows] and len(rows) == 5
    [opened] = wandb.opened
    assert opened["resume"] == "allow" and opened["config"]["lr"] == 1e-3


def test_metrics_go_to_tensorboard_too(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(monkeypatch, tmp_path / "run", tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses(rows))
