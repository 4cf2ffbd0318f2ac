"""Train a Llama or Mistral checkpoint on preference pairs with SimPO, DPO or another objective.

    torchrun train.py                                             the embedded toy, on a laptop
    torchrun train.py --objective dpo                             the same with DPO
    torchrun --nproc-per-node 8 train.py --model DIR --data FILE  a real checkpoint on a node
    python train.py --config recipe.toml --lr 2e-6                settings from a file, then flags
    python train.py --config recipe.toml --dry-run                what that would train, on what
    python train.py --config recipe.toml --plan --gpus 8          memory and time that it would take

A *step* takes `--batch-size` pairs on any hardware. They are spread over ranks and micro-batches by
the work they cost, and the step's loss is the sum over its pairs divided by their number. One rank
and eight, with little memory or much, therefore optimise the same loss. Every rank takes the same
path; one rank is a group of one. FSDP2 shards the parameters and keeps them in float32; the model
computes in `--dtype`.

Read `forward_backward`, the step, then `train`, the loop, then `build_model`, the sharding. A run
leaves OUT/config.json, OUT/metrics.jsonl and OUT/model, see `runtime/run.py`. The same command with
`--out` resumes it from its checkpoints, see `runtime/resume.py`.
"""

import runtime.signals  # before torch, whose import takes seconds

if __name__ == "__main__":
    runtime.signals.listen("train.py")

import math
import shlex
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from data import Pair, micro_batches, pack
from formats.checkpoint import compute_device, load
from formats.errors import printable
from formats.progress import Progress
from methods.objectives import OBJECTIVES, pair_losses
from model import Llama, to_device, train_flops
from runtime.inputs import Inputs, dry_run, open_inputs
from runtime.plan import fit_to_memory, print_plan
from runtime.processes import agree, make_mesh, start_ranks, trim_freed_memory
from runtime.reference import Reference, make_reference
from runtime.run import Run, report_errors, warn_of_failure
from runtime.sample_flags import TOY
from runtime.settings import Settings, read_command
from runtime.show import show
from sample import generate

# --------------------------------------------------------------------------------------------------
# The step


def forward_backward(
    model: Llama,
    batch: list[Pair],
    settings: Settings,
    reference: Reference | None = None,
    grad: bool = True,
    baseline: float | None = None,
) -> dict[str, float]:
    """Return the loss and metrics of a whole step's pairs, spread over all ranks.

    With `grad`, it also accumulates gradients; without, it is an evaluation. Metrics are means over
    all pairs of the step. baseline: what the objective's `step_baseline` gave for this step; None:
    find it by a first pass without gradients, if the objective asks for one.
    """
    objective, rank, world = OBJECTIVES[settings.objective], dist.get_rank(), dist.get_world_size()
    if objective.step_baseline and baseline is None:
        means = forward_backward(model, batch, settings, reference, grad=False, baseline=0.0)
        baseline = objective.step_baseline(means)
    sft_weight = settings.sft_weight + objective.sft_weight
    chosen_tokens = sum(len(pair.responses[0]) for pair in batch)
    shortest = min(batch, key=lambda pair: pair.tokens)
    cost = partial(train_flops, model.config)
    rounds = micro_batches(batch, world, settings.microbatch_tokens, cost)
    sums: dict[str, Tensor] = {}
    for i, shares in enumerate(Progress("micro-batches", rounds)):
        sync_gradients(model, settings, last=i + 1 == len(rounds))
        # Under FSDP every rank must join every forward pass: without pairs it runs a masked one.
        mine, mask = shares[rank] or [shortest], float(bool(shares[rank]))
        with torch.set_grad_enabled(grad):
            ref_logps = reference(mine) if reference else None
            logps, lengths = response_logps(model, mine)
            losses, metrics = pair_losses(settings, logps, lengths, ref_logps, baseline)
            sft_term = sft_weight * logps[:, 0].sum() / chosen_tokens
            loss = mask * (losses.sum() / len(batch) - sft_term)
        if grad:
            backward(loss)
        parts = {name: mask * x.double().sum() / len(batch) for name, x in metrics.items()}
        for name, value in {"loss": loss.detach().double(), **parts}.items():
            sums[name] = sums.get(name, 0) + value
    if not grad:
        reshard(model)
    table = torch.stack(list(sums.values()))
    dist.all_reduce(table)
    return dict(zip(sums, table.tolist()))


def evaluate(
    model: Llama, pairs: list[Pair], settings: Settings, reference: Reference | None
) -> dict[str, float]:
    """Return the loss and metrics of held-out pairs, as of one large step without gradients."""
    return forward_backward(model, pairs, settings, reference, grad=False)


