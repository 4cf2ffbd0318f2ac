"""model.py against transformers (live and recorded), a naive reference, and damaged checkpoint folders.

tests/logits.json holds transformers' logits, so that the comparison also holds where it is not installed. Record anew:

    PYTHONPATH=. python tests/test_model.py
"""

import json
import os
import resource
import stat
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import model as llama
import tiny
from data import Tree, pack
from model import CheckpointError, Config, Llama, PackedAttention, Weights

FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

# ---------------------------------------------------------------------------------------------------------------------
# Families

RECORD = Path(__file__).parent / "logits.json"
RECORDED = np.s_[-3:, :8]  # the last positions, the first words
SEQUENCE = np.random.default_rng(0).integers(0, 97, 40).tolist()


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("dialect", [4, 5])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_against_record(family, dialect, tmp_path):
    """Architecture and both dialects of config.json, wherever the tests run."""
    config = tiny.FAMILIES[family]
    model = llama.load(tiny.write(tmp_path, config if dialect == 4 else tiny.dialect_5(config)))
    expected = torch.tensor(json.loads(RECORD.read_text())[family])
    torch.testing.assert_close(tiny.logits(model, SEQUENCE)[RECORDED], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_against_transformers(family, tmp_path):
    """The same at every position, against the transformers that is installed."""
    pytest.importorskip("transformers", minversion="4.56")
    model = llama.load(tiny.write(tmp_path, tiny.FAMILIES[family]))
    torch.testing.assert_close(tiny.logits(model, SEQUENCE), transformers_logits(tmp_path, SEQUENCE), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama-2", {"num_key_value_heads": 4, "rope_theta": 1e4, "sliding_window": None}),
        ("mistral-bare", {"num_key_value_heads": 8, "rope_theta": 1e4, "sliding_window": 4096, "head_dim": 4}),
        ("mistral-0.3", {"sliding_window": None, "head_dim": 16}),
        ("nemo", {"head_dim": 10}),
    ],
)
def test_defaults_of_absent_keys(family, expected, tmp_path):
    """Where a key is absent: transformers' default for that model type. (A window of 4096 no tiny test can feel.)"""
    config = vars(Config.from_folder(tiny.write(tmp_path, tiny.FAMILIES[family])))
    assert {key: config[key] for key in expected} == expected


