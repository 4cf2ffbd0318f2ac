"""Hold numbers that no other test would miss: each test here once met a mutation that survived.

bench/mutations.py has the mutations.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_train import TOY

import model as llama
import sample
import tiny
import train
from data import Pair, pack
from formats import checkpoint
from formats.candidates import Answer, AnswerFile, Question
from formats.errors import DataError
from formats.tokenizer import Tokenizer
from methods import baselines
from methods.objectives import OBJECTIVES
from model import Config, Llama, TiledLogps, rotary_table, train_flops
from runtime import processes, reference, run, tokens
from runtime.settings import Settings
from study import analyze

# --------------------------------------------------------------------------------------------------
# Positions and precision


@pytest.mark.parametrize("position", [257, 1023, 5000])
def test_angles_of_high_positions(position):
    """Beyond 256, bfloat16 has no room for odd positions."""
    config = Config(7, 8, 8, 1, 1, 1, 8)
    [cos_sin, _] = rotary_table(config, torch.tensor([position]))
    angles = position * 10000.0 ** (-np.arange(4) / 4)
    expected = [*np.cos(angles), *np.sin(angles)]
    assert cos_sin.flatten().tolist() == pytest.approx(expected, abs=1e-3)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root mean square of the difference to a float64 result."""
    return (found.double() - exact).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("keep", [False, True])
def test_log_probabilities_in_bf16_lose_no_more_than_they_must(keep, monkeypatch):
    """Many tiles are as near float64 as one bfloat16 product with its logits upcast."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (64, 4096))
    targets = torch.randint(4096, (64,), generator=generator)

    def results(loss_of, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logps = loss_of(*inputs)
        return [logps, *torch.autograd.grad(logps.sum(), inputs)]

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1)[range(64), targets]

    monkeypatch.setitem(llama.LOGITS_TILE, "cpu", 64 * 128)
    monkeypatch.setattr(llama, "MIN_TILE_WIDTH", 128)
    exact = results(plain, torch.float64)
    naive = results(plain, torch.bfloat16)
    ours = results(lambda h, w: TiledLogps.apply(h, w, targets, keep), torch.bfloat16)
    assert ours[0].dtype == torch.float32
    for found, other, expected, slack in zip(ours, naive, exact, (1.001, 1.1, 1.1), strict=True):
        assert error(found, expected) <= slack * error(other, expected)


def build(trainable: bool = True, **settings) -> Llama:
    """Return the toy's model as training builds it."""
    folder = TOY / "checkpoint"
    settings = {"model": str(folder), "data": "x", "device": "cpu", "dtype": "fp32"} | settings
    parsed = Settings(**settings)
    mesh = processes.make_mesh(parsed, processes.start_ranks(parsed))
    inputs = SimpleNamespace(
        config=checkpoint.read_config(folder), weights=checkpoint.Weights(folder)
    )
    return train.build_model(inputs, mesh, parsed, trainable)


@pytest.mark.parametrize(
    "flags, logits",
    [
        ({"activation_checkpointing": True, "keep_products": "none"}, False),
        ({"activation_checkpointing": True, "keep_products": "attention"}, False),
        ({"activation_checkpointing": True, "keep_products": "all"}, True),
        ({"activation_checkpointing": False}, True),
    ],
)
def test_logits_are_kept_with_all_products(flags, logits):
    assert build(**flags).keep_logits == logits


def test_master_weights_and_their_gradients_are_float32(monkeypatch):
    """A policy that computes in bfloat16 is kept and reduced in float32, a reference is not."""
    policies = []

    class Recorded(train.MixedPrecisionPolicy):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            policies.append(self)

    monkeypatch.setattr(train, "MixedPrecisionPolicy", Recorded)
    policy, frozen = (build(trainable, dtype="bf16") for trainable in (True, False))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert {p.param_dtype for p in policies} == {torch.bfloat16}
    assert {p.reduce_dtype for p in policies} == {torch.float32}


