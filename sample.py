"""Sample from a checkpoint: answers to prompts, several per prompt, or a conversation in the terminal.

    python sample.py                                                     the toy, before training
    python sample.py --model runs/simpo-1/model --prompt "describe the fox ."
    python sample.py --model DIR --prompts prompts.jsonl --num-samples 5 --temperature 0.8 --top-p 0.95 --out candidates.jsonl
    python sample.py --model DIR --chat

A string prompt becomes one user message where the checkpoint has a chat template, and is continued as it is where it has
none. Decoding is greedy by default. Every sample draws its random numbers from its own stream, named by seed, prompt and
sample, so that neither the batch size nor the other prompts change it (but for rounding: a tie within float error may
fall either way when the shapes of the matrix products change).
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import model as llama
from data import DataError, Tokenizer
from model import CheckpointError, Config, Llama, PackedAttention

HERE = Path(__file__).resolve().parent


class KVCache:
    """Keys and values of the sequences being decoded, one row each; hands `model.Decoder` the attention it needs."""

    def __init__(self, config: Config, rows: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.window = config.sliding_window

    def prompts(self, rows: list[int], lengths: list[int]):
        """Attention over a packed stream of whole prompts, which also fills their rows."""
        offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        packed = PackedAttention(torch.arange(sum(lengths), device=self.k.device), offsets, offsets, self.window)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for row, n, keys, values in zip(rows, lengths, k.split(lengths), v.split(lengths)):
                self.k[layer, row, :, :n] = keys.transpose(0, 1)
                self.v[layer, row, :, :n] = values.transpose(0, 1)
            return packed(layer, q, k, v)

        return attend

    def step(self, positions: list[int]):
        """Attention of one new token in each of the first rows, at `positions` [rows], over all before it in its row."""
        device, longest = self.k.device, max(positions) + 1
        rows, positions = torch.arange(len(positions), device=device), torch.tensor(positions, device=device)
        distance = positions[:, None] - torch.arange(longest, device=device)
        mask = ((distance >= 0) & (distance < (self.window or longest)))[:, None, None]  # [rows, heads, 1, keys]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, rows, :, positions] = k
            self.v[layer, rows, :, positions] = v
            keys, values = (cache[layer, : len(rows), :, :longest] for cache in (self.k, self.v))
            q = q.unflatten(1, (keys.shape[1], -1))  # query heads that share a key head stand as its queries
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1, 2)

        return attend

    def move(self, source: int, target: int) -> None:
        for cache in (self.k, self.v):
            cache[:, target] = cache[:, source]


@dataclass
class Row:
    """A sequence being decoded; the n-th in the list has the n-th row of the cache."""

    number: int  # which prompt
    uniforms: np.ndarray  # the random numbers of its tokens, one each: there is room for no more tokens
    position: int  # of its newest token
    token: int = -1
    made: int = 0


@torch.inference_mode()
def decode(
    model: Llama,
    prompts: list[list[int]],
    stop_ids: set[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 32,
    streams: list[int] | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """Continue every prompt; yields (prompt number, token, whether it is the last) as tokens come.

    `batch_size` sequences are decoded at once; whichever ends, with a stop token, after `max_new_tokens` or with the
    positions that the model knows, makes room for the next. Raises DataError for a prompt that fills those. temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off. `streams`: the name of each prompt's stream
    of random numbers, its number by default."""
    weight = model.head_weight
    context = model.config.max_position_embeddings
    longest = max(map(len, prompts))
    if longest >= context:
        raise DataError(f"a prompt of {longest} tokens leaves no room among the model's {context} positions")
    # longest first: a step costs what its longest row costs
    waiting = iter(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    length = min(longest + max_new_tokens, context)
    cache = KVCache(model.config, min(batch_size, len(prompts)), length, weight.device, weight.dtype)
    rows: list[Row] = []
    while True:
        fresh = len(rows)
        for i in itertools.islice(waiting, cache.k.shape[1] - len(rows)):
            noise = np.random.Generator(np.random.Philox(key=(seed << 64) + (streams[i] if streams else i)))
            room = min(max_new_tokens, context - len(prompts[i]))
            rows.append(Row(i, noise.random(room), len(prompts[i]) - 1))
        if not rows:
            return
        if fresh < len(rows):  # the new prompts, as one packed stream
            current = range(fresh, len(rows))
            texts = [prompts[rows[j].number] for j in current]
            lengths = [len(text) for text in texts]
            tokens, positions = itertools.chain(*texts), itertools.chain(*map(range, lengths))
            attend, last = cache.prompts(list(current), lengths), np.cumsum(lengths) - 1
        else:  # one more token for everybody
            current = range(len(rows))
            for row in rows:
                row.position += 1
            tokens, positions = (row.token for row in rows), (row.position for row in rows)
            attend, last = cache.step([row.position for row in rows]), np.arange(len(rows))
        tokens, positions = (torch.tensor(list(x), device=weight.device) for x in (tokens, positions))
        logits = model.logits(model.model(tokens, positions, attend)[last])
        draws = torch.tensor([rows[j].uniforms[rows[j].made] for j in current], device=weight.device)
        chosen = pick(logits, draws, temperature, top_p, top_k).tolist()
        for j, token in reversed(list(zip(current, chosen))):  # from the end, so that the row moved in has had its turn
            row = rows[j]
            row.token, row.made = token, row.made + 1
            finished = token in stop_ids or row.made == len(row.uniforms)
            yield row.number, token, finished
            if finished:
                rows[j] = rows[-1]
                cache.move(len(rows) - 1, j)
                rows.pop()


def pick(logits: Tensor, draws: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """One token for each row of logits [rows, V]: where its draw, uniform in [0, 1), falls among the probabilities.

    `top_k` keeps the k likeliest tokens, `top_p` the fewest of those whose probability reaches p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdim=True).values).double() / temperature  # the likeliest is at 0
    probabilities, ids = logits.softmax(-1), None
    if top_k or top_p < 1:
        probabilities, ids = probabilities.sort(-1, descending=True)
        probabilities = probabilities[:, : top_k or None]
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p * probabilities.sum(-1, keepdim=True)
        keep[:, 0] = True  # however small p is
        probabilities = probabilities * keep
    edges = probabilities.cumsum(-1)
    picked = torch.searchsorted(edges, draws[:, None] * edges[:, -1:], right=True).clamp(max=edges.shape[1] - 1)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


