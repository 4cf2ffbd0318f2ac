"""Check the successors' losses by hand, in their limits, against TRL's formulas, and in a run.

The formulas are in `methods/successors.py`. `test_baselines.py` also trains each of them on the
toy, as it does for every entry of `OBJECTIVES`.
"""

import math
from functools import partial

import pytest
import torch
from test_baselines import (
    LENGTHS,
    LN2,
    LN3,
    LOGPS,
    assert_gradients_shapes_and_dtypes,
    lengths,
    reference,
    t,
    values_and_slopes,
)
from test_train import TOY, first_lines, run

from methods.baselines import kto_loss
from methods.objectives import OBJECTIVES, LossInputs
from methods.successors import alphapo_loss, apo_zero_loss, dpo_norm_loss, repo_loss, simper_loss
from runtime.settings import Settings
from simpo import dpo_loss, simpo_loss

assert_close = torch.testing.assert_close

# --------------------------------------------------------------------------------------------------
# By hand: loss, rewards, slopes


def test_dpo_norm():
    """DPO-norm divides each log-ratio by its length; so are the slopes divided."""
    # ρ is 2 over 4 tokens and −1 over 2, a lead of 1 per token: the logit is β = ln 3, σ is ¾.
    loss = partial(dpo_norm_loss, **reference(t(-12.0), t(-8.0)), **lengths(t(4.0), t(2.0)))
    expected = (math.log(4 / 3), LN3 / 2, -LN3 / 2, -LN3 / 4 / 4, LN3 / 4 / 2)
    assert values_and_slopes(partial(loss, beta=LN3), -10.0, -9.0) == pytest.approx(expected)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_dpo_norm_smooths_labels(epsilon):
    """Where σ is ¾, a right label costs ln 4/3 and a wrong one ln 4."""
    inputs = reference(t(0.0), t(0.0)) | lengths(t(2.0), t(5.0))
    loss, _, _ = dpo_norm_loss(t(2 * LN3), t(0.0), **inputs, beta=1.0, label_smoothing=epsilon)
    expected = (1 - epsilon) * math.log(4 / 3) + epsilon * math.log(4)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "alpha, beta, rewards, slopes",
    [
        # 1 − 1/p: −1 and −3. A reward rises by β / p / |y| per nat.
        (1.0, LN3, (-LN3, -3 * LN3), (-LN3 / 4, LN3 / 3)),
        # p − 1: −½ and −¾. A reward rises by β p / |y| per nat.
        (-1.0, 8 * LN3, (-4 * LN3, -6 * LN3), (-LN3 / 2, LN3 / 6)),
        # log p: −ln 2 and −2 ln 2. A reward rises by β / |y| per nat, as SimPO's.
        (0.0, 2 * LN3 / LN2, (-2 * LN3, -4 * LN3), (-LN3 / LN2 / 4, LN3 / LN2 / 6)),
    ],
)
def test_alphapo(alpha, beta, rewards, slopes):
    """AlphaPO subtracts γ from the difference of bent rewards, and takes −log σ."""
    # p is ½ over 2 tokens and ¼ over 3. Each β makes the difference 2 ln 3, so with γ = ln 3 the
    # logit is ln 3: a loss of ln 4/3, and slopes of ¼ times those of the rewards.
    loss = partial(alphapo_loss, **lengths(t(2.0), t(3.0)), beta=beta, gamma=LN3, alpha=alpha)
    expected = (math.log(4 / 3), *rewards, *slopes)
    assert values_and_slopes(loss, -2 * LN2, -6 * LN2) == pytest.approx(expected)


def test_simper():
    """SimPER is the difference of p; p rises by p / |y| per nat."""
    # p is ½ over 2 tokens and ¼ over 4.
    loss = partial(simper_loss, **lengths(t(2.0), t(4.0)))
    expected = (-1 / 4, 1 / 2, 1 / 4, -1 / 4, 1 / 16)
    assert values_and_slopes(loss, -2 * LN2, -8 * LN2) == pytest.approx(expected)


