"""Check model.py and formats/checkpoint.py: exact logits, packing, kernels, loading and saving.

Logits are compared with transformers, packed pairs with a naive model. Damaged folders must be
refused. tests/logits.json holds transformers' logits, so the comparison does not need transformers
to be installed. To record them again:

    PYTHONPATH=. python tests/test_model.py
"""

import json
import os
import resource
import stat
import tempfile
import time
from collections import Counter
from pathlib import Path

import configs
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from configs import transformers_logits
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import model as llama
import tiny
from data import Pair, pack
from formats import checkpoint
from formats.checkpoint import Weights, read_config
from formats.errors import CheckpointError
from model import Config, Llama, PackedAttention

FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

# --------------------------------------------------------------------------------------------------
# Families

RECORD = Path(__file__).parent / "logits.json"
RECORDED = np.s_[-3:, :8]  # the last positions, the first vocabulary entries
SEQUENCE = np.random.default_rng(0).integers(0, 97, 40).tolist()
NEEDS_SMOLLM2 = pytest.mark.skipif(
    "SIMPO_SMOLLM2" not in os.environ,
    reason="SIMPO_SMOLLM2 does not name a folder with SmolLM2-135M",
)


@pytest.mark.parametrize("dialect", [4, 5])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_against_record(family, dialect, tmp_path):
    """Logits equal the recorded ones, in both dialects of config.json."""
    config = tiny.FAMILIES[family]
    config = config if dialect == 4 else tiny.dialect_5(config)
    model = checkpoint.load(tiny.write(tmp_path, config))
    expected = torch.tensor(json.loads(RECORD.read_text())[family])
    actual = tiny.logits(model, SEQUENCE)[RECORDED]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_against_transformers(family, tmp_path):
    """Logits equal those of the installed transformers at every position."""
    pytest.importorskip("transformers", minversion="4.56")
    model = checkpoint.load(tiny.write(tmp_path, tiny.FAMILIES[family]))
    expected = transformers_logits(tmp_path, SEQUENCE)
    torch.testing.assert_close(tiny.logits(model, SEQUENCE), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama-2", {"num_key_value_heads": 4, "rope_theta": 1e4, "sliding_window": None}),
        (
            "mistral-bare",
            {"num_key_value_heads": 8, "rope_theta": 1e4, "sliding_window": 4096, "head_dim": 4},
        ),
        ("mistral-0.3", {"sliding_window": None, "head_dim": 16}),
        ("nemo", {"head_dim": 10}),
    ],
)
def test_defaults_of_absent_keys(family, expected, tmp_path):
    """An absent key means what it means in transformers for that model type."""
    # Compared as values, because no tiny model would notice a window of 4096.
    config = vars(read_config(tiny.write(tmp_path, tiny.FAMILIES[family])))
    assert {key: config[key] for key in expected} == expected


@NEEDS_SMOLLM2
def test_smollm2_against_transformers():
    """A real checkpoint gives transformers' logits on a real sentence."""
    transformers = pytest.importorskip("transformers", minversion="4.56")
    folder = Path(os.environ["SIMPO_SMOLLM2"])
    text = (
        "The aurora is seen most often in a ring around each magnetic pole, where particles from "
        "the sun follow the field down into the upper atmosphere, strike oxygen and nitrogen a "
        "hundred kilometres above the ground, and leave them glowing green and red."
    )
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(tokens) > 40
    actual = tiny.logits(checkpoint.load(folder), tokens)
    torch.testing.assert_close(actual, transformers_logits(folder, tokens), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------
# Packed pairs against every response alone

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-2,
}
Lengths = list[tuple[int, list[int]]]  # of (prompt, responses), in tokens
PAIRS: dict[str, Lengths] = {
    "one response": [(4, [5]), (1, [1]), (6, [1])],
    "two responses": [(5, [4, 3]), (1, [6, 1]), (3, [1, 1]), (1, [1, 5])],
    "three responses": [(2, [3, 1, 4]), (7, [2, 2, 2])],
    "mixed": [(3, [2]), (2, [1, 4, 3]), (4, [5, 2])],
}


def make_pairs(lengths: Lengths) -> list[Pair]:
    """Return pairs of random tokens, the same ones for the same lengths."""
    rng = np.random.default_rng(1)

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, SHAPE["vocab_size"], count)

    return [Pair(draw(prompt), tuple(map(draw, responses))) for prompt, responses in lengths]


