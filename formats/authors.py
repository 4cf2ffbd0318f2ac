"""Encode pairs as the trainer of SimPO's authors does, for `--like-authors`.

This is the one declared exception to the decisions about tokens in data.py. The authors are
github.com/princeton-nlp/SimPO, commit 1b3e8f3: `apply_chat_template` in scripts/run_simpo.py and
`tokenize_row` in scripts/simpo_trainer.py. bench/like_authors.py checks that the tokens are theirs,
id for id. TRL is the CPOTrainer of release 1.16, which trains SimPO there.

    decision          the authors                   TRL                    ours, see data.py
    ----------------  ----------------------------  ---------------------  ----------------------
    prompt ends with  its last message              the generation prompt  the generation prompt
    response is       the assistant's header, the   the content, the rest  the content and one
                      content, the rest of the      of the template, EOS   end-of-turn token
                      template, EOS if not last     if not last
    system message    an empty one, if the          the record's           the record's
                      template knows that role
    BOS               put first if missing          put first if missing   what the template has
    boundary          encoded together; a token     the same               encoded separately
                      that spans it is a response's
    prompt + longer   the prompt keeps its end,     the response that is   the prompt keeps BOS
    response too      max_prompt_length tokens      too long loses its     and its end; then the
    long              without BOS; if that is not   end                    response that is too
                      enough, both responses keep                          long loses its end
                      the rest of max_length
    equal after cuts  kept                          kept                   dropped
    warm-up starts    at rate 0                     at rate 0              at lr / warm-up steps

* A pair without one prompt for both responses cannot be packed. It is dropped and counted, so that
  it does not end a run of 60,000. This happens only if text merges across the boundary, and the
  recipes' templates write no such text. The authors keep such a pair if the prompts differ in one
  token.
* A BOS that a template writes is cut from the prompt's text, with one space after it, and put first
  as an id. The templates in recipes/ write BOS, for sampling, and those of the authors do not.
* A response is rendered alone, by the authors too. If the template then opens another turn first,
  such as a default system message, that turn is predicted: it is counted, and the log says so.
* Without a template, texts are used as they are. What formats/schemas.py drops stays dropped.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

import data
from data import Example, Pair
from formats.errors import DataError
from formats.schemas import ASSISTANT_MARK
from formats.tokenizer import Tokenizer, as_messages

Encoder = Callable[[list[Example], Tokenizer, int, int, Counter], list[Pair]]


def encoder(like_authors: bool) -> Encoder:
    """Return the function that makes pairs of examples: the authors' way, or `data.encode`."""
    return encode_like_authors if like_authors else data.encode


def encode_like_authors(
    examples: list[Example],
    tokenizer: Tokenizer,
    max_length: int,
    max_prompt_length: int,
    counts: Counter,
) -> list[Pair]:
    """Encode examples as the authors do; takes and returns what `data.encode` does.

    Raises:
        DataError: the tokenizer names no BOS or no EOS, or the template refuses an example, for
            instance because it does not render an assistant's message alone.
    """
    bos, eos = (_special_id(tokenizer, name) for name in ("bos_token", "eos_token"))
    texts = _texts(examples, tokenizer)
    if _opens_another_turn(tokenizer):
        begin = "responses that begin with another turn, which the template opens"
        counts[f"{begin} (pass --no-like-authors)"] += sum(len(answers) for _, answers in texts)
    prompts = tokenizer.encode_prompts([prompt for prompt, _ in texts])
    whole = iter(tokenizer.encode_prompts([p + answer for p, group in texts for answer in group]))
    pairs = []
    for example, alone in zip(examples, prompts):
        both = [next(whole) for _ in example.responses]
        # where the prompt's last token merged with the response, it belongs to the response
        ends = [len(alone) - (ids[: len(alone)] != alone) for ids in both]
        prompt = both[0][: ends[0]]
        if any(len(b) < len(alone) or b[:end] != prompt for b, end in zip(both, ends)):
            counts["dropped: chosen and rejected leave the prompt at different tokens"] += 1
            continue
        responses = [ids[end:] for ids, end in zip(both, ends)]
        responses = [r if r[-1:] == [eos] else [*r, eos] for r in responses]
        prompt = prompt if prompt[:1] == [bos] else [bos, *prompt]
        longest = max(map(len, responses))
        if len(prompt) + longest > max_length:
            counts["prompts cut at their start"] += len(prompt) > max_prompt_length
            prompt = prompt[-max_prompt_length:]
        if len(prompt) + longest > max_length:
            room = max_length - max_prompt_length
            counts["responses cut at their end"] += sum(len(r) > room for r in responses)
            responses = [r[:room] for r in responses]
        arrays = [np.array(ids, np.int32) for ids in (prompt, *responses)]
        pairs.append(Pair(arrays[0], tuple(arrays[1:]), example.where))
    return pairs


def _opens_another_turn(tokenizer: Tokenizer) -> bool:
    """Return True if the template writes more before an answer alone than in a conversation."""
    if not tokenizer.template:
        return False
    question, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    conversations = [([question, answer], False), ([answer], False)]
    whole, alone = tokenizer.render(conversations, ["a conversation", "an answer alone"])
    return not whole.endswith(alone.removeprefix(tokenizer.special["bos_token"]))


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of "bos_token" or "eos_token". Raises DataError if the tokenizer has none."""
    found = tokenizer.backend.token_to_id(tokenizer.special.get(name, ""))
    if found is None:
        needs = "--like-authors needs one, since the authors' trainer puts it into every pair"
        raise DataError(f"{tokenizer.folder}: no {name}: {needs}")
    return found


def _texts(examples: list[Example], tokenizer: Tokenizer) -> list[tuple[str, list[str]]]:
    """Return (prompt text, response texts) of each example, as the authors render them."""
    if not tokenizer.template:
        return tokenizer.texts(examples)
    knows_system = any(word in tokenizer.template for word in ("system", "<|im_start|>"))
    conversations, locations, prompts = [], [], []
    for prompt, responses, where, _ in examples:
        messages = as_messages(prompt) if isinstance(prompt, str) else prompt
        if isinstance(prompt, str) and prompt.endswith(ASSISTANT_MARK):
            responses = tuple(response.strip() for response in responses)  # as Tokenizer.texts does
        if knows_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        prompts.append(messages)
        conversations.append((messages, False))
        conversations += [([{"role": "assistant", "content": r}], False) for r in responses]
        locations += [where] * (1 + len(responses))
    rendered = iter(tokenizer.render(conversations, locations))
    texts, bos = [], tokenizer.special["bos_token"]
    for example, messages in zip(examples, prompts):
        before = next(rendered)
        answers = [next(rendered).removeprefix(bos) for _ in example.responses]
        tokenizer.check_kept(example, messages, before, answers)
        if before.startswith(bos):
            before = before.removeprefix(bos).removeprefix(" ")
        texts.append((before, answers))
    return texts