@pytest.mark.parametrize(
    "margin, expected",
    [
        # averages −1 and −2, a lead of 1 nat per token where ½ is wanted: nothing to learn
        (0.5, (0.0, -1.0, -2.0, 0.0, 0.0)),
        # 3 are wanted; slopes of ∓1/|y|, however much is missing
        (3.0, (2.0, -1.0, -2.0, -1 / 3, 1 / 4)),
    ],
)
def test_repo(margin, expected):
    """RePO penalises a lead below the margin, in nats per token, and ignores every other pair."""
    loss = partial(repo_loss, **lengths(t(3.0), t(4.0)), margin=margin)
    assert values_and_slopes(loss, -3.0, -8.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "rejected, expected",
    [
        # rewards of ln 3 and −ln 3: ¼ twice, with slopes of β · ¼ · ¾
        (-10.0, (1 / 4 + 1 / 4, LN3, -LN3, -3 / 16, 3 / 16)),
        # rewards of ln 3 and 0: the rejected term alone changes
        (-8.0, (1 / 4 + 1 / 2, LN3, 0.0, -3 / 16, 1 / 4)),
    ],
)
def test_apo_zero(rejected, expected):
    """APO-zero has a term for each response, which does not see the other one."""
    beta = LN3 / 2  # so that ρ = 2 is a reward of ln 3
    loss = partial(apo_zero_loss, **reference(t(-12.0), t(-8.0)), beta=beta)
    expected = (*expected[:3], *(beta * slope for slope in expected[3:]))
    assert values_and_slopes(loss, -10.0, rejected) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# For any numbers

