"""The objectives that SimPO is compared with, in the shape of `simpo.py`: the mathematics, and nothing else.

    objective  loss of a pair                                           reward   ref.  per token  SFT term  source
    ---------  --------------                                           ------   ----  ---------  --------  ------
    RRHF       max(0, a_l − a_w) − λ log π_w                            a        –     yes        sum       2304.05302
    SLiC-HF    max(0, δ − log π_w + log π_l) − λ log π_w                log π    –     –          sum       2305.10425
    IPO        (ρ_w − ρ_l − 1/(2τ))²                                    τ ρ      yes   if asked   –         2310.12036
    CPO        −log σ(β log π_w − β log π_l) − λ log π_w                β log π  –     –          sum       2401.08417
    KTO        λ_w (1 − σ(β ρ_w − z_ref)) + λ_l (1 − σ(z_ref − β ρ_l))  β ρ      yes   –          –         2402.01306
    ORPO       −log p_w − λ log σ(o_w − o_l)                            o        –     yes        average   2403.07691
    R-DPO      −log σ(β ρ_w − β ρ_l + α|y_w| − α|y_l|)                  β ρ      yes   –          –         2403.19159

Here w is the chosen and l the rejected response, log π_w a sum over its |y_w| tokens in nats, ρ = log π − log π_ref
(ref.: it needs a reference model), a = log π / |y| the average of a token, p = exp(a), and o = log(p / (1 − p)) the
log-odds of p. Units and shapes are those of `simpo.py`: all tensors are [pairs]; every function returns (losses,
chosen_rewards, rejected_rewards), the rewards without gradient. DPO and SimPO are in `simpo.py`. SFT is −log π_w
averaged over all tokens of a step, so no loss of a pair: `train.run_pairs` adds it, `--sft-weight` times, to any
objective.

The forms are those of Table 3 of the SimPO paper (arXiv 2405.14734), with these remarks:

    RRHF   the authors' own code averages the SFT term over the tokens of a response; the table, and ours, sums it.
    IPO    TRL, on the IPO authors' advice, divides each ρ by its number of tokens (here `length_normalized=True`); the
           table, and ours by default, does not.
    CPO    the authors' own code and TRL average the SFT term over the tokens of a batch (here λ = 0 and
           `--sft-weight 1`); the table, and ours, sums it over a response.
    KTO    the table leaves out the constant λ_w + λ_l and prints the rejected term with a plus, which, minimised, would
           raise the rejected response: the sign here is that of KTO's own paper.
    ORPO   TRL takes the first term over the tokens of all prompts and chosen responses of a batch; the table, and ours,
           over each response alone.
"""

import torch.nn.functional as F
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]  # losses, chosen_rewards, rejected_rewards, all [pairs]


def rrhf_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, lam: float
) -> Triple:
    """RRHF: of two averages, the chosen must not be the lower; `lam` weighs the SFT term."""
    _assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen_rewards = chosen_logps / chosen_lengths
    rejected_rewards = rejected_logps / rejected_lengths
    losses = F.relu(rejected_rewards - chosen_rewards) - lam * chosen_logps
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def slic_loss(chosen_logps: Tensor, rejected_logps: Tensor, delta: float, lam: float) -> Triple:
    """SLiC-HF: the chosen must win by `delta` nats, and not more; `lam` weighs the SFT term."""
    _assert_same_shape(chosen_logps, rejected_logps)
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
    """IPO: the chosen must win by 1/(2τ) nats more than under the reference, neither less nor more.

    Where policy and reference agree, as at the first step, every loss is 1/(2τ)².
    """
    _assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    _assert_same_shape(chosen_logps, chosen_lengths, rejected_lengths)
    chosen_ratios, rejected_ratios = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    if length_normalized:
        chosen_ratios, rejected_ratios = chosen_ratios / chosen_lengths, rejected_ratios / rejected_lengths
    losses = (chosen_ratios - rejected_ratios - 1 / (2 * tau)) ** 2
    return losses, tau * chosen_ratios.detach(), tau * rejected_ratios.detach()


def cpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float, lam: float) -> Triple:
    """CPO: DPO with a reference that finds all responses equally likely; `lam` weighs the SFT term."""
    _assert_same_shape(chosen_logps, rejected_logps)
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
    """KTO: each response on its own, against how far the policy has drifted from the reference on the whole.

    `z_ref`, a constant without gradient, estimates β·KL(π || π_ref) by the mean reward of all responses of the batch;
    a negative estimate of what cannot be negative counts as 0. The batch is the optimizer step's, however it is spread:
    `train.run_pairs` goes over it once without gradient to know `z_ref`. TRL's `kto_pair` took what one process had in
    memory, the rejected half for the chosen term and the other way round; its KTOTrainer pairs prompts with the
    responses to other prompts. Where policy and reference agree, every loss is (λ_w + λ_l) / 2 in all of them (TRL
    divides by the two responses).
    """
    _assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    z_ref = max(z_ref, 0.0)
    chosen_losses = lambda_w * F.sigmoid(z_ref - chosen_rewards)  # 1 − σ(x) = σ(−x)
    rejected_losses = lambda_l * F.sigmoid(rejected_rewards - z_ref)
    return chosen_losses + rejected_losses, chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, lam: float
) -> Triple:
    """ORPO: SFT on the average token of the chosen response, and `lam` times how the odds of the two compare."""
    _assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen_average = chosen_logps / chosen_lengths
    chosen_odds, rejected_odds = _log_odds(chosen_average), _log_odds(rejected_logps / rejected_lengths)
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
    """R-DPO: DPO in which length explains a part of every preference, `alpha` a token, and the policy learns the rest."""
    _assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    _assert_same_shape(chosen_logps, chosen_lengths, rejected_lengths)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards + alpha * (chosen_lengths - rejected_lengths))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def _log_odds(average_logps: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = exp(average_logps), in nats; a p of 1 in float32 is taken for 1 − 10⁻⁶."""
    average_logps = average_logps.clamp(max=-1e-6)
    return average_logps - (-average_logps.expm1()).log()


def _assert_same_shape(*tensors: Tensor) -> None:
    """Broadcasting [pairs] against [pairs, 1] would silently compare every pair with every other."""
    assert len({t.shape for t in tensors}) == 1, (
        f"one number per pair in each tensor, not {[tuple(t.shape) for t in tensors]}"
    )
