"""Checks data sheets by the names of GPUs, and the planned work of a step against a count."""

import dataclasses
import os

import count_ops
import numpy as np
import pytest
import torch

from data import Pair
from model import Config
from runtime import gpus
from runtime.settings import Settings

# As `torch.cuda.get_device_name` returns them. Dense bf16 TFLOP/s; None: no figure is known.
NAMES = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA GH200 144G HBM3e": 989,
    "NVIDIA H800": 989,
    "NVIDIA H800 PCIe": 756,
    "NVIDIA GH200 120GB": 989,
    "NVIDIA A800 80GB PCIe": 312,
    "NVIDIA A800-SXM4-40GB": 312,
    "NVIDIA A30": 165,
    "NVIDIA H20": 148,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA A10": 125,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA GeForce RTX 4090": 165.2,
    "AMD Instinct MI300X": 1307.4,
    # These hold the name of another GPU, or are a part or a variant of one.
    "NVIDIA RTX A1000": None,
    "NVIDIA A10G": None,
    "NVIDIA H100 80GB HBM2e": None,
    "NVIDIA A800 40GB Active": None,
    "NVIDIA A100X": None,
    "Quadro RTX 6000": None,
    "NVIDIA GB10": None,
    "NVIDIA A100-SXM-64GB": None,  # Leonardo's own, with more units
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "GRID A100-40C": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "Tesla T4": None,
}


@pytest.mark.parametrize("name, tflops", NAMES.items())
def test_a_name_has_its_own_figures(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = gpus.peak_flops(torch.device("cuda", 0))
    assert peak == (tflops and tflops * 1e12)
    assert gpus.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "short, bandwidth, memory",
    [
        ("A100-40", 1.555, 40),
        ("a100", 2.039, 80),
        ("A100 PCIe", 1.935, 80),
        ("rtx 4090", 1.008, 24),
    ],
)
def test_a_name_may_be_short(short, bandwidth, memory):
    gpu = gpus.find_gpu(short)
    assert (gpu.bandwidth, gpu.memory) == (bandwidth, memory)


def test_every_entry_is_found_by_its_own_name():
    assert all(gpus.find_gpu(name) is gpu for name, gpu in gpus.GPUS.items())


# What a step computes, by a trace of the operations.

TINY = Config(1000, 64, 160, 1, 4, 2, 16)
PAIRS = [Pair(np.zeros(5, int), (np.zeros(3, int), np.zeros(4, int)))] * 2  # 24 tokens, 34 keys


def test_counts_by_hand():
    """Of one layer for 24 tokens, in bf16, without checkpointing."""
    layer, rest = count_ops.layer_and_rest(TINY, PAIRS, "everything")
    d, i, q, k, t, keys = 64, 160, 64, 32, 24, 34
    weights = d * (2 * q + 2 * k + 3 * i)
    assert (layer["matmul"].ops, layer["matmul"].flops) == (3 * 7, 6 * t * weights)
    # a prompt of 5 sees 15 pairs; a response of 3 sees 5 + 1, 5 + 2, 5 + 3, one of 4 sees 30
    visible = 2 * (15 + 21 + 30)
    assert (layer["attention"].ops, layer["attention"].flops) == (2, 14 * q * visible)
    # silu reads I and writes I, the product reads two; backward: two products and one of silu
    assert (layer["SwiGLU"].ops, layer["SwiGLU"].bytes) == (5, 2 * i * t * (2 + 3 + 3 * 3))
    # two sums forward, five of gradients: q + k + v, gate + up, and both residuals
    assert (layer["sums"].ops, layer["sums"].bytes) == (7, 7 * 3 * 2 * d * t)
    # keys and values: each gathered; their gradients zeroed, then rows read, added and written
    gathered = 2 * (2 * 2 * k * keys + 2 * k * t + 3 * 2 * k * keys)
    assert (layer["gather"].ops, layer["gather"].bytes) == (6, gathered)
    product = 2 * 14 * d * TINY.vocab_size  # of the head: forward, and two backward
    assert rest["matmul"].flops == 3 * product
    checkpointed, rest = count_ops.layer_and_rest(TINY, PAIRS, "none")
    assert rest["matmul"].flops == 4 * product  # its logits are computed again
    again = 2 * t * (weights - d * i)  # all but down_proj
    assert checkpointed["matmul"].flops == layer["matmul"].flops + again
    assert checkpointed["attention"] == layer["attention"]


@pytest.mark.parametrize("keep", ["none", "attention", "all", "everything", None])
def test_the_plan_counts_what_a_trace_counts(keep):
    """Of Llama 3 8B at 5,576 tokens. keep: None for a pass without gradients."""
    config, pairs = count_ops.LLAMA3_8B, count_ops.PAIRS
    layer, rest = count_ops.layer_and_rest(config, pairs, keep)
    step = count_ops.total(layer).times(32).plus(count_ops.total(rest))
    elementwise = count_ops.elementwise(layer).times(32).plus(count_ops.elementwise(rest))
    planned = gpus.work(config, gpus.Load.of(config, pairs), keep)
    assert planned.matmul + planned.attention == pytest.approx(step.flops)
    assert planned.bytes == pytest.approx(elementwise.bytes, rel=0.03)
    assert keep is None or planned.ops == pytest.approx(step.ops, rel=0.01)
    assert count_ops.total(layer).ops <= 105


@pytest.mark.parametrize("window", [None, 7, 3])
def test_a_load_counts_what_its_tokens_see(window):
    """A token at position i sees i + 1, or as many as the window has."""
    config, lengths = dataclasses.replace(TINY, sliding_window=window), [(5, 3, 9), (2, 1, 1)]
    pairs = [Pair(np.zeros(p, int), (np.zeros(c, int), np.zeros(r, int))) for p, c, r in lengths]
    places = [[*range(p), *range(p, p + c), *range(p, p + r)] for p, c, r in lengths]
    seen = [min(place + 1, window or place + 1) for pair in places for place in pair]
    load = gpus.Load.of(config, pairs)
    assert (load.tokens, load.visible) == (len(seen), sum(seen))


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_single_gpu_casts_and_copies(rounds):
    """All of its weights, twice a round, and gradients, in bf16 with float32 masters; no pairs."""
    settings, gpu = Settings(dtype="bf16"), gpus.GPUS["H100"]
    machine = gpus.Machine("cuda", "H100", 1, 80e9, 1e15, gpu)
    times = gpus.step_times(TINY, settings, machine, gpus.Load(0, 0, 0), rounds)
    weights = gpus.Layout.of(TINY, settings, machine).whole
    forward_and_backward = 2 * (4 + 2 + 2 + 2)  # cast: read 4, write 2; copy: read 2, write 2
    gradients = (2 + 4) + (4 + 4)  # cast, then copied
    added = 4 + 4 + 4  # to those of the rounds before
    moved = weights * (rounds * (forward_and_backward + gradients) + (rounds - 1) * added)
    assert times["arithmetic"] == pytest.approx(moved / (3.35e12 * 0.75))


def test_the_roofline_of_the_docs_is_the_one_that_is_printed():
    table = "\n".join(count_ops.roofline(gpus.GPUS["H100"], "none"))
    assert table in (count_ops.ROOT / "docs" / "gpu.md").read_text()


def test_ordinary_tests_see_no_gpu():
    """Not even those of this file, whose name begins like that of the file that needs one."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