BY_LENGTH, BY_REFERENCE = lengths(*LENGTHS), reference(*LOGPS[2:])
LOSSES = {  # functions of the policy's log-probabilities alone
    "dpo_norm": partial(dpo_norm_loss, **BY_REFERENCE, **BY_LENGTH, beta=2.0),
    "alphapo": partial(alphapo_loss, **BY_LENGTH, beta=2.5, gamma=0.1, alpha=0.25),
    "alphapo, α < 0": partial(alphapo_loss, **BY_LENGTH, beta=2.5, gamma=0.1, alpha=-1.0),
    "simper": partial(simper_loss, **BY_LENGTH),
    "repo": partial(repo_loss, **BY_LENGTH, margin=2.0),
    "apo_zero": partial(apo_zero_loss, **BY_REFERENCE, beta=0.3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_shapes_and_dtypes(name):
    """Gradients are exact, outputs are [pairs] of the input's dtype, and pairs are independent."""
    assert_gradients_shapes_and_dtypes(LOSSES[name], LOGPS[:2])


@pytest.mark.parametrize("name", LOSSES)
def test_more_for_the_chosen_and_less_for_the_rejected_never_costs(name):
    """A likelier chosen or a less likely rejected response lowers the loss, or leaves it at 0."""
    w, l = LOGPS[:2]
    losses, chosen, rejected = LOSSES[name](w, l)
    up, better, _ = LOSSES[name](w + 0.01, l)
    down, _, worse = LOSSES[name](w, l - 0.01)
    satisfied = losses == 0  # RePO's
    assert satisfied.any() == (name == "repo") and not satisfied.all()
    assert ((up < losses) | satisfied).all() and ((down < losses) | satisfied).all()
    assert (better > chosen).all() and (worse < rejected).all()


def test_dpo_norm_is_dpo_on_log_ratios_per_token():
    """DPO-norm is DPO of ρ/|y|: plain DPO for one token each, ln 2 where both models agree."""
    w, l, ref_w, ref_l = LOGPS
    ratios = (w - ref_w) / LENGTHS[0], (l - ref_l) / LENGTHS[1]
    none = torch.zeros_like(w)
    for a, b in zip(LOSSES["dpo_norm"](w, l), dpo_loss(*ratios, none, none, beta=2.0)):
        assert_close(a, b)
    one = torch.ones_like(LENGTHS[0])
    for a, b in zip(dpo_norm_loss(*LOGPS, one, one, 0.3, 0.1), dpo_loss(*LOGPS, 0.3, 0.1)):
        assert torch.equal(a, b)
    losses, chosen, _ = dpo_norm_loss(w, l, w, l, *LENGTHS, beta=5.0)
    assert losses.tolist() == pytest.approx([LN2] * 6) and chosen.tolist() == [0] * 6
    # Without a reference, it is SimPO without a margin.
    simpo, *_ = simpo_loss(w, l, *LENGTHS, beta=2.0, gamma=0.0)
    assert_close(dpo_norm_loss(w, l, none, none, *LENGTHS, beta=2.0)[0], simpo)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alphapo_tends_to_simpo(dtype):
    """AlphaPO is SimPO at α = 0, and differs by at most β |α| a² near it."""
    # A reward is β (a − α a²/2 + …). In float32, 1 − p^−α itself has no digits left at α = 10⁻⁶.
    pair = [x.to(dtype) for x in LOGPS[:2]]
    largest = max((x / n).abs().max().item() for x, n in zip(pair, LENGTHS))
    simpo = simpo_loss(*pair, *LENGTHS, beta=2.5, gamma=0.5)
    for alpha in (0.0, 1e-8, 1e-6, 1e-3, -1e-8, -1e-6, -1e-3):
        outputs = alphapo_loss(*pair, *LENGTHS, beta=2.5, gamma=0.5, alpha=alpha)
        for a, b in zip(outputs, simpo):
            rounding = 4 * torch.finfo(dtype).eps * b.abs().max()
            assert (a - b).abs().max() <= 2.5 * abs(alpha) * largest**2 + rounding


def test_repo_is_the_limit_of_simpo_divided_by_beta():
    """SimPO's loss over β exceeds RePO's by 0 to ln 2 / β, if γ/β is RePO's margin."""
    # ln(1 + eˣ) lies 0 to ln 2 above max(0, x); at a lead of exactly the margin it is ln 2.
    w, l = torch.cat((LOGPS[0], t(-4.0))), torch.cat((LOGPS[1], t(-9.0)))
    by_length = [torch.cat((x, torch.tensor([n]))) for x, n in zip(LENGTHS, (2, 3))]
    repo, *rewards = repo_loss(w, l, *by_length, margin=1.0)
    assert repo[-1] == 0 < repo.max()
    for beta in (1.0, 10.0, 1e3, 1e5):
        simpo, *simpo_rewards = simpo_loss(w, l, *by_length, beta=beta, gamma=1.0 * beta)
        excess = simpo / beta - repo
        assert (excess >= -1e-12).all() and (excess <= LN2 / beta + 1e-12).all()
        assert excess[-1].item() == pytest.approx(LN2 / beta)
        for a, b in zip(rewards, simpo_rewards):
            assert_close(beta * a, b)


def test_apo_zero_where_policy_is_the_reference():
    """Where both models agree, APO-zero's loss is 1, with slopes of ∓β/4."""
    loss = partial(apo_zero_loss, **reference(t(-10.0), t(-9.0)), beta=0.4)
    assert values_and_slopes(loss, -10.0, -9.0) == pytest.approx((1.0, 0, 0, -0.1, 0.1))


def test_relatives():
    """APO-zero is KTO at z_ref = 0, and SimPER has the reward of AlphaPO at α = −1, plus 1."""
    for a, b in zip(LOSSES["apo_zero"](*LOGPS[:2]), kto_loss(*LOGPS, beta=0.3, z_ref=0.0)):
        assert_close(a, b)
    _, *bent = alphapo_loss(*LOGPS[:2], *LENGTHS, beta=1.0, gamma=0.0, alpha=-1.0)
    for a, b in zip(LOSSES["simper"](*LOGPS[:2])[1:], bent):
        assert_close(a, b + 1)


def test_as_trl_computes_them():
    """The losses equal the formulas of TRL 1.16, written out from its source."""
    # DPOTrainer._compute_loss and CPOTrainer.cpo_loss; the latter gets averages, and γ as simpo_γ.
    w, l, ref_w, ref_l = LOGPS
    n_w, n_l = LENGTHS
    delta = (w - ref_w) / n_w.clamp(min=1.0) - (l - ref_l) / n_l.clamp(min=1.0)
    assert_close(LOSSES["dpo_norm"](w, l)[0], (1 + (-2.0 * delta).exp()).log())
    zero = 1 - torch.sigmoid(0.3 * (w - ref_w)) + torch.sigmoid(0.3 * (l - ref_l))
    assert_close(LOSSES["apo_zero"](w, l)[0], zero)
    for name, alpha in (("alphapo", 0.25), ("alphapo, α < 0", -1.0)):
        bent = [(1 - (x / n).exp() ** -alpha) / alpha for x, n in ((w, n_w), (l, n_l))]
        logits = bent[0] - bent[1] - 0.1 / 2.5
        losses, *rewards = LOSSES[name](w, l)
        assert_close(losses, (1 + (-2.5 * logits).exp()).log())
        for a, b in zip(rewards, bent):
            assert_close(a, 2.5 * b)


@pytest.mark.parametrize(
    "chosen, rejected", [(-1e4, -1e-3), (-1e-3, -1e4), (-1e4, -1e4), (0.0, -1.0), (0.0, 0.0)]
)
def test_extremes_in_float32(chosen, rejected):
    """Losses, rewards and gradients stay finite for certain and for hopeless responses."""
    # AlphaPO's p^−α overflows, and ∞ − ∞ is NaN. A sigmoid followed by a log gives log 0.
    one, ref = torch.ones(1), torch.full((1,), -2.0)
    by_length, by_reference = lengths(one, one), reference(ref, ref)
    bent = partial(alphapo_loss, **by_length, beta=10.0, gamma=3.0)
    for loss in (
        partial(dpo_norm_loss, **by_reference, **by_length, beta=10.0),
        *(partial(bent, alpha=alpha) for alpha in (1e-6, 0.25, 4.0, -0.25, -4.0)),
        partial(simper_loss, **by_length),
        partial(repo_loss, **by_length, margin=1.0),
        partial(apo_zero_loss, **by_reference, beta=10.0),
    ):
        logps = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        losses, *rewards = loss(*logps)
        losses.sum().backward()
        assert all(x.isfinite().all() for x in (losses, *rewards, *(x.grad for x in logps)))


def test_broadcasting_is_refused():
    """Tensors of different shapes are an error that names the shape."""
    x, wrong = torch.zeros(3), torch.zeros(3, 1)
    for call in (
        lambda: dpo_norm_loss(x, x, x, wrong, x + 1, x + 1, 0.1),
        lambda: dpo_norm_loss(x, x, x, x, wrong + 1, wrong + 1, 0.1),
        lambda: alphapo_loss(x[:1], x[:1], wrong + 1, wrong + 1, 0.1, 0.0, 0.25),
        lambda: simper_loss(x, x, wrong + 1, wrong + 1),
        lambda: repo_loss(x, x, wrong + 1, wrong + 1, 0.1),
        lambda: apo_zero_loss(x, wrong, x, wrong, 0.1),
    ):
        with pytest.raises(AssertionError, match=r"\(3, 1\)"):
            call()


# --------------------------------------------------------------------------------------------------
# In the table, and in a run


def test_entries_of_the_table():
    """Each entry hands its loss the right settings; plain DPO is untouched to the bit."""
    pairs = LossInputs(tuple(LOGPS[:2]), tuple(LENGTHS), tuple(LOGPS[2:]))
    flags = {"beta": 2.0, "gamma_beta_ratio": 0.7, "alphapo_alpha": -0.5, "label_smoothing": 0.1}
    for objective, length_norm, expected in (
        ("dpo", None, dpo_loss(*LOGPS, 2.0, 0.1)),
        ("dpo", True, dpo_norm_loss(*LOGPS, *LENGTHS, 2.0, 0.1)),
        ("alphapo", None, alphapo_loss(*LOGPS[:2], *LENGTHS, 2.0, 0.7 * 2.0, -0.5)),
        ("simper", None, simper_loss(*LOGPS[:2], *LENGTHS)),
        ("repo", None, repo_loss(*LOGPS[:2], *LENGTHS, 0.7)),
        ("apo_zero", None, apo_zero_loss(*LOGPS, 2.0)),
    ):
        entry = OBJECTIVES[objective]
        own = {name: value for name, value in flags.items() if name in entry.defaults}
        settings = Settings(objective=objective, length_norm=length_norm, **own)
        for a, b in zip(entry.loss(pairs, settings), expected):
            assert torch.equal(a, b), objective


def test_length_normalized_dpo_learns_on_the_toy(monkeypatch, tmp_path):
    """With Tülu 3's β, DPO-norm starts at ln 2 and ranks more held-out pairs right."""
    few = first_lines(TOY / "heldout.jsonl", 200, tmp_path / "few.jsonl")
    of_toy = dict.fromkeys(("model", "data", "batch_size", "lr"))  # left to toy/dpo.toml
    flags = of_toy | {"objective": "dpo", "length_norm": True, "beta": 5.0, "max_steps": 20}
    rows = run(monkeypatch, tmp_path / "run", **flags, eval_data=few)
    first, last = rows[0], rows[-1]
    assert first["eval_loss"] == pytest.approx(LN2) and last["eval_loss"] < LN2
    assert last["eval_rewards/accuracies"] > 0.52
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"] == 0
