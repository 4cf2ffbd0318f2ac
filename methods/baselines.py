"""Compute the losses that the paper compares SimPO's with, in the shape of `simpo.py`.

    objective  loss of a pair                                           reward   ref.  per token
    ---------  --------------                                           ------   ----  ---------
    RRHF       max(0, a_l − a_w) − λ log π_w                            a        –     yes
    SLiC-HF    max(0, δ − log π_w + log π_l) − λ log π_w                log π    –     –
    IPO        (ρ_w − ρ_l − 1/(2τ))²                                    τ ρ      yes   if asked
    CPO        −log σ(β log π_w − β log π_l) − λ log π_w                β log π  –     –
    KTO        λ_w (1 − σ(β ρ_w − z_ref)) + λ_l (1 − σ(z_ref − β ρ_l))  β ρ      yes   –
    ORPO       −log p_w − λ log σ(o_w − o_l)                            o        –     yes
    R-DPO      −log σ(β ρ_w − β ρ_l + α|y_w| − α|y_l|)                  β ρ      yes   –

w is the chosen response and l the rejected one. log π_w sums over the |y_w| tokens of w, in nats.
ρ = log π − log π_ref is the log-ratio to a reference model (ref.). a = log π / |y| is the average
per token, p = exp(a), and o = log(p / (1 − p)) is the log-odds of p.

Units and shapes are those of `simpo.py`. All tensors are [pairs], and every function returns
(losses, chosen_rewards, rejected_rewards), the rewards without gradient. SFT is −log π_w averaged
over all chosen tokens of a step, so it is not the loss of a pair: `train.forward_backward` adds it,
`--sft-weight` times, to any objective.

Sources: RRHF arXiv 2304.05302, SLiC-HF 2305.10425, IPO 2310.12036, CPO 2401.08417, KTO 2402.01306,
ORPO 2403.07691, R-DPO 2403.19159. The forms are those of Table 3 of the SimPO paper (2405.14734),
with these remarks:

    RRHF   The authors' code averages the SFT term over a response's tokens; the table and ours sum
           it.
    IPO    On the IPO authors' advice, TRL divides each ρ by its token count. The table and ours do
           not, by default; `length_normalized=True` does.
    CPO    The authors' code and TRL average the SFT term over the tokens of a batch. The table and
           ours sum it over a response; λ = 0 with `--sft-weight 1` gives their form.
    KTO    The table omits the constant λ_w + λ_l and prints the rejected term with a plus, which
           would raise the rejected response; the sign here is that of KTO's own paper.
    ORPO   TRL takes the first term over the tokens of all prompts and chosen responses of a batch.
           The table and ours take it over each chosen response alone.
"""

import torch.nn.functional as F
from torch import Tensor

from simpo import assert_same_shape

Triple = tuple[Tensor, Tensor, Tensor]  # losses, chosen_rewards, rejected_rewards, all [pairs]


def rrhf_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    lam: float,
) -> Triple:
    """Compute RRHF: the chosen average must not be the lower one; `lam` weighs the SFT term."""
    assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen_rewards = chosen_logps / chosen_lengths
    rejected_rewards = rejected_logps / rejected_lengths
    losses = F.relu(rejected_rewards - chosen_rewards) - lam * chosen_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def slic_loss(chosen_logps: Tensor, rejected_logps: Tensor, delta: float, lam: float) -> Triple:
    """Compute SLiC-HF: the chosen must win by `delta` nats, no more. `lam` weighs the SFT term."""
    assert_same_shape(chosen_logps, rejected_logps)
    losses = F.relu(delta - chosen_logps + rejected_logps) - lam * chosen_logps
    return losses, chosen_logps.detach(), rejected_logps.detach()


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    tau: float,
    length_normalized: bool = False,
) -> Triple:
    """Compute IPO: the chosen must win by exactly 1/(2τ) nats more than under the reference.

    Where policy and reference agree, as at the first step, every loss is 1/(2τ)².
    """
    assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    assert_same_shape(chosen_logps, chosen_lengths, rejected_lengths)
    chosen_ratios = chosen_logps - ref_chosen_logps
    rejected_ratios = rejected_logps - ref_rejected_logps
    if length_normalized:
        chosen_ratios = chosen_ratios / chosen_lengths
        rejected_ratios = rejected_ratios / rejected_lengths
    losses = (chosen_ratios - rejected_ratios - 1 / (2 * tau)) ** 2
    return losses, tau * chosen_ratios.detach(), tau * rejected_ratios.detach()


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float, lam: float) -> Triple:
    """Compute CPO: DPO with a uniform reference; `lam` weighs the SFT term."""
    assert_same_shape(chosen_logps, rejected_logps)
    chosen_rewards, rejected_rewards = beta * chosen_logps, beta * rejected_logps
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards) - lam * chosen_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def kto_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    z_ref: float,
    lambda_w: float = 1.0,
    lambda_l: float = 1.0,
) -> Triple:
    """Compute KTO: each response against how far the policy has drifted from the reference overall.

    `z_ref` is a constant without gradient. It estimates β·KL(π || π_ref) by the mean reward of all
    responses of the optimizer step; a negative estimate counts as 0, since a divergence cannot be
    negative. `train.forward_backward` finds it by a first pass without gradients over the step, so
    it does not depend on how the step is spread over ranks. TRL's `kto_pair` used what one rank had
    in memory, the rejected half for the chosen term and vice versa; its KTOTrainer pairs prompts
    with responses to other prompts. Where policy and reference agree, every loss is (λ_w + λ_l) / 2
    in all of these (TRL divides by the two responses).
    """
    assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    z_ref = max(z_ref, 0.0)
    chosen_losses = lambda_w * F.sigmoid(z_ref - chosen_rewards)  # 1 − σ(x) = σ(−x)
    rejected_losses = lambda_l * F.sigmoid(rejected_rewards - z_ref)
    return chosen_losses + rejected_losses, chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    lam: float,
) -> Triple:
    """Compute ORPO: the chosen response's average SFT loss plus `lam` times the log odds ratio."""
    assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen_average = chosen_logps / chosen_lengths
    chosen_odds = _log_odds(chosen_average)
    rejected_odds = _log_odds(rejected_logps / rejected_lengths)
    losses = -chosen_average - lam * F.logsigmoid(chosen_odds - rejected_odds)
    return losses, chosen_odds.detach(), rejected_odds.detach()


def rdpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    alpha: float,
) -> Triple:
    """Compute R-DPO: length explains `alpha` per token of a preference, the policy the rest."""
    assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    assert_same_shape(chosen_logps, chosen_lengths, rejected_lengths)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    explained = alpha * (chosen_lengths - rejected_lengths)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards + explained)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def _log_odds(average_logps: Tensor) -> Tensor:
    """Compute log(p / (1 − p)) for p = exp(average_logps), in nats; clamps p to 1 − 10⁻⁶."""
    average_logps = average_logps.clamp(max=-1e-6)
    return average_logps - (-average_logps.expm1()).log()