def generate(
    model: Llama, prompts: list[list[int]], stop_ids: set[int], max_new_tokens: int, **options
) -> list[list[int]]:
    """The new tokens of every prompt, its stop token included if it came to one; options as for `decode`."""
    made: list[list[int]] = [[] for _ in prompts]
    for number, token, _ in decode(model, prompts, stop_ids, max_new_tokens, **options):
        made[number].append(token)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_prompts(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) for each prompt: a line of a .txt file, or a record with `prompt` or `messages`."""
    if path.suffix != ".txt":
        yield from data.read_records(str(path))
        return
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read: {e}") from None
    yield from ((f"{path}:{n}", {"prompt": line}) for n, line in enumerate(lines, 1) if line.strip())


def prompt_of(record: dict, where: str) -> str | data.Messages:
    """The `prompt` (string or messages) or `messages` of a record."""
    field = "prompt" if record.get("prompt") is not None else "messages"
    if record.get(field) is None:
        raise DataError(f"{where}: no 'prompt' or 'messages' field")
    return data.check_prompt(record[field], where, field)


def chat(model: Llama, tokenizer: Tokenizer, options: dict) -> None:
    """A conversation in the terminal, streamed; ends with an empty line, Ctrl-D or Ctrl-C."""
    messages: list[dict] = []
    print("Empty line or Ctrl-D to leave.")
    while True:
        try:
            said = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            said = ""
        if not said.strip():
            return print()
        messages.append({"role": "user", "content": said})
        text = tokenizer.prompt_text(messages if tokenizer.template else said, "chat")
        ids, shown = [], ""
        try:
            for _, token, _ in decode(model, tokenizer.encode_prompts([text]), tokenizer.stop_ids, **options):
                ids.append(token)
                answer = tokenizer.decode(ids)
                if not answer.endswith("\ufffd"):  # half a character: the rest is in the next token
                    print(answer[len(shown) :], end="", flush=True)
                    shown = answer
        except KeyboardInterrupt:
            pass
        print()
        messages.append({"role": "assistant", "content": shown})


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="sample.py [--flag value ...]     (--help explains every flag)",
    )
    parser.add_argument(
        "--model",
        default=str(HERE / "toy" / "checkpoint"),
        metavar="DIR",
        help="Hugging Face folder, or a hub id NAME[@REVISION] (default: the toy's)",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt with a prompt a line, or records with `prompt` or `messages` (.jsonl, .json, .parquet)",
    )
    parser.add_argument("--chat", action="store_true", help="converse in the terminal")
    parser.add_argument(
        "--out", metavar="FILE.jsonl", help="write one object a prompt: its record and `responses`; else print"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="responses per prompt (default: 1)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 is greedy, 1 the model's own distribution (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that make up P of the probability (default: 1, all)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: 0, all)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest response, in tokens (default: 512)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (default: 0)")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="sequences decoded at once (default: 32)"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="bf16 on cuda, fp32 on a cpu (default: auto)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cuda where there is one, else cpu (default: auto)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="jinja2 chat template to use instead of the checkpoint's; 'none' for plain text",
    )
    flags = parser.parse_args(argv)
    for name in ("num_samples", "max_new_tokens", "batch_size"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    if not (
        0 <= flags.temperature < float("inf") and 0 < flags.top_p <= 1 and flags.top_k >= 0 and 0 <= flags.seed < 2**64
    ):
        parser.error("expected a finite --temperature ≥ 0, 0 < --top-p ≤ 1, --top-k ≥ 0 and 0 ≤ --seed < 2⁶⁴")
    if flags.num_samples > 1 and flags.temperature == 0:
        parser.error("--num-samples goes with --temperature: greedy samples are all the same")
    if flags.chat and (flags.prompt or flags.prompts or flags.out):
        parser.error("--chat goes without --prompt, --prompts and --out")
    if flags.out and Path(flags.out).exists() and not flags.overwrite:
        parser.error(f"{flags.out} exists: pass --overwrite to replace it")
    return flags


def main() -> None:
    flags = read_flags()
    try:
        sample(flags)
    except (DataError, CheckpointError, OSError) as e:
        sys.exit(f"sample.py: error: {e}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"sample.py: error: {e}\nlower --batch-size ({flags.batch_size}) or --max-new-tokens")
    except KeyboardInterrupt:
        sys.exit("\nsample.py: interrupted" + (f"; the answers so far are in {flags.out}" if flags.out else ""))


def sample(flags: argparse.Namespace) -> None:
    device = flags.device if flags.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no CUDA device here")
    dtype = torch.bfloat16 if (flags.dtype == "auto" and device == "cuda") or flags.dtype == "bf16" else torch.float32
    source = data.local_path(flags.model, "model", llama.CHECKPOINT_FILES)
    tokenizer = Tokenizer(source, data.read_template(flags.chat_template))
    records = [("--prompt", {"prompt": text}) for text in flags.prompt]
    records += read_prompts(Path(flags.prompts)) if flags.prompts else []
    if not records and not flags.chat:
        if flags.prompts:
            raise DataError(f"{flags.prompts}: no prompt in it")
        if source != HERE / "toy" / "checkpoint":
            raise DataError("nothing to answer: pass --prompt, --prompts or --chat")
        records = [("", {"prompt": "describe the fox and the moon ."})]
    asked = [prompt_of(record, where) for where, record in records]
    prompts = tokenizer.encode_prompts(
        [tokenizer.prompt_text(prompt, where) for prompt, (where, _) in zip(asked, records)]
    )
    config = Config.from_folder(source)
    tokenizer.check_fits(config.vocab_size)
    for (where, _), ids in zip(records, prompts):
        if not 0 < len(ids) < config.max_position_embeddings:
            raise DataError(f"{where}: {len(ids)} tokens; the model takes 1 to {config.max_position_embeddings - 1}")
    model = llama.load(source, device, dtype)
    options = {
        name: getattr(flags, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size")
    }
    if flags.chat:
        return chat(model, tokenizer, options)

    out = open(flags.out, "w", encoding="utf-8") if flags.out else None
    n = flags.num_samples
    group = max(1, 8 * flags.batch_size // n)  # prompts decoded together; after each group its answers are written
    bar = tqdm(total=len(prompts) * n, desc="sampling", unit="response", disable=None if flags.out else True)
    for start in range(0, len(prompts), group):
        chunk = [ids for ids in prompts[start : start + group] for _ in range(n)]
        streams = [(start + i // n) * 2**32 + i % n for i in range(len(chunk))]  # prompt and sample
        answers: list[list[int]] = [[] for _ in chunk]
        for number, token, finished in decode(model, chunk, tokenizer.stop_ids, **options, streams=streams):
            answers[number].append(token)
            bar.update(finished)
        responses = [tokenizer.decode(ids) for ids in answers]
        for i, ((_, record), prompt) in enumerate(zip(records[start : start + group], asked[start:])):
            mine = responses[i * n : (i + 1) * n]
            if out:
                out.write(json.dumps(record | {"responses": mine}, ensure_ascii=False, default=str) + "\n")
                out.flush()
            else:
                for response in mine:
                    print(f"{prompt if isinstance(prompt, str) else prompt[-1]['content']}\n  {response}\n")


if __name__ == "__main__":
    main()
