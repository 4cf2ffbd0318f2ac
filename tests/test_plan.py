"""Checks `--plan`: by hand for Llama 3's shapes, and against what a run on a CPU takes."""

import doctest
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plan_check
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as llama
import train
import workload
from formats.checkpoint import read_config
from formats.errors import InputError
from model import Block, Config, PackedAttention, rotary_table
from runtime import gpus, plan
from runtime.processes import multiplies_bf16
from runtime.settings import PlanOptions, read_command, read_settings

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
LLAMA3_8B = workload.MODELS["llama3-8b"]
LLAMA3_70B = LLAMA3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def planned(folder: Path, config: dict, *flags: str) -> plan.Plan:
    """Plan for a folder with config.json and nothing else: no weights, no tokenizer."""
    folder.joinpath("config.json").write_text(json.dumps(config))
    flags = (f"--model={folder}", "--data=owner/pairs", "--plan", *flags)
    return plan.make_plan(*read_command(list(flags)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype):
    """Of one block, to 1 %.

    Tables that all blocks share are left out here, the scales of the norms in the formula.
    """
    toy = read_config(ROOT / "toy" / "checkpoint")
    shape = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 32}
    config = Config(**vars(toy) | shape | {"num_attention_heads": 8, "num_key_value_heads": 2})
    pairs = [data.Pair(np.zeros(200, int), (np.zeros(120, int), np.zeros(80, int)), "")] * 2
    packed = data.pack(pairs)
    attend = PackedAttention(torch.from_numpy(packed["key_index"]), packed["cu_q"], packed["cu_k"])
    block, load = Block(config, 0).to(dtype), plan.Load.of(config, pairs)
    x = torch.randn(int(load.tokens), config.hidden_size, dtype=dtype, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        turns = rotary_table(config, torch.from_numpy(packed["positions"]))
        block(x, turns, attend)
    shared = (*block.parameters(), *turns, attend.mask, attend.key_index)
    shared = {tensor.untyped_storage().data_ptr() for tensor in shared}
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in shared)
    counted = plan.activations(config, load, dtype.itemsize, "cpu").saved["everything"]
    assert counted == pytest.approx(found, rel=0.01)


