"""Hear signals, and the death of torchrun, from a program's first moment to its last.

This file imports nothing slow, so that train.py listens before it imports torch. Python runs a
signal's handler between two of its own instructions, hence never while torch waits for other ranks.
A thread therefore hears every signal, too, and ends the process if nothing is lost by that:

    START    the process leaves at once: nothing has been computed, and its files survive a kill
    STEPS    the run saves after the current step, on all ranks, see `Run.save_if_due`; but if a
             rank of this machine has died, that step never ends and the process leaves at once
    SAVING   nothing happens: what is being saved is worth more than the time it takes; but once
             rank 0, which finishes every save, has died on this machine, the process leaves at once
"""

import contextlib
import hashlib
import os
import platform
import select
import signal
import threading
from collections.abc import Callable, Iterator

RESUME_ME = 75  # exit status: stopped when told to, not finished (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun started us
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
MAX_RESTARTS = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
START, STEPS, SAVING = range(3)

# --------------------------------------------------------------------------------------------------
# The launcher


def _find_parent() -> int:
    """Return the process that started this one; 0 if that was a torchrun that has died already."""
    parent = os.getppid()
    if LAUNCHED and os.getsid(0) == os.getpid():  # torchrun gives each worker a session
        try:
            executable = os.path.basename(os.readlink(f"/proc/{parent}/exe"))
        except OSError:  # another user's, or no Linux
            return 0 if parent == 1 else parent
        return parent if executable.startswith("python") else 0
    return parent


def _name_launcher() -> str:
    """Return a name that all processes of one torchrun on this machine have, and no others.

    It stays the same when torchrun restarts its workers. In containers every torchrun may be
    process 1 of a host with the same name; the time it started and its namespace tell them apart.
    """
    facts = [platform.node(), str(PARENT), os.environ.get("TORCHELASTIC_RUN_ID", "")]
    with contextlib.suppress(OSError):  # no Linux
        facts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{PARENT}/stat") as stat:
            facts += [boot.read(), stat.read().rpartition(")")[2].split()[19]]  # starttime
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


PARENT = _find_parent()
LAUNCHER = _name_launcher()

# --------------------------------------------------------------------------------------------------
# Listening

peers: list[int] = []  # process ids of this machine's ranks, ours among them
rank_0 = 0  # process id of rank 0, if it is one of them
_received: list[int] = []
_listening = False
_phase = START


def listen(program: str) -> None:
    """Hear signals until the process ends, by `leave`. For a main program, as its first act.

    A signal that is ignored, as `nohup` ignores SIGHUP, stays ignored.
    """
    global _listening
    _listening = True
    while (unused := os.open(os.devnull, os.O_RDWR)) < 3:  # no file of ours becomes a closed stdout
        pass
    os.close(unused)
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    _handle()
    threading.Thread(target=_watch, args=(bell, program), daemon=True).start()


def is_listening() -> bool:
    """Return True in a program that called `listen`."""
    return _listening


def _handle() -> dict:
    """Record each signal that is not ignored; return the old handlers by signal."""
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {n: signal.signal(n, lambda n, frame: _received.append(n)) for n in heard}


def _told() -> bool:
    """Return True once a signal was received, or torchrun has died."""
    return bool(_received) or (LAUNCHED and os.getppid() != PARENT)


def _watch(bell: int, program: str) -> None:
    """Wait for signals, and leave when the table at the top of this file says so."""
    while True:
        if select.select([bell], [], [], 1.0)[0]:
            _received.extend(n for n in os.read(bell, 64) if n in SIGNALS)
        if _phase == START and _told():
            if os.environ.get("RANK", "0") == "0":
                text = "stopped by a signal before the first step; run the same command again"
                with contextlib.suppress(OSError):
                    os.write(2, f"{program}: {text}\n".encode())
            leave(RESUME_ME)
        if _phase != START and _told():
            dead = {process for process in peers if not _lives(process)}
            if rank_0 in dead or (_phase == STEPS and dead):
                leave(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def leave(status: int) -> None:
    """End this process at once: no rank is waited for, no thread, no destructor.

    The file that TRAIN_STOPPED names, if set, is created when the status is RESUME_ME: torchrun
    does not pass a status on, and recipes/slurm.sh has to know.
    """
    if status == RESUME_ME and (path := os.environ.get("TRAIN_STOPPED")):
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os._exit(status)


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once this rank was told to stop after its current step.

    A signal tells it, and so does the death of torchrun. Signals that came earlier count only in a
    program that listens.
    """
    global _phase
    if not _listening:
        _received.clear()
    old_handlers = {} if _listening else _handle()
    _phase = STEPS
    try:
        yield _told
    finally:
        _phase = SAVING
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def protect() -> None:
    """From now on, let no signal end this process before it has saved and left by itself."""
    global _phase
    _phase = SAVING