@pytest.mark.parametrize("gather_once", [True, False])
def test_gather_once_communicates_once(gather_once):
    """Only the last micro-batch reduces gradients; without the flag only the copies wait for it."""
    calls: dict[str, bool] = {}

    class Recorder:
        def __getattr__(self, name: str):
            return lambda value: calls.update({name: value})

    postponed = {"set_requires_all_reduce"}  # and no other: the buffers of a reduction are freed
    if gather_once:
        postponed |= {"set_requires_gradient_sync", "set_reshard_after_backward"}
    for last in (False, True):
        train.sync_gradients(Recorder(), Settings(gather_once=gather_once), last)
        assert calls == dict.fromkeys(postponed, last)


# --------------------------------------------------------------------------------------------------
# The optimizer


def test_two_steps_of_adamw_by_hand():
    """Rate, betas, eps and weight decay are all the settings', and every parameter is trained."""
    rate, decay, eps, one, two = 0.1, 0.3, 0.05, 0.6, 0.7
    settings = Settings(lr=rate, adam_beta1=one, adam_beta2=two, adam_eps=eps, weight_decay=decay)
    model = tiny.fill(Llama(Config(7, 8, 8, 1, 1, 1, 8)))
    optimizer = train.make_optimizer(model, settings)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    mean, square = 0.0, 0.0
    for step, slope in enumerate((0.5, -0.1), 1):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, slope)
        optimizer.step()
        mean = one * mean + (1 - one) * slope
        square = two * square + (1 - two) * slope**2
        root = math.sqrt(square / (1 - two**step))
        move = rate * mean / (1 - one**step) / (root + eps)
        for name, parameter in model.named_parameters():
            shrunk = 1 - rate * decay * (parameter.dim() > 1)  # gains do not decay
            expected[name] = expected[name] * shrunk - move
            torch.testing.assert_close(
                parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6, msg=name
            )


@pytest.mark.parametrize("steps, warmup", [(25, 3), (11, 2), (1, 1), (20, 2)])
def test_a_warm_up_is_rounded_up(steps, warmup):
    """A tenth of 25 steps is 3, at whose end the rate is at its peak; it falls after that."""
    settings = Settings(lr=1.0, warmup_ratio=0.1)
    rates = [train.learning_rate(settings, step, steps) for step in range(steps)]
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :]))


# Published: β, γ/β and learning rates in Table 7 and section 3 of the SimPO paper, arXiv 2405.14734
DEFAULTS = {
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5, "length_norm": True, "label_smoothing": 0.0},
    "dpo": {"beta": 0.01, "length_norm": False, "label_smoothing": 0.0, "reference": "online"},
    "rrhf": {"lam": 1.0},
    "slic": {"lam": 1.0, "delta": 1.0},
    "ipo": {"beta": 0.1, "length_norm": False, "reference": "online"},
    "cpo": {"beta": 0.01, "lam": 1.0},
    "kto": {"beta": 0.01, "reference": "online"},
    "orpo": {"lam": 0.1},
    "rdpo": {"beta": 0.01, "alpha": 0.05, "reference": "online"},
    "alphapo": {"beta": 2.5, "gamma_beta_ratio": 0.04, "alphapo_alpha": 0.25},
    "simper": {},
    "repo": {"gamma_beta_ratio": 0.6},
    "apo_zero": {"beta": 0.1, "reference": "online"},
    "sft": {},
}


def test_defaults_of_every_objective():
    """A default is a promise to whoever names none, so changing one must change this table."""
    # objectives that somebody adds stand after these
    ours = list(OBJECTIVES.items())[: len(DEFAULTS)]
    assert {name: objective.defaults for name, objective in ours} == DEFAULTS


@pytest.mark.parametrize("longest, prompt", [(2048, 1800), (1024, 900), (4096, 1800), (512, 450)])
def test_the_longest_prompt_is_a_share_of_the_longest_pair(longest, prompt):
    assert Settings(max_length=longest).max_prompt_length == prompt


# --------------------------------------------------------------------------------------------------
# What is counted


