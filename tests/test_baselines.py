"""Check the baselines' losses by hand, for properties of any numbers, and in runs on the toy.

The formulas are in `methods/baselines.py`. `test_simpo.py` does the same for SimPO and DPO.
"""

import json
import math
from functools import partial

import pytest
import torch
from test_train import TOY, first_lines, run, write

from methods import baselines, objectives
from methods.baselines import (
    cpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    rdpo_loss,
    rrhf_loss,
    slic_loss,
)
from methods.objectives import OBJECTIVES
from runtime.settings import read_settings
from simpo import dpo_loss, simpo_loss

LN2, LN3 = math.log(2), math.log(3)
BASELINES = [name for name in OBJECTIVES if name not in ("simpo", "dpo", "sft")]


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lengths(chosen, rejected) -> dict[str, torch.Tensor]:
    return {"chosen_lengths": chosen, "rejected_lengths": rejected}


def reference(chosen, rejected) -> dict[str, torch.Tensor]:
    return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def values_and_slopes(loss, chosen: float, rejected: float) -> tuple[float, ...]:
    """Return (loss, chosen reward, rejected reward, dL/d log π_w, dL/d log π_l) of one pair."""
    chosen, rejected = t(chosen).requires_grad_(), t(rejected).requires_grad_()
    losses, *rewards = loss(chosen, rejected)
    losses.sum().backward()
    return losses.item(), *(r.item() for r in rewards), chosen.grad.item(), rejected.grad.item()


# --------------------------------------------------------------------------------------------------
# By hand: loss, rewards, slopes


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        # averages −1 and −2: ranked right, so only λ · 3 nats are left, and their slope
        ((-3.0, 3.0), (-8.0, 4.0), (1.5, -1.0, -2.0, -0.5, 0.0)),
        # the other way round: 1 nat per token too little, and λ · 8; slopes ∓1/|y| besides −λ
        ((-8.0, 4.0), (-3.0, 3.0), (1.0 + 4.0, -2.0, -1.0, -1 / 4 - 0.5, 1 / 3)),
    ],
)
def test_rrhf(chosen, rejected, expected):
    """RRHF penalises a wrong order of the averages per token, and always adds its SFT term."""
    loss = partial(rrhf_loss, **lengths(t(chosen[1]), t(rejected[1])), lam=0.5)
    assert values_and_slopes(loss, chosen[0], rejected[0]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "delta, expected",
    [
        # won by 5 nats where 1 is wanted: the hinge is silent, λ · 3 is not
        (1.0, (1.5, -3.0, -8.0, -0.5, 0.0)),
        # won by 5 nats where 7 are wanted
        (7.0, (2.0 + 1.5, -3.0, -8.0, -1.5, 1.0)),
    ],
)
def test_slic(delta, expected):
    """SLiC-HF penalises a lead below δ nats, and always adds its SFT term."""
    loss = partial(slic_loss, delta=delta, lam=0.5)
    assert values_and_slopes(loss, -3.0, -8.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "normalized, expected",
    [
        # ρ 2 and −1, a lead of 3 where 1/(2τ) = 2: 1 too much, squared
        (False, (1.0, 0.5, -0.25, 2.0, -2.0)),
        # per token ½ and −½, a lead of 1: 1 too little; slopes over 4 and 2
        (True, (1.0, 0.125, -0.125, -0.5, 1.0)),
    ],
)
def test_ipo(normalized, expected):
    """IPO squares the distance between the lead and 1/(2τ), in nats or in nats per token."""
    inputs = reference(t(-12.0), t(-8.0)) | lengths(t(4.0), t(2.0))
    loss = partial(ipo_loss, **inputs, tau=0.25, length_normalized=normalized)
    assert values_and_slopes(loss, -10.0, -9.0) == pytest.approx(expected)


