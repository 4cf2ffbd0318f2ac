"""Feed mutated checkpoints and data to the code that train.py and sample.py read them with.

    python tests/fuzz.py --cases 5000 --seed 0    the campaign; exit status 1 if a case fails
    python tests/fuzz.py --case 1234 --seed 0     one case again, with its traceback

Each case takes a sound tiny checkpoint and data file and mutates one of their files: its bytes,
numbers, keys or types, or the file becomes a link. Then it reads everything: configuration,
headers, tokenizer, template, records, tokens, weights, and one forward pass.

A case passes if that works, or raises a DataError or CheckpointError of one line that names a path.
It fails at any other exception, or if any file is written. It also fails if its process dies, uses
over 10 seconds of CPU time, or needs over 1 GiB of extra memory. Cases run in child processes, so
the campaign survives one that kills its process.

The tables and functions up to `mutate` say what is mutated. tests/test_fuzz.py runs a short
campaign.
"""

import argparse
import faulthandler
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file is also a script

import torch

from data import encode, pack
from formats.checkpoint import Weights, checkpoint_folder, load, read_config
from formats.errors import CheckpointError, DataError
from formats.records import read_records
from formats.schemas import Columns, Dropped, parse_record
from formats.tokenizer import Tokenizer
from model import Llama

sys.dont_write_bytecode = True  # a case counts any file that its process writes as a failure

SECONDS = 10  # of CPU time that a case may use
MEMORY = 2**30  # bytes that a child process may add to what it needs before the first case
WALL = 120  # seconds for a child process, and one more for each of its cases
BATCH = 100  # cases of one child process

CHECKPOINT = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
]
DATA = ["data.jsonl", "data.json", "data.jsonl.gz", "data.parquet"]


# --------------------------------------------------------------------------------------------------
# What mutations insert. A seed picks from these tables by index, so append new entries at the end.

# fmt: off
EXTREMES = [  # values of JSON
    None, True, False, -1, 0, 1, 2, 3, 64, 340, 2**16, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e30, 1e308, math.nan, math.inf,
    -math.inf, "", " ", "\0", "x", "\n", "\ud83d", "\u202e", "é" * 50, "x" * 10**5,
    "../../etc/passwd", "/etc/passwd", "</s>", "<s>", "<|im_end|>", "F32", "BF16", "F64", "I8",
    "F8_E4M3", "llama", "yarn", [], {}, [[]], [None], {"": None}, {"type": "Sequence"}, [0, 2**63],
    [2**32, 2**32], [-1], [0] * 1000,
]
BYTES = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[" * 10**5, b'"', b",", b"\\ud83d",
    b"1e999", b"9" * 5000, b"\r\n", b"{" * 999,
]
HOSTILE = [  # templates that try to spend without bound, or to reach Python
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ [1] * 10**10 }}",
    "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ messages[0].__class__ }}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ raise_exception('no\nway') }}",
    "{{ undefined.x.y }}",
    "{{ messages | tojson(indent=10**8) }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}"
    "{% endfor %}{{ ns.l }}",
]
SYNTAX = [  # pieces of a template
    "{%", "%}", "{{", "}}", "{#", "for", "in", "if", "endif", "endfor", "messages", "loop", "|",
    "(", ")", "[", "]", "'", "-%}", "range(9)", "{% generation %}", "{% set", "{% macro",
    "{% include 'x' %}", "{% import 'os' %}", "\\ud83d", "{% raw %}",
]
# Parts of a tokenizer.json. In some version of the library, each makes it panic or work forever.
PARTS = [
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 60}),
    ("normalizer", {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}] * 3}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(l+|e+|o+|H+| )+$z"},
                       "behavior": "Isolated", "invert": False}),
    ("model", {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}),
    ("model", {"type": "Unigram", "unk_id": 9, "vocab": []}),
    ("decoder", {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}),
    ("post_processor", None),
    ("model", None),
]
# fmt: on


# --------------------------------------------------------------------------------------------------
# Mutations: each takes the content of a file and returns it changed


