"""What `--plan` says: by hand for Llama 3's shapes, and beside what a run on a CPU takes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import plan
import train
from model import Block, Config, PackedAttention, rotary_table
from settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import plan_check  # noqa: E402
import workload  # noqa: E402

GIB = 2**30
LLAMA3_8B = workload.MODELS["llama3-8b"]
LLAMA3_70B = LLAMA3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip


def planned(folder: Path, config: dict, *flags: str) -> dict:
    folder.joinpath("config.json").write_text(json.dumps(config))  # and nothing else: no weights, no tokenizer
    return plan.plan(read_settings([f"--model={folder}", "--data=owner/pairs", "--plan", *flags]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(dtype):
    """Of one block, to 1 %: without the tables that all blocks share, and the formula leaves out the norms' scales."""
    config = Config.from_folder(ROOT / "toy" / "checkpoint")
    config = Config(**vars(config) | {"hidden_size": 256, "intermediate_size": 640, "head_dim": 32,
                                      "num_attention_heads": 8, "num_key_value_heads": 2})  # fmt: skip
    trees = [data.Tree(np.zeros(200, int), (np.zeros(120, int), np.zeros(80, int)), "")] * 2
    packed = data.pack(trees)
    attend = PackedAttention(torch.from_numpy(packed["key_index"]), packed["cu_q"], packed["cu_k"])
    block, load = Block(config, 0).to(dtype), plan.Load.of(trees)
    x = torch.randn(int(load.tokens), config.hidden_size, dtype=dtype, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t
    ):
        turns = rotary_table(config, torch.from_numpy(packed["positions"]))
        block(x, *turns, attend)
    shared = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *turns, attend.mask, attend.key_index)}
    found = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in shared)
    assert plan.activations(config, load, dtype.itemsize, "cpu")[0]["everything"] == pytest.approx(found, rel=0.01)


def test_8b(tmp_path):
    """8,030,261,248 parameters: 16 bytes each are 119.66 GiB, too much for one GPU of 80 and easy for eight."""
    alone = planned(tmp_path, LLAMA3_8B, "--gpus=1", "--gpu-memory=80")
    assert alone["parameters"] == 8_030_261_248
    stays = "parameters", "gradients", "optimizer"
    assert [round(alone["items"][name] / GIB, 2) for name in stays] == [29.92, 29.92, 59.83]
    assert alone["total"] > 119.66 * GIB and alone["largest"] == 0
    eight = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--gpu-memory=80", "--objective=dpo")
    assert round(eight["items"]["optimizer"] / GIB, 2) == 7.48 and round(eight["items"]["reference"] / GIB, 2) == 1.87
    assert eight["total"] < 40 * GIB
    copies = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--gpu-memory=80", "--replicate=2")
    assert copies["items"]["optimizer"] == 2 * eight["items"]["optimizer"]


def test_kept_products_are_counted(tmp_path):
    """Of Llama 3 8B, in bf16: q, k, v and o have 4096 + 2 · 1024 + 4096 features a token, gate and up 2 · 14336."""
    plans = {which: planned(tmp_path, LLAMA3_8B, "--gpus=8", f"--keep-products={which}") for which in ("none", "attention", "all")}
    waiting = {which: p["moments"]["log-probs"]["activations"] / p["load"].tokens for which, p in plans.items()}
    assert waiting["attention"] - waiting["none"] == pytest.approx(32 * 2 * 10240)
    assert waiting["all"] - waiting["attention"] == pytest.approx(32 * 2 * 28672)
    working = {which: p["moments"]["blocks"]["activations"] / p["load"].tokens - waiting[which] for which, p in plans.items()}
    assert working["none"] == pytest.approx(working["attention"]) == pytest.approx(working["all"] + 2 * 28672)
    whole = planned(tmp_path, LLAMA3_8B, "--gpus=8", "--keep-products=all", "--no-activation-checkpointing")
    assert whole["items"] == planned(tmp_path, LLAMA3_8B, "--gpus=8", "--no-activation-checkpointing")["items"]