def backward(loss: Tensor) -> None:
    """Accumulate the gradients of the sum of all ranks' losses."""
    trim_freed_memory(loss.device)
    (loss * dist.get_world_size()).backward()  # FSDP averages gradients over ranks


def response_logps(model: Llama, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Return each response's summed log-probability in nats, and its length in tokens.

    Both are [pairs, responses]. Nothing here waits for the GPU, so that the next micro-batch is
    packed while this one is computed.
    """
    device = compute_device(model)
    packed = pack(pairs)
    for name in packed.keys() - {"cu_q", "cu_k"}:  # these stay on the CPU, see PackedAttention
        packed[name] = to_device(packed[name], device)
    lengths = to_device([[len(r) for r in pair.responses] for pair in pairs], device)
    # The sum of Eq. 3. unsafe=True skips a check of the lengths that would wait for the GPU.
    logps = torch.segment_reduce(model(**packed), "sum", lengths=lengths.flatten(), unsafe=True)
    return logps.view_as(lengths), lengths


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Return the learning rate at `step` (0-based): linear warm-up, then `--lr-schedule`."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        ahead = 0 if settings.like_authors else 1  # Hugging Face's first step has rate 0
        return settings.lr * (step + ahead) / warmup
    left = 1 - (step - warmup) / (steps - warmup)
    cosine = (1 - math.cos(math.pi * left)) / 2
    return settings.lr * {"constant": 1.0, "linear": left, "cosine": cosine}[settings.lr_schedule]


# --------------------------------------------------------------------------------------------------
# The loop


def train(settings: Settings) -> dict:
    """Run one training, from reading to saving.

    Returns its paths "out" and "model", its number of "steps", and the evaluations "before" and
    "after" it. Call it on all ranks; without torchrun there is one. It may be called again.
    """
    device = start_ranks(settings)
    settings = settings.resolved(device.type)
    mesh = make_mesh(settings, device)
    with Run(settings, device) as run:
        inputs = open_inputs(settings, device)
        fit_to_memory(settings, inputs, device)
        policy = agree(lambda: build_model(inputs, mesh, settings, trainable=True))
        optimizer = make_optimizer(policy, settings)
        run.open(inputs, policy, optimizer)
        freeze = partial(freeze_reference, inputs, mesh, settings)
        reference, tables = make_reference(settings, inputs, device, freeze, run.resumed)
        run.start(partial(evaluate, policy, inputs.held_out[:], settings, reference), tables)
        for step in run.steps():
            batch = inputs.batch(step)
            rate = learning_rate(settings, step, len(inputs.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            metrics = forward_backward(policy, batch, settings, reference)
            metrics["learning_rate"] = rate
            metrics["grad_norm"] = clip_gradients(policy, settings.max_grad_norm)
            stop_if_not_finite(step, batch, metrics)
            optimizer.step()
            optimizer.zero_grad()
            run.log_step(step, batch, metrics)
            run.evaluate_if_due(step)
            run.save_if_due(step)
        summary = run.finish()
        warn_of_failure(lambda: print(printable(report(inputs, summary))))
    return summary


def make_optimizer(policy: Llama, settings: Settings) -> torch.optim.Optimizer:
    """Return AdamW. Weight decay leaves norm gains alone, as Hugging Face's Trainer does."""
    gains = [p for p in policy.parameters() if p.dim() == 1]
    matrices = [p for p in policy.parameters() if p.dim() > 1]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    betas = settings.adam_beta1, settings.adam_beta2
    eps, decay = settings.adam_eps, settings.weight_decay
    return torch.optim.AdamW(groups, settings.lr, betas, eps, decay, fused=True)


def clip_gradients(policy: Llama, max_norm: float) -> float:
    """Clip gradients to `max_norm` over all shards; return the norm before clipping."""
    return torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm).full_tensor().item()


