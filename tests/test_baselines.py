"""The baselines' losses against numbers worked by hand, what must hold for any numbers, and each in a run on the toy."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import baselines
import train
from baselines import cpo_loss, ipo_loss, kto_loss, orpo_loss, rdpo_loss, rrhf_loss, slic_loss
from simpo import dpo_loss, simpo_loss

TOY = Path(__file__).resolve().parent.parent / "toy"
LN2, LN3 = math.log(2), math.log(3)
BASELINES = [name for name in train.HYPERPARAMETERS if name not in ("simpo", "dpo", "sft")]


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def values_and_slopes(loss, chosen: float, rejected: float) -> tuple[float, float, float, float, float]:
    """(loss, chosen reward, rejected reward, dL/d log π_w, dL/d log π_l) of one pair."""
    chosen, rejected = t(chosen).requires_grad_(), t(rejected).requires_grad_()
    losses, *rewards = loss(chosen, rejected)
    losses.sum().backward()
    return losses.item(), *(r.item() for r in rewards), chosen.grad.item(), rejected.grad.item()


# ---------------------------------------------------------------------------------------------------------------------
# By hand: loss, rewards, slopes


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        # averages −1 and −2: ranked right, so only λ · 3 nats are left, and their slope
        ((-3.0, 3.0), (-8.0, 4.0), (1.5, -1.0, -2.0, -0.5, 0.0)),
        # the other way round: 1 nat a token too little, and λ · 8; slopes ∓1/|y| besides −λ
        ((-8.0, 4.0), (-3.0, 3.0), (1.0 + 4.0, -2.0, -1.0, -1 / 4 - 0.5, 1 / 3)),
    ],
)
def test_rrhf(chosen, rejected, expected):
    loss = lambda w, l: rrhf_loss(w, l, t(chosen[1]), t(rejected[1]), lam=0.5)
    assert values_and_slopes(loss, chosen[0], rejected[0]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "delta, expected",
    [
        (1.0, (1.5, -3.0, -8.0, -0.5, 0.0)),  # won by 5 of 1 nats wanted: the hinge is silent, λ · 3 is not
        (7.0, (2.0 + 1.5, -3.0, -8.0, -1.5, 1.0)),  # by 5 of 7
    ],
)
def test_slic(delta, expected):
    assert values_and_slopes(lambda w, l: slic_loss(w, l, delta, lam=0.5), -3.0, -8.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "normalized, expected",
    [
        (False, (1.0, 0.5, -0.25, 2.0, -2.0)),  # ρ 2 and −1, a lead of 3 where 1/(2τ) = 2: 1 too much, squared
        (True, (1.0, 0.125, -0.125, -0.5, 1.0)),  # per token ½ and −½, a lead of 1: 1 too little; slopes over 4 and 2
    ],
)
def test_ipo(normalized, expected):
    loss = lambda w, l: ipo_loss(w, l, t(-12.0), t(-8.0), t(4.0), t(2.0), tau=0.25, length_normalized=normalized)
    assert values_and_slopes(loss, -10.0, -9.0) == pytest.approx(expected)


def test_cpo():
    """β · 5 nats = 1: ln(1 + 1/e) = 0.313262, σ(−1) = 0.268941; and λ · 3."""
    expected = (0.3132616875 + 1.5, -0.6, -1.6, -0.2 * 0.2689414214 - 0.5, 0.2 * 0.2689414214)
    assert values_and_slopes(lambda w, l: cpo_loss(w, l, beta=0.2, lam=0.5), -3.0, -8.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "z_ref, weights, loss, slopes",
    [
        (0.0, (1.0, 1.0), 0.25 + 0.25, (-3 / 16, 3 / 16)),  # σ(−ln 3) = ¼ twice; its slope ¼ · ¾
        (LN3, (1.0, 1.0), 0.5 + 0.1, (-1 / 4, 0.09)),  # chosen no better than all: ½; rejected at −2 ln 3: 1/10
        (LN3, (2.0, 3.0), 1.0 + 0.3, (-1 / 2, 0.27)),
        (-5.0, (1.0, 1.0), 0.25 + 0.25, (-3 / 16, 3 / 16)),  # an estimate below 0 is taken for 0
    ],
)
def test_kto(z_ref, weights, loss, slopes):
    """ρ of 2 and −2 with β = ½ ln 3: rewards ln 3 and −ln 3."""
    beta = LN3 / 2
    expected = (loss, LN3, -LN3, *(beta * slope for slope in slopes))
    pair = lambda w, l: kto_loss(w, l, t(-12.0), t(-8.0), beta, z_ref, *weights)
    assert values_and_slopes(pair, -10.0, -10.0) == pytest.approx(expected)


def test_orpo():
    """p of ¾ over 4 tokens and ½ over 2: odds 3 and 1, σ(ln 3) = ¾. The loss is (1 + λ) ln 4/3.

    Slopes: a token's log-odds rise by 1/(1 − p) per nat, so λ · ¼ · 4 / 4 on the chosen and λ · ¼ · 2 / 2 on the rejected.
    """
    loss = lambda w, l: orpo_loss(w, l, t(4.0), t(2.0), lam=0.5)
    expected = (1.5 * math.log(4 / 3), LN3, 0.0, -1 / 4 - 0.5 / 4, 0.5 / 4)
    assert values_and_slopes(loss, 4 * math.log(3 / 4), 2 * math.log(1 / 2)) == pytest.approx(expected)


def test_rdpo():
    """DPO's logit of 0.3 (β 0.1, ρ 2 and −1), and α · 3 tokens more: ln(1 + e^−0.6) = 0.437488, σ(−0.6) = 0.354344."""
    loss = lambda w, l: rdpo_loss(w, l, t(-12.0), t(-8.0), t(12.0), t(9.0), beta=0.1, alpha=0.1)
    expected = (0.4374878504, 0.2, -0.1, -0.1 * 0.3543436938, 0.1 * 0.3543436938)
    assert values_and_slopes(loss, -10.0, -9.0) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# For any numbers

