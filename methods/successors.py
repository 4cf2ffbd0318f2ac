"""The objectives that came after SimPO: the mathematics, in the shape of `simpo.py`.

    objective  loss of a pair                         reward                ref.  per token
    ---------  --------------                         ------                ----  ---------
    DPO-norm   −log σ(β ρ_w / |y_w| − β ρ_l / |y_l|)  β ρ / |y|             yes   yes
    AlphaPO    −log σ(r_w − r_l − γ)                  r = β (1 − p^−α) / α  –     yes
    SimPER     p_l − p_w                              p                     –     yes
    RePO       max(0, m − a_w + a_l)                  a                     –     yes
    APO-zero   1 − σ(β ρ_w) + σ(β ρ_l)                β ρ                   yes   –

Symbols, units and shapes are those of `methods/baselines.py`. a = log π / |y| is the average per
token, p = exp(a) the inverse perplexity, and m is SimPO's γ/β in nats per token.

Sources: DPO-norm is Tülu 3, arXiv 2411.15124 (`--objective dpo --length-norm`); AlphaPO 2501.03884,
SimPER 2502.00883, RePO 2503.07426, APO-zero 2408.06266. Remarks on the authors' code and TRL's:

    DPO-norm  TRL's `sigmoid_norm` logs the rewards of plain DPO, and never smooths labels.
    AlphaPO   TRL raises p to −α, infinite once p underflows. Ours is flat beyond p^−α = e³⁰.
    SimPER    The authors log a as the reward. Ours is p, so that the loss is minus the margin.
    RePO      The authors log β a as the reward, although the loss has no β.
    APO-zero  It is KTO at z_ref = 0. The authors contributed TRL's `apo_zero`, which is equal.
"""

import torch.nn.functional as F
from torch import Tensor

from methods.baselines import Triple
from simpo import assert_same_shape, dpo_loss, simpo_loss


def dpo_norm_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Triple:
    """Compute DPO on averages per token, so that `beta` has the unit and size of SimPO's."""
    assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    assert_same_shape(chosen_logps, chosen_lengths, rejected_lengths)
    averages = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    ref_averages = ref_chosen_logps / chosen_lengths, ref_rejected_logps / rejected_lengths
    return dpo_loss(*averages, *ref_averages, beta, label_smoothing)


def alphapo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma: float,
    alpha: float,
) -> Triple:
    """Compute AlphaPO: SimPO on averages bent by `alpha`, which may be negative; 0 is SimPO."""
    assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    w = _bend(chosen_logps / chosen_lengths, alpha)
    l = _bend(rejected_logps / rejected_lengths, alpha)
    return simpo_loss(w, l, chosen_lengths, rejected_lengths, beta, gamma, length_normalized=False)


def simper_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Triple:
    """Compute SimPER: the difference of inverse perplexities, between −1 and 1."""
    assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen_rewards = (chosen_logps / chosen_lengths).exp()
    rejected_rewards = (rejected_logps / rejected_lengths).exp()
    return rejected_rewards - chosen_rewards, chosen_rewards.detach(), rejected_rewards.detach()


def repo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    margin: float,
) -> Triple:
    """Compute RePO: the chosen average must win by `margin` nats per token, SimPO's γ/β."""
    assert_same_shape(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen_rewards = chosen_logps / chosen_lengths
    rejected_rewards = rejected_logps / rejected_lengths
    losses = F.relu(margin - chosen_rewards + rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def apo_zero_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Triple:
    """Compute APO-zero: raise the chosen and lower the rejected; 1 where both models agree."""
    assert_same_shape(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = F.sigmoid(-chosen_rewards) + F.sigmoid(rejected_rewards)  # 1 − σ(x) = σ(−x)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def _bend(average_logps: Tensor, alpha: float) -> Tensor:
    """Compute (1 − p^(−α)) / α for p = exp(average_logps); its limit, log p, for α = 0."""
    if alpha == 0:
        return average_logps
    return -(-alpha * average_logps).clamp(max=30).expm1() / alpha