def pair_of(prompt: int, *responses: int) -> Pair:
    return Pair(np.zeros(prompt, np.int32), tuple(np.zeros(r, np.int32) for r in responses))


@pytest.mark.parametrize(
    "window, visible",
    [
        # 1 + 2 + 3, twice 4 + 5, then 6 more for the second
        (None, 6 + 9 + 15),
        # a window of 3: the prompt's last token and all later ones see 3
        (3, 6 + 6 + 9),
        (2, 5 + 4 + 6),
        (1, 3 + 2 + 3),
        (4, 6 + 8 + 12),
        (100, 6 + 9 + 15),
    ],
)
def test_operations_of_a_window_by_hand(window, visible):
    """Prompt of 3 tokens, responses of 2 and 3: what each token sees, token by token."""
    config = Config(7, 8, 16, 5, 2, 1, 4, sliding_window=window)
    matrices = 5 * 8 * ((2 + 1 + 1 + 2) * 4 + 3 * 16)
    expected = 6 * matrices * 8 + 5 * 12 * 2 * 4 * visible + 6 * 7 * 8 * 5
    assert train_flops(config, pair_of(3, 2, 3)) == expected


def test_tokens_per_second_count_each_prompt_once(monkeypatch):
    """Pairs of 3 + 2 + 4 and 1 + 1 + 5 tokens in 4 seconds; MFU is a share of all ranks' peak."""
    processes.start_ranks(Settings(device="cpu"))
    config, pairs = Config(7, 8, 16, 5, 2, 1, 4), [pair_of(3, 2, 4), pair_of(1, 1, 5)]
    device = torch.device("cpu")
    rates = run.speed(config, pairs, 4.0, device)
    assert rates == {"tokens_per_second": 4.0, "pairs_per_second": 0.5}
    monkeypatch.setattr(run, "peak_flops", lambda device: 1e6)
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 2)
    flops = sum(train_flops(config, pair) for pair in pairs)
    assert run.speed(config, pairs, 4.0, device)["mfu"] == pytest.approx(flops / 4 / 1e6 / 2)


@pytest.mark.parametrize("batch_size", [3, 7, 100])
def test_a_cached_reference_scores_the_last_pair_of_an_epoch(batch_size):
    """The last step of an epoch is short, and its pairs need scores as the others do."""
    settings = Settings(device="cpu", batch_size=batch_size)
    processes.start_ranks(settings)
    pairs, held_out = [pair_of(2, 1, 1) for _ in range(7)], [pair_of(2, 1, 1) for _ in range(2)]
    for index, pair in enumerate([*pairs, *held_out]):
        pair.index = index
    steps = [range(i, min(i + batch_size, 7)) for i in range(0, 7, batch_size)]
    inputs = SimpleNamespace(
        pairs=pairs,
        held_out=held_out,
        steps=2 * steps,
        config=Config(7, 8, 16, 5, 2, 1, 4),
        batch=lambda step: [pairs[i] for i in (2 * steps)[step]],
    )
    table = torch.zeros(9, 2)

    def score(pairs: list[Pair]) -> torch.Tensor:
        return torch.tensor([[1.0 + pair.index, 2.0] for pair in pairs])

    reference.fill_table(table, score, inputs, settings)
    assert table.tolist() == [[1.0 + i, 2.0] for i in range(9)]


def test_ties_are_first_in_neither_ranking():
    """A tie of one ranking leaves the pair to the other; a tie of both is neither."""
    cells = analyze.contingency(np.array([0, 0, 1, 0, -1]), np.array([0, 1, 0, -1, 0]))
    expected = {"both": 0.0, "reward only": 0.2, "likelihood only": 0.2, "neither": 0.6}
    assert cells == pytest.approx(expected)


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.5, 2), (0.75, 3), (0.7501, 4), (1.0, 4)])
def test_top_p_at_its_edge(top_p, kept):
    """Four tokens have exactly ¼ each: two of them reach ½, and a third would be one too many."""
    draws = torch.arange(64, dtype=torch.float64) / 64
    picked = sample.pick(torch.zeros(64, 4), draws, 1.0, top_p, 0)
    assert len(set(picked.tolist())) == kept


