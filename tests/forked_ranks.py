"""Train on two ranks, again and again, while torch is imported once; see `starts`.

    python tests/forked_ranks.py FILE

FILE holds a JSON list with one [flags, fault] per start. A fault is [rank, place, call]: on this
rank, this call of what runs at this place runs out of memory; null: none does. Prints the exit
statuses of both ranks for every start, as JSON.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo  # which FSDP would import in every fork

import train


def starts(flags_and_faults: list, folder: Path) -> None:
    """Run this file, which trains for each [flags, fault]; check that a fault fails both ranks."""
    (file := folder / "starts.json").write_text(json.dumps(flags_and_faults))
    command, environment = [sys.executable, __file__, file], os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    expected = [[1, 1] if fault else [0, 0] for _, fault in flags_and_faults]
    assert ran.stdout.strip() == json.dumps(expected), ran.stderr


def exhaust(rank: int, place: str, call: int) -> None:
    """Let the call of the forward pass of a step or an evaluation, or of a backward pass, fail."""
    name = "backward" if place == "backward" else "response_logps"
    original, calls = getattr(train, name), []

    def failing(*arguments):
        if place == "backward" or torch.is_grad_enabled() == (place == "forward"):
            calls.append(1)
            if len(calls) == call and os.environ.get("RANK", "0") == str(rank):
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    setattr(train, name, failing)


def start(rank: int, port: int, flags: list[str], fault: list | None) -> int:
    """Fork a rank that trains; return its process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.dup2(2, 1)
        if fault:
            exhaust(*fault)
        sys.argv = ["train.py", *flags]
        train.main()
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    statuses = []
    for flags, fault in json.loads(Path(sys.argv[1]).read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [start(rank, port, flags, fault) for rank in range(2)]
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