def stop_if_not_finite(step: int, batch: list[Pair], metrics: dict[str, float]) -> None:
    """Raise FloatingPointError, naming the pairs, before a NaN reaches the weights."""
    loss, norm = metrics["loss"], metrics["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        pairs = ", ".join(pair.where for pair in batch)
        raise FloatingPointError(f"step {step + 1}: loss {loss}, gradient norm {norm}; {pairs}")


# --------------------------------------------------------------------------------------------------
# Sharding


def build_model(inputs: Inputs, mesh: DeviceMesh, settings: Settings, trainable: bool) -> Llama:
    """Build the model on the meta device, shard it, then fill it: a rank needs room for its share.

    The policy is kept in float32 and computes in `--dtype`, a frozen reference is kept in it.
    FSDP2 gathers a block while another computes: in forward because the CPU runs ahead of the GPU,
    in backward because FSDP2 asks for the next block by itself.
    """
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[settings.dtype]
    master = torch.promote_types(compute, torch.float32)
    with torch.device("meta"):
        model = Llama(inputs.config).to(master)
    inputs.weights.check(model)
    if not trainable:
        model.requires_grad_(False).to(compute)
    precision = MixedPrecisionPolicy(compute, reduce_dtype=master, cast_forward_inputs=False)
    fsdp_options = {"mesh": mesh, "mp_policy": precision}
    if settings.offload:
        pin_memory = mesh.device_type == "cuda"
        fsdp_options["offload_policy"] = CPUOffloadPolicy(pin_memory=pin_memory)
    model.keep_logits = settings.keeps_logits
    keep_gathered = settings.gather_once and trainable
    for block in model.model.layers:
        block.checkpoint_activations = settings.activation_checkpointing
        block.save_matmuls(settings.keep_products)
        if settings.compile:
            block.compile()
        fully_shard(block, **fsdp_options, reshard_after_forward=not keep_gathered)
    # The root holds the embedding and the head. The policy's stay gathered until backward.
    fully_shard(model, **fsdp_options, reshard_after_forward=not trainable)
    model.to_empty(device="cpu" if settings.offload else mesh.device_type)
    inputs.weights.copy_into(model)
    return model


def freeze_reference(inputs: Inputs, mesh: DeviceMesh, settings: Settings) -> Reference:
    """Build a frozen copy of the model; return what gives its `response_logps` of pairs."""
    model = build_model(inputs, mesh, settings, trainable=False)
    return torch.no_grad()(lambda pairs: response_logps(model, pairs)[0])


def sync_gradients(model: Llama, settings: Settings, last: bool) -> None:
    """Tell FSDP what may wait for the last micro-batch of a step."""
    model.set_requires_all_reduce(last)  # the copies of --replicate meet once per step
    if settings.gather_once:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def reshard(model: Llama) -> None:
    """Free the weights that FSDP keeps gathered, in `--dtype`, until a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# --------------------------------------------------------------------------------------------------
# The command


def report(inputs: Inputs, summary: dict) -> str:
    """Say what was learnt, on held-out pairs if there are some, and what to do next."""
    lines, pairs, out = [], inputs.held_out or inputs.pairs, summary["out"]
    model, prompt, before, after = summary["model"], "PROMPT", summary["before"], summary["after"]
    if "rewards/margins" in after:
        percent = [100 * metrics["rewards/accuracies"] for metrics in (before, after)]
        margins = [metrics["rewards/margins"] for metrics in (before, after)]
        lines += [f"\nWhat was learnt, on {len(pairs)} held-out pairs:"]
        lines += ["  reward accuracy  {:7.1f} %  →  {:.1f} %".format(*percent)]
        lines += ["  reward margin    {:+7.3f}    →  {:+.3f}".format(*margins)]
    if sum(path.stat().st_size for path in model.glob("*.safetensors")) < 2**27:  # answers at once
        room, tokenizer, judged = inputs.config.max_position_embeddings // 2, inputs.tokenizer, []
        prompt = tokenizer.decode(ids := pairs[0].prompt[:room].tolist())
        if inputs.source.resolve() == TOY:
            from toy.evidence import evidence  # only the toy has a world and a judge

            judged = evidence(inputs.source, model, tokenizer, inputs.held_out[:])
        lines += ["", *(judged or [f"One prompt, answered greedily: {prompt}"])]
        for when, folder in (("before", inputs.source), ("after", model)) if not judged else ():
            [answer] = generate(load(folder), [ids], tokenizer.stop_ids, max_new_tokens=128)
            lines += [f"  {when:6}  {tokenizer.decode(answer)}"]
    command = shlex.join(["python", "sample.py", "--model", str(model)])
    lines += ["", f"Sample from it:  {command} \\\n    --prompt {shlex.quote(prompt)}"]
    return "\n".join([*lines, f"Look at the run: {out}/metrics.jsonl and config.json"])


def main() -> None:
    settings, plan_options = read_command(description=__doc__)
    with report_errors("train.py"):
        if plan_options.plan:
            print_plan(settings, plan_options)
        elif settings.dry_run:
            device = start_ranks(settings)
            make_mesh(settings, device)  # refuses what training would refuse
            dry_run(settings.resolved(device.type))
        elif settings.show:
            start_ranks(settings)
            show(settings)
        else:
            train(settings)


if __name__ == "__main__":
    main()
