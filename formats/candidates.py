"""Read prompts; write candidates and answer files so that an interrupted command can resume.

    read_questions       --prompt, --prompts  →  Question   what to ask, how, what to say next
    in_groups            Question             →  samples    through `sample.respond`
    AnswerFile.resume    OUT.incomplete       →  records    of an interrupted command
    AnswerFile.write     samples              →  OUT.incomplete
    AnswerFile.finish    OUT.incomplete       →  OUT        once every prompt is answered

A candidate file holds every record of --prompts with its `responses`. `finished` says whether the
model ended each of them; `generation` has the settings they were made with, and a digest of the
model. Add a list of `scores` from any scorer, and train.py trains on the best response against the
worst (formats/schemas.py). With --format, `finish` writes the answer file of a benchmark instead
(formats/benchmarks.py). sample.py decodes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import IO, Any, NamedTuple

from data import Messages
from formats.benchmarks import Benchmark
from formats.checkpoint import content_files
from formats.errors import DataError
from formats.files import digests, dump_json, parse_json, reading
from formats.progress import Progress
from formats.records import read_records
from formats.schemas import check_prompt
from formats.tokenizer import Tokenizer

PATHS = ("model", "chat_template")  # compared by their content, so a model may have been moved
# Every setting that shapes an answer. The batch size is missing because it does not.
SETTINGS = (
    *PATHS,
    "dtype",
    "num_samples",
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "seed",
)


class Question(NamedTuple):
    """Holds one prompt, what the user says after each answer, and the temperature to answer at."""

    where: str  # location for error messages: "prompts.jsonl:17"
    record: dict  # as read
    prompt: str | Messages
    follow_ups: list[str]
    temperature: float

    @property
    def turns(self) -> int:
        """Return the number of answers that the question asks for."""
        return 1 + len(self.follow_ups)

    @property
    def text(self) -> str:
        """Return the prompt as a terminal shows it: of a conversation, the last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]

    def next_prompt(self, answers: list["Answer"]) -> tuple[str, str | Messages]:
        """Return (location, messages) for the next answer: the prompt, then every turn so far.

        A first answer gets the prompt as it is, which may be a string. Error messages name the
        location.
        """
        if not answers:
            return self.where, self.prompt
        assert isinstance(self.prompt, list), f"{self.where}: follow-ups need a list of messages"
        messages = list(self.prompt)
        for answer, follow_up in zip(answers, self.follow_ups):
            messages.append({"role": "assistant", "content": answer.text})
            messages.append({"role": "user", "content": follow_up})
        return f"{self.where}, turn {1 + len(answers)}", messages


class Answer(NamedTuple):
    """Holds what the model answered, and whether it ended its turn or was cut."""

    text: str
    finished: bool


Samples = list[list[Answer]]  # answers to one question: [sample][turn]
Respond = Callable[[list[Question], int], list[Samples]]  # (group, index of its first question)


# --------------------------------------------------------------------------------------------------
# Prompts in


def read_questions(
    prompts: list[str],
    file: str | None = None,
    benchmark: Benchmark | None = None,
    temperature: float | None = None,
    limit: int | None = None,
) -> list[Question]:
    """Return the first `limit` questions: those of --prompt, then those of the file.

    `temperature` overrides the benchmark's; without a benchmark the default is 0, which is greedy.

    Raises:
        DataError: a prompt cannot be used. The message names file, line and field.
    """
    records = [("--prompt", {"prompt": text}) for text in prompts]
    records += Progress(f"reading {file}", read_prompts(Path(file))) if file else []
    questions = []
    for where, record in records[:limit]:
        if benchmark:
            asked = benchmark.read_question(record, where)
        else:
            asked = (prompt_of(record, where), [], 0.0)
        questions.append(Question(where, record, *asked))
    if temperature is not None:
        questions = [question._replace(temperature=temperature) for question in questions]
    return questions