@pytest.mark.skipif("SIMPO_SMOLLM2" not in os.environ, reason="SIMPO_SMOLLM2 does not name a folder with SmolLM2-135M")
def test_smollm2_against_transformers():
    """A real checkpoint and a real sentence."""
    transformers = pytest.importorskip("transformers", minversion="4.56")
    folder = Path(os.environ["SIMPO_SMOLLM2"])
    text = (
        "The aurora is seen most often in a ring around each magnetic pole, where particles from the sun follow the "
        "field down into the upper atmosphere, strike oxygen and nitrogen a hundred kilometres above the ground, and "
        "leave them glowing green and red."
    )
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(tokens) > 40
    actual = tiny.logits(llama.load(folder), tokens)
    torch.testing.assert_close(actual, transformers_logits(folder, tokens), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Packed trees against every branch alone

SHAPE = {
    "vocab_size": 31, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-2,
}  # fmt: skip
TREES = {  # lengths of (prompt, responses)
    "one branch": [(4, [5]), (1, [1]), (6, [1])],
    "pairs": [(5, [4, 3]), (1, [6, 1]), (3, [1, 1]), (1, [1, 5])],
    "three branches": [(2, [3, 1, 4]), (7, [2, 2, 2])],
    "mixed": [(3, [2]), (2, [1, 4, 3]), (4, [5, 2])],
}


def make_trees(lengths: list) -> list[Tree]:
    rng = np.random.default_rng(1)
    draw = lambda n: rng.integers(0, SHAPE["vocab_size"], n)
    return [Tree(draw(p), tuple(map(draw, responses)), "") for p, responses in lengths]


def run(model: Llama, trees: list[Tree]) -> torch.Tensor:
    return model(**{name: torch.from_numpy(value) for name, value in pack(trees).items()})


def gradients(model: Llama, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss in which every token counts differently, so that no two can be swapped."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = ""):
    """Within `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance, f"{what}: off by {error:.1e} of the largest value"


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """One path alone, q [T, H, E] and k, v [T, K, E]: the whole matrix, its mask and its softmax, written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[2] ** 0.5
    back = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
    hidden = (back < 0) | (back >= (window or len(q)))
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def naive_logps(w: dict[str, torch.Tensor], c: Config, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """The model over again for one path, in the precision of its weights `w`; RoPE turns complex numbers."""
    tokens = torch.from_numpy(np.concatenate((prompt, response)))
    half = c.head_dim // 2
    angles = torch.arange(len(tokens))[:, None] * c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def rotate(x):
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in (f"model.layers.{i}" for i in range(c.num_hidden_layers)):
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{name}_proj").view(len(tokens), -1, c.head_dim) for name in "qkv")
        attended = naive_attention(rotate(q), rotate(k), v, c.sliding_window)
        x = x + linear(attended.flatten(1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(h, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(gate * gate.sigmoid() * up, f"{layer}.mlp.down_proj")
    logits = linear(norm(x, "model.norm"), "model.embed_tokens" if c.tie_word_embeddings else "lm_head")
    return logits.log_softmax(-1)[range(len(prompt) - 1, len(tokens) - 1), tokens[len(prompt) :]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("trees", TREES)
def test_packed_trees_are_their_branches_alone(trees, window, tied):
    """Who sees whom, positions, windows and who predicts whom: values and gradients of all parameters."""
    trees = make_trees(TREES[trees])
    model = tiny.fill(Llama(Config(**SHAPE, sliding_window=window, tie_word_embeddings=tied)))
    logps = run(model, trees)
    actual = gradients(model, logps)

    alone = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    branches = [(tree.prompt, response) for tree in trees for response in tree.responses]
    expected = torch.cat([naive_logps(alone, model.config, *branch) for branch in branches])
    assert_near(logps, expected, 1e-5, "log-probabilities")
    (expected * torch.linspace(-1, 2, len(expected))).sum().backward()
    for name, p in alone.items():
        assert_near(actual[name], p.grad, 1e-5, name)


def test_order_of_trees_changes_nothing():
    """No tree sees another."""
    trees = make_trees([lengths for case in TREES.values() for lengths in case])
    model = tiny.fill(Llama(Config(**SHAPE, sliding_window=5)))
    order = np.random.default_rng(2).permutation(len(trees))
    sizes = [sum(map(len, tree.responses)) for tree in trees]
    shuffled = run(model, [trees[i] for i in order]).split([sizes[i] for i in order])
    for i, logps in zip(order, shuffled):
        torch.testing.assert_close(logps, run(model, trees).split(sizes)[i])


def test_recompute_changes_no_gradient(monkeypatch):
    """Activation checkpointing runs every block a second time, and nothing else."""
    trees = make_trees(TREES["mixed"])
    model = tiny.fill(Llama(Config(**SHAPE, sliding_window=5)))
    kept = gradients(model, run(model, trees))
    calls, body = [], llama.Block.body
    monkeypatch.setattr(llama.Block, "body", lambda *args: calls.append(1) or body(*args))
    for block in model.model.layers:
        block.recompute = True
    recomputed = gradients(model, run(model, trees))
    assert len(calls) == 2 * SHAPE["num_hidden_layers"]
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("words, least", [(1, 1), (7, 1), (37, 1), (1, 7)])
def test_tiled_logps(words, least, monkeypatch):
    """Any tile gives the log-softmax and its gradients; no pass makes more logits at once, none wait for backward."""
    n, d, v = 50, 4, 37
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((n, d), (v, d)))
    targets = torch.randint(v, (n,), generator=generator)
    expected = (hidden @ weight.T).log_softmax(-1)[range(n), targets]
    slopes = torch.linspace(-1, 2, n)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight), slopes)
    monkeypatch.setitem(llama.LOGITS_TILE, "cpu", n * words)
    monkeypatch.setattr(llama, "LEAST_WORDS", least)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x)
    with Largest() as largest, hooks:
        actual = llama.TiledLogps.apply(hidden, weight, targets)
        actual_gradients = torch.autograd.grad(actual, (hidden, weight), slopes)
    torch.testing.assert_close((actual, *actual_gradients), (expected, *expected_gradients))
    assert largest.elements == max(n * words, n * least, n * d) and not any(shape[-1:] == (v,) for shape in saved)


def test_tiled_logps_of_large_logits():
    """A word that is sure, words that are hopeless, in whatever tile: no overflow, no NaN, gradients that are 0."""
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1e4], [0.0], [1e4]], requires_grad=True)
    logps = llama.TiledLogps.apply(hidden, weight, torch.tensor([2, 2]))
    torch.testing.assert_close(logps, torch.tensor([0.0, -2e4]))
    [gradient] = torch.autograd.grad(logps.sum(), weight)  # of the second row alone: its target's, its likeliest word's
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [0.0], [-1.0]]))


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="PackedAttention.flash is a CUDA kernel")


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(
    "device, dtype, tolerance", [("cpu", torch.float32, 1e-5), pytest.param("cuda", torch.bfloat16, 2e-2, marks=CUDA)]
)
def test_attention_kernels(device, dtype, tolerance, window, monkeypatch):
    """Both kernels behind the attention rule, forward and backward: grouped queries, more tokens than a block."""
    if device == "cuda":
        monkeypatch.setattr(PackedAttention, "sdpa", None)  # flash it is, or nothing
    lengths = [(150, [70, 33]), (1, [1, 1]), (40, [5, 200, 1]), (129, [128])]
    packed = {name: torch.from_numpy(value) for name, value in pack(make_trees(lengths)).items()}
    attend = PackedAttention(packed["key_index"].to(device), packed["cu_q"], packed["cu_k"], window)
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(len(packed["tokens"]), heads, 64, generator=generator).to(device, dtype)
    q, k, v, slopes = draw(8), draw(2), draw(2), draw(8)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(0, *inputs)
    actual = torch.autograd.grad(out, inputs, slopes)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, root = torch.zeros_like(slopes, dtype=torch.float64), 0
    for p, responses in lengths:
        start = root + p
        for r in responses:
            path = torch.tensor([*range(root, root + p), *range(start, start + r)], device=device)
            new = slice(0 if start == root + p else p, None)  # the first branch brings the prompt's queries with it
            expected = expected.index_put((path[new],), naive_attention(*(x[path] for x in exact), window)[new])
            start += r
        root = start
    assert_near(out, expected, tolerance, "output")
    for name, gradient, reference in zip("qkv", actual, torch.autograd.grad(expected, exact, slopes.double())):
        assert_near(gradient, reference, tolerance, f"gradient of {name}")


