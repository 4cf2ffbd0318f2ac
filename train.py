"""Train a Llama or Mistral checkpoint on preference pairs, with SimPO, DPO or what they are compared with.

    torchrun train.py                                                    the embedded toy, on a laptop, in a minute
    torchrun train.py --objective dpo                                    the same with DPO
    torchrun --nproc-per-node 8 train.py --model DIR --data FILE         a real checkpoint on a node
    python train.py --config recipe.toml --lr 2e-6                       settings from a file; flags win over it
    python train.py --config recipe.toml --dry-run                       what that would train, on what
    python train.py --config recipe.toml --plan --gpus 8                 what that would take: memory, time

A *step* takes `--batch-size` pairs, whatever the hardware. They are spread over processes and micro-batches by their
tokens and work, and the step's loss is the sum over its pairs divided by their number, so that one process and eight,
with little memory or much, optimise the very same loss. Every process takes the same path; one process is a group of
one. Parameters are sharded by FSDP2, kept in float32, and computed with in `--dtype`.

Writes OUT/config.json (everything resolved), OUT/metrics.jsonl (one object per step), OUT/model/ (a Hugging Face folder),
and with `--save-every N` OUT/checkpoints/step-NNNNNN, from which the same command goes on as if it had never stopped. So it
does after SIGTERM and SIGUSR1 (Slurm's warnings), which save at the end of the step and exit with status 75.
"""

import contextlib
import ctypes
import fcntl
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import sys
import time
import typing
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
import model as llama
from baselines import cpo_loss, ipo_loss, kto_loss, orpo_loss, rdpo_loss, rrhf_loss, slic_loss
from data import Tokenizer, Tree
from model import CheckpointError, Config, Llama, Weights
from plan import micro_batches, peak_flops, print_plan, train_flops
from sample import generate
from settings import HYPERPARAMETERS, NEEDS_REFERENCE, SECTIONS, Settings, read_settings
from simpo import dpo_loss, simpo_loss

PARENT = os.getppid()  # torchrun, if that started us

# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start_processes(settings: Settings) -> tuple[torch.device, DeviceMesh]:
    """Join the group that torchrun described in the environment, or be a group of one."""
    kind = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:  # oneDNN keeps buffers for every shape it has seen, and no two of our streams have the same length
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
        keep_freed_memory()
    store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # a torchrun that starts its workers again shows them the old addresses
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backends = "cpu:gloo,cuda:nccl" if settings.offload else "nccl"  # offloaded gradients are normed on the host
    dist.init_process_group(backends if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return device, make_mesh(settings, kind)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free: else it hands big blocks back to Linux, which zeroes them anew at every use."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc here
        for option, size in ((-3, 2**30), (-1, 2**29)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(option, size)


def trim_freed_memory(device: torch.device) -> None:
    """Hand back to Linux, once, what lies freed between the activations that stay; a GPU has its own way."""
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bfloat16 has arithmetic units here; a CPU without them takes about eight times as long as in float32."""
    return device.type != "cpu" or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_mesh(settings: Settings, kind: str) -> DeviceMesh:
    """All processes in a row, which parameters are sharded over; with `--replicate N`, in N rows with a copy each."""
    world, copies = dist.get_world_size(), settings.replicate
    if world % copies:
        sys.exit(f"train.py: error: --replicate {copies} does not divide the number of processes, {world}")
    if copies == 1:
        return init_device_mesh(kind, (world,))
    return init_device_mesh(kind, (copies, world // copies), mesh_dim_names=("replicate", "shard"))


def share_out(items: list) -> list:
    """This process's contiguous share of a list; the shares of all ranks, in order, are the list."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def gather(thing) -> list:
    """What every process has, in the order of ranks."""
    things = [thing]
    if dist.get_world_size() > 1:
        things = [None] * dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def agree(work: Callable):
    """This process's `work()`. Where it fails on one process, all raise that error, so that none waits for it."""
    result = error = None
    try:
        result = work()
    except (ValueError, OSError) as e:
        error = e
    if errors := [e for e in gather(error) if e]:
        raise errors[0]
    return result


def on_every_rank(work: Callable) -> list:
    """The results of `work()` of all processes, in the order of ranks; errors as in `agree`."""
    return gather(agree(work))


def on_rank_0(work: Callable):
    """The result of `work()`, which rank 0 does alone while the others wait."""
    return on_every_rank(lambda: work() if dist.get_rank() == 0 else None)[0]


def say(*words) -> None:
    if dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on some process."""
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def progress(items, what: str, **bar):
    """A bar on rank 0 of a terminal, silence elsewhere."""
    return tqdm(items, desc=what, disable=None if dist.get_rank() == 0 else True, leave=False, dynamic_ncols=True, **bar)


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


def load_trees(name: str, tokenizer: Tokenizer, settings: Settings) -> tuple[list[Tree], dict[str, int]]:
    """Read, tokenize (each process its share) and gather; also the counts of what was read, cut and dropped."""
    counts: Counter = Counter()
    examples, first_dropped = [], ""

    def read() -> None:
        nonlocal first_dropped
        for where, record in data.read_records(name):
            counts["records"] += 1
            try:
                kind, example = data.parse_record(record, where, paired=settings.objective != "sft")
                counts[f"format: {kind}"] += 1
                examples.append(example)
            except data.Dropped as e:
                counts[f"dropped: {e}"] += 1
                first_dropped = first_dropped or f"; the first, {where}: {e}"

    def encode() -> tuple[list[Tree], Counter]:
        mine, trees, seen = share_out(examples), [], Counter()
        for i in progress(range(0, len(mine), 256), f"tokenizing {name}"):
            trees += tokenizer.encode(mine[i : i + 256], settings.max_length, settings.max_prompt_length, seen)
        return trees, seen

    agree(read)
    trees = []
    for share, seen in on_every_rank(encode):
        trees += share
        counts += seen
    summary = ", ".join(f"{n} {what}" if ":" not in what else f"{what} ({n})" for what, n in counts.items())
    if not trees:
        raise data.DataError(f"{name}: nothing to learn from: {summary or 'it is empty'}{first_dropped}")
    say(f"{name}: {summary}{first_dropped}")
    return trees, dict(counts) | {"used": len(trees)}


def read_inputs(settings: Settings) -> tuple[Path, Config, Weights, Tokenizer]:
    """The checkpoint folder and what is read from it before any memory is spent."""
    source = data.local_path(settings.model, "model", llama.CHECKPOINT_FILES)
    config, weights = Config.from_folder(source), Weights(source)
    tokenizer = Tokenizer(source, data.read_template(settings.chat_template))
    tokenizer.check_fits(config.vocab_size)
    return source, config, weights, tokenizer


def build_model(weights: Weights, config: Config, mesh: DeviceMesh, settings: Settings, trainable: bool) -> Llama:
    """Empty on the meta device, sharded, then filled: nothing is ever whole on one process.

    The policy is kept in float32 and computed with in `--dtype`; a frozen reference needs only the latter."""
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[settings.dtype]
    master = torch.promote_types(compute, torch.float32)
    with torch.device("meta"):
        model = Llama(config).to(master)
    weights.check(model)
    if not trainable:
        model.requires_grad_(False).to(compute)
    place = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(compute, reduce_dtype=master, cast_forward_inputs=False)}
    if settings.offload:
        place["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for block in model.model.layers:
        block.recompute = settings.activation_checkpointing
        block.keep_products(settings.keep_products)
        if settings.compile:
            for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
                part.compile(dynamic=True)  # streams differ in length; one compilation serves them all
        # gathered while another block computes: forward, since the CPU runs ahead; backward, since FSDP2 asks for the next
        fully_shard(block, **place, reshard_after_forward=not (settings.gather_once and trainable))
    # embedding and head: the policy's stay whole from forward to backward, a reference has no backward to wait for
    fully_shard(model, **place, reshard_after_forward=not trainable)
    model.to_empty(device="cpu" if settings.offload else mesh.device_type)
    weights.copy_into(model)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Objective


def response_logps(model: Llama, trees: list[Tree]) -> tuple[Tensor, Tensor]:
    """Summed log-probability of every response, in nats, and its length, in tokens; both [pairs, responses].

    Nothing here waits for a GPU, so that the next micro-batch is packed while this one is computed."""
    device = model.device
    there = lambda x: x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
    packed = data.pack(trees)
    for name in packed.keys() - {"cu_q", "cu_k"}:  # these two stay on the CPU, see model.PackedAttention
        packed[name] = there(torch.from_numpy(packed[name]))
    lengths = there(torch.tensor([[len(r) for r in tree.responses] for tree in trees]))
    logps = torch.segment_reduce(model(**packed), "sum", lengths=lengths.flatten(), unsafe=True)  # safe: would ask the GPU
    return logps.view_as(lengths), lengths


def pair_losses(
    settings: Settings, logps: Tensor, lengths: Tensor, ref_logps: Tensor | None, z_ref: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every pair and what to report of it, all [pairs]; the one place where the objective is chosen.

    logps, ref_logps: summed, in nats, [pairs, (chosen, rejected)]; lengths: in tokens, likewise; z_ref: KTO's."""
    names = ("chosen", "rejected")[: logps.shape[1]]
    report = {f"logps/{name}": column for name, column in zip(names, logps.detach().unbind(1))}
    report |= {f"avg_logps/{name}": column for name, column in zip(names, (logps.detach() / lengths).unbind(1))}
    report |= {f"lengths/{name}": column for name, column in zip(names, lengths.unbind(1))}
    s, policy, tokens = settings, logps.unbind(1), lengths.unbind(1)
    reference = ref_logps.unbind(1) if s.objective in NEEDS_REFERENCE else ()
    match s.objective:
        case "sft":
            return torch.zeros_like(logps[:, 0]), report
        case "simpo":
            result = simpo_loss(*policy, *tokens, s.beta, s.gamma, s.label_smoothing, s.length_norm)
        case "dpo":
            result = dpo_loss(*policy, *reference, s.beta, s.label_smoothing)
        case "rrhf":
            result = rrhf_loss(*policy, *tokens, s.lam)
        case "slic":
            result = slic_loss(*policy, s.delta, s.lam)
        case "ipo":
            result = ipo_loss(*policy, *reference, *tokens, s.beta, s.length_norm)
        case "cpo":
            result = cpo_loss(*policy, s.beta, s.lam)
        case "kto":
            result = kto_loss(*policy, *reference, s.beta, z_ref)
        case "orpo":
            result = orpo_loss(*policy, *tokens, s.lam)
        case "rdpo":
            result = rdpo_loss(*policy, *reference, *tokens, s.beta, s.alpha)
    losses, chosen, rejected = result
    report |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    report["rewards/accuracies"] = (chosen > rejected).float() + (chosen == rejected).float() / 2  # a tie is half right
    return losses, report


Reference = Callable[[list[Tree], list[int]], Tensor]  # (trees, their numbers in the data set) → logps [pairs, 2]


def run_pairs(
    model: Llama,
    trees: list[Tree],
    numbers: list[int],
    settings: Settings,
    reference: Reference | None,
    backward: bool,
    z_ref: float | None = None,
) -> dict[str, float]:
    """Forward, and with `backward` also backward, over the pairs `numbers`; training and evaluation both.

    Spreads them over processes and micro-batches; gradients and the metrics returned are those of all pairs together.
    A process whose share is empty computes one pair at weight 0, since FSDP needs everybody at every forward pass.
    KTO compares with the mean reward of the whole step, `z_ref`: it is found by a pass without gradient."""
    if settings.objective == "kto" and z_ref is None:
        means = run_pairs(model, trees, numbers, settings, reference, backward=False, z_ref=0.0)
        z_ref = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
    batch = [trees[n] for n in numbers]
    rank, world = dist.get_rank(), dist.get_world_size()
    sft_weight = settings.sft_weight + (settings.objective == "sft")
    chosen_tokens = sum(len(tree.responses[0]) for tree in batch)
    sums: dict[str, Tensor] = {}
    shortest = min(range(len(batch)), key=lambda i: len(batch[i]))
    rounds = micro_batches(model.config, batch, world, settings.microbatch_tokens)
    for number, shares in enumerate(rounds, 1):
        last = number == len(rounds)
        model.set_requires_all_reduce(last)  # HSDP's copies meet once a step
        model.set_is_last_backward(last)
        if settings.gather_once:
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
        mine, weight = shares[rank] or [shortest], 1.0 if shares[rank] else 0.0
        share = [batch[i] for i in mine]
        with torch.set_grad_enabled(backward):
            ref_logps = reference(share, [numbers[i] for i in mine]) if reference else None
            logps, lengths = response_logps(model, share)
            losses, report = pair_losses(settings, logps, lengths, ref_logps, z_ref)
            loss = weight * (losses.sum() / len(batch) - sft_weight * logps[:, 0].sum() / chosen_tokens)
        if backward:
            trim_freed_memory(logps.device)
            (loss * world).backward()  # FSDP averages over processes; ours is a sum
        means = {name: weight * value.double().sum() / len(batch) for name, value in report.items()}
        for name, value in {"loss": loss.detach().double(), **means}.items():
            sums[name] = sums.get(name, 0) + value
    if not backward:  # what waits for a backward pass would stay gathered, in the precision of computing
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    table = torch.stack(list(sums.values()))
    dist.all_reduce(table)
    return dict(zip(sums, table.tolist()))


def online_reference(model: Llama) -> Reference:
    """Score pairs with a frozen copy when they are needed: before the policy's forward, so that no activations wait."""

    @torch.no_grad()
    def score(trees: list[Tree], numbers: list[int]) -> Tensor:
        return response_logps(model, trees)[0]

    return score


def empty_table(trees: list[Tree], settings: Settings, device: torch.device) -> Tensor:
    """Room for the reference's log-probabilities of every pair, [trees, 2], as precise as the policy's."""
    return torch.zeros(len(trees), 2, device=device, dtype=torch.float64 if settings.dtype == "fp64" else torch.float32)


def reference_table(model: Llama, trees: list[Tree], steps: list[np.ndarray], settings: Settings) -> Tensor:
    """Every pair of `steps` scored once, [trees, 2]; the model can be freed afterwards.

    Goes through the very micro-batches that training will see, so that at step 0 policy and reference agree to the bit.
    """
    table = empty_table(trees, settings, model.device)
    seen = torch.zeros(len(trees), device=model.device)
    online, rank, world = online_reference(model), dist.get_rank(), dist.get_world_size()
    for step in progress(steps, "reference"):
        for shares in micro_batches(model.config, [trees[n] for n in step], world, settings.microbatch_tokens):
            numbers = [int(step[i]) for i in shares[rank] or [0]]
            logps = online([trees[n] for n in numbers], numbers)
            if shares[rank]:
                table[numbers] = logps
                seen[numbers] += 1
    dist.all_reduce(table)
    dist.all_reduce(seen)
    wanted = np.unique(np.concatenate(steps))
    assert (seen[wanted] == 1).all(), "every pair is scored exactly once"
    return table


def cached_reference(table: Tensor) -> Reference:
    """Look up what `reference_table` found."""
    return lambda trees, numbers: table[numbers]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: OUT/checkpoints/step-000120 holds all that the next step depends on, so that a run that was killed and
# resumed is the unbroken run. Weights and moments lie in safetensors, each process's shards in its own files, read back by
# any number of processes; nothing is pickled. No random state: the order of the pairs follows from seed and epoch, and
# nothing else is random.

RESUME_ME = 75  # exit status: stopped when told to, not done (EX_TEMPFAIL of sysexits.h)

# what may change when a run goes on: results stay the same up to rounding; data is compared by its tokens
FREE = frozenset("""chat_template device microbatch_tokens activation_checkpointing keep_products compile replicate gather_once
                 offload out overwrite log_every eval_every save_every keep resume dry_run tensorboard wandb plan gpus gpu_memory
                 gpu_tflops mfu plan_tokens_per_pair""".split())  # fmt: skip


def identity(settings: Settings, source: Path, trees: list[Tree], held_out: list[Tree]) -> dict:
    """What must be the same for a run to go on: the settings that the mathematics depends on, the checkpoint that it began
    from (of a hub id, the very commit), and the tokens."""

    def digest(trees: list[Tree]) -> str:
        bits = hashlib.sha256()
        for tree in trees:
            for part in (tree.prompt, *tree.responses):
                bits.update(len(part).to_bytes(8, "little") + part.tobytes())
        return f"{len(trees)} with sha256 {bits.hexdigest()[:16]}"

    same = {name: value for name, value in asdict(settings).items() if name not in FREE}
    return same | {"model": str(source.resolve()), "data": digest(trees), "eval_data": digest(held_out)}


def training_state(policy: Llama, optimizer: torch.optim.AdamW, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a run under the names they are saved by, themselves: loading fills them in place."""
    state = dict(tables)
    for name, parameter in policy.named_parameters():
        moments = optimizer.state[parameter]
        if not moments:  # before the first step
            moments |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            moments["step"] = torch.zeros((), device=parameter.device)
        state |= {f"model.{name}": parameter.detach()}
        state |= {f"optimizer.{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
    return state


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((p for p in out.glob("checkpoints/step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def cause_of(error: BaseException) -> BaseException:
    """What DCP has wrapped, if it has; Ctrl-C goes on as what it is."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    if isinstance(cause, KeyboardInterrupt):
        raise cause
    return cause


def save_checkpoint(out: Path, state: dict[str, Tensor], record: dict, keep: int) -> Path:
    """Write a checkpoint under another name, wait for the disk, then rename: whole or absent. Every process calls it.

    record: what is no tensor; at least `step`. Raises OSError, and the older checkpoints stay, where the disk is full."""
    path = out / "checkpoints" / f"step-{record['step']:06d}"
    temporary = path.with_name(path.name + ".incomplete")
    files, size = {}, 0  # DCP holds a whole file in memory: about 1 GiB each
    for name, tensor in state.items():
        size += tensor.nbytes // dist.get_world_size()
        files[name] = 1 + size // 2**30

    def begin() -> None:
        for stale in path.parent.glob("*.incomplete"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)

    def finish() -> None:
        shutil.copyfile(out / "metrics.jsonl", temporary / "metrics.jsonl")
        (temporary / "state.json").write_text(json.dumps(record, indent=2) + "\n")
        for file in (temporary / "metrics.jsonl", temporary / "state.json", temporary):
            llama.sync(file)
        temporary.rename(path)
        llama.sync(path.parent)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old.rename(old.with_name(old.name + ".incomplete")))

    try:
        on_rank_0(begin)
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(temporary, files, save_distributed=True))
        on_rank_0(finish)
    except (CheckpointException, OSError) as e:
        cause = cause_of(e)
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        older = checkpoints(out)
        raise OSError(f"{path}: cannot be saved: {cause}; " + (f"{older[-1]} is whole" if older else "there is no older one")) from None
    return path


def find_checkpoint(settings: Settings, out: Path, same: dict) -> tuple[Path | None, dict, str]:
    """The checkpoint to go on from, its record and its metrics.jsonl; None and those of a run that begins.

    Raises CheckpointError unless it is one of the same run."""
    newest = None if (out / "model").exists() else next(reversed(checkpoints(out)), None)
    path = {"auto": newest, "never": None}.get(settings.resume, Path(settings.resume))
    if path is None:
        return None, {"step": 0, "run": uuid.uuid4().hex}, ""
    record = llama.read_json(path / "state.json")
    theirs = record.get("identity")
    whole = isinstance(record.get("step"), int) and isinstance(record.get("before"), dict) and isinstance(theirs, dict)
    if not whole or "run" not in record:
        raise CheckpointError(f"{path / 'state.json'}: not the state of a run")
    differ = [f"{key.replace('_', '-')} {theirs.get(key)!r} (now {same.get(key)!r})"
              for key in sorted(theirs | same) if theirs.get(key) != same.get(key)]  # fmt: skip
    if differ:
        raise CheckpointError(f"{path} is of another run: {', '.join(differ)}; pass these, another --out, or --resume never")
    try:
        return path, record, (path / "metrics.jsonl").read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path / 'metrics.jsonl'}: cannot be read: {e}") from None