class Live(TorchDispatchMode):
    """Records the most bytes that the results of operations hold at a time."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.sizes[StorageWeakRef(out.untyped_storage())] = out.untyped_storage().nbytes()
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("kept", ["none", "all"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_are_what_backward_holds(dtype, kept, monkeypatch):
    """Of eight tiles, to 3 %; hidden states and weights are narrow."""
    n, v = 1024, 8 * plan.MIN_TILE_WIDTH
    monkeypatch.setitem(llama.LOGITS_TILE, "cpu", v * n // 8)
    config, load = Config(v, 2, 4, 1, 1, 1, 2), plan.Load(n, n, n)
    settings = read_settings(
        ["--model=m", "--data=d", f"--dtype={dtype}", f"--keep-products={kept}"]
    )
    layout = plan.Layout.of(config, settings, plan.Machine("cpu", "", 1, GIB, None))
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    hidden, weight = (torch.randn(k, 2, dtype=compute, requires_grad=True) for k in (n, v))
    targets = torch.randint(v, (n,))
    with Live() as live:
        llama.TiledLogps.apply(hidden, weight, targets, kept == "all").sum().backward()
    counted = plan.temporary_memory(config, settings, layout, load)["log-probs"]["logits"]
    assert live.peak == pytest.approx(counted, rel=0.03)


def test_8b(tmp_path):
    """8,030,261,248 parameters of 16 bytes: too much for a GPU of 80 GiB, easy for eight."""
    alone = planned(tmp_path, LLAMA3_8B, "--gpus=1", "--gpu-memory=80")
    assert alone.parameters == 8_030_261_248
    persistent = "parameters", "gradients", "optimizer"
    assert [round(alone.items[name] / GIB, 2) for name in persistent] == [29.92, 29.92, 59.83]
    assert alone.total > 119.66 * GIB and alone.largest == 0
    eight = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--gpu-memory=80", "--objective=dpo")
    assert round(eight.items["optimizer"] / GIB, 2) == 7.48
    assert round(eight.items["reference"] / GIB, 2) == 1.87
    assert eight.total < 40 * GIB
    copies = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--gpu-memory=80", "--replicate=2")
    assert copies.items["optimizer"] == 2 * eight.items["optimizer"]


def test_offload_moves_what_persists_to_the_host(tmp_path):
    here = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--objective=dpo")
    offloaded = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--objective=dpo", "--offload")
    assert [offloaded.items[name] for name in plan.PERSISTENT] == [0] * 4
    assert offloaded.on_host == sum(here.items[name] for name in plan.PERSISTENT)
    assert "--offload" in here.helps and "--offload" not in offloaded.helps


def test_kept_products_are_counted(tmp_path):
    """Of Llama 3 8B in bf16.

    q, k, v and o have 4096 + 2 · 1024 + 4096 features a token, gate and up 2 · 14336, the head
    128256 for each predicted token.
    """
    flags = [LLAMA3_8B, "--gpus=8"]
    plans = {
        policy: planned(tmp_path, *flags, f"--keep-products={policy}")
        for policy in ("none", "attention", "all")
    }
    waiting = {
        policy: p.phases["log-probs"]["activations"] / p.load.tokens for policy, p in plans.items()
    }
    assert waiting["attention"] - waiting["none"] == pytest.approx(32 * 2 * 10240)
    assert waiting["all"] - waiting["attention"] == pytest.approx(32 * 2 * 28672)
    logits = {policy: p.phases["log-probs"]["logits"] for policy, p in plans.items()}
    tile, everything = 2**25, plans["all"].load.predicted * 128256
    assert logits["none"] == logits["attention"] == (2 + 2 * 4 + 2) * tile
    assert logits["all"] == 2 * everything + (2 * 4 + 2) * tile
    working = {
        policy: p.phases["blocks"]["activations"] / p.load.tokens - waiting[policy]
        for policy, p in plans.items()
    }
    assert working["none"] == pytest.approx(working["attention"])
    assert working["none"] == pytest.approx(working["all"] + 2 * 28672)


def test_70b_on_64_gpus(tmp_path):
    """Works Llama 3 70B out by hand.

    P = 70,553,706,496. A block has 8192 · (2 · 8192 + 2 · 1024 + 3 · 28672) + 2 · 8192 =
    855,654,400 parameters, the root 2 · 128256 · 8192 + 8192 = 2,101,354,496. The worst phase is
    the backward of the last block. The root and two blocks, one for the flat buffer and one for the
    weights, are gathered in bf16. Unsharded are the gradients of the head and of the block in bf16,
    the float32 copy that is reduced, and a 64th of it.
    """
    p = planned(
        tmp_path,
        LLAMA3_70B,
        "--gpus=64",
        "--gpu-memory=80",
        "--plan-tokens-per-pair=1000",
        "--batch-size=512",
        "--microbatch-tokens=4000",
        "--mfu=0.4",
    )
    share = 70_553_706_496 / 64
    block, root, head = 855_654_400, 2_101_354_496, 128256 * 8192
    assert p.parameters == 80 * block + root == 70_553_706_496
    items = p.items
    assert [items[name] / share for name in plan.PERSISTENT] == [4, 4, 8, 0]
    assert items["gathered weights"] == 2 * root + 2 * 2 * block
    assert items["unsharded gradients"] == 2 * head + 2 * block + 4 * block * (1 + 1 / 64)
    assert items is p.phases["blocks"]
    assert p.phases["log-probs"]["logits"] == (2 * 4 + 2 * 2) * 2**25
    assert p.load.tokens == 4000 and p.microbatches == 2
    # 80 blocks' inputs and attention, 32 KiB a token, its normaliser; one block's 16 D + 4 A + 8 I
    # bytes, its keys and values, gradients: 0.5 MiB
    waiting = 80 * (32768 + 256)
    assert waiting * 4000 < items["activations"] < (waiting + 700_000) * 4000
    assert 35 * GIB < p.total < 50 * GIB
    # 6 operations a token and parameter but the embedding's; attention adds little at this length
    assert p.flops == pytest.approx(6 * (p.parameters - head) * 512_000, rel=0.03)
    assert p.seconds == pytest.approx(p.flops / (64 * 989e12 * 0.4))
    # there is room for a whole step at once, and no use for more
    assert p.largest == p.most == 8000


def test_the_largest_microbatch_holds_a_whole_step(tmp_path):
    """Shares of several GPUs differ by up to a pair, and the fullest must fit."""
    lengths = [(5 + 7 * i % 90, 3 + 11 * i % 200, 4 + 5 * i % 70) for i in range(40)]
    records = [
        {"prompt": "a " * p, "chosen": "b " * c, "rejected": "c " * r} for p, c, r in lengths
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [f"--model={ROOT}/toy/checkpoint", f"--data={data}", "--plan", "--gpus=8", "--gpu=H100"]
    flags += ["--batch-size=40"]
    largest = plan.make_plan(*read_command(flags)).largest
    whole = plan.make_plan(*read_command([*flags, f"--microbatch-tokens={largest}"]))
    assert whole.microbatches == 1 and whole.load.tokens == largest == whole.most
    less = plan.make_plan(*read_command([*flags, f"--microbatch-tokens={largest - 1}"]))
    assert less.microbatches == 2


def test_the_fullest_microbatch_has_the_most_logits_too():
    """A long prompt makes one of 100 tokens, long responses one that predicts 80."""
    lengths = [(90, 5, 5), (2, 40, 40)]
    pairs = [
        data.Pair(np.zeros(p, int), (np.zeros(c, int), np.zeros(r, int))) for p, c, r in lengths
    ]
    settings = read_settings(["--model=m", "--data=d", "--microbatch-tokens=100"])
    config, machine = Config(9, 2, 4, 1, 1, 1, 2), plan.Machine("cuda", "", 1, GIB, None)
    load, rounds = plan.fullest_microbatch(config, settings, machine, [pairs], plan.Load(0, 0, 0))
    assert (load.tokens, load.predicted, rounds) == (100, 80, 2)


def test_largest_microbatch_fits_and_no_larger_one(tmp_path):
    tmp_path.joinpath("config.json").write_text(json.dumps(LLAMA3_8B))
    config = read_config(tmp_path)
    flags = ["--model=x/y", "--data=x/y", "--dtype=bf16", "--no-activation-checkpointing"]
    settings = read_settings(flags)
    machine = plan.Machine("cuda", "H100", 8, 80 * GIB, None)
    load = plan.Load(1000, 1200, 800)

    def total(tokens: int) -> float:
        phases = plan.memory(config, settings, machine, load.times(tokens / 1000))
        return sum(plan.worst(phases).values())

    largest = plan.largest_microbatch(config, settings, machine, load, 10**6)
    assert 1000 < largest < 10**6 and total(largest) <= machine.memory < total(largest + 1)


def test_every_pass_costs_a_third_of_forward_and_backward(tmp_path):
    """An online reference is one pass more; KTO's pass before the step asks both models again."""
    flags = "--gpus=8", "--mfu=0.4"
    seconds = {
        (objective, kind): planned(
            tmp_path, LLAMA3_8B, *flags, f"--objective={objective}", f"--reference={kind}"
        ).seconds
        for objective in ("dpo", "kto")
        for kind in ("online", "cached")
    }
    three_passes = planned(tmp_path, LLAMA3_8B, *flags).seconds
    passes = {key: 3 * value / three_passes for key, value in seconds.items()}
    assert passes == pytest.approx(
        {("dpo", "online"): 4, ("dpo", "cached"): 3, ("kto", "online"): 6, ("kto", "cached"): 4}
    )
    cached = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--objective=dpo", "--reference=cached")
    assert cached.items["reference"] == 0


