"""Sample from a checkpoint: answers to prompts, several per prompt, or a conversation in the terminal.

    python sample.py                                                     the toy, before training
    python sample.py --model runs/simpo-1/model --prompt "describe the fox ."
    python sample.py --model DIR --prompts prompts.jsonl --num-samples 5 --temperature 0.8 --top-p 0.95 --out candidates.jsonl
    python sample.py --model DIR --format alpaca_eval --prompts alpaca_eval.json --temperature 0.9 --out outputs.json
    python sample.py --model DIR --chat

A string prompt becomes one user message where the checkpoint has a chat template, and is continued as it is where it has
none. Decoding is greedy by default. Every sample draws its random numbers from its own stream, named by seed, prompt, turn
and sample, so that neither the batch size nor the other prompts change it (but for rounding: a tie within float error may
fall either way when the shapes of the matrix products change).

--out appears once it is whole. Until then the answers gather in OUT.incomplete, and the same command continues there.
Candidates: every record of --prompts with its `responses` and the settings of their `generation`; add a list of `scores`
from any scorer, and train.py takes the best against the worst. Answer files, with --format, in the form that the tools of
AlpacaEval, Arena-Hard and MT-Bench read, from their own question files. The paper (arXiv 2405.14734) samples AlpacaEval at
temperature 0.9 from its Llama 3 models, 0.7 from Mistral-Base and 0.5 from Mistral-Instruct, and decodes Arena-Hard greedily.
MT-Bench has a temperature for each category, 0.7, 0.1 or 0, which --temperature overrides.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import model as llama
from answers import FORMATS
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
        # a few rows at a time, each time up to their longest; a GPU would rather have one launch
        size = 8 if device.type == "cpu" else len(positions)
        blocks = [
            (slice(i, min(i + size, len(positions))), slice(max(positions[i : i + size]) + 1))
            for i in range(0, len(positions), size)
        ]
        rows, positions = torch.arange(len(positions), device=device), torch.tensor(positions, device=device)
        distance = positions[:, None] - torch.arange(longest, device=device)
        mask = ((distance >= 0) & (distance < (self.window or longest)))[:, None, None]  # [rows, heads, 1, keys]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, rows, :, positions] = k
            self.v[layer, rows, :, positions] = v
            keys, values = self.k[layer], self.v[layer]  # [rows, heads, keys, features]
            q = q.unflatten(1, (keys.shape[1], -1))  # query heads that share a key head stand as its queries
            out = [
                F.scaled_dot_product_attention(
                    q[some], keys[some, :, upto], values[some, :, upto], attn_mask=mask[some, :, :, upto]
                )
                for some, upto in blocks
            ]
            return torch.cat(out).flatten(1, 2)

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
    positions that the model knows, makes room for the next. Raises DataError for a prompt that fills those.
    temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off. `streams`: the name of each prompt's stream of random
    numbers, its number by default."""
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
# Prompts → answers


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


class Question(NamedTuple):
    """What is asked, and how: the prompt, then what the user says after each answer."""

    where: str
    record: dict  # as it was read
    prompt: str | data.Messages
    more: list[str]
    temperature: float

    def conversation(self, answers: list[str]) -> str | data.Messages:
        """What the next answer continues."""
        if not answers:
            return self.prompt
        turns = zip(("assistant", "user") * len(answers), itertools.chain(*zip(answers, self.more)))
        return [*self.prompt, *({"role": role, "content": content} for role, content in turns)]


def read_questions(flags: argparse.Namespace) -> list[Question]:
    """All that --prompt and --prompts ask. Raises DataError naming file, line and field."""
    if flags.format:
        read = FORMATS[flags.format].read
    else:
        read = lambda record, where: (prompt_of(record, where), [], 0.0)
    records = [("--prompt", {"prompt": text}) for text in flags.prompt]
    records += read_prompts(Path(flags.prompts)) if flags.prompts else []
    questions = [Question(where, record, *read(record, where)) for where, record in records[: flags.limit]]
    if flags.temperature is not None:
        questions = [question._replace(temperature=flags.temperature) for question in questions]
    return questions


def prompt_of(record: dict, where: str) -> str | data.Messages:
    """The `prompt` (string or messages) or `messages` of a record."""
    field = "prompt" if record.get("prompt") is not None else "messages"
    if record.get(field) is None:
        raise DataError(f"{where}: no 'prompt' or 'messages' field")
    return data.check_prompt(record[field], where, field)