def test_cpo():
    """CPO is DPO's loss without a reference, plus its SFT term."""
    # β · 5 nats = 1: ln(1 + 1/e) = 0.313262 and σ(−1) = 0.268941. The SFT term adds λ · 3.
    sigma = 0.2689414214
    expected = (0.3132616875 + 1.5, -0.6, -1.6, -0.2 * sigma - 0.5, 0.2 * sigma)
    loss = partial(cpo_loss, beta=0.2, lam=0.5)
    assert values_and_slopes(loss, -3.0, -8.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "z_ref, weights, loss, slopes",
    [
        # σ(−ln 3) = ¼ twice; its slope is ¼ · ¾
        (0.0, (1.0, 1.0), 0.25 + 0.25, (-3 / 16, 3 / 16)),
        # chosen no better than the mean: ½; rejected at −2 ln 3: 1/10
        (LN3, (1.0, 1.0), 0.5 + 0.1, (-1 / 4, 0.09)),
        (LN3, (2.0, 3.0), 1.0 + 0.3, (-1 / 2, 0.27)),
        # a negative estimate counts as 0
        (-5.0, (1.0, 1.0), 0.25 + 0.25, (-3 / 16, 3 / 16)),
    ],
)
def test_kto(z_ref, weights, loss, slopes):
    """KTO compares each reward with z_ref, and weighs the two terms apart."""
    # With β = ½ ln 3, ρ of 2 and −2 are rewards of ln 3 and −ln 3.
    beta = LN3 / 2
    expected = (loss, LN3, -LN3, *(beta * slope for slope in slopes))
    options = {"beta": beta, "z_ref": z_ref, "lambda_w": weights[0], "lambda_l": weights[1]}
    pair = partial(kto_loss, **reference(t(-12.0), t(-8.0)), **options)
    assert values_and_slopes(pair, -10.0, -10.0) == pytest.approx(expected)


def test_orpo():
    """ORPO adds λ times the negative log-sigmoid of the log odds ratio to the average SFT loss."""
    # p is ¾ over 4 tokens and ½ over 2, so the odds are 3 and 1, σ(ln 3) = ¾, and the loss is
    # (1 + λ) ln 4/3. A token's log-odds rise by 1/(1 − p) per nat. That gives slopes of
    # λ · ¼ · 4 / 4 for the chosen and λ · ¼ · 2 / 2 for the rejected response.
    loss = partial(orpo_loss, **lengths(t(4.0), t(2.0)), lam=0.5)
    expected = (1.5 * math.log(4 / 3), LN3, 0.0, -1 / 4 - 0.5 / 4, 0.5 / 4)
    chosen, rejected = 4 * math.log(3 / 4), 2 * math.log(1 / 2)
    assert values_and_slopes(loss, chosen, rejected) == pytest.approx(expected)


def test_rdpo():
    """R-DPO adds α per token of difference in length to DPO's logit."""
    # DPO's logit is 0.3 (β 0.1, ρ 2 and −1). α · 3 tokens more make it 0.6:
    # ln(1 + e^−0.6) = 0.437488, σ(−0.6) = 0.354344.
    inputs = reference(t(-12.0), t(-8.0)) | lengths(t(12.0), t(9.0))
    loss = partial(rdpo_loss, **inputs, beta=0.1, alpha=0.1)
    expected = (0.4374878504, 0.2, -0.1, -0.1 * 0.3543436938, 0.1 * 0.3543436938)
    assert values_and_slopes(loss, -10.0, -9.0) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# For any numbers

