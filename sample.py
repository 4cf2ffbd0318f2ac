r"""Sample from a model: decode answers to prompts with a key-value cache, or chat in the terminal.

    python sample.py                                                the toy, before training
    python sample.py --model runs/simpo-1/model --prompt "describe the fox ."
    python sample.py --model DIR --prompts prompts.jsonl --out candidates.jsonl \
                     --num-samples 5 --temperature 0.8 --top-p 0.95
    python sample.py --model DIR --prompts alpaca_eval.json --out outputs.json \
                     --format alpaca_eval --temperature 0.9
    python sample.py --model DIR --chat

    prompts ── prefill ──▶ rows of the cache ── step ──▶ logits ── pick ──▶ a token per row
                 ▲                                                               │
                 └──── a row that ends makes room for the next prompt ◀──────────┘

A string prompt becomes one user message if the model has a chat template; otherwise the model
continues it as it is. Decoding is greedy by default. Each sample draws its random numbers from its
own stream, named by seed, place of the prompt, turn and sample. So the batch size does not change a
sample, unless rounding decides between two tokens of almost equal probability.

OUT appears once it is complete; until then answers gather in OUT.incomplete. To resume after an
interruption, run the same command again. model.py describes the model, formats/candidates.py the
files of prompts and answers, formats/benchmarks.py those of --format.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Messages
from formats import candidates
from formats.candidates import Answer, AnswerFile, Question, Samples, in_groups, read_questions
from formats.checkpoint import checkpoint_folder, load, read_config
from formats.errors import DataError, InputError, printable
from formats.progress import Progress, write
from formats.tokenizer import Tokenizer, read_template
from model import Attend, Attention, Config, Llama, PackedAttention
from runtime.processes import out_of_memory
from runtime.sample_flags import TOY, USAGE, Flags
from runtime.settings import parse_table


class KVCache:
    """Stores keys and values of the sequences being decoded, one row per sequence.

    `prefill` and `step` return the attention function that the model calls in every layer. That
    function also writes the new keys and values to the cache.

    k, v: [layers, rows, key-value heads, positions, features of a head], in `weight`'s dtype and on
        its device.
    """

    def __init__(self, config: Config, rows: int, length: int, weight: Tensor):
        heads, features = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, rows, heads, length, features)
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)
        self.window = config.sliding_window

    def prefill(self, first: int, lengths: list[int]) -> Attend:
        """Return attention within each prompt of a packed stream; fill the rows from `first`."""
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        stream = torch.arange(sum(lengths), device=self.k.device)
        packed = PackedAttention(stream, offsets, offsets, self.window)

        def attend(layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prompts = zip(lengths, k.split(lengths), v.split(lengths))
            for row, (n, keys, values) in enumerate(prompts, first):
                self.k[layer.index, row, :, :n] = keys.transpose(0, 1)
                self.v[layer.index, row, :, :n] = values.transpose(0, 1)
            return packed(layer, q, k, v)

        return attend

    def step(self, positions: list[int]) -> Attend:
        """Return attention from a new token in each row, at `positions`, to the whole row."""
        device, count = self.k.device, len(positions)
        # A CPU takes a few rows at a time, up to their own longest; a GPU prefers a single launch.
        size = 8 if device.type == "cpu" else count
        ranges = [(i, min(i + size, count)) for i in range(0, count, size)]
        ends = [max(positions[i:j]) + 1 for i, j in ranges]
        blocks = [(slice(i, j), slice(end)) for (i, j), end in zip(ranges, ends)]
        longest = max(ends)
        rows, newest = torch.arange(count, device=device), torch.tensor(positions, device=device)
        distance = newest[:, None] - torch.arange(longest, device=device)
        mask = (distance >= 0) & (distance < (self.window or longest))
        mask = mask[:, None, None]  # [rows, heads, queries, keys]

        def attend(layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer.index, rows, :, newest] = k
            self.v[layer.index, rows, :, newest] = v
            # Query heads that share a key head become several queries of that one head.
            q = q.unflatten(1, (k.shape[1], -1))  # [rows, key-value heads, queries, features]
            out = []
            for block, seen in blocks:
                keys, values = (cache[layer.index, block, :, seen] for cache in (self.k, self.v))
                allowed = mask[block, :, :, seen]
                out += [F.scaled_dot_product_attention(q[block], keys, values, attn_mask=allowed)]
            return torch.cat(out).flatten(1, 2)

        return attend

    def move(self, source: int, target: int) -> None:
        """Copy the row `source` over the row `target`."""
        for cache in (self.k, self.v):
            cache[:, target] = cache[:, source]


@dataclass
class Row:
    """Holds a sequence being decoded; row i of the list uses row i of the cache."""

    index: int  # of the prompt among all
    prompt: list[int]
    draws: np.ndarray  # uniform in [0, 1), one for each token that it has room for
    tokens: list[int] = field(default_factory=list)  # generated so far


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
    """Continue every prompt; yield (index of its prompt, token, is it the last) as tokens come.

    Up to `batch_size` sequences are decoded at once. One ends with a stop token, after
    `max_new_tokens` or at the model's last position, and makes room for the next prompt.

    temperature: 0 is greedy. top_p: 1 is off. top_k: 0 is off.
    streams: names each prompt's stream of random numbers; by default its index does.

    Raises:
        DataError: a prompt fills all positions of the model.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each number of rows or keys
    context, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if longest >= context:
        raise DataError(f"a prompt of {longest} tokens leaves no room in {context} positions")
    capacity, length = min(batch_size, len(prompts)), min(longest + max_new_tokens, context)
    cache = KVCache(model.config, capacity, length, model.head_weight)
    # Longest prompts first, because a step costs as much as its longest row.
    waiting = iter(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    rows: list[Row] = []
    while True:
        first = len(rows)  # of the rows that get a token now
        for i in islice(waiting, capacity - len(rows)):
            stream = np.random.Philox(key=(seed << 64) + (streams[i] if streams else i))
            room = min(max_new_tokens, context - len(prompts[i]))
            rows.append(Row(i, prompts[i], np.random.Generator(stream).random(room)))
        if not rows:
            return
        if first < len(rows):
            logits = prefill(model, cache, rows, first)
        else:
            first, logits = 0, step(model, cache, rows)
        draws = torch.tensor([row.draws[len(row.tokens)] for row in rows[first:]])
        tokens = pick(logits, draws.to(logits.device), temperature, top_p, top_k).tolist()
        # Backwards, so that the last row, which replaces a finished one, has had its turn.
        for i, token in reversed(list(enumerate(tokens, first))):
            row = rows[i]
            row.tokens.append(token)
            finished = token in stop_ids or len(row.tokens) == len(row.draws)
            yield row.index, token, finished
            if finished:
                rows[i] = rows[-1]
                cache.move(len(rows) - 1, i)
                rows.pop()


def prefill(model: Llama, cache: KVCache, rows: list[Row], first: int) -> Tensor:
    """Run the prompts of rows[first:] as one packed stream; return the logits after each, [n, V].

    n is the number of these rows.
    """
    prompts, device = [row.prompt for row in rows[first:]], model.head_weight.device
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor(list(chain(*prompts)), device=device)
    positions = torch.tensor(list(chain(*map(range, lengths))), device=device)
    hidden = model.model(tokens, positions, cache.prefill(first, lengths))
    return model.logits(hidden[np.cumsum(lengths) - 1])


def step(model: Llama, cache: KVCache, rows: list[Row]) -> Tensor:
    """Run the newest token of every row; return the logits after it, [rows, V]."""
    device = model.head_weight.device
    tokens = [row.tokens[-1] for row in rows]
    positions = [len(row.prompt) + len(row.tokens) - 1 for row in rows]
    inputs = (torch.tensor(ids, device=device) for ids in (tokens, positions))
    return model.logits(model.model(*inputs, cache.step(positions)))


def pick(logits: Tensor, draws: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Pick one token per row of logits [rows, V] by inverse transform sampling.

    That is the first token at which the cumulative probability exceeds the row's draw; at
    temperature 0, the likeliest token. `top_k` keeps the k likeliest tokens; `top_p` keeps the
    fewest of those that reach p together.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # The largest logit becomes 0, which no temperature can turn into infinity.
    logits = (logits - logits.max(-1, keepdim=True).values).double() / temperature
    probabilities, ids = logits.softmax(-1), None
    if top_k or top_p < 1:
        probabilities, ids = probabilities.sort(-1, descending=True)
        probabilities = probabilities[:, : top_k or None]
        likelier = probabilities.cumsum(-1) - probabilities  # sum over the tokens before this one
        keep = likelier < top_p * probabilities.sum(-1, keepdim=True)
        keep[:, 0] = True  # however small p is
        probabilities = probabilities * keep
    edges = probabilities.cumsum(-1)
    picked = torch.searchsorted(edges, draws[:, None] * edges[:, -1:], right=True)
    picked = picked.clamp(max=edges.shape[1] - 1)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


def generate(
    model: Llama, prompts: list[list[int]], stop_ids: set[int], max_new_tokens: int, **options
) -> list[list[int]]:
    """Return the new tokens of every prompt, with the stop token; options as in `decode`."""
    generated: list[list[int]] = [[] for _ in prompts]
    with Progress("answering", total=len(prompts)) as bar:
        for index, token, last in decode(model, prompts, stop_ids, max_new_tokens, **options):
            generated[index].append(token)
            bar.update(last)
    return generated


# --------------------------------------------------------------------------------------------------
# From prompts to answers


def encode_prompts(
    tokenizer: Tokenizer, config: Config, prompts: list[tuple[str, str | Messages]]
) -> list[list[int]]:
    """Return the token ids of prompts, each given as (its location for error messages, prompt).

    Raises:
        DataError: a prompt is empty, or leaves no room for an answer.
    """
    encoded = tokenizer.encode_prompts([tokenizer.prompt_text(p, where) for where, p in prompts])
    most = config.max_position_embeddings - 1
    for (where, _), ids in zip(prompts, encoded):
        if not 0 < len(ids) <= most:
            raise DataError(f"{where}: {len(ids)} tokens, the model takes 1 to {most}; remove it")
    return encoded


def respond(
    model: Llama,
    tokenizer: Tokenizer,
    questions: list[Question],
    first: int,
    n: int,
    bar: Progress,
    **options,
) -> list[Samples]:
    """Hold `n` conversations about every question; return [question][sample][turn] → the answer.

    first: index of questions[0] among all, which names its streams of random numbers.
    options: as in `decode`.
    """
    samples: Samples = [[] for _ in range(len(questions) * n)]
    asked = [question for question in questions for _ in range(n)]
    turns = range(max(question.turns for question in questions))
    for turn, t in product(turns, sorted({question.temperature for question in questions})):
        indices = [i for i, q in enumerate(asked) if q.temperature == t and turn < q.turns]
        if not indices:
            continue
        conversations = [asked[i].next_prompt(samples[i]) for i in indices]
        prompts = encode_prompts(tokenizer, model.config, conversations)
        streams = [(first + i // n) * 2**32 + turn * 2**24 + i % n for i in indices]
        options |= {"temperature": t, "streams": streams}
        answers: list[list[int]] = [[] for _ in indices]
        for index, token, finished in decode(model, prompts, tokenizer.stop_ids, **options):
            answers[index].append(token)
            bar.update(finished)
        for i, ids in zip(indices, answers):
            samples[i].append(Answer(tokenizer.decode(ids), ids[-1] in tokenizer.stop_ids))
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def chat(model: Llama, tokenizer: Tokenizer, **options) -> None:
    """Converse in the terminal, streaming, until an empty line, Ctrl-D or Ctrl-C."""
    messages: Messages = []
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
        prompts, ids, shown = tokenizer.encode_prompts([text]), [], ""
        try:
            for _, token, _ in decode(model, prompts, tokenizer.stop_ids, **options):
                ids.append(token)
                answer = tokenizer.decode(ids)
                if not answer.endswith("\ufffd"):  # half a character: wait for the next token
                    print(printable(answer[len(shown) :]), end="", flush=True)
                    shown = answer
        except KeyboardInterrupt:
            pass  # ends the answer, not the conversation
        print()
        messages.append({"role": "assistant", "content": shown})


# --------------------------------------------------------------------------------------------------
# The command


def read_flags(argv: list[str] | None = None) -> Flags:
    """Parse the command line; exit with status 2 and one line on a usage error."""
    return parse_table(Flags, argv, __doc__, USAGE)


def main() -> None:
    """Run the command; report expected failures as one line on stderr, with exit status 1."""
    flags = read_flags()
    try:
        sample(flags)
    except (InputError, OSError, UnicodeError) as e:
        sys.exit(f"sample.py: error: {e}")
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        advice = f"lower --batch-size ({flags.batch_size}) or --max-new-tokens"
        sys.exit(f"sample.py: error: {out_of_memory(e)}; {advice}")
    except KeyboardInterrupt as e:
        sys.exit("; ".join(["\nsample.py: interrupted", *map(str, e.args)]))


def sample(flags: Flags) -> None:
    """Chat, or answer every prompt and print or write the answers. Raises InputError, OSError."""
    device, dtype = flags.resolve_auto()
    folder = checkpoint_folder(flags.model)
    date = flags.date or (None if flags.overwrite else candidates.begun_on(flags.out))
    tokenizer = Tokenizer(folder, read_template(flags.chat_template), date)
    flags.date = tokenizer.date
    config = read_config(folder)
    tokenizer.check_fits(config.vocab_size)
    if flags.chat:
        model = load(folder, device, dtype)
        return chat(model, tokenizer, temperature=flags.temperature or 0.0, **flags.decoding)

    # Everything that may be refused is read before the weights, which take longest.
    prompts = flags.prompt
    if not prompts and not flags.prompts:
        if folder != TOY:
            raise DataError("nothing to answer: pass --prompt, --prompts or --chat")
        prompts = ["describe the fox and the moon ."]
    benchmark = flags.benchmark
    questions = read_questions(prompts, flags.prompts, benchmark, flags.temperature, flags.limit)
    if not questions:
        raise DataError(f"{flags.prompts}: holds no prompt")
    encode_prompts(tokenizer, config, [question.next_prompt([]) for question in questions])
    out = AnswerFile(Path(flags.out), questions, flags.generation, benchmark) if flags.out else None
    done = out.resume(tokenizer, flags.overwrite) if out else 0
    model = load(folder, device, dtype)
    answered = answer(model, tokenizer, questions, done, flags)
    if out:
        out.write(answered)
        return out.finish(candidates.model_name(flags.model, flags.generator), tokenizer)
    for question, samples in answered:
        for (response,) in samples:
            write(printable(f"{question.text}\n  {response.text}\n"))


def answer(
    model: Llama, tokenizer: Tokenizer, questions: list[Question], done: int, flags: Flags
) -> Iterator[tuple[Question, Samples]]:
    """Answer the questions from index `done` on; yield (question, samples)."""
    n = flags.num_samples
    turns = [n * question.turns for question in questions]
    with Progress("sampling", total=sum(turns), first=sum(turns[:done])) as bar:
        ask = partial(respond, model, tokenizer, n=n, bar=bar, **flags.decoding)
        yield from in_groups(questions, ask, max(1, 8 * flags.batch_size // n), done)


if __name__ == "__main__":
    main()