def test_every_answer_has_a_stream_of_its_own(monkeypatch):
    """Questions, turns and samples draw different random numbers."""
    tokenizer, used = Tokenizer(TOY / "checkpoint"), []
    [answer] = tokenizer.encode_responses(["the fox runs away ."])

    def decode(model, prompts, stop_ids, streams, **options):
        used.extend(streams)
        yield from ((i, t, t in stop_ids) for i in range(len(prompts)) for t in answer)

    monkeypatch.setattr(sample, "decode", decode)
    asked = [{"role": "user", "content": "describe the fox ."}]
    question = Question("here", {}, asked, ["describe the owl ."], 1.0)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    bar = SimpleNamespace(update=lambda n: None)
    for first in (0, 2):  # two groups of two questions
        sample.respond(model, tokenizer, [question] * 2, first, 3, bar)
    assert len(set(used)) == len(used) == 4 * 2 * 3


def test_the_longest_prompts_are_decoded_first():
    """A step costs as much as its longest row, so rows of like lengths share a step."""
    model = checkpoint.load(TOY / "checkpoint")
    prompts = [[5], [5, 6, 7], [5, 6]]
    order = [index for index, *_ in sample.decode(model, prompts, set(), 1, batch_size=1)]
    assert order == [1, 2, 0]


def test_a_prompt_leaves_room_for_one_token():
    tokenizer, prompts = Tokenizer(TOY / "checkpoint"), [("here:1", "describe the fox .")]
    [ids] = tokenizer.encode_prompts([tokenizer.prompt_text(prompts[0][1], "")])
    room = SimpleNamespace(max_position_embeddings=len(ids) + 1)
    assert sample.encode_prompts(tokenizer, room, prompts) == [ids]
    room.max_position_embeddings -= 1
    with pytest.raises(DataError, match=f"here:1: {len(ids)} tokens"):
        sample.encode_prompts(tokenizer, room, prompts)


@pytest.mark.parametrize("stops", [True, False])
def test_an_answer_is_finished_if_its_last_token_ends_a_turn(stops, monkeypatch):
    tokenizer = Tokenizer(TOY / "checkpoint")
    answer = tokenizer.encode_responses(["the fox runs away ."])[0][: None if stops else -1]
    monkeypatch.setattr(sample, "decode", lambda *_, **__: ((0, t, False) for t in answer))
    question = Question("here", {}, [{"role": "user", "content": "describe the fox ."}], [], 1.0)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    bar = SimpleNamespace(update=lambda n: None)
    [[[found]]] = sample.respond(model, tokenizer, [question], 0, 1, bar)
    assert found.finished is stops


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (-math.inf, 1.0), (1.0, math.inf)])
def test_no_step_is_taken_if_loss_or_norm_is_not_finite(loss, norm):
    pair = Pair(np.ones(1, np.int32), (), "pairs.jsonl:7")
    with pytest.raises(FloatingPointError, match="step 3: loss .*; pairs.jsonl:7"):
        train.stop_if_not_finite(2, [pair], {"loss": loss, "grad_norm": norm})
    train.stop_if_not_finite(2, [pair], {"loss": 1.0, "grad_norm": 1.0})


@pytest.mark.parametrize("average", [-1e-5, -1e-4, -0.5])
def test_odds_of_likely_responses(average):
    """ORPO's log-odds are exact up to p = 1 − 10⁻⁶."""
    logps, lengths = torch.tensor([average], dtype=torch.float64), torch.ones(1)
    _, odds, _ = baselines.orpo_loss(logps, logps, lengths, lengths, 0.1)
    assert odds.item() == pytest.approx(average - math.log(-math.expm1(average)))