def test_time_is_modelled_unless_mfu_is_given(tmp_path):
    """By the GPU's data sheet; what goes on beside each other counts by the longest."""

    def plan_for(*flags: str) -> plan.Plan:
        return planned(tmp_path, LLAMA3_8B, "--gpus=8", *flags)

    here = plan_for("--gpu=H100")
    assert here.machine.memory == 80 * GIB and here.machine.peak == 989e12
    beside = [here.times[name] for name in here.times if name != "optimizer"]
    assert here.seconds == max(beside) + here.times["optimizer"]
    share = here.flops / (here.seconds * 8 * 989e12)
    assert 0.3 < share < 0.45
    assert plan_for("--gpu=H200").seconds < here.seconds  # by the bandwidth of its memory
    assert plan_for("--keep-products=all").seconds < here.seconds
    assert plan_for("--gpu=L40S").times["links"] > 10 * here.times["links"]  # PCIe
    assert plan_for("--gpu-tflops=500").seconds > 1.5 * here.seconds
    assert plan_for("--mfu=0.5").seconds == pytest.approx(here.flops / (8 * 989e12 * 0.5))
    assert plan_for("--dtype=fp32").seconds is None  # data sheets are read for bf16 alone
    alone = planned(tmp_path, LLAMA3_8B, "--gpus=1")
    assert alone.times["links"] == 0 < alone.times["arithmetic"]