def test_70b_on_64_gpus(tmp_path):
    """By hand. P = 70,553,706,496; a block has 8192 · (2 · 8192 + 2 · 1024 + 3 · 28672) + 2 · 8192 = 855,654,400, the root
    2 · 128256 · 8192 + 8192 = 2,101,354,496. The worst moment is the backward of the last block: the root and, for the
    flat buffer and the weights, two blocks in bf16 are gathered; unsharded are the head's gradient and the block's in
    bf16, the float32 copy that is reduced, and a 64th of it."""
    p = planned(tmp_path, LLAMA3_70B, "--gpus=64", "--gpu-memory=80", "--plan-tokens-per-pair=1000", "--batch-size=512",
                "--microbatch-tokens=4000")  # fmt: skip
    share = 70_553_706_496 / 64
    block, root, head = 855_654_400, 2_101_354_496, 128256 * 8192
    assert p["parameters"] == 80 * block + root == 70_553_706_496
    items = p["items"]
    assert [items[name] / share for name in ("parameters", "gradients", "optimizer", "reference")] == [4, 4, 8, 0]
    assert items["gathered weights"] == 2 * root + 2 * 2 * block
    assert items["unsharded gradients"] == 2 * head + 2 * block + 4 * block * (1 + 1 / 64)
    assert items is p["moments"]["blocks"]
    assert p["moments"]["log-probs"]["log-prob tile"] == (4 + 2 * 2) * 2**25
    assert p["load"].tokens == 4000 and p["microbatches"] == 2
    # 80 blocks' inputs and attention, 32 KiB a token, its normaliser; one block's 16 D + 4 A + 8 I bytes, its keys and
    # values, gradients: 0.5 MiB
    assert 80 * (32768 + 256) * 4000 < items["activations"] < (80 * (32768 + 256) + 700_000) * 4000
    assert 35 * GIB < p["total"] < 50 * GIB
    # 6 operations a parameter but the embedding's, and token: attention adds little at such lengths
    assert p["flops"] == pytest.approx(6 * (p["parameters"] - head) * 512_000, rel=0.03)
    assert p["seconds"] == pytest.approx(p["flops"] / (64 * 989e12 * 0.4))
    # there is room for a whole step at once, and no use for more
    assert p["largest"] == p["most"] == 8000


def test_largest_microbatch_fits_and_no_larger_one(tmp_path):
    tmp_path.joinpath("config.json").write_text(json.dumps(LLAMA3_8B))
    config = Config.from_folder(tmp_path)
    settings = read_settings(["--model=x/y", "--data=x/y", "--plan", "--dtype=bf16", "--no-activation-checkpointing"])
    load, room = plan.Load(1000, 1200, 800), 80 * GIB
    total = lambda tokens: sum(plan.worst(plan.memory(config, settings, "cuda", 8, load.filled(tokens))).values())
    largest = plan.largest_microbatch(config, settings, "cuda", 8, load, 10**6, room)
    assert 1000 < largest < 10**6 and total(largest) <= room < total(largest + 1)


def test_reference_costs_a_third_more(tmp_path):
    flags = ["--gpus=8", "--objective=dpo"]
    online, cached = (planned(tmp_path, LLAMA3_8B, *flags, f"--reference={kind}") for kind in ("online", "cached"))
    assert online["seconds"] == pytest.approx(4 / 3 * cached["seconds"]) and cached["items"]["reference"] == 0


def run(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *map(str, flags)])
    train.main()


def test_the_table(monkeypatch, capsys, tmp_path):
    """A recipe whose model and data are on the hub can be planned from a config.json; nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    recipe = ROOT / "recipes" / "llama3-base-simpo.toml"
    run(monkeypatch, "--config", recipe, "--model", tmp_path, "--gpus=8", "--mfu=0.5")
    printed = capsys.readouterr().out
    assert "8,030,261,248 parameters; simpo, bf16" in printed and "assumed" in printed and "fits in" in printed
    assert "a step at 50% of 8 ×" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    run(monkeypatch, "--device=cpu")  # the toy, whose pairs are here
    assert "104,768 parameters; simpo, fp32" in (printed := capsys.readouterr().out)
    assert "all 1,987 of" in printed and "63 steps" not in printed  # no peak is known of a CPU


@pytest.mark.parametrize(
    "flags, status, line",
    [
        (["--model=owner/name", "--data=owner/pairs"], 1, "pass --model a folder that holds its config.json"),
        (["--model=nowhere", "--data=owner/pairs"], 1, "nowhere: no such file or folder"),
        (["--gpus=6", "--replicate=4"], 1, "--replicate 4 does not divide --gpus 6"),
        (["--gpus=0"], 2, "--gpus: expected a positive number"),
        (["--gpu-memory=lots"], 2, "--gpu-memory"),
    ],
)
def test_errors(monkeypatch, capsys, flags, status, line):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *flags)
    assert exit.value.code == status and line in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the constants are glibc's and Linux's")
@pytest.mark.parametrize(
    "flags", [["--dtype=fp32"], ["--dtype=bf16", "--no-activation-checkpointing", "--objective=dpo"]], ids=" ".join
)
def test_memory_is_as_measured(tmp_path, flags):
    """Two steps of a model with 31 million parameters, within 15 %."""
    if "--dtype=bf16" in flags and not train.multiplies_bf16(torch.device("cpu")):
        pytest.skip("this CPU multiplies bfloat16 in software: minutes")
    shape = plan_check.SHAPE | {"hidden_size": 384, "intermediate_size": 1024}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 3}
    foreseen, taken = plan_check.foreseen_and_taken([*plan_check.write_inputs(tmp_path, shape), *flags])
    assert foreseen == pytest.approx(taken, rel=0.15)