def test_bfloat16_attention_on_a_cpu_is_that_of_float32():
    """Rounded where it leaves, forward and backward, and nowhere inside."""
    packed = pack(make_trees([(150, [70, 33]), (40, [5, 200])]))
    attend = PackedAttention(torch.from_numpy(packed["key_index"]), packed["cu_q"], packed["cu_k"])
    generator = torch.Generator().manual_seed(0)
    q, k, v, slopes = (
        torch.randn(len(packed["tokens"]), n, 64, generator=generator).bfloat16() for n in (4, 2, 2, 4)
    )
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(0, *inputs)
        found.append([x.bfloat16() for x in (out, *torch.autograd.grad(out, inputs, slopes.to(dtype)))])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("window", [None, 64])
def test_no_attention_beyond_the_mask(window, monkeypatch):
    """A block of queries is given no key after its last query and, with a window, none that has left it for all of them."""
    seen, original = [], torch.nn.functional.scaled_dot_product_attention
    spy = lambda q, k, v, **kwargs: seen.append((q.shape[2], k.shape[2])) or original(q, k, v, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    packed = pack(make_trees([(300, [212, 500])]))
    attend = PackedAttention(torch.from_numpy(packed["key_index"]), packed["cu_q"], packed["cu_k"], window)
    q, k = torch.zeros(1012, 2, 8), torch.zeros(1012, 1, 8)
    assert attend(0, q, k, k).shape == q.shape
    ends = [128, 256, 384, 512, 428, 556, 684, 800]  # of the keys: prompt and chosen from 0 on, rejected from 300 on
    rows = [128] * 4 + [128] * 3 + [116]
    assert seen == [(n, end if window is None else min(end, n + window - 1)) for n, end in zip(rows, ends)]


def test_activation_checkpointing_keeps_attention(tmp_path):
    """Backward makes a block's matrix products again, attention and what is asked for never; gradients stay, to the bit."""
    counts = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[function.name()] += 1
            return function(*args, **(kwargs or {}))

    model = llama.load(tiny.write(tmp_path, tiny.FAMILIES["nemo"]))  # no two kinds of its products have the same shape, but k and v
    gradients, products = [], []
    packed = {name: torch.from_numpy(x) for name, x in pack(make_trees([(150, [40, 9])])).items()}
    packed |= {name: packed[name].numpy() for name in ("cu_q", "cu_k")}
    for which in (None, "none", "attention", "all"):
        for block in model.model.layers:
            block.recompute = which is not None
            block.keep_products(which or "none")
        logps = model(**packed)
        counts.clear()
        with Count():
            logps.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        products.append(counts["aten::mm"])
        assert counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == 0
        assert counts["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] > 0
        model.zero_grad()
    assert all(torch.equal(a, b) for others in gradients[1:] for a, b in zip(gradients[0], others))
    again = [(n - products[0]) / len(model.model.layers) for n in products[1:]]
    assert again == [6, 2, 0]  # all but down_proj's, whose output nothing needs; gate and up; none


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def set_tensor(name: str, tensor: torch.Tensor | None):
    """An edit of a folder: the tensor of this name is another one, or is gone."""

    def edit(folder: Path):
        tensors = load_file(folder / FILE)
        tensors[name] = tensor
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / FILE)

    return edit


def truncate(folder: Path):
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:-100])


