"""Checks that need a GPU. Ordinary tests hide GPUs, so these run alone: pytest tests/test_gpu.py"""

import os
import shutil

import pytest
import test_model
import test_train
import torch

from formats.checkpoint import load
from model import flash_runs
from sample import generate

TOY = test_train.TOY / "checkpoint"
if not torch.cuda.is_available():
    hidden = "needs a GPU, and a run of its own: pytest tests/test_gpu.py"
    pytest.skip(hidden, allow_module_level=True)


@pytest.mark.skipif(not flash_runs(torch.device("cuda")), reason="compute capability below 8")
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("heads, size", [((8, 2), 64), ((3, 3), 8), ((4, 1), 256)])
def test_attention_by_the_kernel(window, heads, size):
    test_model.assert_attention_is_naive("cuda", torch.bfloat16, 2e-2, window, size, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_the_kernel(dtype):
    """Float32, and 12 features per head: PyTorch's own kernels."""
    test_model.assert_attention_is_naive("cuda", dtype, 2e-2, 64, 12)


@pytest.mark.parametrize(
    "flags",
    [
        {"dtype": "fp32"},
        {"dtype": "bf16"},
        {"dtype": "bf16", "keep_products": "all", "compile": True},
        {"dtype": "bf16", "offload": True},
        {"dtype": "bf16", "objective": "dpo", "reference": "cached"},
    ],
    ids=str,
)
def test_losses_are_those_of_a_cpu(monkeypatch, tmp_path, flags):
    if "compile" in flags and not (
        shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
    ):
        pytest.skip("torch.compile needs a C compiler")
    common = test_train.few_pairs(tmp_path) | {"microbatch_tokens": 200}
    objective = {key: flags[key] for key in ("objective", "reference") if key in flags}
    cpu = common | objective | {"device": "cpu"}
    expected = test_train.losses(test_train.run(monkeypatch, tmp_path / "cpu", **cpu))
    if not flash_runs(torch.device("cuda")):
        flags = flags | {"dtype": "fp32"}
    rows = test_train.run(monkeypatch, tmp_path / "gpu", **common | flags | {"device": "cuda"})
    tolerance = 1e-3 if flags["dtype"] == "fp32" else 2e-2
    assert test_train.losses(rows) == pytest.approx(expected, rel=tolerance)
    last = [row for row in rows if "loss" in row][-1]
    assert 0 < last["peak_memory_gib"] <= last["reserved_memory_gib"]


def test_greedy_answers_are_those_of_a_cpu():
    """In float32; prompts of several lengths decode together, past one step of the cache's."""
    prompts = [[5, 6, 7], [8] * 40, [9, 10]]
    cpu, gpu = (
        generate(load(TOY, device, torch.float32), prompts, set(), max_new_tokens=80)
        for device in ("cpu", "cuda")
    )
    assert cpu == gpu
