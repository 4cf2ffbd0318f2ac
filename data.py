"""From preference pairs in text to packed micro-batches of tokens.

    formats/schemas.py   a record in any known format  →  Example               text
    encode               Example                       →  Pair                  token ids
    batches              number of pairs               →  the pairs of a step   indices
    micro_batches        the pairs of a step           →  [round][rank]         who computes what
    pack                 the pairs of a micro-batch    →  a stream              for `model.Llama`

Decisions about tokens, each of which some trainer got wrong:

* At most one BOS: the template's own, or without a template the tokenizer's.
* The prompt ends with the generation prompt. The response is what the model would have to generate
  after it: the content and one end-of-turn token. Whatever the template writes after that token,
  such as a newline, is left out. A response that was cut while it was sampled gets no such token.
* Prompt and response are encoded separately. No merge crosses the boundary, so the prompt has the
  same tokens for every response.
* A prompt that is too long is cut at its start. It keeps BOS and its end, the generation prompt. A
  response that does not fit after that is cut at its end. Everything cut or dropped is counted, and
  no empty response ever reaches a loss.
* The template comes with the checkpoint and is untrusted: `formats/sandbox.py` sandboxes it.

`--like-authors` is the one exception: `formats/authors.py` takes the place of `encode`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Messages = list[dict]  # [{"role": "user", "content": "…"}, …]


class Example(NamedTuple):
    """Holds a prompt and its responses as text: (chosen, rejected), or one response for SFT."""

    prompt: str | Messages
    responses: tuple[str, ...]
    where: str  # "pairs.jsonl:17", for error messages
    finished: tuple[bool, ...] = ()  # False: cut while it was sampled; by default all are finished


@dataclass(slots=True)
class Pair:
    """Holds a prompt and its responses as token ids, int32; each response continues the prompt."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    where: str = ""
    index: int = 0  # the row of this pair in the table of a cached reference

    @property
    def tokens(self) -> int:
        """Return the number of tokens in the stream: the prompt counts once."""
        return len(self.prompt) + sum(map(len, self.responses))


def encode(
    examples: list[Example],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    counts: Counter,
) -> list[Pair]:
    """Encode examples; prompt plus response have at most `max_length` tokens.

    tokenizer: a `formats.tokenizer.Tokenizer`. Adds to `counts` what was cut or dropped, and why.
    """
    texts = tokenizer.texts(examples)
    prompts = tokenizer.encode_prompts([prompt for prompt, _ in texts])
    finished = [done for e in examples for done in e.finished or [True] * len(e.responses)]
    answers = [answer for _, group in texts for answer in group]
    encoded = iter(tokenizer.encode_responses(answers, finished))
    pairs = []
    for example, prompt in zip(examples, prompts):
        responses = [next(encoded) for _ in example.responses]
        if not prompt:
            counts["dropped: an empty prompt"] += 1
            continue
        if len(prompt) > max_prompt_length:
            bos = prompt[:1] if prompt[0] in tokenizer.bos_ids else []
            prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos) :]
            counts["prompts cut at their start"] += 1
        room = max_length - len(prompt)
        counts["responses cut at their end"] += sum(len(r) > room for r in responses)
        responses = [r[:room] for r in responses]
        if len(responses) > 1 and responses[0] == responses[1]:
            counts["dropped: chosen equal to rejected in what is left of them"] += 1
            continue
        arrays = [np.array(ids, np.int32) for ids in (prompt, *responses)]
        pairs.append(Pair(arrays[0], tuple(arrays[1:]), example.where))
    return pairs


def batches(
    count: int, batch_size: int, epochs: int, seed: int, shuffle: bool = True
) -> Iterator[np.ndarray]:
    """Yield the pair indices of every step.

    The order depends on seed and epoch alone. The last step of an epoch may be short.
    """
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(count) if shuffle else np.arange(count)
        yield from (order[i : i + batch_size] for i in range(0, count, batch_size))