def write_index(weight_map):
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGED = {  # case: (what happens to the folder, what the error must name)
    "missing tensor": (set_tensor(Q, None), ["missing", Q]),
    "unknown tensor": (set_tensor(Q.replace("weight", "bias"), torch.zeros(64)), [Q.replace("weight", "bias")]),
    "a layer too many": (set_tensor(Q.replace("1", "2"), torch.zeros(64, 64)), [Q.replace("1", "2")]),
    "misshapen tensor": (set_tensor(Q, torch.zeros(64, 63)), [FILE, Q, "[64, 63]", "[64, 64]"]),
    "tensor too long": (set_tensor(Q, torch.zeros(65, 64)), [FILE, Q, "[65, 64]", "[64, 64]"]),
    "int8": (set_tensor(Q, torch.zeros(64, 64, dtype=torch.int8)), [FILE, Q, "I8"]),
    "float64": (set_tensor(Q, torch.zeros(64, 64, dtype=torch.float64)), [FILE, Q, "F64", "F32"]),
    "truncated": (truncate, [FILE]),
    "not safetensors": (lambda folder: (folder / FILE).write_text("version https://git-lfs.github.com"), [FILE]),
    "no weights": (lambda folder: (folder / FILE).unlink(), [FILE, INDEX]),
    "pickle": (lambda folder: (folder / FILE).rename(folder / "pytorch_model.bin"), ["pickle"]),
    "shard that is not there": (write_index({Q: "model-00001-of-00002.safetensors"}), ["model-00001-of-00002", INDEX]),
    "shard above the folder": (write_index({Q: "../model.safetensors"}), [INDEX, "../", "in this folder"]),
    "shard at a full path": (write_index({Q: "/model.safetensors"}), [INDEX, "/model", "in this folder"]),
    "shard that is a pickle": (write_index({Q: "pytorch_model.bin"}), [INDEX, "pytorch_model.bin", "safetensors file"]),
    "empty index": (write_index({}), [INDEX, "weight_map"]),
    "index that is a list": (write_index([Q]), [INDEX, "weight_map"]),
    "no config": (lambda folder: (folder / CONFIG).unlink(), [CONFIG]),
    "config not JSON": (lambda folder: (folder / CONFIG).write_text("{"), [CONFIG]),
    "config not an object": (lambda folder: (folder / CONFIG).write_text("[]"), [CONFIG]),
    "config not text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), [CONFIG]),
}


def entry(begin: int, end: int, rows: int = 8) -> dict:
    """A tensor of a safetensors header: float32 [rows] in the bytes from `begin` to `end`."""
    return {"dtype": "F32", "shape": [rows], "data_offsets": [begin, end]}


