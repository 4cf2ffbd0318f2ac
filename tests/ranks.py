"""Play several ranks in one process, each a thread, so that a test need not start any."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist


def on_ranks(monkeypatch, ranks: int, work: Callable) -> list:
    """Return what `work()` returns on each rank, or the exception that it raises there."""
    here, barrier, board = threading.local(), threading.Barrier(ranks, timeout=60), {}

    def exchange(thing) -> list:
        board[here.rank] = thing
        barrier.wait()
        things = [board[rank] for rank in range(ranks)]
        barrier.wait()
        return things

    def all_gather_object(things: list, thing) -> None:
        things[:] = exchange(thing)

    def broadcast(tensor, source: int) -> None:
        tensor.copy_(exchange(tensor.clone())[source])

    def rank_of_thread(rank: int):
        here.rank = rank
        try:
            return work()
        except Exception as e:
            return e

    for function in (all_gather_object, broadcast):
        monkeypatch.setattr(dist, function.__name__, function)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda: getattr(here, "rank", 0))
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank_of_thread, range(ranks)))