GENERATOR = torch.Generator().manual_seed(0)
LOGPS = [-10 * torch.rand(6, generator=GENERATOR, dtype=torch.float64) - 0.1 for _ in range(4)]
LENGTHS = [torch.randint(1, 9, (6,), generator=GENERATOR) for _ in range(2)]
BY_LENGTH, BY_REFERENCE = lengths(*LENGTHS), reference(*LOGPS[2:])
LOSSES = {  # functions of the policy's log-probabilities alone
    "rrhf": partial(rrhf_loss, **BY_LENGTH, lam=0.3),
    "slic": partial(slic_loss, delta=1.0, lam=0.3),
    "ipo": partial(ipo_loss, **BY_REFERENCE, **BY_LENGTH, tau=0.2),
    "ipo per token": partial(
        ipo_loss, **BY_REFERENCE, **BY_LENGTH, tau=0.2, length_normalized=True
    ),
    "cpo": partial(cpo_loss, beta=0.3, lam=0.3),
    "kto": partial(kto_loss, **BY_REFERENCE, beta=0.3, z_ref=0.2),
    "orpo": partial(orpo_loss, **BY_LENGTH, lam=0.3),
    "rdpo": partial(rdpo_loss, **BY_REFERENCE, **BY_LENGTH, beta=0.3, alpha=0.05),
}


def assert_gradients_shapes_and_dtypes(loss, inputs) -> None:
    """Check a loss at six float64 pairs, inputs = (chosen, rejected) log-probabilities."""

    def losses_of(w, l):
        return loss(w, l)[0]

    logps = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(losses_of, logps)
    losses, *rewards = loss(*logps)
    assert losses.requires_grad and not any(r.requires_grad for r in rewards)
    assert all(x.shape == (6,) and x.dtype == torch.float64 for x in (losses, *rewards))
    for jacobian in torch.autograd.functional.jacobian(losses_of, tuple(logps)):
        assert torch.equal(jacobian, jacobian.diag().diag())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_shapes_and_dtypes(name):
    """Gradients are exact, outputs are [pairs] of the input's dtype, and pairs are independent."""
    assert_gradients_shapes_and_dtypes(LOSSES[name], LOGPS[:2])


@pytest.mark.parametrize("name", [name for name in LOSSES if "ipo" not in name])
def test_more_for_the_chosen_and_less_for_the_rejected_never_costs(name):
    """A likelier chosen response lowers the loss; a less likely rejected one never raises it."""
    # KTO's rejected term with the printed plus, or a swapped pair, fails this test. IPO is left out
    # because it alone has a lead that is too large.
    w, l = LOGPS[:2]
    losses, chosen, rejected = LOSSES[name](w, l)
    up, better, _ = LOSSES[name](w + 0.05, l)
    down, _, worse = LOSSES[name](w, l - 0.05)
    assert (up < losses).all() and (down <= losses).all()
    assert (better > chosen).all() and (worse < rejected).all()


@pytest.mark.parametrize("lead, loss", [(0.0, 25.0), (5.0, 0.0), (10.0, 25.0)])
def test_ipo_wants_a_lead_of_one_over_two_tau(lead, loss):
    """IPO's loss is 0 at a lead of 1/(2τ) nats and (1/(2τ))² at none and at twice that lead."""
    # τ = 0.1: the wanted lead is 5 nats.
    inputs = reference(t(-7.0), t(-9.0)) | lengths(t(3.0), t(4.0))
    losses, _, _ = ipo_loss(t(-7.0 + lead), t(-9.0), **inputs, tau=0.1)
    assert losses.item() == pytest.approx(loss)


def test_where_policy_is_the_reference():
    """Where policy and reference agree, KTO's loss is (λ_w + λ_l) / 2, and R-DPO's is ln 2."""
    same = [*LOGPS[:2], *LOGPS[:2]]
    kto, _, _ = kto_loss(*same, beta=0.1, z_ref=0.0)
    assert kto.tolist() == pytest.approx([1.0] * 6)
    rdpo, _, _ = rdpo_loss(*same, LENGTHS[0], LENGTHS[0], beta=0.1, alpha=0.5)
    assert rdpo.tolist() == pytest.approx([LN2] * 6)