HEADERS = {  # case: (header or its text, bytes of tensors, what the error must say); the first one is sound
    "sound": ({"a": entry(0, 32), "b": entry(32, 64)}, 64, None),
    "two tensors over each other": ({"a": entry(0, 32), "b": entry(16, 48)}, 48, "`b`"),
    "two tensors in one place": ({"a": entry(0, 32), "b": entry(0, 32)}, 32, "invalid offset for tensor `"),
    "a hole": ({"a": entry(0, 32), "b": entry(40, 72)}, 72, "`b`"),
    "beyond the file": ({"a": entry(0, 32), "b": entry(32, 64)}, 40, "not fully covered"),
    "bytes behind the last": ({"a": entry(0, 32)}, 64, "not fully covered"),
    "end before begin": ({"a": entry(32, 0), "b": entry(0, 32)}, 32, "`a`"),
    "offsets at 2⁶⁰": ({"a": entry(0, 2**60, 2**58)}, 64, "not fully covered"),
    "a shape whose size overflows": ({"a": entry(0, 0) | {"shape": [2**32, 2**32]}}, 0, "overflow"),
    "another shape than bytes": ({"a": entry(0, 32, 9)}, 32, "shape"),
    "negative": ({"a": entry(0, 32, -8)}, 32, "-8"),
    "the same name twice": ('{"a": %s, "a": %s}' % ((json.dumps(entry(0, 64, 16)),) * 2), 64, "a stands twice"),
    "the same name twice, other bytes": (
        '{"a": %s, "a": %s}' % (json.dumps(entry(32, 64)), json.dumps(entry(0, 64, 16))), 64, "a stands twice"),
    "the same field twice": ('{"a": {"dtype": "F32", "dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', 0, "dtype"),
    "nested 100,000 deep": ("[" * 100_000, 0, "header"),
    "an unknown type": ({"a": entry(0, 32) | {"dtype": "Q\n4"}}, 32, "unknown variant"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_header(case, tmp_path):
    """A reader that trusted these offsets would hand one tensor's bytes to another, or read past the end of the file."""
    header, size, says = HEADERS[case]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    if says is None:
        assert Weights(tmp_path).files.keys() == header.keys()
        return
    with pytest.raises(CheckpointError) as error:
        Weights(tmp_path)
    message = str(error.value)
    assert str(tmp_path / FILE) in message and says in message and "\n" not in message


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what a process has mapped")
def test_a_loaded_checkpoint_is_not_mapped_any_more(tmp_path):
    """What was read of a mapped file counts as memory of the process: once more the size of the weights, all through training."""
    model = llama.load(tiny.write(tmp_path, tiny.FAMILIES["llama-3"]))
    weights = Weights(tmp_path)  # train.py has it as long as it runs
    weights.copy_into(model)
    assert len(weights.files) > 1 and str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("size", [2**24 + 1, 10**9, 2**63, 2**64 - 1])
def test_absurd_header_size(size, tmp_path):
    """Eight bytes of a file may ask for any amount of memory."""
    (tmp_path / FILE).write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"{FILE}: .* a header of {size} bytes"):
        Weights(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    """Which of the two is meant? What was checked by somebody else may be the other one."""
    for name in ("one.safetensors", "two.safetensors"):
        save_file({Q: torch.zeros(2)}, tmp_path / name)
    write_index({Q: "one.safetensors", "other": "two.safetensors"})(tmp_path)
    with pytest.raises(CheckpointError, match=f"two.safetensors: {Q} is also in one.safetensors"):
        Weights(tmp_path)


ABSURD = [
    {"num_hidden_layers": 5000}, {"vocab_size": 2**30}, {"hidden_size": 2**30}, {"intermediate_size": 2**31 - 1},
    {"head_dim": 2**20}, {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2}, {"rope_theta": 10**400},
]  # fmt: skip


@pytest.mark.parametrize("change", ABSURD, ids=lambda change: next(iter(change)))
def test_absurd_sizes_cost_nothing(change, tmp_path):
    """A line of config.json that asks for terabytes, or for a billion layers, is refused by its name."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"])
    (tmp_path / CONFIG).write_text(json.dumps(tiny.FAMILIES["llama-3"] | change))
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(tmp_path)
    assert str(tmp_path / CONFIG) in message and (next(iter(change)) in message or "head_dim" in message)
    assert time.process_time() - began < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_sizes_that_the_weights_do_not_have(tmp_path):
    """Below those limits config.json may still ask for 100 TiB: the files' headers are held against it first."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"])
    large = {"hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 100, "head_dim": 2**12, "vocab_size": 2**20}
    (tmp_path / CONFIG).write_text(json.dumps(tiny.FAMILIES["llama-3"] | large))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "missing" in refusal(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


def test_key_that_stands_twice(tmp_path):
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"])
    (tmp_path / CONFIG).write_text('{"vocab_size": 1, "vocab_size": 97}')
    assert "vocab_size stands twice" in refusal(tmp_path)


def test_error_is_one_short_line(tmp_path):
    """Names of tensors come from the file: they may hold line breaks, a terminal's commands, or a megabyte."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"])
    set_tensor("a\nb\x1b[2J\u2028" + "c" * 10**6, torch.zeros(1))(tmp_path)
    message = refusal(tmp_path)
    assert message.isprintable() and "not a tensor of this model: a b [2J c" in message and len(message) < 3000


UNSUPPORTED = [  # a change to config.json, whose first key the error must name
    {"model_type": "qwen2"}, {"model_type": "gemma"}, {"model_type": "mixtral"}, {"model_type": None},
    {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"num_local_experts": 8},
    {"quantization_config": {"quant_method": "gptq"}}, {"partial_rotary_factor": 0.5}, {"rope_interleaved": True},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"rope_scaling": "llama3"}, {"rope_theta": -1},
    {"rope_parameters": {"rope_type": "yarn"}}, {"rope_parameters": {"partial_rotary_factor": 0.5}},
    {"num_key_value_heads": 3}, {"num_attention_heads": 0}, {"head_dim": 15}, {"vocab_size": None},
    {"vocab_size": "97"}, {"hidden_size": 64.5}, {"num_hidden_layers": True}, {"rms_norm_eps": float("nan")},
    {"sliding_window": -1, "model_type": "mistral"},
]  # fmt: skip


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        llama.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folder_is_refused(case, tmp_path):
    """Strict loading: one line that names the file, and the tensor where there is one."""
    damage, named = DAMAGED[case]
    damage(tiny.write(tmp_path, tiny.FAMILIES["llama-2"]))
    message = refusal(tmp_path)
    assert str(tmp_path) in message and all(words in message for words in named), message


@pytest.mark.parametrize("change", UNSUPPORTED, ids=json.dumps)
def test_unsupported_config_is_refused(change, tmp_path):
    """Whatever would be computed silently wrong."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"])
    (tmp_path / CONFIG).write_text(json.dumps(tiny.FAMILIES["llama-3"] | change))
    message = refusal(tmp_path)
    assert str(tmp_path / CONFIG) in message and next(iter(change)) in message, message


def test_redundant_tensors_are_accepted(tmp_path):
    """lm_head beside a tied embedding, and the buffers that transformers once saved."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3.2"])
    expected = tiny.logits(llama.load(tmp_path), SEQUENCE)
    set_tensor("lm_head.weight", torch.zeros(97, 64))(tmp_path)
    set_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8))(tmp_path)
    assert torch.equal(tiny.logits(llama.load(tmp_path), SEQUENCE), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_files_of_any_precision(shards, dtype, tmp_path):
    """Every tensor of one file, or of an index's shards, arrives as it was written."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"], dtype)
    expected = load_file(tmp_path / FILE)
    if shards > 1:
        weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(expected)}
        for file in set(weight_map.values()):
            save_file({name: expected[name] for name in expected if weight_map[name] == file}, tmp_path / file)
        write_index(weight_map)(tmp_path)
        (tmp_path / FILE).unlink()
    model = llama.load(tmp_path)
    assert Weights(tmp_path).dtype == dtype and {p.dtype for p in model.parameters()} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name].float()), name