def mutate_bytes(r: random.Random, raw: bytes) -> bytes:
    """Overwrite, cut, insert, move, repeat or replace bytes at one or several positions."""
    for _ in range(r.choice([1, 1, 1, 2, 5, 20])):
        i, j = sorted(r.randrange(len(raw) + 1) for _ in range(2))
        near = min(len(raw), i + r.choice([1, 2, 8, 100]))
        match r.randrange(8):
            case 0:
                raw = raw[:i] + bytes([r.randrange(256)]) + raw[i + 1 :]
            case 1:
                raw = raw[:i]
            case 2:
                raw = raw[:i] + raw[near:]
            case 3:
                raw = raw[:i] + r.randbytes(r.choice([1, 8, 100])) + raw[i:]
            case 4:
                raw = raw[:i] + r.choice(BYTES) + raw[i:]
            case 5:
                raw = raw[:j] + raw[i:near] + raw[j:]
            case 6:
                raw = raw[:j] + raw[i:near] * r.choice([2, 50, 1000]) + raw[j:]
            case 7:
                raw = mutate_number(r, raw)
    return raw


def mutate_number(r: random.Random, raw: bytes) -> bytes:
    """Replace one number of a text by an extreme one, if it has any."""
    numbers = list(re.finditer(rb"-?\d+", raw))
    if not numbers:
        return raw
    number = r.choice(numbers)
    extreme = r.choice([x for x in EXTREMES if type(x) in (int, float)])
    return raw[: number.start()] + json.dumps(extreme).encode() + raw[number.end() :]