def test_an_answer_is_on_disk_before_the_next_is_made(tmp_path):
    """A kill costs the answers that are being made, and no other."""
    question = Question("here", {}, [{"role": "user", "content": "why ?"}], [], 1.0)
    out, seen = AnswerFile(tmp_path / "out.jsonl", [question] * 2, {"num_samples": 1}), []
    out.file, out.records = out.lock(overwrite=False), []

    def answered():
        for _ in range(2):
            seen.append(out.work.read_text().count("because"))
            yield question, [[Answer("because", True)]]

    with out.file:
        out.write(answered())
    assert seen == [0, 1]


@pytest.mark.parametrize("count, world", [(7, 3), (2, 4), (0, 2), (6, 2)])
def test_the_slices_of_all_ranks_are_the_whole(count, world, monkeypatch):
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: world)
    items, slices = list(range(count)), []
    for rank in range(world):
        monkeypatch.setattr(processes.dist, "get_rank", lambda rank=rank: rank)
        slices += processes.slice_of(items)
    assert slices == items


@pytest.mark.parametrize("mine, theirs", [(False, True), (True, False), (False, False)])
def test_one_rank_that_says_so_is_enough(mine, theirs, monkeypatch):
    ways = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum}

    def all_reduce(flags: torch.Tensor, way: dist.ReduceOp) -> None:
        flags.copy_(ways[way](flags, torch.tensor(float(theirs))))

    monkeypatch.setattr(processes.dist, "all_reduce", all_reduce)
    assert processes.any_rank(mine, torch.device("cpu")) is (mine or theirs)


def test_a_digest_of_tokens_knows_where_a_response_ends():
    """The same tokens, cut elsewhere into prompt and responses, are other pairs."""
    one, two, three = (np.full(n, 5, np.int32) for n in (1, 2, 3))
    cuts = [[two, one], [one, two], [three], [one, one, one]]
    assert len({tokens.digest([cut]) for cut in cuts}) == len(cuts)


@pytest.mark.parametrize("kind, positions", [("mistral", 2**17), ("llama", 2048)])
def test_positions_that_config_json_leaves_open(kind, positions, tmp_path):
    """They are transformers' defaults."""
    raw = json.loads((TOY / "checkpoint" / "config.json").read_text())
    del raw["max_position_embeddings"]
    raw |= {"model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"sliding_window": None}))
    assert checkpoint.read_config(tmp_path).max_position_embeddings == positions


def test_scores_of_many_pairs_stay_with_their_pairs(monkeypatch):
    """Pairs are scored in groups of 256, and each group in any order."""
    pairs = [Pair(np.ones(1, np.int32), (np.ones(1 + i % 7, np.int32),) * 2) for i in range(300)]

    def response_logps(model, pairs):
        lengths = torch.tensor([[len(r) for r in pair.responses] for pair in pairs])
        return -lengths.float(), lengths

    monkeypatch.setattr(analyze.train, "response_logps", response_logps)
    logps, lengths = analyze.score_pairs(None, pairs, 64)
    assert lengths[:, 0].tolist() == [1 + i % 7 for i in range(300)]
    assert torch.equal(logps, -lengths.float())


# --------------------------------------------------------------------------------------------------
# Against transformers; last, because importing it takes seconds


def test_bf16_is_no_further_from_float64_than_transformers(tmp_path):
    """The log-probabilities of 300 tokens in bfloat16, against float64 with the same weights."""
    transformers = pytest.importorskip("transformers", minversion="4.56")
    config = tiny.FAMILIES["llama-3"] | {"max_position_embeddings": 512}
    folder = tiny.write(tmp_path, config, torch.bfloat16)
    prompt, response = np.split(np.random.default_rng(0).integers(3, 97, 300), [20])
    packed = pack([Pair(prompt, (response,))])
    tensors = {name: torch.from_numpy(value) for name, value in packed.items()}
    ours = checkpoint.load(folder, dtype=torch.bfloat16)(**tensors)
    exact = checkpoint.load(folder, dtype=torch.float64)(**tensors)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    logits = peer(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits[0]
    theirs = logits.float().log_softmax(-1)[range(19, 299), response]
    assert error(ours, exact) <= 1.1 * error(theirs, exact)