def run(model: Llama, pairs: list[Pair]) -> torch.Tensor:
    """Return the log-probabilities [N] of all response tokens, packed as one stream."""
    return model(**{name: torch.from_numpy(value) for name, value in pack(pairs).items()})


def gradients(model: Llama, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return gradients of a loss that weighs every token differently, so that no two can swap."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str):
    """Check that the largest error is below `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance, f"{what}: off by {error:.1e} of the largest value"


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Compute attention along one path, with the whole matrix, its mask and its softmax.

    q is [T, H, E]; k and v are [T, K, E].
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[2] ** 0.5
    positions = torch.arange(len(q), device=q.device)
    distance = positions[:, None] - positions
    hidden = (distance < 0) | (distance >= (window or len(q)))
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def naive_logps(
    w: dict[str, torch.Tensor], c: Config, prompt: np.ndarray, response: np.ndarray
) -> torch.Tensor:
    """Compute a response's log-probabilities with a second implementation of the model.

    It runs one path in the precision of its weights `w`, and RoPE turns complex numbers.
    """
    tokens = torch.from_numpy(np.concatenate((prompt, response)))
    half = c.head_dim // 2
    frequencies = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(tokens))[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def heads(x, name):
        return linear(x, name).view(len(tokens), -1, c.head_dim)

    def rotate(x):
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in (f"model.layers.{i}" for i in range(c.num_hidden_layers)):
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (heads(h, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        attended = naive_attention(rotate(q), rotate(k), v, c.sliding_window)
        x = x + linear(attended.flatten(1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(h, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(gate * gate.sigmoid() * up, f"{layer}.mlp.down_proj")
    head = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
    logits = linear(norm(x, "model.norm"), head)
    predict = range(len(prompt) - 1, len(tokens) - 1)
    return logits.log_softmax(-1)[predict, tokens[len(prompt) :]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", PAIRS)
def test_packed_pairs_are_their_responses_alone(case, window, tied):
    """Packed log-probabilities and all gradients equal those of every response computed alone."""
    # This fails if masks, positions, windows or the choice of predicting positions are wrong.
    pairs = make_pairs(PAIRS[case])
    config = Config(**SHAPE, sliding_window=window, tie_word_embeddings=tied)
    model = tiny.fill(Llama(config))
    logps = run(model, pairs)
    actual = gradients(model, logps)

    alone = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    paths = [(pair.prompt, response) for pair in pairs for response in pair.responses]
    expected = torch.cat([naive_logps(alone, config, *path) for path in paths])
    assert_near(logps, expected, 1e-5, "log-probabilities")
    (expected * torch.linspace(-1, 2, len(expected))).sum().backward()
    for name, p in alone.items():
        assert_near(actual[name], p.grad, 1e-5, name)


def test_order_of_pairs_changes_nothing():
    """No pair sees another: shuffling a stream's pairs leaves each one's log-probabilities."""
    pairs = make_pairs([lengths for case in PAIRS.values() for lengths in case])
    model = tiny.fill(Llama(Config(**SHAPE, sliding_window=5)))
    order = np.random.default_rng(2).permutation(len(pairs))
    sizes = [sum(map(len, pair.responses)) for pair in pairs]
    shuffled = run(model, [pairs[i] for i in order]).split([sizes[i] for i in order])
    for i, logps in zip(order, shuffled):
        torch.testing.assert_close(logps, run(model, pairs).split(sizes)[i])


def test_activation_checkpointing_changes_no_gradient(monkeypatch):
    """Activation checkpointing runs every block exactly twice and gives the same gradients."""
    pairs = make_pairs(PAIRS["mixed"])
    model = tiny.fill(Llama(Config(**SHAPE, sliding_window=5)))
    stored = gradients(model, run(model, pairs))
    calls, body = [], llama.Block.body

    def counting_body(*args):
        calls.append(1)
        return body(*args)

    monkeypatch.setattr(llama.Block, "body", counting_body)
    for block in model.model.layers:
        block.checkpoint_activations = True
    recomputed = gradients(model, run(model, pairs))
    assert len(calls) == 2 * SHAPE["num_hidden_layers"]
    for name, gradient in stored.items():
        torch.testing.assert_close(recomputed[name], gradient)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("width, min_width", [(1, 1), (7, 1), (37, 1), (1, 7), (64, 1)])
def test_tiled_logps(width, min_width, keep, monkeypatch):
    """Tiles of any width give log-softmax and its gradients, from tensors no larger than a tile.

    With `keep`, logits wait for backward instead of being computed twice.
    """
    n, d, v = 50, 4, 37
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((n, d), generator=generator, requires_grad=True)
    weight = torch.randn((v, d), generator=generator, requires_grad=True)
    targets = torch.randint(v, (n,), generator=generator)
    expected = (hidden @ weight.T).log_softmax(-1)[range(n), targets]
    slopes = torch.linspace(-1, 2, n)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight), slopes)
    monkeypatch.setitem(llama.LOGITS_TILE, "cpu", n * width)
    monkeypatch.setattr(llama, "MIN_TILE_WIDTH", min_width)
    monkeypatch.setattr(llama, "TILE_STEP", 1)
    saved_sizes, products = Counter(), Counter()

    def record(x):
        saved_sizes[x is not hidden and x is not weight] += x.numel()
        return x

    def linear(*args, plain=llama.F.linear):
        products["logits"] += 1
        return plain(*args)

    monkeypatch.setattr(llama.F, "linear", linear)
    hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda x: x)
    with Largest() as largest, hooks:
        actual = llama.TiledLogps.apply(hidden, weight, targets, keep)
        actual_gradients = torch.autograd.grad(actual, (hidden, weight), slopes)
    torch.testing.assert_close((actual, *actual_gradients), (expected, *expected_gradients))
    assert largest.elements == max(n * min(width, v), n * min_width, n * d)
    assert saved_sizes[True] == 2 * n + n * v * keep  # targets, normalisers, logits
    assert products["logits"] == -(-v // max(width, min_width)) * (2 - keep)


def test_logits_are_kept_for_backward_alone(tmp_path, monkeypatch):
    """A pass without gradients, as in evaluation, keeps no logits. Gradients stay bit-equal."""
    model = checkpoint.load(tiny.write(tmp_path, tiny.FAMILIES["nemo"]), dtype=torch.float32)
    pairs = make_pairs([(5, [7, 9])])
    kept, apply = [], llama.TiledLogps.apply
    record = staticmethod(lambda *args: kept.append(args[-1]) or apply(*args))
    monkeypatch.setattr(llama.TiledLogps, "apply", record)
    expected = gradients(model, run(model, pairs))
    model.keep_logits = True
    found = gradients(model, run(model, pairs))
    with torch.no_grad():
        run(model, pairs)
    assert kept == [False, True, False]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tiled_logps_of_large_logits():
    """Certain and hopeless vocabulary entries cause no overflow, and gradients are exact."""
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[-1e4], [0.0], [1e4]], requires_grad=True)
    logps = llama.TiledLogps.apply(hidden, weight, torch.tensor([2, 2]))
    torch.testing.assert_close(logps, torch.tensor([0.0, -2e4]))
    # Only the second row has a gradient: that of its target and that of its likeliest entry.
    [gradient] = torch.autograd.grad(logps.sum(), weight)
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [0.0], [-1.0]]))


@pytest.mark.parametrize("heads", [(8, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 64])
def test_attention_by_segment(window, dtype, tolerance, heads):
    """The path of CPUs. tests/test_cuda_branch.py holds that of GPUs to the same."""
    assert_attention_is_naive("cpu", dtype, tolerance, window, heads=heads)


def assert_attention_is_naive(
    device: str, dtype: torch.dtype, tolerance: float, window: int | None, size: int = 64,
    heads: tuple[int, int] = (8, 2),
):  # fmt: skip
    """Check the attention rule, forward and backward, beyond one block of queries.

    size: features per head. heads: of the queries, and of the keys and values.
    """
    lengths = [(150, [70, 33]), (1, [1, 1]), (40, [5, 200, 1]), (129, [128])]
    packed = {name: torch.from_numpy(value) for name, value in pack(make_pairs(lengths)).items()}
    key_index = packed["key_index"].to(device)
    attend = PackedAttention(key_index, packed["cu_q"], packed["cu_k"], window)
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        shape = (len(packed["tokens"]), heads, size)
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v, slopes = (draw(heads[i]) for i in (0, 1, 1, 0))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(0, *inputs)
    actual = torch.autograd.grad(out, inputs, slopes)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, root = torch.zeros_like(slopes, dtype=torch.float64), 0
    for p, responses in lengths:
        start = root + p
        for r in responses:
            path = torch.tensor([*range(root, root + p), *range(start, start + r)], device=device)
            # The first response's segment also has the prompt's queries.
            new = slice(0 if start == root + p else p, None)
            alone = naive_attention(*(x[path] for x in exact), window)
            expected = expected.index_put((path[new],), alone[new])
            start += r
        root = start
    assert_near(out, expected, tolerance, "output")
    exact_gradients = torch.autograd.grad(expected, exact, slopes.double())
    for name, gradient, reference in zip("qkv", actual, exact_gradients):
        assert_near(gradient, reference, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("window", [None, 64])
def test_no_attention_beyond_the_mask(window, monkeypatch):
    """A block of queries gets no key after its last query, and none that all have left behind."""
    sizes, original = [], llama.attention

    def spy(q, k, *others):
        sizes.append((q.shape[1] // 2, k.shape[1]))  # two query heads share the key head
        return original(q, k, *others)

    monkeypatch.setattr(llama, "attention", spy)
    packed = pack(make_pairs([(300, [212, 500])]))
    key_index = torch.from_numpy(packed["key_index"])
    attend = PackedAttention(key_index, packed["cu_q"], packed["cu_k"], window)
    q, k = torch.zeros(1012, 2, 8), torch.zeros(1012, 1, 8)
    assert attend(0, q, k, k).shape == q.shape
    # Where the keys end: prompt and chosen from 0 on, rejected from 300 on.
    ends = [128, 256, 384, 512, 428, 556, 684, 800]
    rows = [128] * 4 + [128] * 3 + [116]
    expected = [(n, min(end, n + window - 1) if window else end) for n, end in zip(rows, ends)]
    assert sizes == expected


KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    "dtype, attention, own, backward",  # what returns attention's output, and what backward runs
    [
        (torch.float32, KERNEL, 0, f"{KERNEL}_backward"),
        (torch.bfloat16, "aten::bmm", 4, "aten::bmm"),  # two gradients each of two products
    ],
)
def test_activation_checkpointing_saves_attention(dtype, attention, own, backward, tmp_path):
    """Backward recomputes neither attention nor saved matmuls, and gradients stay bit-equal."""
    counts = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[function.name()] += 1
            return function(*args, **(kwargs or {}))

    # In this family all kinds of matmuls differ in shape, except those of k and v.
    model = checkpoint.load(tiny.write(tmp_path, tiny.FAMILIES["nemo"]), dtype=dtype)
    all_gradients, matmuls = [], []
    arrays = pack(make_pairs([(150, [40, 9])]))
    packed = {name: torch.from_numpy(array) for name, array in arrays.items()}
    packed |= {name: arrays[name] for name in ("cu_q", "cu_k")}
    blocks = 3 * len(model.model.layers)  # of queries: 150 + 40 and 9, in blocks of at most 128
    for saved in (None, "none", "attention", "all"):
        for block in model.model.layers:
            block.checkpoint_activations = saved is not None
            block.save_matmuls(saved or "none")
        logps = model(**packed)
        counts.clear()
        with Count():
            logps.sum().backward()
        all_gradients.append([p.grad for p in model.parameters()])
        matmuls.append(counts["aten::mm"])
        assert counts[attention] == own * blocks
        assert counts[backward] > 0
        model.zero_grad()
    for others in all_gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(all_gradients[0], others))
    recomputed = [(n - matmuls[0]) / len(model.model.layers) for n in matmuls[1:]]
    # Per block: all but down_proj's, whose output backward never needs; gate and up; none.
    assert recomputed == [6, 2, 0]


# --------------------------------------------------------------------------------------------------
# Loading


def set_tensor(name: str, tensor: torch.Tensor | None):
    """Return an edit of a folder that replaces the tensor of this name, or removes it."""

    def edit(folder: Path):
        tensors = load_file(folder / FILE) | {name: tensor}
        remaining = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(remaining, folder / FILE)

    return edit


def set_text(file: str, text: str):
    """Return an edit of a folder that writes this text to the file."""
    return lambda folder: (folder / file).write_text(text)


def remove(file: str):
    """Return an edit of a folder that deletes the file."""
    return lambda folder: (folder / file).unlink()


def write_index(weight_map):
    """Return an edit of a folder that writes an index with this weight map."""
    return set_text(INDEX, json.dumps({"weight_map": weight_map}))


def truncate(folder: Path):
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:-100])


Q = "model.layers.1.self_attn.q_proj.weight"
Q_BIAS, Q_LAYER_2 = Q.replace("weight", "bias"), Q.replace("1", "2")
DAMAGED = {  # case: (what happens to the folder, what the error must name)
    "missing tensor": (set_tensor(Q, None), ["missing", Q]),
    "unknown tensor": (set_tensor(Q_BIAS, torch.zeros(64)), [Q_BIAS]),
    "a layer too many": (set_tensor(Q_LAYER_2, torch.zeros(64, 64)), [Q_LAYER_2]),
    "misshapen tensor": (set_tensor(Q, torch.zeros(64, 63)), [FILE, Q, "[64, 63]", "[64, 64]"]),
    "tensor too long": (set_tensor(Q, torch.zeros(65, 64)), [FILE, Q, "[65, 64]", "[64, 64]"]),
    "int8": (set_tensor(Q, torch.zeros(64, 64, dtype=torch.int8)), [FILE, Q, "I8"]),
    "float64": (set_tensor(Q, torch.zeros(64, 64, dtype=torch.float64)), [FILE, Q, "F64", "F32"]),
    "truncated": (truncate, [FILE]),
    "not safetensors": (set_text(FILE, "version https://git-lfs.github.com"), [FILE]),
    "no weights": (remove(FILE), [FILE, INDEX]),
    "pickle": (lambda folder: (folder / FILE).rename(folder / "pytorch_model.bin"), ["pickle"]),
    "absent shard": (
        write_index({Q: "model-00001-of-00002.safetensors"}),
        ["model-00001-of-00002", INDEX],
    ),
    "shard above the folder": (
        write_index({Q: "../model.safetensors"}),
        [INDEX, "../", "in this folder"],
    ),
    "shard at a full path": (
        write_index({Q: "/model.safetensors"}),
        [INDEX, "/model", "in this folder"],
    ),
    "shard that is a pickle": (
        write_index({Q: "pytorch_model.bin"}),
        [INDEX, "pytorch_model.bin", "safetensors file"],
    ),
    "empty index": (write_index({}), [INDEX, "weight_map"]),
    "index that is a list": (write_index([Q]), [INDEX, "weight_map"]),
    "no config": (remove(CONFIG), [CONFIG]),
    "config not JSON": (set_text(CONFIG, "{"), [CONFIG]),
    "config not an object": (set_text(CONFIG, "[]"), [CONFIG]),
    "config not text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), [CONFIG]),
}


def entry(begin: int, end: int, rows: int = 8) -> dict:
    """Return a safetensors header's entry: float32 [rows] in the bytes from `begin` to `end`."""
    return {"dtype": "F32", "shape": [rows], "data_offsets": [begin, end]}


def twice(first: dict, second: dict) -> str:
    """Return the text of a safetensors header that has the key "a" twice."""
    return f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}'