def test_relatives():
    """Each objective equals a related one where their formulas meet."""
    assert_close = torch.testing.assert_close
    w, l, _, _ = LOGPS
    dpo, *rewards = dpo_loss(*LOGPS, beta=0.3)
    # R-DPO without α is DPO.
    assert_close(rdpo_loss(*LOGPS, *LENGTHS, beta=0.3, alpha=0.0)[0], dpo)
    # IPO's rewards are DPO's.
    for a, b in zip(ipo_loss(*LOGPS, *LENGTHS, tau=0.3)[1:], rewards):
        assert_close(a, b)
    # CPO without λ is DPO with a flat reference, and also SimPO without normalisation and margin.
    cpo = cpo_loss(w, l, beta=0.3, lam=0.0)[0]
    assert_close(cpo, dpo_loss(w, l, 0 * w - 3, 0 * l - 3, beta=0.3)[0])
    simpo = simpo_loss(w, l, *LENGTHS, beta=0.3, gamma=0.0, length_normalized=False)[0]
    assert_close(cpo, simpo)
    # SLiC-HF over averages, without δ, is RRHF.
    slic = slic_loss(w / LENGTHS[0], l / LENGTHS[1], delta=0.0, lam=0.0)[0]
    assert_close(rrhf_loss(w, l, *LENGTHS, lam=0.0)[0], slic)


@pytest.mark.parametrize("name", ["rrhf", "slic", "cpo"])
def test_the_sft_term_is_a_sum_over_the_response(name):
    """One more λ costs −log π_w more: the nats of the whole response, whatever its length."""
    loss = {
        "rrhf": partial(rrhf_loss, **BY_LENGTH),
        "slic": partial(slic_loss, delta=1.0),
        "cpo": partial(cpo_loss, beta=0.1),
    }[name]
    more, less = loss(*LOGPS[:2], lam=1.5)[0], loss(*LOGPS[:2], lam=0.5)[0]
    torch.testing.assert_close(more - less, -LOGPS[0])


@pytest.mark.parametrize(
    "chosen, rejected", [(-1e4, -1e-3), (-1e-3, -1e4), (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)]
)
def test_extremes_in_float32(chosen, rejected):
    """Losses, rewards and gradients stay finite for certain and for hopeless responses."""
    # ORPO's odds of a certain response are infinite, and ∞ − ∞ is NaN. A sigmoid followed by a log,
    # in place of logsigmoid, gives log 0.
    one, ref = torch.ones(1), torch.full((1,), -2.0)
    by_length, by_reference = lengths(one, one), reference(ref, ref)
    for loss in (
        partial(rrhf_loss, **by_length, lam=1.0),
        partial(slic_loss, delta=1.0, lam=1.0),
        partial(ipo_loss, **by_reference, **by_length, tau=0.01),
        partial(cpo_loss, beta=10.0, lam=1.0),
        partial(kto_loss, **by_reference, beta=10.0, z_ref=1.0),
        partial(orpo_loss, **by_length, lam=1.0),
        partial(rdpo_loss, **by_reference, **by_length, beta=10.0, alpha=1.0),
    ):
        logps = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        losses, *rewards = loss(*logps)
        losses.sum().backward()
        assert all(x.isfinite().all() for x in (losses, *rewards, *(x.grad for x in logps)))


def test_broadcasting_is_refused():
    """Tensors of different shapes are an error that names the shape."""
    # [pairs] against [pairs, 1] would compare every pair with every other and still return numbers.
    x, wrong = torch.zeros(3), torch.zeros(3, 1)
    for call in (
        lambda: rrhf_loss(x, x, x + 1, wrong + 1, 1.0),
        lambda: slic_loss(x, wrong, 1.0, 1.0),
        lambda: ipo_loss(x, x, wrong, x, x, x, 0.1),
        lambda: cpo_loss(wrong, x, 0.1, 1.0),
        lambda: kto_loss(x, x, x, wrong, 0.1, 0.0),
        lambda: orpo_loss(x, x, wrong + 1, x + 1, 0.1),
        lambda: rdpo_loss(x, x, x, x, wrong, x, 0.1, 0.1),
    ):
        with pytest.raises(AssertionError, match=r"\(3, 1\)"):
            call()


# --------------------------------------------------------------------------------------------------
# In a run