def micro_batches(
    pairs: list[Pair], ranks: int, budget: int, cost: Callable[[Pair], float]
) -> list[list[list[Pair]]]:
    """Spread the pairs of one step over rounds and ranks: [round][rank] → pairs.

    budget: the most tokens in a micro-batch. cost: the work of a pair, in any unit.
    """
    rounds = assign([pair.tokens for pair in pairs], ranks, budget, [cost(pair) for pair in pairs])
    return [[[pairs[i] for i in share] for share in shares] for shares in rounds]


def assign(
    sizes: list[int], ranks: int, budget: int, costs: list[float] | None = None
) -> list[list[list[int]]]:
    """Spread pairs over rounds and ranks by size: [round][rank] → indices into `sizes`.

    Every rank gets the same number of micro-batches, since FSDP needs all ranks in every forward
    pass; a rank's share may be empty. The costliest pair goes first, into the micro-batch with the
    least work (longest processing time first). If a micro-batch exceeds `budget` tokens, one more
    round is tried; a pair larger than the budget travels alone. costs default to sizes.

    >>> assign([5, 3, 4, 4], ranks=2, budget=8)
    [[[0, 1], [2, 3]]]
    """
    costs = costs or [float(size) for size in sizes]
    costliest_first = sorted(range(len(sizes)), key=lambda i: -costs[i])
    total = sum(min(size, budget) for size in sizes)
    rounds = max(1, math.ceil(total / (ranks * budget)))  # that could hold all tokens
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * ranks)]
        work = [0.0] * len(bins)
        for i in costliest_first:
            idlest = work.index(min(work))
            bins[idlest].append(i)
            work[idlest] += costs[i]
        if all(len(share) <= 1 or sum(sizes[i] for i in share) <= budget for share in bins):
            return [[sorted(bins[r * ranks + k]) for k in range(ranks)] for r in range(rounds)]
        rounds += 1


def pack(pairs: list[Pair]) -> dict[str, np.ndarray]:
    """Lay pairs out as one stream without padding; each prompt appears once.

    The keys are the parameters of `model.Llama.forward`. cu_q and cu_k are cumulative lengths:
    segment i has the queries cu_q[i]:cu_q[i+1] of the stream, and the keys that key_index lists at
    cu_k[i]:cu_k[i+1].

    >>> pair = Pair(np.array([10, 11, 12]), (np.array([20, 21]), np.array([30, 31, 32])))
    >>> for name, value in pack([pair]).items(): print(f"{name:9}", value)
    tokens    [10 11 12 20 21 30 31 32]
    positions [0 1 2 3 4 3 4 5]
    key_index [0 1 2 3 4 0 1 2 5 6 7]
    cu_q      [0 5 8]
    cu_k      [ 0  5 11]
    predict   [2 3 2 5 6]
    targets   [20 21 30 31 32]

    The first segment holds the queries of the prompt and the first response (stream 0–4, which see
    0–4). Each further response is a segment of its own, whose keys are the prompt's and its own:
    5–7 see 0–2 and 5–7. The prompt's last token predicts the first token of every response.
    """

    def join(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int64)

    tokens, positions, key_index, predict, targets = ([] for _ in range(5))
    q_lengths, k_lengths = [0], [0]
    end = 0  # of the stream so far
    for pair in pairs:
        prompt, p, start = pair.prompt, len(pair.prompt), end
        assert p and all(map(len, pair.responses)), f"{pair.where}: empty prompt or response"
        tokens.append(prompt)
        positions.append(np.arange(p))
        end += p
        for i, response in enumerate(pair.responses):
            r = len(response)
            tokens.append(response)
            positions.append(np.arange(p, p + r))
            key_index += [np.arange(start, start + p), np.arange(end, end + r)]
            q_lengths.append(r if i else p + r)
            k_lengths.append(p + r)
            predict += [np.array([start + p - 1]), np.arange(end, end + r - 1)]
            targets.append(response)
            end += r
    return {
        "tokens": join(tokens),
        "positions": join(positions),
        "key_index": join(key_index),
        "cu_q": np.cumsum(q_lengths, dtype=np.int32),
        "cu_k": np.cumsum(k_lengths, dtype=np.int32),
        "predict": join(predict),
        "targets": join(targets),
    }


if __name__ == "__main__":
    print(__doc__)