DTYPE_TWICE = '{"a": {"dtype": "F32", "dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
HEADERS = {  # case: (header or its text, bytes of tensors, what the error must say or None)
    "sound": ({"a": entry(0, 32), "b": entry(32, 64)}, 64, None),
    "tensors that overlap": ({"a": entry(0, 32), "b": entry(16, 48)}, 48, "`b`"),
    "tensors with the same bytes": (
        {"a": entry(0, 32), "b": entry(0, 32)},
        32,
        "invalid offset for tensor `",
    ),
    "a hole": ({"a": entry(0, 32), "b": entry(40, 72)}, 72, "`b`"),
    "beyond the file": ({"a": entry(0, 32), "b": entry(32, 64)}, 40, "not fully covered"),
    "bytes after the last": ({"a": entry(0, 32)}, 64, "not fully covered"),
    "end before begin": ({"a": entry(32, 0), "b": entry(0, 32)}, 32, "`a`"),
    "offsets at 2⁶⁰": ({"a": entry(0, 2**60, 2**58)}, 64, "not fully covered"),
    "overflowing shape": ({"a": entry(0, 0) | {"shape": [2**32, 2**32]}}, 0, "overflow"),
    "another shape than bytes": ({"a": entry(0, 32, 9)}, 32, "shape"),
    "negative": ({"a": entry(0, 32, -8)}, 32, "-8"),
    "duplicate name": (twice(entry(0, 64, 16), entry(0, 64, 16)), 64, "duplicate key: a"),
    "duplicate name, other bytes": (twice(entry(32, 64), entry(0, 64, 16)), 64, "duplicate key: a"),
    "duplicate field": (DTYPE_TWICE, 0, "dtype"),
    "nested 100,000 deep": ("[" * 100_000, 0, "header"),
    "unknown dtype": ({"a": entry(0, 32) | {"dtype": "Q\n4"}}, 32, "unknown variant"),
}