def read_prompts(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (location, record) for each prompt: a line of a .txt file, or a record of a data file.

    Only a newline ends a line of a .txt file; blank lines are skipped.
    """
    if path.suffix != ".txt":
        yield from read_records(str(path))
        return
    with reading(path, DataError):
        lines = path.read_text(encoding="utf-8").split("\n")
    yield from (
        (f"{path}:{n}", {"prompt": text}) for n, text in enumerate(lines, 1) if text.strip()
    )


def prompt_of(record: dict, where: str) -> str | Messages:
    """Return the `prompt` of a record, a string or messages; or its `messages` without a prompt.

    Raises:
        DataError: the record has neither, or it holds nothing that the assistant could answer.
    """
    field = "prompt" if record.get("prompt") is not None else "messages"
    if record.get(field) is None:
        raise DataError(f"{where}: no 'prompt' or 'messages' field")
    beside = {name: value for name, value in record.items() if name != field}
    return check_prompt(record[field], where, field, beside)


# --------------------------------------------------------------------------------------------------
# Answers out


def in_groups(
    questions: list[Question], respond: Respond, size: int, done: int = 0
) -> Iterator[tuple[Question, Samples]]:
    """Answer the questions from index `done` on, `size` at a time; yield each with its samples.

    A group that was interrupted is decoded again as a whole, so that rounding, and with it every
    answer, is the same as without the interruption.
    """
    start = done - done % size if done < len(questions) else done
    for first in range(start, len(questions), size):
        group = questions[first : first + size]
        yield from list(zip(group, respond(group, first)))[max(0, done - first) :]


def begun_on(out: str | None) -> str | None:
    """Return the day that the unfinished file of `out` was begun with; None if it tells none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(f"{out}.incomplete", "rb") as file:
            record: Any = parse_json(file.readline())
        return date.fromisoformat(record["generation"]["date"]).isoformat()
    return None


@dataclass
class AnswerFile:
    """Writes OUT: gathers records in OUT.incomplete and renames it when every prompt is answered.

    generation: the settings of the command by name, those of SETTINGS.
    benchmark: None for a candidate file.
    """

    out: Path
    questions: list[Question]
    generation: dict
    benchmark: Benchmark | None = None
    records: list[dict] = field(default_factory=list)  # of the first questions, finished so far
    # OUT.incomplete, locked from `resume` until this object ends
    file: IO[bytes] = field(init=False)

    @property
    def work(self) -> Path:
        """Return the path of OUT.incomplete."""
        return Path(f"{self.out}.incomplete")

    def record(self, question: Question, samples: Samples) -> dict:
        """Return the record of a question with its `responses` and `generation` settings added.

        A benchmark gets the texts as they are, [sample][turn]. Candidates have one turn each, so
        theirs become a flat list, beside which `finished` says which the model has ended.
        """
        record = dict(question.record)
        answers: dict[str, list] = {"responses": [[a.text for a in turns] for turns in samples]}
        if not self.benchmark:
            answers["responses"] = [text for (text,) in answers["responses"]]
            answers["finished"] = [answer.finished for (answer,) in samples]
            record["prompt"] = question.prompt  # training needs it, even if read from `messages`
            for stale in ("chosen", "rejected", "scores"):  # they judge other responses than these
                record.pop(stale, None)
        generation = self.generation | {"temperature": question.temperature}
        return record | answers | {"generation": generation}

    def resume(self, tokenizer: Tokenizer, overwrite: bool = False) -> int:
        """Lock and read what an interrupted command has left; return the number of answers.

        No other command can write OUT until this one ends. Truncates the file after its last
        complete line. `overwrite` empties a file that the current command would not have written.
        tokenizer: of the model that answers; the model's files are read once, so that one file
        never holds the answers of two models.

        Raises:
            DataError: an existing line is not one that this command would write. The message
                names the line and the first difference.
        """
        self.generation = self.generation | {"model_sha256": content_digest(tokenizer)}
        self.file = self.lock(overwrite)
        raw = self.file.read()
        complete = raw[: raw.rfind(b"\n") + 1]
        self.records = []
        for i, line in enumerate(complete.splitlines()):
            record, problem = self.read_line(line, i)
            if problem and overwrite:
                self.records, complete = [], b""
                break
            if problem:
                advice = "move the file away, or pass --overwrite to start over"
                raise DataError(f"{self.work}:{i + 1}: {problem}; {advice}")
            self.records.append(record)
        self.file.truncate(len(complete))
        return len(self.records)

    def lock(self, overwrite: bool) -> IO[bytes]:
        """Open OUT.incomplete, locked until it is closed, and rewind it.

        Raises:
            FileExistsError: another command is writing it, or has finished it since this one began.
        """
        file = open(self.work, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(self.work))
        except BlockingIOError:
            raise FileExistsError(f"{self.work}: another command is writing there") from None
        except FileNotFoundError:
            mine = False
        if not mine or (self.out.exists() and not overwrite):
            raise FileExistsError(f"{self.out}: another command has just finished it")
        file.seek(0)
        return file

    def read_line(self, line: bytes, i: int) -> tuple[dict, str | None]:
        """Return the record on line `i`, and why the current command would not have written it."""
        if i == len(self.questions):
            return {}, f"answers more prompts than the {i} asked"
        question = self.questions[i]
        try:
            record: Any = parse_json(line)
            ours = self.record(question, [])
            ours |= {name: record[name] for name in ("responses", "finished") if name in ours}
            # Compare JSON with JSON: dump has turned dates into strings.
            expected: Any = parse_json(dump(ours).encode())
            expected["generation"] |= {name: record["generation"].get(name) for name in PATHS}
            for name, value in expected["generation"].items():
                theirs = record["generation"].get(name)
                if theirs != value:
                    problem = f"made with {name} = {json.dumps(theirs)}, not {json.dumps(value)}"
                    return record, problem
            if len(record["responses"]) != self.generation["num_samples"]:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}, "not a line of an unfinished command"
        same = record == expected
        return record, None if same else f"answers another prompt than {question.where}"

    def write(self, answered: Iterable[tuple[Question, Samples]]) -> None:
        """Append the record of every answered question to OUT.incomplete as soon as it comes.

        Raises:
            KeyboardInterrupt: its message says how much is written, and how to resume.
        """
        try:
            for question, samples in answered:
                self.records.append(self.record(question, samples))
                self.file.write(dump(self.records[-1]).encode())
                self.file.flush()
        except KeyboardInterrupt:
            done = f"{len(self.records)} of {len(self.questions)} prompts are answered in"
            advice = "run the same command again to resume"
            raise KeyboardInterrupt(f"{done} {self.work}; {advice}") from None

    def finish(self, name: str, tokenizer: Tokenizer) -> None:
        """Atomically turn the finished OUT.incomplete into OUT.

        name: the model's name in a benchmark's answer file.
        """
        if self.benchmark is None:
            os.replace(self.work, self.out)
            return

        def count_tokens(text: str) -> int:
            return len(tokenizer.backend.encode([text])[0])

        answers = [self.benchmark.write_answer(r, name, count_tokens) for r in self.records]
        if self.benchmark.json_lines:
            text = "".join(map(dump, answers))
        else:
            text = dump_json(answers, ensure_ascii=False, indent=2) + "\n"
        whole = Path(f"{self.out}.whole")
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, self.out)
        self.work.unlink()


def content_digest(tokenizer: Tokenizer) -> str:
    """Return a digest of what answers, whatever its path: the model's files and the template."""
    files = {
        name: entry["sha256"] for name, entry in digests(content_files(tokenizer.folder)).items()
    }
    content = json.dumps([files, tokenizer.template]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def dump(record: dict) -> str:
    """Return one line of JSON. Types that JSON lacks, such as dates in parquet, become strings."""
    return dump_json(record, ensure_ascii=False, default=str) + "\n"


def model_name(model: str, generator: str | None = None) -> str:
    """Return the model's name for an answer file: `generator`, a hub id, or the folder's name.

    train.py names every trained model's folder `model`, so such a folder takes its run's name.
    """
    path = Path(model).expanduser()
    if generator or not path.exists():
        return generator or model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name