GENERATOR = torch.Generator().manual_seed(0)
LOGPS = [-10 * torch.rand(6, generator=GENERATOR, dtype=torch.float64) - 0.1 for _ in range(4)]
LENGTHS = [torch.randint(1, 9, (6,), generator=GENERATOR) for _ in range(2)]
LOSSES = {  # functions of the policy's log-probabilities alone
    "rrhf": lambda w, l: rrhf_loss(w, l, *LENGTHS, lam=0.3),
    "slic": lambda w, l: slic_loss(w, l, delta=1.0, lam=0.3),
    "ipo": lambda w, l: ipo_loss(w, l, *LOGPS[2:], *LENGTHS, tau=0.2),
    "ipo per token": lambda w, l: ipo_loss(w, l, *LOGPS[2:], *LENGTHS, tau=0.2, length_normalized=True),
    "cpo": lambda w, l: cpo_loss(w, l, beta=0.3, lam=0.3),
    "kto": lambda w, l: kto_loss(w, l, *LOGPS[2:], beta=0.3, z_ref=0.2),
    "orpo": lambda w, l: orpo_loss(w, l, *LENGTHS, lam=0.3),
    "rdpo": lambda w, l: rdpo_loss(w, l, *LOGPS[2:], *LENGTHS, beta=0.3, alpha=0.05),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_what_comes_back(name):
    """[pairs] each, in the dtype given; rewards without gradient; pairs do not touch each other."""
    logps = [x.clone().requires_grad_() for x in LOGPS[:2]]
    assert torch.autograd.gradcheck(lambda w, l: LOSSES[name](w, l)[0], logps)
    losses, *rewards = LOSSES[name](*logps)
    assert losses.requires_grad and not any(r.requires_grad for r in rewards)
    assert all(x.shape == (6,) and x.dtype == torch.float64 for x in (losses, *rewards))
    for jacobian in torch.autograd.functional.jacobian(lambda w, l: LOSSES[name](w, l)[0], tuple(logps)):
        assert torch.equal(jacobian, jacobian.diag().diag())


@pytest.mark.parametrize("name", [name for name in LOSSES if "ipo" not in name])
def test_more_for_the_chosen_and_less_for_the_rejected_never_costs(name):
    """KTO's rejected term printed with a plus, or a swapped pair, fails here. IPO alone has a lead that is too large."""
    w, l = LOGPS[:2]
    losses, chosen, rejected = LOSSES[name](w, l)
    up, better, _ = LOSSES[name](w + 0.05, l)
    down, _, worse = LOSSES[name](w, l - 0.05)
    assert (up < losses).all() and (down <= losses).all()
    assert (better > chosen).all() and (worse < rejected).all()


@pytest.mark.parametrize("lead, loss", [(0.0, 25.0), (5.0, 0.0), (10.0, 25.0)])
def test_ipo_wants_a_lead_of_one_over_two_tau(lead, loss):
    """τ = 0.1: where policy and reference agree 1/(2τ)² = 25, at a lead of 5 nats nothing, at 10 as much again."""
    losses, _, _ = ipo_loss(t(-7.0 + lead), t(-9.0), t(-7.0), t(-9.0), t(3.0), t(4.0), tau=0.1)
    assert losses.item() == pytest.approx(loss)


def test_where_policy_is_the_reference():
    same = [*LOGPS[:2], *LOGPS[:2]]
    assert kto_loss(*same, beta=0.1, z_ref=0.0)[0].tolist() == pytest.approx([1.0] * 6)
    assert rdpo_loss(*same, LENGTHS[0], LENGTHS[0], beta=0.1, alpha=0.5)[0].tolist() == pytest.approx([LN2] * 6)


def test_relatives():
    """What the objectives share: R-DPO without α is DPO, CPO without λ is DPO with a flat reference and also SimPO
    unnormalised, IPO's rewards are DPO's, and SLiC-HF over averages would be RRHF."""
    w, l, ref_w, ref_l = LOGPS
    dpo, *rewards = dpo_loss(*LOGPS, beta=0.3)
    torch.testing.assert_close(rdpo_loss(*LOGPS, *LENGTHS, beta=0.3, alpha=0.0)[0], dpo)
    for a, b in zip(ipo_loss(*LOGPS, *LENGTHS, tau=0.3)[1:], rewards):
        torch.testing.assert_close(a, b)
    cpo = cpo_loss(w, l, beta=0.3, lam=0.0)[0]
    torch.testing.assert_close(cpo, dpo_loss(w, l, 0 * w - 3, 0 * l - 3, beta=0.3)[0])
    torch.testing.assert_close(cpo, simpo_loss(w, l, *LENGTHS, beta=0.3, gamma=0.0, length_normalized=False)[0])
    averages = w / LENGTHS[0], l / LENGTHS[1]
    torch.testing.assert_close(rrhf_loss(w, l, *LENGTHS, lam=0.0)[0], slic_loss(*averages, delta=0.0, lam=0.0)[0])


@pytest.mark.parametrize("name", ["rrhf", "slic", "cpo"])
def test_the_sft_term_is_a_sum_over_the_response(name):
    """One λ more costs −log π_w more: nats of the whole response, however long it is."""
    with_lam = {
        "rrhf": lambda lam: rrhf_loss(*LOGPS[:2], *LENGTHS, lam),
        "slic": lambda lam: slic_loss(*LOGPS[:2], 1.0, lam),
        "cpo": lambda lam: cpo_loss(*LOGPS[:2], 0.1, lam),
    }[name]
    torch.testing.assert_close(with_lam(1.5)[0] - with_lam(0.5)[0], -LOGPS[0])


@pytest.mark.parametrize("chosen, rejected", [(-1e4, -1e-3), (-1e-3, -1e4), (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_extremes_in_float32(chosen, rejected):
    """ORPO's odds of a certain response are infinite, and ∞ − ∞ no number; a forgotten logsigmoid gives log 0."""
    one, ref = torch.ones(1), torch.full((1,), -2.0)
    for loss in (
        lambda w, l: rrhf_loss(w, l, one, one, 1.0),
        lambda w, l: slic_loss(w, l, 1.0, 1.0),
        lambda w, l: ipo_loss(w, l, ref, ref, one, one, 0.01),
        lambda w, l: cpo_loss(w, l, 10.0, 1.0),
        lambda w, l: kto_loss(w, l, ref, ref, 10.0, 1.0),
        lambda w, l: orpo_loss(w, l, one, one, 1.0),
        lambda w, l: rdpo_loss(w, l, ref, ref, one, one, 10.0, 1.0),
    ):
        logps = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        losses, *rewards = loss(*logps)
        losses.sum().backward()
        assert all(x.isfinite().all() for x in (losses, *rewards, *(x.grad for x in logps)))


def test_broadcasting_is_refused():
    """[pairs] against [pairs, 1] would compare every pair with every other and still return a number."""
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


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def run(monkeypatch, out: Path, *flags: object) -> list[dict]:
    """`python train.py`, in this process; the rows of its metrics.jsonl."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), f"--out={out}"])
    train.main()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", BASELINES)
def test_each_learns_on_the_toy(monkeypatch, tmp_path, objective):
    """With the settings of toy/OBJECTIVE.toml: finite to the end, and more held-out pairs right than wrong."""
    (tmp_path / "few.jsonl").write_text("".join((TOY / "heldout.jsonl").open().readlines()[:200]))
    flags = [f"--objective={objective}", "--max-steps=20", f"--eval-data={tmp_path / 'few.jsonl'}"]
    rows = run(monkeypatch, tmp_path / "run", *flags)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    before, after = rows[0], rows[-1]
    assert len(rows) == 22 and after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/accuracies"] > max(0.5, before["eval_rewards/accuracies"]) + 0.02
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]


def test_kto_compares_with_the_mean_reward_of_the_step(monkeypatch, tmp_path):
    """However the step is spread over micro-batches; SFT lifts these rejected responses too, above 0."""
    pairs = [json.loads(line) for line in (TOY / "heldout.jsonl").read_text().splitlines()[:12]]
    pairs = [pair | {"rejected": pair["chosen"].removesuffix(" .")} for pair in pairs]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    seen = []
    monkeypatch.setattr(train, "kto_loss", lambda *x: seen.append(x[-1]) or baselines.kto_loss(*x))
    flags = ["--objective=kto", "--beta=0.5", f"--model={TOY / 'checkpoint'}", f"--data={tmp_path / 'few.jsonl'}"]
    flags += ["--batch-size=12", "--epochs=3", "--lr=1e-3", "--sft-weight=3", "--microbatch-tokens=200"]
    rows = run(monkeypatch, tmp_path / "run", *flags)
    parts = len(seen) // 6  # micro-batches of a step, which each step goes over twice: for the mean, then to learn
    assert parts > 1 and len(seen) == 6 * parts
    means = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in rows]
    assert means[0] == 0 and means[-1] > 0.1
    for step, mean in enumerate(means):
        first, second = seen[2 * step * parts :][:parts], seen[(2 * step + 1) * parts :][:parts]
        assert first == [0.0] * parts and second == pytest.approx([mean] * parts, abs=1e-6)


def test_hyperparameters_belong_to_their_objective(capsys):
    """A flag that would do nothing is an error; what is left out takes the objective's own value."""
    common = ["--model", "m", "--data", "d", "--objective"]
    for flags, line in (
        (["simpo", "--lam", "1"], "--lam: not a setting of simpo, but of rrhf, slic, cpo, orpo"),
        (["dpo", "--no-length-norm"], "--length-norm: not a setting of dpo, but of simpo, ipo"),
        (["orpo", "--beta", "1"], "--beta: not a setting of orpo, but of simpo, dpo, ipo, cpo, kto, rdpo"),
        (["cpo", "--gamma-beta-ratio", "0"], "--gamma-beta-ratio: not a setting of cpo, but of simpo"),
        (["kto", "--label-smoothing", "0.1"], "--label-smoothing: not a setting of kto, but of simpo, dpo"),
        (["slic", "--delta", "-1"], "--delta: expected 0 or a positive number"),
        (["rdpo", "--alpha", "inf"], "--alpha: not a finite number"),
    ):
        with pytest.raises(SystemExit) as exit:
            train.read_settings(common + flags)
        assert exit.value.code == 2 and line in capsys.readouterr().err
    for objective, values in train.HYPERPARAMETERS.items():
        settings = train.read_settings([*common, objective])
        assert {name: getattr(settings, name) for name in values} == values