# ---------------------------------------------------------------------------------------------------------------------
# Saving

COMPANIONS = [
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "chat_template.jinja",
]  # fmt: skip
LEFT_BEHIND = ["pytorch_model.bin", "modeling_custom.py", "optimizer.pt", "README.md"]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tiny.write(tmp_path / "source", tiny.FAMILIES["llama-3.1"])
    for name in COMPANIONS + LEFT_BEHIND:
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.mark.parametrize("shard_bytes, files", [(10**9, 1), (60_000, 5), (1, 21)])
def test_save_and_load(shard_bytes, files, source, tmp_path):
    """The same bits again, in one file or many; a right index; beside them what others need, and nothing more."""
    model, out = llama.load(source), tmp_path / "out" / "model"
    llama.save(model, source, out, torch.float32, shard_bytes=shard_bytes, replace={"chat_template.jinja": "another"})
    expected = load_file(source / FILE)
    shards = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert len(shards) == files
    for shard in shards.values():
        assert len(shard) == 1 or sum(x.nbytes for x in shard.values()) <= shard_bytes
    if files > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    names = {path.name for path in out.iterdir()}
    assert names == {CONFIG, *COMPANIONS, *shards, *([INDEX] if files > 1 else [])}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    assert (out / "chat_template.jinja").read_text() == "another"
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in [CONFIG, *COMPANIONS[:-1]])
    for name, p in llama.load(out).named_parameters():
        assert torch.equal(p, expected[name]), name