def refusal(folder: Path) -> str:
    """Return the message of the error that loading this folder must raise; it is one line."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_header(case, tmp_path):
    """A header with wrong offsets, sizes or names is refused in one line that names the file."""
    # A reader that trusted it would mix up the bytes of tensors, or read past the end of the file.
    header, size, problem = HEADERS[case]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    if problem is None:
        assert Weights(tmp_path).files.keys() == header.keys()
        return
    with pytest.raises(CheckpointError) as error:
        Weights(tmp_path)
    message = str(error.value)
    assert str(tmp_path / FILE) in message and problem in message and "\n" not in message


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="only Linux says what a process has mapped"
)
def test_a_loaded_checkpoint_is_not_mapped_any_more(tmp_path):
    """No file of a checkpoint stays mapped after its tensors were read."""
    # Pages that were read count as memory of the process, so a mapped file would cost the size of
    # the weights once more throughout training.
    model = checkpoint.load(tiny.write(tmp_path, tiny.FAMILIES["llama-3"]))
    weights = Weights(tmp_path)  # train.py holds this for as long as it runs
    weights.copy_into(model)
    assert len(weights.files) > 1
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("size", [2**24 + 1, 10**9, 2**63, 2**64 - 1])
def test_absurd_header_size(size, tmp_path):
    """A header size that asks for absurd amounts of memory is refused."""
    (tmp_path / FILE).write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"{FILE}: .* a header of {size} bytes"):
        Weights(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    """A tensor that is in two shards is refused, and both files are named."""
    # Nothing says which of the two is meant, and a person may have checked the other one.
    for name in ("one.safetensors", "two.safetensors"):
        save_file({Q: torch.zeros(2)}, tmp_path / name)
    write_index({Q: "one.safetensors", "other": "two.safetensors"})(tmp_path)
    with pytest.raises(CheckpointError, match=f"two.safetensors: {Q} is also in one.safetensors"):
        Weights(tmp_path)


ABSURD = [  # changes to config.json
    {"num_hidden_layers": 5000},
    {"vocab_size": 2**30},
    {"hidden_size": 2**30},
    {"intermediate_size": 2**31 - 1},
    {"head_dim": 2**20},
    {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2},
    {"rope_theta": 10**400},
]


def peak_memory() -> int:
    """Return the most memory that this process has held so far, in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def change_config(folder: Path, change: dict) -> None:
    """Write a folder of the family llama-3 with these changes to config.json alone."""
    tiny.write(folder, tiny.FAMILIES["llama-3"])
    (folder / CONFIG).write_text(json.dumps(tiny.FAMILIES["llama-3"] | change))