def test_offload_has_its_price(tmp_path):
    """On the bus, two gathers of float32 shards and a gradient per micro-batch; a slower AdamW.

    From the second micro-batch on, gradients of other ones are there, and the host adds them up.
    With --gather-once there is one gradient, and with --replicate one that leaves the GPU.
    """
    here = planned(tmp_path, LLAMA3_8B, "--gpus=8")
    offloaded = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--offload")
    crossing = here.microbatches * 3 * 4 * here.parameters / 8
    assert here.times["host bus"] == 0
    assert offloaded.times["host bus"] == pytest.approx(crossing / (64e9 * 0.8))
    host = here.parameters / 8 / 20e9  # seconds for a byte of every parameter
    tensors = (32 * 9 + 3) * 60e-6
    assert here.microbatches == 2
    assert offloaded.times["optimizer"] == pytest.approx((40 + 12) * host + tensors)
    once = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--offload", "--gather-once")
    assert once.times["optimizer"] == pytest.approx(40 * host + tensors)
    copies = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--offload", "--replicate=2")
    assert copies.times["optimizer"] == pytest.approx(40 * 2 * host + tensors)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gpus=1", "--objective=dpo", "--keep-products=all", "--batch-size=16"],
        ["--gpus=2", "--no-activation-checkpointing", "--gather-once", "--gpu=A100-40"],
        ["--device=cpu", "--objective=dpo", "--no-activation-checkpointing"],
    ],
    ids=" ".join,
)
def test_every_remedy_has_its_total(tmp_path, flags):
    """The total is what a plan with that flag says."""
    here = planned(tmp_path, LLAMA3_8B, *flags)
    assert len(here.helps) >= 2
    for remedy, total in here.helps.items():
        with_it = planned(tmp_path, LLAMA3_8B, *flags, *remedy.split())
        assert total == with_it.total < here.total, remedy


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_the_models_of_recipes_are_known(monkeypatch, tmp_path, recipe):
    """Without a download, and without a cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    p = plan.make_plan(*read_command([f"--config={recipe}", "--plan", "--gpus=8"]))
    sizes = {"llama3": 8_030_261_248, "mistra": 7_241_732_096, "tulu3-": 8_030_326_784}
    assert p.parameters == sizes[recipe.stem[:6]]


def test_an_objective_of_one_response_is_planned_with_one(tmp_path):
    p = planned(tmp_path, LLAMA3_8B, "--objective=sft", "--batch-size=8", "--gpus=1")
    assert p.step_tokens == 8 * 409  # UltraFeedback's prompt and response


def test_the_settings_of_the_caller_do_not_change(tmp_path):
    tmp_path.joinpath("config.json").write_text(json.dumps(LLAMA3_8B))
    settings = read_settings([f"--model={tmp_path}", "--data=owner/pairs"])
    assert plan.make_plan(settings, PlanOptions(gpus=8)).settings.dtype in ("bf16", "fp32")
    assert settings.dtype == "auto"


def test_examples_in_docstrings():
    assert doctest.testmod(plan) == (0, 1)  # failed, attempted
    assert doctest.testmod(gpus) == (0, 2)


def run(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *map(str, flags)])
    train.main()


def test_the_table(monkeypatch, capsys, tmp_path):
    """A recipe with model and data on the hub can be planned from a config.json.

    Nothing is written.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    recipe = ROOT / "recipes" / "llama3-base-simpo.toml"
    run(monkeypatch, "--config", recipe, "--model", tmp_path, "--gpus=8", "--mfu=0.5")
    printed = capsys.readouterr().out
    assert (
        "8,030,261,248 parameters; simpo, bf16" in printed
        and "assumed" in printed
        and "fits in" in printed
    )
    assert "a step at 50% of 8 ×" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    run(monkeypatch, "--device=cpu")  # the toy, whose pairs are here
    assert "104,768 parameters; simpo, fp32" in (printed := capsys.readouterr().out)
    assert "all 1,984 of" in printed and "62 steps" not in printed  # no peak is known of a CPU


RECIPE = ["--config", str(ROOT / "recipes" / "llama3-base-dpo.toml")]