def paths_in(value, path=()) -> list[tuple]:
    """Return the paths to every key and index in a JSON value, down to a depth of 7."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        items = []
    found = []
    for key, member in items:
        found.append((*path, key))
        if len(path) < 6:
            found += paths_in(member, (*path, key))
    return found


def value_at(value, path):
    """Return what a path of keys and indices leads to."""
    for key in path:
        value = value[key]
    return value


def mutate_json(r: random.Random, raw: bytes) -> bytes:
    """Replace, delete, copy or rename members of a JSON value, nest it deeply or repeat a key."""
    value = json.loads(raw)
    duplicate = None  # the key to repeat
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        paths = paths_in(value)
        if not paths:
            break
        # Most of a tokenizer's file is its vocabulary, which has hardly any structure to break.
        if len(paths) > 200 and r.random() < 0.9:
            paths = [path for path in paths if not {"vocab", "merges"} & set(path[:-1])]
        *parents, key = r.choice(paths)
        parent = value_at(value, parents)
        match r.randrange(6):
            case 0 | 1:
                parent[key] = r.choice(EXTREMES)
            case 2:
                del parent[key]
            case 3:
                other = value_at(value, r.choice(paths))
                parent[key] = json.loads(json.dumps(other))
            case 4:
                if isinstance(parent, dict):
                    member = parent.pop(key)
                    names = ["", "x", "a\nb", "type", "\0", key + "x", *map(str, parent)]
                    parent[r.choice(names)] = member
            case 5:
                duplicate = key if isinstance(key, str) else duplicate
    text = json.dumps(value)
    if r.random() < 0.03:
        depth = r.choice([100, 2000, 10**5])
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + text[-1]
    if duplicate is not None:
        name, extreme = json.dumps(duplicate), json.dumps(r.choice(EXTREMES))
        text = text.replace(f"{name}:", f"{name}: {extreme}, {name}:", 1)
    return text.encode()


def mutate_tokenizer(r: random.Random, raw: bytes) -> bytes:
    value = json.loads(raw)
    if r.random() < 0.2:
        name, part = r.choice(PARTS)
        value[name] = part
    raw = json.dumps(value).encode()
    return mutate_json(r, raw) if r.random() < 0.9 else raw


def mutate_safetensors(r: random.Random, raw: bytes) -> bytes:
    """Mutate the header, the size that the file claims for it, or the length of the data."""
    size = int.from_bytes(raw[:8], "little")
    header, tensors = raw[8 : 8 + size], raw[8 + size :]
    if r.random() < 0.2:
        return mutate_bytes(r, raw)
    header = mutate_json(r, header) if r.random() < 0.8 else mutate_bytes(r, header)
    if r.random() < 0.1:
        tensors = tensors[: r.randrange(len(tensors))]
    else:
        tensors += bytes(r.choice([0, 0, 0, 8, 4096]))
    if r.random() < 0.1:
        size = r.choice([0, 1, size, 2**24, 2**24 + 1, 10**8, 2**63, 2**64 - 1])
    else:
        size = len(header)
    return size.to_bytes(8, "little") + header + tensors


def mutate_template(r: random.Random, raw: bytes) -> bytes:
    text = raw.decode()
    for _ in range(r.choice([1, 1, 2, 5])):
        i = r.randrange(len(text) + 1)
        pieces = HOSTILE if r.random() < 0.05 else SYNTAX
        text = text[:i] + r.choice(pieces) + text[i + r.choice([0, 0, 1, 5]) :]
    raw = text.encode()
    return mutate_bytes(r, raw) if r.random() < 0.4 else raw


def mutate_lines(r: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    i = r.randrange(len(lines) - 1)
    lines[i] = mutate_json(r, lines[i])
    return b"\n".join(lines)


def mutate_compressed_lines(r: random.Random, raw: bytes) -> bytes:
    return gzip.compress(mutate_lines(r, gzip.decompress(raw)))


def other_table(r: random.Random, raw: bytes) -> bytes:
    """Return a valid parquet file, but with other columns and types."""
    import pyarrow  # optional, so it is imported only where it is used
    import pyarrow.parquet

    def column(n: int):
        question = {"role": "user", "content": "Hi"}
        columns = [
            [r.choice([None, "x", "", "é"]) for _ in range(n)],
            [b"\xff"] * n,
            [r.random()] * n,
            [2**63 - 1] * n,
            [None] * n,
            [[]] * n,
            [[question, {"role": "assistant", "content": r.choice(["a", None])}]] * n,
            [{"role": 1}] * n,
            [[[1]]] * n,
            [True] * n,
            ["x" * 10**6] * n,
            [[1.5, None]] * n,
        ]
        return pyarrow.array(r.choice(columns))

    n = r.choice([0, 1, 3])
    known = ("prompt", "chosen", "rejected", "responses", "scores", "messages")
    names = [name for name in known if r.random() < 0.6]
    sink = pyarrow.BufferOutputStream()
    compression = r.choice(["none", "snappy", "zstd"])
    table = pyarrow.table([column(n) for _ in names], names=names)
    pyarrow.parquet.write_table(table, sink, compression=compression)
    return sink.getvalue().to_pybytes()


def replace_file(r: random.Random, path: Path, outside: Path) -> None:
    """Put something in the place of a file that is not a regular file of the folder."""
    path.unlink()
    match r.randrange(6):
        case 0:
            path.symlink_to(outside)
        case 1:
            path.symlink_to(path.name)
        case 2:
            path.symlink_to("nowhere")
        case 3:
            path.mkdir()
        case 4:
            os.mkfifo(path)
        case 5:
            path.symlink_to("/dev/zero")


MUTATIONS = {  # for files with a structure of their own; JSON and bytes are the default
    "model.safetensors": mutate_safetensors,
    "chat_template.jinja": mutate_template,
    "tokenizer.json": mutate_tokenizer,
    "data.jsonl": mutate_lines,
    "data.jsonl.gz": mutate_compressed_lines,
    "data.parquet": other_table,
}


def mutate(r: random.Random, folder: Path, base: Path) -> str:
    """Change one file of the folder and return what was changed, usually the file's name."""
    name = r.choice([*CHECKPOINT, *CHECKPOINT[:4], CHECKPOINT[0], *DATA, "pickle", "links"])
    if name == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        return name
    if name == "links":
        name = r.choice(CHECKPOINT[:7])
        replace_file(r, folder / name, base / name)
        return "links"
    path = folder / name
    if name == "model.safetensors.index.json":
        shutil.copy(base / "index" / name, path)
    if name in DATA:
        (folder / "data").mkdir()
        path = folder / "data" / name
        shutil.copy(base / "data" / name, path)
    raw = path.read_bytes()
    mutation = mutate_bytes if r.random() < 0.3 else MUTATIONS.get(name, mutate_json)
    path.write_bytes(mutation(r, raw))
    return name