@pytest.mark.parametrize("change", ABSURD, ids=lambda change: next(iter(change)))
def test_absurd_sizes_cost_nothing(change, tmp_path):
    """A size that asks for terabytes is refused by its key, without spending time or memory."""
    change_config(tmp_path, change)
    began, peak = time.process_time(), peak_memory()
    message = refusal(tmp_path)
    assert str(tmp_path / CONFIG) in message
    assert next(iter(change)) in message or "head_dim" in message
    assert time.process_time() - began < 1 and peak_memory() - peak < 2**16


def test_sizes_that_the_weights_do_not_have(tmp_path):
    """Sizes below those limits are checked against the files' headers before memory is spent."""
    # This config.json asks for 100 TiB.
    large = {"hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 100}
    change_config(tmp_path, large | {"head_dim": 2**12, "vocab_size": 2**20})
    peak = peak_memory()
    assert "missing" in refusal(tmp_path)
    assert peak_memory() - peak < 2**17


def test_duplicate_key(tmp_path):
    """A duplicate key in config.json is refused by its name."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"])
    (tmp_path / CONFIG).write_text('{"vocab_size": 1, "vocab_size": 97}')
    assert "duplicate key: vocab_size" in refusal(tmp_path)


def test_error_is_one_short_line(tmp_path):
    """An error message stays one short printable line, whatever a tensor is called."""
    # Names come from the file: they may hold line breaks, a terminal's commands, or a megabyte.
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"])
    set_tensor("a\nb\x1b[2J\u2028" + "c" * 10**6, torch.zeros(1))(tmp_path)
    message = refusal(tmp_path)
    assert message.isprintable() and len(message) < 3000
    assert "not a tensor of this model: a b [2J c" in message


UNSUPPORTED = [  # changes to config.json; the error must name the first key
    {"model_type": "qwen2"},
    {"model_type": "gemma"},
    {"model_type": "mixtral"},
    {"model_type": None},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"hidden_act": "gelu"},
    {"num_local_experts": 8},
    {"quantization_config": {"quant_method": "gptq"}},
    {"partial_rotary_factor": 0.5},
    {"rope_interleaved": True},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_scaling": "llama3"},
    {"rope_theta": -1},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
    {"num_key_value_heads": 3},
    {"num_attention_heads": 0},
    {"head_dim": 15},
    {"vocab_size": None},
    {"vocab_size": "97"},
    {"hidden_size": 64.5},
    {"num_hidden_layers": True},
    {"rms_norm_eps": float("nan")},
    {"sliding_window": -1, "model_type": "mistral"},
]


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folder_is_refused(case, tmp_path):
    """A damaged folder is refused in one line that names the file and, if known, the tensor."""
    damage, named = DAMAGED[case]
    damage(tiny.write(tmp_path, tiny.FAMILIES["llama-2"]))
    message = refusal(tmp_path)
    assert str(tmp_path) in message and all(words in message for words in named), message


@pytest.mark.parametrize("change", UNSUPPORTED, ids=json.dumps)
def test_unsupported_config_is_refused(change, tmp_path):
    """A config.json that model.py would silently compute wrongly is refused by its key."""
    change_config(tmp_path, change)
    message = refusal(tmp_path)
    assert str(tmp_path / CONFIG) in message and next(iter(change)) in message, message


def test_redundant_tensors_are_accepted(tmp_path):
    """A copy of the tied embedding, and frequencies that transformers once saved, are ignored."""
    tiny.write(tmp_path, tiny.FAMILIES["smollm2"])
    expected = tiny.logits(checkpoint.load(tmp_path), SEQUENCE)
    embedding = load_file(tmp_path / FILE)["model.embed_tokens.weight"]
    set_tensor("lm_head.weight", embedding.clone())(tmp_path)
    frequencies = 100000.0 ** -(torch.arange(0, 16, 2) / 16)
    for layer, dtype in enumerate((torch.bfloat16, torch.float16)):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        set_tensor(name, frequencies.to(dtype))(tmp_path)
    assert torch.equal(tiny.logits(checkpoint.load(tmp_path), SEQUENCE), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_files_of_any_precision(shards, dtype, tmp_path):
    """Every tensor arrives as it was written, from one file or from the shards of an index."""
    tiny.write(tmp_path, tiny.FAMILIES["llama-3"], dtype)
    expected = load_file(tmp_path / FILE)
    if shards > 1:
        weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(expected)}
        for file in set(weight_map.values()):
            shard = {name: expected[name] for name in expected if weight_map[name] == file}
            save_file(shard, tmp_path / file)
        write_index(weight_map)(tmp_path)
        (tmp_path / FILE).unlink()
    model = checkpoint.load(tmp_path)
    assert set(Weights(tmp_path).dtypes.values()) == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name].float()), name


# --------------------------------------------------------------------------------------------------
# Saving

COMPANIONS = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
]
LEFT_BEHIND = ["pytorch_model.bin", "modeling_custom.py", "optimizer.pt", "README.md"]


@pytest.fixture
def source(tmp_path) -> Path:
    """Write a checkpoint folder with companions to copy and files to leave behind."""
    folder = tiny.write(tmp_path / "source", tiny.FAMILIES["llama-3.1"])
    for name in COMPANIONS + LEFT_BEHIND:
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.mark.parametrize("shard_bytes, files", [(10**9, 1), (60_000, 5), (1, 21)])
def test_save_and_load(shard_bytes, files, source, tmp_path):
    """A saved model has the same bits, a right index, the companion files and nothing else."""
    model, out = checkpoint.load(source), tmp_path / "out" / "model"
    options = {"shard_bytes": shard_bytes, "replace": {"chat_template.jinja": "another"}}
    checkpoint.save(model, source, out, torch.float32, **options)
    expected = load_file(source / FILE)
    shards = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert len(shards) == files
    for shard in shards.values():
        assert len(shard) == 1 or sum(x.nbytes for x in shard.values()) <= shard_bytes
    if files > 1:
        index = json.loads((out / INDEX).read_text())
        locations = {name: file for file, shard in shards.items() for name in shard}
        assert index["weight_map"] == locations
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    names = {path.name for path in out.iterdir()}
    assert names == {CONFIG, *COMPANIONS, *shards, *([INDEX] if files > 1 else [])}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    assert (out / "chat_template.jinja").read_text() == "another"
    for name in (CONFIG, *COMPANIONS[:-1]):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    for name, p in checkpoint.load(out).named_parameters():
        assert torch.equal(p, expected[name]), name


def test_saved_folder_in_transformers(source, tmp_path):
    """Transformers reads a folder that we saved, and computes the same logits."""
    pytest.importorskip("transformers", minversion="4.56")
    model = checkpoint.load(source)
    (source / "generation_config.json").unlink()
    checkpoint.save(model, source, tmp_path / "out", torch.float32, shard_bytes=60_000)
    expected = transformers_logits(tmp_path / "out", SEQUENCE)
    torch.testing.assert_close(expected, tiny.logits(model, SEQUENCE), atol=1e-4, rtol=0)


def test_interrupted_save_leaves_no_folder(source, tmp_path, monkeypatch):
    """A folder appears only once it is complete, and the next save clears what was left over."""
    model, out, written = checkpoint.load(source), tmp_path / "out", []

    def disk_full(tensors, path, metadata):
        if written:
            raise OSError("no space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(checkpoint, "save_file", disk_full)
        checkpoint.save(model, source, out, torch.float32, shard_bytes=60_000)
    assert written and not out.exists()
    checkpoint.save(model, source, out, torch.float32)
    assert sorted(tmp_path.iterdir()) == [out, source]
    assert len(list(out.glob("*.safetensors"))) == 1


def test_save_never_overwrites(source, tmp_path):
    """Saving to an existing folder is an error, and the folder stays as it is."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="out"):
        checkpoint.save(checkpoint.load(source), source, out, torch.float32)
    assert not list(out.iterdir())


# --------------------------------------------------------------------------------------------------
# Sharded reading and writing

RANKS = 2
UNEVEN = {  # a projection has one row, so the second rank has none of it
    "vocab_size": 97,
    "hidden_size": 25,
    "num_attention_heads": 5,
    "head_dim": 6,
    "intermediate_size": 1,
}


def shard_load_save(rank: int, folder: Path, out: Path) -> None:
    """Read one rank's shards, check that all shards together are the file, and save them."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    with torch.device("meta"):
        model = Llama(read_config(folder))
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    Weights(folder).copy_into(model)
    expected = load_file(folder / FILE)
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor) and torch.equal(p.full_tensor(), expected[name]), name
    dtypes = Weights(folder).dtypes
    checkpoint.save(model, folder, out, dtypes, write=rank == 0, shard_bytes=5_000)
    dist.destroy_process_group()


def test_sharded_load_and_save(tmp_path):
    """Uneven and empty shards load the file's tensors, and save the files that one rank saves.

    Every tensor is saved in its own dtype, to the bit.
    """
    folder = tiny.write(tmp_path / "source", tiny.FAMILIES["llama-2"] | UNEVEN)
    tensors = configs.mix_dtypes(load_file(folder / FILE))
    save_file(tensors, folder / FILE)
    torch.multiprocessing.spawn(shard_load_save, (folder, tmp_path / "many"), nprocs=RANKS)
    model = checkpoint.load(folder)
    checkpoint.save(model, folder, tmp_path / "one", Weights(folder).dtypes, shard_bytes=5_000)
    many, one = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("many", "one")
    )
    assert many == one and len(many) > 3
    saved = [load_file(path) for path in (tmp_path / "many").glob("*.safetensors")]
    for name, tensor in {name: t for shard in saved for name, t in shard.items()}.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name


def record_logits() -> None:
    """Write tests/logits.json anew from the installed transformers."""
    recorded = {}
    for family, config in tiny.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            logits = transformers_logits(tiny.write(Path(folder), config), SEQUENCE)
            rows = logits[RECORDED].tolist()
            recorded[family] = [[round(x, 5) for x in row] for row in rows]
    RECORD.write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    record_logits()
