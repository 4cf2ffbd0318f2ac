"""Checks on a CPU what only runs on a GPU: FlashAttention's branch, under its kernel's contract.

`flash_on_cpu` stands in for the kernel and raises an error where it would.
"""

import contextlib
import copy
import os
import sys
from functools import partial
from types import SimpleNamespace

import flash_on_cpu
import numpy as np
import pytest
import test_model
import test_train
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

import model as llama
import sample
import tiny
import train
from data import pack
from formats import checkpoint
from formats.errors import DataError
from model import Config, Llama, PackedAttention
from runtime import inputs, processes, reference, run, signals
from runtime.settings import Settings, read_settings


@pytest.fixture
def calls(monkeypatch):
    """Take the branch of GPUs for CPU tensors; return the counts of the kernel's calls."""
    pretend(monkeypatch.setattr)
    monkeypatch.setattr(flash_on_cpu, "CALLS", {"forward": 0, "backward": 0})
    return flash_on_cpu.CALLS


def pretend(setattr=setattr) -> None:
    setattr(llama, "flash_runs", lambda device: True)


def logps_of(model: Llama, lengths: test_model.Lengths) -> torch.Tensor:
    """Return the log-probabilities of all responses in a stream of pairs with these lengths."""
    packed = pack(test_model.make_pairs(lengths))
    arrays = {name: packed.pop(name) for name in ("cu_q", "cu_k")}
    return model(**{name: torch.from_numpy(value) for name, value in packed.items()}, **arrays)


# One kernel.


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("heads, size", [((8, 2), 64), ((3, 3), 8), ((4, 1), 256)])
def test_attention_by_the_kernel(calls, window, heads, size):
    """Grouped queries or not, with or without a window: what naive attention gives."""
    test_model.assert_attention_is_naive("cpu", torch.bfloat16, 2e-2, window, size, heads)
    assert calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize(
    "dtype, size", [(torch.float32, 64), (torch.bfloat16, 12), (torch.bfloat16, 264)]
)
def test_what_the_kernel_refuses_goes_another_way(calls, dtype, size):
    """Float32, a head size that is not a multiple of 8, and one above 256."""
    test_model.assert_attention_is_naive("cpu", dtype, 2e-2, 64, size, heads=(2, 1))
    assert calls == {"forward": 0, "backward": 0}