# --------------------------------------------------------------------------------------------------
# Cases: what is mutated, and how it is read


def write_base(base: Path) -> None:
    """Write a sound tiny checkpoint, and the same pairs in every kind of data file."""
    # test_data trains tokenizers when it is imported, and a child process needs none.
    import test_data
    import test_schemas

    import tiny

    stops = {"eos_token_id": [2, 4]}
    config = tiny.FAMILIES["llama-3.1"] | {"vocab_size": 340} | stops
    folder = tiny.write(base / "checkpoint", config)
    test_data.write_checkpoint(
        folder,
        test_data.byte_level(),
        None,
        "<|im_end|>",
        generation_config=stops,
        special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}},
    )
    (folder / "chat_template.jinja").write_text(test_data.CHATML)

    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (base / "index").mkdir()
    (base / "index" / "model.safetensors.index.json").write_text(json.dumps(index))

    transcript = test_data.TRANSCRIPT
    pairs = [
        {"prompt": "Hi", "chosen": "Hello, hello.", "rejected": "No."},
        test_data.ULTRAFEEDBACK[0],
        {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2.5]},
        {"chosen": transcript + " Yes.", "rejected": transcript + " No."},
        *(schema.record for schema in test_schemas.READ[3::3]),
    ]
    (base / "data").mkdir()
    for name in DATA:
        same_columns = pairs[:1] * 3
        test_data.write(base / "data" / name, same_columns if name.endswith("parquet") else pairs)
    read_everything(folder, base)


def read_everything(folder: Path, base: Path) -> None:
    """Read a checkpoint and its data as train.py and sample.py do, up to one forward pass.

    The data is the folder's own, or the base's if the folder has none.
    """
    source = checkpoint_folder(str(folder))
    config, weights = read_config(source), Weights(source)
    tokenizer = Tokenizer(source)
    tokenizer.check_fits(config.vocab_size)
    own_data = folder / "data"
    examples = []
    source_of_data = own_data if own_data.exists() else base / "data" / "data.jsonl"
    for where, record in read_records(str(source_of_data)):
        for columns in (None, Columns({"prompt": "question", "chosen": "good"}, ("critique",))):
            try:
                parse_record(record, where, paired=False, columns=columns)
            except (DataError, Dropped):  # other flags than those that the record was made for
                pass
        try:
            examples.append(parse_record(record, where)[1])
        except Dropped:
            pass
    pairs = encode(examples, tokenizer, 256, 128, Counter())
    with torch.device("meta"):
        weights.check(Llama(config))
    model = load(source)
    if pairs:
        batch = {name: torch.from_numpy(value) for name, value in pack(pairs[:2]).items()}
        offsets = {name: batch[name].numpy() for name in ("cu_q", "cu_k")}
        with torch.no_grad():
            model(**batch | offsets)
        tokenizer.decode(pairs[0].responses[0].tolist())
    tokenizer.changed_files()


def run_case(seed: int, case: int, base: Path, work: Path) -> dict:
    """Mutate a copy of the base, read it under limits and return the outcome."""
    r = random.Random(f"{seed} {case}")
    folder = work / f"case-{case}"
    shutil.copytree(base / "checkpoint", folder)
    what = mutate(r, folder, base)
    outcome, message = "read", ""
    faulthandler.register(signal.SIGXCPU, chain=True)  # prints where the CPU time went
    began = time.process_time()
    # With a size limit of 0, the kernel refuses every write to a file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    limit = math.ceil(began) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))
    try:
        read_everything(folder, base)
    except (DataError, CheckpointError) as e:
        outcome, message = "refused", str(e)
        if message.count("\n") or str(work) not in message or not message.isprintable():
            outcome = "FAILED: not one line that names a path"
        if "Too large" in message:
            outcome = "FAILED: wrote a file"
    except BaseException as e:  # a panic of the tokenizers library is no Exception
        outcome, message = f"FAILED: {type(e).__name__}", traceback.format_exc()
    for limited in (resource.RLIMIT_FSIZE, resource.RLIMIT_DATA):  # what mutates has no limit
        resource.setrlimit(limited, (resource.RLIM_INFINITY,) * 2)
    for path in folder.rglob("*"):
        if path.is_fifo():
            path.unlink()
    shutil.rmtree(folder)
    seconds = time.process_time() - began
    return {"case": case, "what": what, "outcome": outcome, "message": message, "seconds": seconds}