def test_saved_folder_in_transformers(source, tmp_path):
    """What we write, others read."""
    pytest.importorskip("transformers", minversion="4.56")
    model = llama.load(source)
    (source / "generation_config.json").unlink()
    llama.save(model, source, tmp_path / "out", torch.float32, shard_bytes=60_000)
    theirs = transformers_logits(tmp_path / "out", SEQUENCE)
    torch.testing.assert_close(theirs, tiny.logits(model, SEQUENCE), atol=1e-4, rtol=0)


def test_interrupted_save_leaves_no_folder(source, tmp_path, monkeypatch):
    """A folder that is there is whole; the next attempt clears what the first left."""
    model, out, written = llama.load(source), tmp_path / "out", []

    def disk_full(tensors, path, metadata):
        if written:
            raise OSError("no space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(llama, "save_file", disk_full)
        llama.save(model, source, out, torch.float32, shard_bytes=60_000)
    assert written and not out.exists()
    llama.save(model, source, out, torch.float32)
    assert sorted(tmp_path.iterdir()) == [out, source] and len(list(out.glob("*.safetensors"))) == 1


def test_save_never_overwrites(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="out"):
        llama.save(llama.load(source), source, out, torch.float32)
    assert not list(out.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Sharded reading and writing

RANKS = 2
UNEVEN = {  # a projection with one row: the second rank has none
    "vocab_size": 97, "hidden_size": 25, "num_attention_heads": 5, "head_dim": 6, "intermediate_size": 1,
}  # fmt: skip


def shard_load_save(rank: int, folder: Path, out: Path) -> None:
    """One process: read its share, see that the whole is the file, write it together with the others."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    with torch.device("meta"):
        model = Llama(Config.from_folder(folder))
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    Weights(folder).copy_into(model)
    expected = load_file(folder / FILE)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor) and torch.equal(p.full_tensor(), expected[name]), name
    llama.save(model, folder, out, torch.bfloat16, write=rank == 0, shard_bytes=5_000)
    dist.destroy_process_group()


def test_sharded_load_and_save(tmp_path):
    """Uneven shares, empty ones too, make the very tensors of the file, and the very files that one process writes."""
    folder = tiny.write(tmp_path / "source", tiny.FAMILIES["llama-2"] | UNEVEN)
    torch.multiprocessing.spawn(shard_load_save, (folder, tmp_path / "many"), nprocs=RANKS)
    llama.save(llama.load(folder), folder, tmp_path / "one", torch.bfloat16, shard_bytes=5_000)
    many, one = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("many", "one"))
    assert many == one and len(many) > 3


if __name__ == "__main__":
    import tempfile

    recorded = {}
    for family, config in tiny.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = transformers_logits(tiny.write(Path(folder), config), SEQUENCE)[RECORDED].tolist()
            recorded[family] = [[round(x, 5) for x in row] for row in rows]
    RECORD.write_text(json.dumps(recorded) + "\n")