@pytest.mark.parametrize(
    "flags, status, parts",
    [
        (["--model=owner/name", "--data=owner/pairs"], 1, ["owner/name", "--model", "config.json"]),
        (["--model=nowhere", "--data=owner/pairs"], 1, ["nowhere"]),
        (["--gpus=6", "--replicate=4"], 1, ["--replicate 4", "--gpus 6"]),
        (["--gpu=H9000"], 1, ["--gpu H9000", "H100 NVL", "A100 40"]),
        (["--device=cpu", "--gpu=H100"], 1, ["--gpu H100", "--device cpu"]),
        (["--device=cpu", "--gpu-memory=0.1"], 1, ["needs", "has 0.10 GiB"]),
        ([*RECIPE, "--gpu=A100-40"], 1, ["a GPU needs", "has 40.00 GiB"]),
        (["--gpus=0"], 2, ["--gpus", "positive"]),
        (["--gpu-memory=lots"], 2, ["--gpu-memory"]),
    ],
)
def test_errors(monkeypatch, capsys, flags, status, parts):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *flags)
    assert exit.value.code == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line and all(part in line for part in parts)


@pytest.mark.skipif(sys.platform != "linux", reason="the constants are glibc's and Linux's")
@pytest.mark.parametrize(
    "flags",
    [["--dtype=fp32"], ["--dtype=bf16", "--no-activation-checkpointing", "--objective=dpo"]],
    ids=" ".join,
)
def test_memory_is_as_measured(tmp_path, flags):
    """Two steps of a model with 31 million parameters, within 15 %."""
    if "--dtype=bf16" in flags and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this CPU multiplies bfloat16 in software: minutes")
    shape = plan_check.SHAPE | {"hidden_size": 384, "intermediate_size": 1024}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    predicted, taken = plan_check.predicted_and_taken(
        [*plan_check.write_inputs(tmp_path, shape), *flags]
    )
    assert predicted == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_plan_under_torchrun_is_that_of_its_ranks(rank, monkeypatch, capsys):
    """`torchrun --nproc-per-node 8 train.py --plan` plans eight GPUs, once."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(plan, "is_rank_0", lambda: rank == 0)
    model = "--model=meta-llama/Meta-Llama-3-8B-Instruct"
    plan.print_plan(*read_command([model, "--data=owner/pairs", "--plan", "--gpu=H100"]))
    assert capsys.readouterr().out.count("8 × H100 of 80 GiB") == (rank == 0)


def test_a_machine_with_old_gpus_plans_for_others(monkeypatch, capsys, tmp_path):
    """In bfloat16, which an H100 has; for its own GPUs in float32, with its own memory."""
    t4 = SimpleNamespace(total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: t4)
    monkeypatch.setattr(plan.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 10 * GIB))
    model = ["--model=meta-llama/Meta-Llama-3-8B-Instruct", "--data=owner/pairs", "--plan"]
    planned = plan.make_plan(*read_command([*model, "--gpu=H100", "--gpus=8"]))
    assert planned.settings.dtype == "bf16" and planned.seconds
    here = plan.make_plan(*read_command(model))
    assert here.settings.dtype == "fp32" and here.machine.host == 5 * GIB
    with pytest.raises(InputError, match="--offload needs .* this machine has 5.00 GiB for each"):
        plan.print_plan(*read_command([*model, "--offload", "--gpu-memory=80"]))
    plan.print_plan(*read_command([*model, "--offload", "--gpu=H100"]))  # whose host may be larger


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--compile", "--flash=3"], "without what --flash 3 and --compile would save"),
        (["--compile"], "without what --compile would save"),
        (["--compile", "--mfu=0.5"], ""),
        ([], ""),
    ],
)
def test_what_the_time_leaves_out_is_said(capsys, flags, said):
    model = ["--model=meta-llama/Meta-Llama-3-8B-Instruct", "--data=owner/pairs", "--plan"]
    plan.print_plan(*read_command([*model, "--gpus=8", "--gpu=H100", *flags]))
    printed = capsys.readouterr().out
    assert said in printed and ("without what" in printed) == bool(said)


def test_remedies_that_fit_come_first(capsys):
    flags = ["--model=meta-llama/Meta-Llama-3-8B-Instruct", "--data=owner/pairs", "--plan"]
    with pytest.raises(InputError, match="needs"):
        plan.print_plan(*read_command([*flags, "--gpu=A100-40", "--gpus=1"]))
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    with")]
    assert "--offload" in found[0] and "still" not in found[0]
    assert len(found) > 1 and all("still too much: --" in line for line in found[1:])