# --------------------------------------------------------------------------------------------------
# Campaigns


def refuse_writes(event: str, args: tuple) -> None:
    """Audit hook that raises RuntimeError if a file is opened for writing while a case is read.

    The limit on the size of a file lets empty files through.
    """
    limited = event == "open" and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 0
    if limited and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        if isinstance(args[0], str) and args[0] != os.devnull:
            raise RuntimeError(f"writes {args[0]}")


def run_child(seed: int, cases: range, base: Path, work: Path) -> None:
    """Run cases in this process, and print one JSON line for each as soon as it is done."""
    import pyarrow.parquet  # noqa: F401  before the memory in use is measured

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(refuse_writes)
    for case in cases:
        print(json.dumps(run_case(seed, case, base, work)), flush=True)


def campaign(seed: int, cases: int, work: Path) -> list[dict]:
    """Run cases in batches, each in a child process, and return the outcome of every case.

    A case that ends its child fails, and the next child continues after it.
    """
    base = work / "base"
    base.mkdir()
    write_base(base)
    results: list[dict] = []
    threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1"}
    while len(results) < cases:
        first, last = len(results), min(cases, len(results) + BATCH)
        command = [sys.executable, __file__, "--seed", str(seed)]
        command += ["--child", str(first), str(last), str(work)]
        with open(work / "stderr", "w+") as stderr:
            try:
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=environment,
                    timeout=WALL + last - first,
                )
                output, status = done.stdout, f"process ended with {done.returncode}"
            except subprocess.TimeoutExpired as e:
                output, status = e.stdout or b"", "no answer"
            stderr.seek(0)
            panic = stderr.read()[-2000:]
        results += [json.loads(line) for line in output.splitlines() if line.endswith(b"}")]
        if len(results) < last:
            case = len(results)
            failure = {"outcome": f"FAILED: {status}", "message": panic, "seconds": SECONDS}
            results.append({"case": case, "what": "?"} | failure)
            shutil.rmtree(work / f"case-{case}", ignore_errors=True)
        if sys.stderr.isatty():
            print(f"\r{len(results)} of {cases}", end="", file=sys.stderr)
    return results


def report(results: list[dict]) -> int:
    """Print failures and a table of outcomes by mutated file; return the number of failures."""
    failed = [result for result in results if "FAILED" in result["outcome"]]
    for result in failed:
        print(f"case {result['case']} ({result['what']}): {result['outcome']}\n{result['message']}")
    table = Counter((result["what"], result["outcome"].partition(":")[0]) for result in results)
    for what in sorted({what for what, _ in table}):
        counts = (f"{table[what, key]:6} {key}" for key in ("read", "refused", "FAILED"))
        print(f"{what:30}", *counts)
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--cases", default=5000, help="number of cases (default: 5000)", **number)
    parser.add_argument("--seed", default=0, help="a seed and a case's number make it", **number)
    parser.add_argument("--case", help="run this case alone, in this process", **number)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        first, last, work = flags.child
        run_child(flags.seed, range(int(first), int(last)), Path(work) / "base", Path(work))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if flags.case is not None:
            (work / "base").mkdir()
            write_base(work / "base")
            result = run_case(flags.seed, flags.case, work / "base", work)
            print(*(f"{key}: {value}" for key, value in result.items()), sep="\n")
            return "FAILED" in result["outcome"]
        began = time.perf_counter()
        results = campaign(flags.seed, flags.cases, work)
    failed = report(results)
    slowest = max(results, key=lambda result: result["seconds"])
    print(
        f"{len(results)} cases, seed {flags.seed}: {failed} failed; "
        f"{time.perf_counter() - began:.0f} seconds; "
        f"the slowest took {slowest['seconds']:.1f} (case {slowest['case']})"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