def load_checkpoint(path: Path, state: dict[str, Tensor], optimizer: torch.optim.AdamW, step: int) -> None:
    """Fill `state` in place. Every process calls it. Raises CheckpointError for a damaged checkpoint."""
    logging.disable(logging.WARNING)  # DCP would log the traceback of what is one line below
    try:
        dcp.load(state, storage_reader=HuggingFaceStorageReader(path))
    except CheckpointException as e:
        raise CheckpointError(f"{path}: cannot be read: {cause_of(e)}") from None
    finally:
        logging.disable(logging.NOTSET)
    for moments in optimizer.state.values():
        moments["step"].fill_(step)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Of step 0 … steps − 1: up to the peak in a line over the warm-up, which ends at it, then down to just above 0."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    left = 1 - (step - warmup) / (steps - warmup)
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return settings.lr * shape[settings.lr_schedule]


def prepare_out(settings: Settings, files: contextlib.ExitStack) -> typing.TextIO:
    """Settle on the folder of this run and lock it, on rank 0: new, empty, or left by a run of ours that did not finish.

    Returns OUT/metrics.jsonl, open; nobody else can have it until this process ends, however it ends."""
    runs = Path("runs")
    if settings.out is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun has started us again
        for path in runs.glob("*/config.json"):
            with contextlib.suppress(CheckpointError):  # half written, by whomever
                if llama.read_json(path).get("launcher") == launcher() and not (path.parent / "model").exists():
                    settings.out = str(path.parent)
    if settings.out is None:
        runs.mkdir(exist_ok=True)
        for path in (runs / f"{settings.objective}-{n}" for n in itertools.count(1)):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                settings.out = str(path)
                break
    out = Path(settings.out)
    if out.exists() and any(out.iterdir()) and not (out / "metrics.jsonl").exists():
        raise FileExistsError(f"{out} is not empty and holds no run of ours: pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    metrics = files.enter_context(open(out / "metrics.jsonl", "a+", encoding="utf-8"))
    try:
        fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(f"{out}: another run is writing there") from None
    if (out / "model").exists() and not settings.overwrite:
        raise FileExistsError(f"{out} holds a finished run: pass --overwrite to replace it, or another --out")
    goes_on_here = settings.resume == "auto" or Path(settings.resume).resolve().parent == (out / "checkpoints").resolve()
    if not goes_on_here and checkpoints(out) and not settings.overwrite:
        raise FileExistsError(f"{out} holds checkpoints of a run: pass --overwrite to replace them, or another --out")
    return metrics


def begin_out(out: Path, metrics: typing.TextIO, first: int, rows: str, record: dict) -> None:
    """Take away what a run that has done `first` steps will do anew, on rank 0."""
    shutil.rmtree(out / "model", ignore_errors=True)
    for path in checkpoints(out):
        if not 0 < int(path.name[5:]) <= first:
            shutil.rmtree(path)
    metrics.truncate(0)
    metrics.write(rows)
    metrics.flush()  # the next checkpoint copies what is on disk
    (out / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def launcher() -> str:
    """Whoever started this process: the same for all that one torchrun starts, and starts again."""
    return f"{platform.node()}:{PARENT}:{os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def open_writers(settings: Settings, out: Path, state: dict, files: contextlib.ExitStack) -> list[Callable[[dict], None]]:
    """What else takes every row of metrics, of a run that goes on from `state`."""
    writers = []
    if settings.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = files.enter_context(SummaryWriter(str(out / "tensorboard"), purge_step=state["step"] + 1))
        writers.append(lambda row: [board.add_scalar(name, value, row["step"]) for name, value in row.items()])
    if settings.wandb:
        import wandb

        whose = {"project": "simpo", "name": out.name, "id": state["run"], "resume": "allow"}  # the same when it goes on
        online = files.enter_context(wandb.init(**whose, dir=out, config=asdict(settings)))
        writers.append(lambda row: online.log(row, step=row["step"]))
    return writers


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def speed(config: Config, trees: list[Tree], seconds: float, device: torch.device) -> dict[str, float]:
    """Rates over all processes, and the share of known GPUs' peak that went into the mathematics (MFU)."""
    rates = {"tokens_per_second": sum(map(len, trees)) / seconds, "pairs_per_second": len(trees) / seconds}
    if peak := peak_flops(device):
        rates["mfu"] = train_flops(config, trees) / seconds / peak / dist.get_world_size()
    return rates


def describe(metrics: dict[str, float]) -> str:
    """The few numbers of a line on the terminal."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "rewards/margins" in metrics:
        parts += [f"margin {metrics['rewards/margins']:+.4f}", f"accuracy {100 * metrics['rewards/accuracies']:.1f} %"]
    else:
        parts += [f"log p {metrics['avg_logps/chosen']:.3f} nats/token"]
    return "  ".join(parts)


@contextlib.contextmanager
def one_line_errors(program: str, settings: Settings | None = None) -> Iterator[None]:
    """What a user or a machine can cause ends with one line on stderr and status 1, on whichever process it happens."""
    try:
        yield
    except (data.DataError, CheckpointError, OSError, FloatingPointError) as e:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{program}: error: {e}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as e:  # the others wait for this process and cannot be asked
        print(f"{program}: error: {e}\nlower --microbatch-tokens", file=sys.stderr, flush=True)
        os._exit(1)
    except KeyboardInterrupt:
        if not dist.is_initialized() or dist.get_rank() == 0:
            out = Path(settings.out) if settings and settings.out else None
            saved = checkpoints(out) if out else []
            kept = f"{saved[-1]} is kept: go on with the same flags and --out {out}" if saved else "no weights are kept"
            print(f"\n{program}: interrupted; {kept}" + (f"; metrics are in {out}" if out else ""), file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def dry_run(settings: Settings) -> None:
    """Say what would be trained, on what: every setting, and of model and data as much as is on this machine."""
    notes = {name: "" for name in ("model", "data", "eval_data") if getattr(settings, name)}
    missing = [name for name in notes if not data.at_hand(getattr(settings, name))]
    notes |= dict.fromkeys(missing, "would be fetched from the hub")
    template, tokenizer = data.read_template(settings.chat_template), None
    if "model" not in missing:
        source = Path(settings.model).expanduser()
        config, tokenizer = Config.from_folder(source), Tokenizer(source, template)
        tokenizer.check_fits(config.vocab_size)
        with torch.device("meta"):
            notes["model"] = f"{sum(p.numel() for p in Llama(config).parameters()):,} parameters"
    for name in notes:
        if name == "model" or name in missing:
            continue
        where = getattr(settings, name)
        n = len(load_trees(where, tokenizer, settings)[0]) if tokenizer else sum(1 for _ in data.read_records(where))
        notes[name] = f"{n:,} {'used' if tokenizer else 'records'}"
        if name == "data":
            epochs = data.batches(n, settings.batch_size, settings.epochs, settings.seed, settings.shuffle)
            notes[name] += f", {sum(1 for _ in itertools.islice(epochs, settings.max_steps)):,} steps"
    if settings.gamma is not None:
        notes["gamma_beta_ratio"] = f"γ = {settings.gamma:g}"
    for name, value in asdict(settings).items():
        if name in SECTIONS:
            say(f"\n{SECTIONS[name]}")
        if value is not None:
            say(f"  {name.replace('_', '-'):26}{value!s:58}{notes.get(name, '')}".rstrip())


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGUSR1 has come, or the torchrun that started this process has died and left it alone."""
    told = []
    before = {number: signal.signal(number, lambda *_: told.append(True)) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(told) or "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    settings = read_settings(description=__doc__)
    with one_line_errors("train.py", settings):
        if settings.plan:
            return print_plan(settings)
        device, mesh = start_processes(settings)
        if settings.dry_run:
            dry_run(settings)
        else:
            train(settings, device, mesh)


def train(settings: Settings, device: torch.device, mesh: DeviceMesh) -> None:
    """One run, from reading to saving. Told to stop, on whichever process, it saves its state at the end of the step
    and leaves with status RESUME_ME."""
    with contextlib.ExitStack() as files:  # closed, and OUT unlocked, however the run ends
        run(settings, device, mesh, files)


def run(settings: Settings, device: torch.device, mesh: DeviceMesh, files: contextlib.ExitStack) -> None:
    if settings.dtype == "auto":
        settings.dtype = "bf16" if device.type == "cuda" else "fp32"

    # What to train, on what. Errors come before anything is written.
    [source, config, weights, tokenizer] = agree(lambda: read_inputs(settings))
    if settings.max_length > config.max_position_embeddings:
        say(
            f"warning: --max-length {settings.max_length}, but the model knows {config.max_position_embeddings} positions"
        )
    if settings.dtype == "bf16" and not multiplies_bf16(device):
        say("warning: this CPU multiplies bfloat16 in software; --dtype fp32 is several times as fast")
    trees, counts = load_trees(settings.data, tokenizer, settings)
    held_out, eval_counts = load_trees(settings.eval_data, tokenizer, settings) if settings.eval_data else ([], {})
    epochs = data.batches(len(trees), settings.batch_size, settings.epochs, settings.seed, settings.shuffle)
    steps = list(itertools.islice(epochs, settings.max_steps))
    policy = agree(lambda: build_model(weights, config, mesh, settings, trainable=True))
    parameters = sum(p.numel() for p in policy.parameters())

    # Where it goes, and whether it goes on from somewhere.
    metrics_file = agree(lambda: prepare_out(settings, files) if dist.get_rank() == 0 else None)
    settings.out = on_rank_0(lambda: settings.out)
    out = Path(settings.out)
    same = identity(settings, source, trees, held_out)
    resumed, state, rows = on_rank_0(lambda: find_checkpoint(settings, out, same))
    first = state["step"]

    reference = held_out_reference = None
    tables: dict[str, Tensor] = {}  # of a cached reference
    if settings.objective in NEEDS_REFERENCE:
        frozen = None
        if settings.reference == "online" or not resumed:
            frozen = build_model(weights, config, mesh, settings, trainable=False)
        if settings.reference == "cached":
            first_epoch = steps[: math.ceil(len(trees) / settings.batch_size)]
            wanted = {"reference": (trees, first_epoch), "held_out_reference": (held_out, [np.arange(len(held_out))])}
            tables = {
                name: reference_table(frozen, *what, settings) if frozen else empty_table(what[0], settings, device)
                for name, what in wanted.items()
                if what[0]
            }
            reference, held_out_reference = (cached_reference(tables.get(name)) for name in wanted)
        else:
            reference = held_out_reference = online_reference(frozen)
        del frozen
        gc.collect()  # FSDP's modules refer to each other in circles: without this a cached reference stays in memory

    betas = settings.adam_beta1, settings.adam_beta2
    optimizer = torch.optim.AdamW(
        policy.parameters(), settings.lr, betas, settings.adam_eps, settings.weight_decay, fused=True
    )
    if resumed:
        load_checkpoint(resumed, training_state(policy, optimizer, tables), optimizer, first)
        say(f"resumed from {resumed}")
    record = {
        "settings": asdict(settings) | {"gamma": settings.gamma},
        "source": str(source),
        "resumed": str(resumed) if resumed else None,
        "architecture": asdict(config),
        "parameters": parameters,
        "data": counts,
        "eval_data": eval_counts,
        "steps": len(steps),
        "processes": dist.get_world_size(),
        "launcher": launcher(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")},
    }
    on_rank_0(lambda: begin_out(out, metrics_file, first, rows, record))
    writers = open_writers(settings, out, state, files) if metrics_file else []

    def log(row: dict) -> None:
        if metrics_file:
            metrics_file.write(json.dumps(row) + "\n")
            metrics_file.flush()
        for write in writers:
            write(row)

    def evaluate(step: int) -> dict[str, float]:
        if not held_out:
            return {}
        metrics = run_pairs(policy, held_out, list(range(len(held_out))), settings, held_out_reference, backward=False)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"held out, after {step} steps: loss {metrics['loss']}")
        log({"step": step} | {f"eval_{name}": value for name, value in metrics.items()})
        say(f"held out, after {step} steps:  {describe(metrics)}")
        return metrics

    own = [*HYPERPARAMETERS[settings.objective], *(["reference"] if settings.objective in NEEDS_REFERENCE else [])]
    say(
        ", ".join([settings.objective, *(f"{name} {getattr(settings, name)}" for name in own)])
        + f": {len(steps)} steps of {len(steps[0])} pairs, {parameters:,} parameters, "
        + f"{dist.get_world_size()} × {device.type} in {settings.dtype} → {out}"
    )
    before = state["before"] if resumed else evaluate(0)
    # The loop. Every process is in every line of it; metrics are sums over all of them.
    told = files.enter_context(told_to_stop())  # before this there is nothing to save
    seen = sum(map(len, steps[:first]))
    bar = progress(steps[first:], settings.objective, initial=first, total=len(steps))
    for step, numbers in enumerate(bar, first):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, len(steps))
        metrics = run_pairs(policy, trees, numbers.tolist(), settings, reference, backward=True)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        grad_norm = norm.full_tensor().item()  # of all shards
        if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
            pairs = ", ".join(trees[n].where for n in numbers)
            raise FloatingPointError(f"step {step + 1}: loss {metrics['loss']}, gradient norm {grad_norm}; {pairs}")
        optimizer.step()
        optimizer.zero_grad()
        seen += len(numbers)
        batch, seconds = [trees[n] for n in numbers], time.perf_counter() - start
        row = {
            "step": step + 1,
            "epoch": seen / len(trees),
            **metrics,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            **speed(config, batch, seconds, device),
            "peak_memory_gib": peak_memory_gib(device),
        }
        if (step + 1) % settings.log_every == 0:
            log(row)
        if not bar.disable:
            bar.set_postfix_str(describe(row))
        elif (step + 1) % settings.log_every == 0:
            rates = f"lr {row['learning_rate']:.2e}  {row['pairs_per_second']:.2f} pairs/s"
            say(f"step {step + 1}/{len(steps)}  {describe(row)}  {rates}")
        last = step + 1 == len(steps)
        if settings.eval_every and (step + 1) % settings.eval_every == 0 and not last:
            evaluate(step + 1)
        stop = any_process(told(), device)
        if stop or settings.save_every and ((step + 1) % settings.save_every == 0 or last):
            state |= {"step": step + 1, "before": before, "identity": same}
            path = save_checkpoint(out, training_state(policy, optimizer, tables), state, settings.keep)
        if stop:
            say(f"told to stop: {path} is kept; go on with the same flags and --out {out}")
            sys.exit(RESUME_ME)
    after = evaluate(len(steps))

    llama.save(
        policy, source, out / "model", weights.dtype, write=dist.get_rank() == 0, replace=tokenizer.changed_files()
    )
    if dist.get_rank() == 0:
        print(report(source, out, tokenizer, held_out or trees, before, after))


def report(source: Path, out: Path, tokenizer: Tokenizer, trees: list[Tree], before: dict, after: dict) -> str:
    """What was learnt on held-out pairs, and where to look: for people."""
    lines = []
    if "rewards/margins" in after:
        lines += [f"\nWhat was learnt, on {len(trees)} held-out pairs:"]
        (a, b), (c, d) = ((m["rewards/accuracies"] * 100, m["rewards/margins"]) for m in (before, after))
        lines += [f"  reward accuracy  {a:7.1f} %  →  {c:.1f} %", f"  reward margin    {b:+7.3f}    →  {d:+.3f}"]
    model, prompt = out / "model", "PROMPT"
    if sum(path.stat().st_size for path in model.glob("*.safetensors")) < 2**27:  # small enough to answer at once
        prompt = tokenizer.decode(trees[0].prompt.tolist())
        lines += ["", f"One prompt, answered greedily: {prompt}"]
        for when, folder in (("before", source), ("after", model)):
            [ids] = generate(llama.load(folder), [trees[0].prompt.tolist()], tokenizer.stop_ids, max_new_tokens=128)
            lines += [f"  {when:6}  {tokenizer.decode(ids)}"]
    lines += ["", f"Sample from it:  python sample.py --model {model} --prompt {shlex.quote(prompt)}"]
    lines += [f"Look at the run: {out}/metrics.jsonl (a line per step), {out}/config.json (everything resolved)"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