@pytest.mark.parametrize(
    "break_it, complaint",
    [
        (lambda attend: setattr(attend, "cu_q", attend.cu_q.long()), "int32 offsets"),
        (lambda attend: setattr(attend, "cu_k", attend.cu_k // 2), "the totals"),
        (lambda attend: setattr(attend, "longest", (3, 3)), "the longest lengths"),
    ],
)
def test_the_stand_in_refuses(calls, break_it, complaint):
    positions, cu = torch.arange(9), np.array([0, 4, 9], np.int32)
    attend = PackedAttention(positions, cu, cu)
    q = torch.ones(9, 2, 8, dtype=torch.bfloat16)
    assert attend(0, q, q, q).shape == q.shape
    break_it(attend)
    with pytest.raises(RuntimeError, match=f"FlashAttention demands.*{complaint}"):
        attend(0, q, q, q)


@pytest.mark.parametrize("capability, able", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_old_gpus_take_the_other_way(monkeypatch, capability, able):
    """Compute capability below 8: neither FlashAttention nor, by default, bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert llama.flash_runs(torch.device("cuda", 0)) is able
    settings = read_settings(["--device=cuda"])
    assert settings.resolved("cuda").dtype == ("bf16" if able else "fp32")
    assert settings.resolved("cpu").dtype == "fp32"


@pytest.mark.parametrize(
    "version, device, capability, complaint",
    [
        (3, "cpu", 9, "needs a GPU"),
        (3, "cuda", 8, "needs compute capability 9, and a GPU has 8"),
        (3, "cuda", 10, "needs compute capability 9, and a GPU has 10"),
        (4, "cuda", 12, "needs compute capability 9 or 10, and a GPU has 12"),
        (4, "cuda", 10, "needs torch 2.13, and this is 2.11"),
        (3, "cuda", 9, "not usable here: ModuleNotFoundError: .*flash_attn_interface"),
        (4, "cuda", 10, "not usable here: ModuleNotFoundError: .*flash_attn"),
        (4, "cuda", 9, "not usable here: RuntimeError: Module 'broken' does not expose"),
    ],
)
def test_a_flash_attention_that_is_not_here(monkeypatch, version, device, capability, complaint):
    """Wrong device, wrong GPU, no package, or a package that is half built: one line."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(
        torch, "__version__", TorchVersion("2.11" if "torch" in complaint else "2.13")
    )
    for package in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    if "broken" in complaint:
        failing = partial(fail, RuntimeError("Module 'broken' does not expose FA4 kernels"))
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", failing)
    with pytest.raises(DataError, match=f"--flash {version}: {complaint}"):
        processes.use_flash(version, torch.device(device))


def fail(error: Exception, *_) -> None:
    raise error


def test_flash_attention_of_another_version(monkeypatch):
    """Activate it once, and go back to torch's own for a run that asks for that."""
    state, calls = torch.nn.attention, []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(state, "activate_flash_attention_impl", calls.append)
    monkeypatch.setattr(state, "restore_flash_attention_impl", lambda: calls.append("FA2"))
    monkeypatch.setattr(state, "current_flash_attention_impl", lambda: calls[-1] if calls else None)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13"))
    for version in (2, 3, 3, 4, 2):
        processes.use_flash(version, torch.device("cuda"))
    assert calls == ["FA3", "FA4", "FA2"]


@pytest.mark.parametrize(
    "name, device, saved",
    [
        ("torch_attn::_varlen_attn", "meta", True),
        ("aten::_scaled_dot_product_efficient_attention", "meta", True),  # in float32
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "cpu", True),
        ("aten::bmm", "cpu", True),
        ("aten::bmm", "meta", False),  # of queries and keys, too, where no kernel takes the heads
        ("aten::mul", "meta", False),
    ],
)
def test_what_checkpointing_saves_of_attention(name, device, saved):
    """Outputs of kernels, and of the last matmul on a CPU; "meta" stands for a GPU."""
    op = SimpleNamespace(name=lambda: name)
    policy = llama.checkpoint_policy(frozenset(), None, op, torch.empty(0, device=device))
    assert policy.name == ("MUST_SAVE" if saved else "PREFER_RECOMPUTE")


# Whole models.

LENGTHS = [[(30, [20, 10])], [(31, [5, 9]), (7, [8, 60])], [(90, [80, 70])]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Llama:
    folder = tmp_path_factory.mktemp("model")
    return checkpoint.load(tiny.write(folder, tiny.FAMILIES["mistral-0.1"]), dtype=torch.bfloat16)


def test_checkpointing_saves_the_kernels_output(calls, model):
    """Backward calls the forward kernel no second time, and gradients stay equal to the bit."""
    gradients, blocks = [], model.model.layers
    for saved in (None, "none", "attention", "all"):
        for block in blocks:
            block.checkpoint_activations = saved is not None
            block.save_matmuls(saved or "none")
        calls.update(forward=0, backward=0)
        gradients.append(
            torch.autograd.grad(logps_of(model, LENGTHS[1]).sum(), list(model.parameters()))
        )
        assert calls == {"forward": len(blocks), "backward": len(blocks)}, saved
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_are_one_graph(calls, model, checkpointing, monkeypatch):
    """No graph break, and one compilation for all layers and for streams of any length."""
    compiled = copy.deepcopy(model)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(PackedAttention, "by_segment", PackedAttention.by_segment)  # undo later
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.model.layers:
        block.checkpoint_activations = checkpointing
        block.compile()
    for lengths in LENGTHS:
        losses = [logps_of(m, lengths).sum() for m in (model, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
        losses[1].backward()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    passes = 3 * len(compiled.model.layers)
    assert calls == {"forward": 2 * passes, "backward": passes}
    torch._dynamo.reset()


def test_compiled_blocks_around_attention_in_parts(monkeypatch):
    """Without the kernel, attention stays outside; no layer or length is compiled anew."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(PackedAttention, "by_segment", PackedAttention.by_segment)  # undo later
    graphs = []
    for layers in (2, 12):  # more than torch compiles for one function before it gives up
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Llama(Config(50, 32, 64, layers, 4, 2, 8))
        for block in model.model.layers:
            block.compile()
        for lengths in LENGTHS:
            logps_of(model, lengths).sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    torch._dynamo.reset()


def test_decoding_does_without_cudnn(monkeypatch):
    """Rows end and keys grow: nearly every step has a new shape, for which cuDNN would plan."""
    toy, shapes = checkpoint.load(test_train.TOY / "checkpoint"), set()
    original = sample.F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        shapes.add(k.shape)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        return original(q, k, v, **options)

    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(sample.F, "scaled_dot_product_attention", spy)
    sample.generate(toy, [[5, 6, 7], [8] * 40, [9, 10]], set(), max_new_tokens=30)
    assert len(shapes) > 20


class OnDevice(torch.Tensor):
    """Refuses lists as indices, which would be copied to a GPU from pageable memory."""

    def __getitem__(self, index):
        assert isinstance(index, torch.Tensor)
        return super().__getitem__(index)

    def __setitem__(self, index, value):
        assert isinstance(index, torch.Tensor)
        super().__setitem__(index, value)


def test_a_cached_reference_waits_for_no_index():
    pairs = test_model.make_pairs([(3, [2, 1]), (2, [1, 4])])
    for index, pair in enumerate(pairs):
        pair.index = index
    table = torch.arange(6.0).view(3, 2).as_subclass(OnDevice)
    assert reference.look_up(table, pairs[::-1]).tolist() == [[2, 3], [0, 1]]
    assert reference.rows_of([], table).tolist() == []
    table[reference.rows_of(pairs, table)] += 1


@pytest.mark.parametrize("theirs", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", None])
def test_segments_of_gpu_memory_grow(monkeypatch, theirs):
    """Unless the user has configured the allocator, under its old or its new name."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if theirs:
        monkeypatch.setenv(theirs, "max_split_size_mb:512")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for start in ("set_device", "get_device_capability"):  # CUDA would start here
        monkeypatch.setattr(torch.cuda, start, partial(fail, InterruptedError(start)))
    with pytest.raises(InterruptedError, match="set_device"):
        processes.start_ranks(Settings(device="cuda", flash=3))
    conf = os.environ.get("PYTORCH_ALLOC_CONF")
    assert conf == {
        None: "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:512",
        "PYTORCH_CUDA_ALLOC_CONF": None,
    }.get(theirs)


@pytest.mark.parametrize("offload", [False, True])
def test_the_group_of_one_gpu(monkeypatch, offload):
    """NCCL with a TCPStore, bound to its device, and with a patience that reading data needs."""
    joined = {}

    def join(backends, **options):
        joined.update(options, backends=backends)
        raise InterruptedError

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(InterruptedError):
        processes.start_ranks(Settings(device="cuda", offload=offload))
    assert joined["backends"] == ("cpu:gloo,cuda:nccl" if offload else "nccl")
    assert isinstance(joined["store"], dist.TCPStore)
    assert joined["device_id"] == torch.device("cuda", 0)
    assert joined["timeout"].total_seconds() == 1800


def test_groups_of_copies_are_as_patient(monkeypatch):
    """A group within a mesh would have its backend's own timeout, NCCL's 10 minutes."""
    mesh, set_to = SimpleNamespace(get_all_groups=lambda: ["rows", "columns"]), {}
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(processes, "init_device_mesh", lambda *_, **__: mesh)

    def record(timeout, group) -> None:
        set_to[group] = timeout

    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", record)
    assert processes.make_mesh(Settings(replicate=2), torch.device("cuda")) is mesh
    assert set_to == {"rows": processes.TIMEOUT, "columns": processes.TIMEOUT}


@pytest.mark.parametrize(
    "environment, gpus, said",
    [
        ({"LOCAL_WORLD_SIZE": "2"}, 1, "2 ranks for 1 GPUs: pass --nproc-per-node 1"),
        ({"LOCAL_WORLD_SIZE": "8"}, 4, "8 ranks for 4 GPUs: pass --nproc-per-node 4"),
        ({"LOCAL_RANK": "4"}, 4, "5 ranks for 4 GPUs"),  # another launcher than torchrun
        ({}, 0, "--device cuda: no CUDA device available"),
    ],
)
def test_more_ranks_than_gpus(monkeypatch, environment, gpus, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(DataError, match=said):
        processes.start_ranks(Settings(device="cuda"))


@pytest.mark.parametrize(
    "able, size, said",
    [(False, 64, "older than compute capability 8"), (True, 12, "no heads of 12 features"),
     (True, 264, "no heads of 264 features"), (True, 64, "")],
)  # fmt: skip
def test_slow_attention_is_said(monkeypatch, capsys, able, size, said):
    monkeypatch.setattr(inputs, "flash_runs", lambda device: able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = llama.Config(97, 64, 80, 2, 4, 4, head_dim=size)
    inputs.warn_of_slow_attention(Settings(dtype="bf16"), config, torch.device("cuda"))
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)
    inputs.warn_of_slow_attention(Settings(), config, torch.device("cpu"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("capability, dtype", [((7, 0), "fp32"), ((8, 6), "bf16")])
def test_sampling_on_an_old_gpu_says_why_it_is_in_float32(monkeypatch, capsys, capability, dtype):
    """On stderr, since stdout may be data; once it is asked for, fp32 needs no reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla V100")
    flags = sample.Flags()
    assert flags.resolve_auto()[0] == "cuda" and flags.dtype == dtype
    printed = capsys.readouterr()
    assert ("Tesla V100 is older" in printed.err) == (dtype == "fp32") and not printed.out
    sample.Flags(dtype="fp32").resolve_auto()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    "device, dtype, size, in_vain",
    [("cpu", "bf16", 64, True), ("cuda", "fp32", 64, True), ("cuda", "bf16", 12, True),
     ("cuda", "bf16", 64, False)],
)  # fmt: skip
def test_compiling_in_vain_is_said(
    monkeypatch, capsys, device, dtype, size, in_vain, checkpointing
):
    """Without FlashAttention, torch gives up on a checkpointed block, which no one would notice."""
    monkeypatch.setattr(inputs, "flash_runs", lambda device: True)
    config = llama.Config(97, 64, 80, 2, 4, 4, head_dim=size)
    settings = Settings(dtype=dtype, compile=True, activation_checkpointing=checkpointing)
    inputs.warn_of_slow_attention(settings, config, torch.device(device))
    said = "add --no-activation-checkpointing" in capsys.readouterr().out
    assert said == (in_vain and checkpointing)


@pytest.mark.parametrize(
    "world, error, destroyed",
    [("1", DataError("bad"), True), ("2", None, True), ("2", SystemExit(75), True),
     ("2", DataError("bad"), False), ("2", RuntimeError("a bug"), False)],
)  # fmt: skip
def test_a_rank_that_fails_waits_for_nobody(monkeypatch, capsys, world, error, destroyed):
    """An error of one rank of many is printed, and the group is left as it is: NCCL would wait."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(signals, "leave", lambda status: calls.append(status))
    with pytest.raises(SystemExit) if error else contextlib.nullcontext():
        with run.report_errors("train.py"):
            if error:
                raise error
    assert ("destroyed" in calls) is destroyed
    said = capsys.readouterr().err
    assert isinstance(error, (SystemExit, type(None))) or str(error) in said
    assert ("Traceback" in said) == isinstance(error, RuntimeError)


@pytest.mark.parametrize("rank, local_rank, says", [(8, 0, True), (9, 1, False), (0, 0, True)])
def test_every_machine_says_what_it_lacks(monkeypatch, capsys, rank, local_rank, says):
    """Before the ranks have joined, an error may be of one machine alone, where rank 0 is not."""
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    run.print_error("train.py", DataError("8 ranks for 4 GPUs"))
    assert bool(capsys.readouterr().err) == says


# Two ranks.

RANKS = 2
FLAGS = {"objective": "dpo", "beta": 0.1, "dtype": "bf16", "max_steps": 2, "keep_products": "all"}


def train_on_a_rank(rank: int, flags: list[str], rendezvous: str) -> None:
    """Train as one of several ranks, on the branch of GPUs."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    pretend()
    train.train(read_settings(flags))
    assert flash_on_cpu.CALLS["backward"] > 0
    dist.destroy_process_group()


def test_two_ranks_train_as_one(calls, monkeypatch, tmp_path):
    """FSDP2 shards the blocks around the kernel; an online reference runs it without gradients."""
    flags = test_train.few_pairs(tmp_path) | {"microbatch_tokens": 200} | FLAGS
    alone = test_train.losses(test_train.run(monkeypatch, tmp_path / "alone", **flags))
    assert calls["backward"] > 0
    words = test_train.arguments(tmp_path / "two", **flags)
    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(train_on_a_rank, (words, rendezvous), nprocs=RANKS)
    together = test_train.losses(test_train.rows_of(tmp_path / "two"))
    assert together == pytest.approx(alone, rel=5e-3)