def respond(
    model: Llama, tokenizer: Tokenizer, questions: list[Question], first: int, n: int, bar: tqdm, **options
) -> list[list[list[str]]]:
    """`n` conversations about every question: [question][sample][turn] → the answer. `first` is the number of the first
    question, which names its random numbers; options as for `decode`."""
    samples: list[list[str]] = [[] for _ in range(len(questions) * n)]
    asked = [question for question in questions for _ in range(n)]
    temperatures = sorted({question.temperature for question in questions})
    for turn, temperature in itertools.product(range(1 + max(len(q.more) for q in questions)), temperatures):
        those = [i for i, q in enumerate(asked) if q.temperature == temperature and turn <= len(q.more)]
        if not those:
            continue
        place = f", turn {turn + 1}" if turn else ""
        talks = [(asked[i].where + place, asked[i].conversation(samples[i])) for i in those]
        prompts = encode(tokenizer, model.config, talks)
        streams = [(first + i // n) * 2**32 + turn * 2**24 + i % n for i in those]
        answers: list[list[int]] = [[] for _ in those]
        for number, token, finished in decode(
            model, prompts, tokenizer.stop_ids, temperature=temperature, streams=streams, **options
        ):
            answers[number].append(token)
            bar.update(finished)
        for i, ids in zip(those, answers):
            samples[i].append(tokenizer.decode(ids))
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def encode(tokenizer: Tokenizer, config: Config, asked: list[tuple[str, str | data.Messages]]) -> list[list[int]]:
    """Token ids of prompts, each with its place. Raises DataError where one leaves no room for an answer."""
    encoded = tokenizer.encode_prompts([tokenizer.prompt_text(prompt, where) for where, prompt in asked])
    for (where, _), ids in zip(asked, encoded):
        if not 0 < len(ids) < config.max_position_embeddings:
            raise DataError(f"{where}: {len(ids)} tokens; the model takes 1 to {config.max_position_embeddings - 1}")
    return encoded


def record_of(question: Question, answers: list[list[str]], flags: argparse.Namespace) -> dict:
    """A line of OUT.incomplete, and of a file of candidates: the record asked for, what was answered, and how."""
    record = dict(question.record)
    if not flags.format:
        record["prompt"] = question.prompt  # also where it was read from `messages`: data.py asks for it
        for stale in ("chosen", "rejected", "scores"):  # would be taken for a preference among the new responses
            record.pop(stale, None)
    settings = {name: getattr(flags, name) for name in SETTINGS} | {"temperature": question.temperature}
    responses = answers if flags.format else [answer for (answer,) in answers]
    return record | {"responses": responses, "generation": settings}


SETTINGS = (  # all that shapes an answer; the batch size does not
    "model", "chat_template", "dtype", "num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "seed",
)  # fmt: skip


def dump(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def continue_file(path: Path, questions: list[Question], flags: argparse.Namespace) -> list[dict]:
    """The records of an interrupted run, one per question from the first on; cuts a half-written last line off.

    Raises DataError naming the line that this command would not have written, and what differs."""

    def difference(line: bytes, i: int) -> str | None:
        if i >= len(questions):
            return f"answers more prompts than the {len(questions)} asked"
        try:
            record = json.loads(line)
            expected = json.loads(dump(record_of(questions[i], [], flags) | {"responses": record["responses"]}))
            for name, value in expected["generation"].items():
                if record["generation"].get(name) != value:
                    return f"made with {name} = {json.dumps(record['generation'].get(name))}, not {json.dumps(value)}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return "not a line of an unfinished run"
        records.append(record)
        return None if record == expected else f"answers another prompt than {questions[i].where}"

    records: list[dict] = []
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    for i, line in enumerate(whole.splitlines()):
        if problem := difference(line, i):
            raise DataError(f"{path}:{i + 1}: {problem}; move it away, or start anew with --overwrite")
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return records


def model_name(flags: argparse.Namespace) -> str:
    """--generator, else a hub id, else the folder's name, which for a model that train.py wrote is its run's."""
    path = Path(flags.model).expanduser()
    if flags.generator or not path.exists():
        return flags.generator or flags.model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def finish(work: Path, records: list[dict], tokenizer: Tokenizer, flags: argparse.Namespace) -> None:
    """Make --out of what was gathered, at one stroke."""
    out = Path(flags.out)
    if flags.format:
        form = FORMATS[flags.format]
        count_tokens = lambda text: len(tokenizer.backend.encode(text, add_special_tokens=False).ids)
        answers = [form.write(record, model_name(flags), count_tokens) for record in records]
        whole = out.with_name(out.name + ".whole")
        text = "".join(map(dump, answers)) if form.jsonl else json.dumps(answers, ensure_ascii=False, indent=2) + "\n"
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, out)
        work.unlink()
    else:
        os.replace(work, out)


# ---------------------------------------------------------------------------------------------------------------------
# The command


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
        "--out", metavar="FILE", help="write one object a prompt (.jsonl): its record and `responses`; else print"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --out, and an unfinished one that other settings made"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N prompts only")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), help="read this benchmark's question file and write its answer file"
    )
    parser.add_argument(
        "--generator",
        metavar="NAME",
        help="the model's name in an answer file (default: that of its hub id, folder or run)",
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="responses per prompt (default: 1)")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 is greedy, 1 the model's own distribution (default: 0; by category for mt_bench)",
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
    for name in ("num_samples", "max_new_tokens", "batch_size", "limit"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    if not (
        0 <= (flags.temperature or 0) < float("inf")
        and 0 < flags.top_p <= 1
        and flags.top_k >= 0
        and 0 <= flags.seed < 2**64
    ):
        parser.error("expected a finite --temperature ≥ 0, 0 < --top-p ≤ 1, --top-k ≥ 0 and 0 ≤ --seed < 2⁶⁴")
    if flags.num_samples > 1 and not flags.temperature:
        parser.error("--num-samples goes with --temperature: greedy samples are all the same")
    if flags.chat and (flags.prompt or flags.prompts or flags.out):
        parser.error("--chat goes without --prompt, --prompts and --out")
    if flags.format and (not flags.prompts or not flags.out or flags.prompt or flags.num_samples > 1):
        parser.error("--format goes with --prompts and --out, without --prompt and --num-samples")
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
        sys.exit("\nsample.py: interrupted")


def sample(flags: argparse.Namespace) -> None:
    device = flags.device if flags.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no CUDA device here")
    if flags.dtype == "auto":
        flags.dtype = "bf16" if device == "cuda" else "fp32"
    source = data.local_path(flags.model, "model", llama.CHECKPOINT_FILES)
    tokenizer = Tokenizer(source, data.read_template(flags.chat_template))
    config = Config.from_folder(source)
    tokenizer.check_fits(config.vocab_size)
    load = lambda: llama.load(source, device, torch.bfloat16 if flags.dtype == "bf16" else torch.float32)
    options = {name: getattr(flags, name) for name in ("max_new_tokens", "top_p", "top_k", "seed", "batch_size")}
    if flags.chat:
        return chat(load(), tokenizer, options | {"temperature": flags.temperature or 0.0})

    if not flags.prompt and not flags.prompts:
        if source != HERE / "toy" / "checkpoint":
            raise DataError("nothing to answer: pass --prompt, --prompts or --chat")
        flags.prompt = ["describe the fox and the moon ."]
    questions = read_questions(flags)
    if not questions:
        raise DataError(f"{flags.prompts}: no prompt in it")
    encode(tokenizer, config, [(question.where, question.prompt) for question in questions])
    work = Path(flags.out + ".incomplete") if flags.out else None
    try:
        records = continue_file(work, questions, flags) if work else []
    except DataError:
        if not flags.overwrite:
            raise
        work.unlink()
        records = []
    model = load()
    file = open(work, "a", encoding="utf-8") if work else None
    n, kept = flags.num_samples, len(records)
    group = max(1, 8 * flags.batch_size // n)  # prompts decoded together; after each group its answers are written
    bar = tqdm(
        total=len(questions) * n, initial=kept * n, desc="sampling", unit="response", disable=None if file else True
    )
    try:
        # an unfinished group is decoded again as a whole, so that what is new comes out as it would have
        first = kept - kept % group if kept < len(questions) else kept
        for start in range(first, len(questions), group):
            chunk = questions[start : start + group]
            answers = respond(model, tokenizer, chunk, start, n, bar, **options)
            for question, mine in list(zip(chunk, answers))[max(0, kept - start) :]:
                if file:
                    records.append(record_of(question, mine, flags))
                    file.write(dump(records[-1]))
                    file.flush()
                    continue
                prompt = question.prompt
                for (response,) in mine:
                    print(f"{prompt if isinstance(prompt, str) else prompt[-1]['content']}\n  {response}\n")
    except KeyboardInterrupt:
        done = f"{len(records)} of {len(questions)} prompts are answered in {work}; the same command goes on from there"
        sys.exit("\nsample.py: interrupted" + (f"; {done}" if file else ""))
    finally:
        if file:
            file.close()
    if file:
        finish(work, records, tokenizer, flags)


if __name__ == "__main__":
    main()
