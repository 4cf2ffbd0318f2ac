"""Score pairs under the reference model of DPO and its relatives: the policy before training.

`--reference online` keeps a frozen copy and runs it in every step. `--reference cached` runs it
once over all pairs, keeps one number per response and frees the copy; training then costs as much
as SimPO. Both give the same run. `methods/objectives.py` says which objectives need a reference.
"""

import gc
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data import Pair, micro_batches
from formats.progress import Progress
from methods.objectives import OBJECTIVES
from model import to_device, train_flops
from runtime.inputs import Inputs
from runtime.settings import Settings

# Maps pairs to summed log-probabilities in nats, [pairs, (chosen, rejected)].
Reference = Callable[[list[Pair]], Tensor]


def make_reference(
    settings: Settings,
    inputs: Inputs,
    device: torch.device,
    freeze: Callable[[], Reference],
    resumed: Path | None,
) -> tuple[Reference | None, dict[str, Tensor]]:
    """Return this run's reference, None if it needs none, and the tensors to save with checkpoints.

    Call it on all ranks. freeze: builds the frozen copy and returns what scores pairs with it.
    resumed: the checkpoint that the table will come from; with one, nothing is scored again.
    """
    if not OBJECTIVES[settings.objective].needs_reference:
        return None, {}
    if settings.reference == "online":
        return freeze(), {}
    dtype = torch.float64 if settings.dtype == "fp64" else torch.float32
    count = len(inputs.pairs) + len(inputs.held_out)
    table = torch.zeros(count, 2, device=device, dtype=dtype)
    if not resumed:
        fill_table(table, freeze(), inputs, settings)
        gc.collect()  # FSDP's modules form reference cycles: without this the copy stays in memory
    train, held_out = table.split([len(inputs.pairs), len(inputs.held_out)])
    tensors = {"reference": train} | ({"held_out_reference": held_out} if inputs.held_out else {})
    return partial(look_up, table), tensors


def look_up(table: Tensor, pairs: list[Pair]) -> Tensor:
    """Return the rows of `pairs` in a cached reference, [pairs, (chosen, rejected)] in nats."""
    return table[rows_of(pairs, table)]


def rows_of(pairs: list[Pair], table: Tensor) -> Tensor:
    """Return the indices of `pairs` in a cached reference, on its device, without waiting."""
    return to_device(np.array([pair.index for pair in pairs], np.int64), table.device)


def fill_table(table: Tensor, score: Reference, inputs: Inputs, settings: Settings) -> None:
    """Score each pair of the run, exactly once, all ranks together.

    The micro-batches are those of training, so that policy and reference agree to the bit at the
    first step.
    """
    # One epoch meets every pair. A run of --max-steps may end before that and needs fewer.
    first_epoch = range(len(inputs.steps))[: math.ceil(len(inputs.pairs) / settings.batch_size)]
    held_out = [inputs.held_out[:]] if inputs.held_out else []
    steps = itertools.chain(map(inputs.batch, first_epoch), held_out)
    scored, wanted = torch.zeros(len(table), device=table.device), list[Tensor]()
    cost = partial(train_flops, inputs.config)
    rank, world = dist.get_rank(), dist.get_world_size()
    count = len(first_epoch) + len(held_out)
    for step in Progress("scoring with the reference", steps, total=count):
        wanted.append(rows_of(step, table))
        for shares in micro_batches(step, world, settings.microbatch_tokens, cost):
            # Every rank must join every forward pass: one without pairs runs any pair.
            logps = score(shares[rank] or step[:1])
            rows = rows_of(shares[rank], table)
            table[rows] = logps[: len(rows)]
            scored[rows] += 1
    dist.all_reduce(table)
    dist.all_reduce(scored)
    assert (scored[torch.cat(wanted)] == 1).all(), "every pair is scored exactly once"