@pytest.mark.parametrize("objective", BASELINES)
def test_each_learns_on_the_toy(monkeypatch, tmp_path, objective):
    """With its toy settings, each objective stays finite and ranks more held-out pairs right."""
    few = first_lines(TOY / "heldout.jsonl", 100, tmp_path / "few.jsonl")
    of_toy = dict.fromkeys(("model", "data", "batch_size", "lr"))  # left to toy/OBJECTIVE.toml
    steps = 48 if objective in ("slic", "cpo") else 20  # their SFT term acts first
    flags = of_toy | {"objective": objective, "max_steps": steps, "eval_data": few}
    rows = run(monkeypatch, tmp_path / "run", **flags)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    first, last = rows[0], rows[-1]
    assert len(rows) == steps + 2 and last["eval_loss"] < first["eval_loss"]
    accuracy = "eval_rewards/accuracies"
    assert last[accuracy] > max(0.5, first[accuracy]) + 0.02
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"]


def test_kto_compares_with_the_mean_reward_of_the_step(monkeypatch, tmp_path):
    """z_ref is the mean reward of the whole step, however it is spread over micro-batches."""
    # SFT also lifts these rejected responses, so the mean rises above 0.
    lines = (TOY / "heldout.jsonl").read_text().splitlines()[:12]
    pairs = [json.loads(line) for line in lines]
    pairs = [pair | {"rejected": pair["chosen"].removesuffix(" .")} for pair in pairs]
    seen = []

    def recording_loss(*args):
        seen.append(args[-1])
        return baselines.kto_loss(*args)

    monkeypatch.setattr(objectives, "kto_loss", recording_loss)
    flags = {"objective": "kto", "beta": 0.5, "sft_weight": 3, "microbatch_tokens": 200}
    flags |= {"data": write(tmp_path / "few.jsonl", *pairs), "batch_size": 12, "epochs": 3}
    rows = run(monkeypatch, tmp_path / "run", **flags, max_steps=None, lr=1e-3)
    # Each step runs its micro-batches twice: once for the mean reward, once to learn.
    parts = len(seen) // 6
    assert parts > 1 and len(seen) == 6 * parts
    means = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in rows]
    assert means[0] == 0 and means[-1] > 0.1
    for step, mean in enumerate(means):
        start = 2 * step * parts
        first, second = seen[start : start + parts], seen[start + parts : start + 2 * parts]
        assert first == [0.0] * parts
        assert second == pytest.approx([mean] * parts, abs=1e-6)


def test_hyperparameters_belong_to_their_objective(capsys):
    """A flag that the objective does not use is an error; an absent one takes its default."""
    common = ["--model", "m", "--data", "d", "--objective"]
    for flags, words in (
        (["simpo", "--lam", "1"], ["--lam:", "of simpo", "rrhf, slic, cpo, orpo"]),
        (["kto", "--no-length-norm"], ["--length-norm:", "of kto", "simpo, dpo, ipo"]),
        (["orpo", "--beta", "1"], ["--beta:", "of orpo", "simpo, dpo, ipo, cpo, kto, rdpo"]),
        (["cpo", "--gamma-beta-ratio", "0"], ["--gamma-beta-ratio:", "of cpo", "of simpo"]),
        (["alphapo", "--alpha", "1"], ["--alpha:", "of alphapo", "of rdpo"]),
        (["kto", "--label-smoothing", "0.1"], ["--label-smoothing:", "of kto", "simpo, dpo"]),
        (["simpo", "--reference", "cached"], ["--reference:", "of simpo", "dpo, ipo, kto, rdpo"]),
        (["slic", "--delta", "-1"], ["--delta:", "0 or a positive number"]),
        (["rdpo", "--alpha", "inf"], ["--alpha:", "finite number"]),
    ):
        with pytest.raises(SystemExit) as exit:
            read_settings(common + flags)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit.value.code == 2 and all(word in line for word in words), line
    for name, objective in OBJECTIVES.items():
        settings = read_settings([*common, name])
        values = {key: getattr(settings, key) for key in objective.defaults}
        assert values == objective.defaults
