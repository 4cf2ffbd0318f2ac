"""Find a trainer's fastest settings within a memory limit, with the fewest runs that settle it.

Every setting is an axis: its values in the order of the memory that they take. The search climbs
from a starting point, one axis at a time, as long as a step makes the run faster, or the next one
does where a step changes little. Where a step takes too much memory, it is tried again with less on
another axis. No settings run twice, and none run that hold at least as much as others that did not
fit. A run is stopped as soon as it is clearly behind the fastest one so far, or holds more than the
limit.

`bench/compare.py --best` uses it.
"""

import time
from collections.abc import Callable
from pathlib import Path

from runtime.processes import peak_resident

FASTER = 1.02  # the least ratio of speeds that is worth a step
# A run is stopped if it ends a step later than the fastest one, by this ratio and as many seconds.
BEHIND, SECONDS = 1.05, 2.0

Point = tuple[int, ...]  # an index into each axis

# A dict with `pairs` per second, `peak_gib`, and `ends`, the seconds from the start of the process
# to the end of each step; or with `unavailable`, why there is no speed, and `peak_gib` until then.
Run = dict


class Stopped(Exception):
    """Reports that a run was stopped early; the message says why."""


class Watch:
    """Looks at a running process and stops it when its outcome is clear.

    steps: a file that gets a line at the end of every step. most_gib: of resident memory.
    rival: the `ends` of the fastest run so far; empty if there is none.
    """

    def __init__(self, most_gib: float, rival: list[float]):
        self.most_gib, self.rival = most_gib, rival
        self.ends: list[float] = []
        self.peak_gib = 0.0
        self.started = time.perf_counter()

    def look(self, pid: int, steps: Path) -> None:
        """Note what has happened since the last look.

        Raises:
            Stopped: the process holds too much memory, or is clearly behind.
        """
        seconds = time.perf_counter() - self.started
        count = steps.read_bytes().count(b"\n") if steps.exists() else 0
        self.ends += [seconds] * (count - len(self.ends))
        self.peak_gib = max(self.peak_gib, peak_resident(pid) / 2**30)
        if self.peak_gib > self.most_gib:
            raise Stopped(f"it holds more than {self.most_gib:.2f} GiB")
        last = [seconds] if len(self.ends) < len(self.rival) else []  # of a step that still runs
        if any(mine > BEHIND * its + SECONDS for mine, its in zip(self.ends + last, self.rival)):
            raise Stopped("it is clearly slower")


class Search:
    """Searches the settings of one side.

    axes: of each setting its values, from the least memory to the most.
    measure: runs settings, given the `ends` of the fastest so far; returns a Run.
    """

    def __init__(self, axes: list[list], measure: Callable[[tuple, list[float]], Run]):
        self.axes, self.measure = axes, measure
        self.runs: dict[Point, Run] = {}

    def settings(self, point: Point) -> tuple:
        return tuple(values[i] for values, i in zip(self.axes, point))

    def fastest(self, start: Point, most_gib: float) -> Point | None:
        """Return the fastest point that takes at most `most_gib`; None if nothing fits or runs.

        No run is repeated: the search goes on from the fastest of earlier calls that fits, and only
        the first begins at `start`.
        """
        ran = [p for p, run in self.runs.items() if "pairs" in run and run["peak_gib"] <= most_gib]
        best = max(ran, key=lambda point: self.runs[point]["pairs"], default=start)
        while not self.fits(best, None, most_gib):
            lower = [self.moved(best, axis, -1) for axis in range(len(best)) if best[axis]]
            if not lower:
                return None
            best = lower[0]
        if "pairs" not in self.runs[best]:  # it does not run at all
            return None
        moved = True
        while moved:
            moved = False
            for axis in range(len(best)):
                for way in (1, -1):
                    while further := self.faster(best, axis, way, most_gib):
                        best, moved = further, True
        return best

    def faster(self, best: Point, axis: int, way: int, most_gib: float) -> Point | None:
        """Return a point that is faster than `best`, a step or two along an axis; None if none is.

        The second step is taken if the first, run to its end, is about as fast.
        """
        steps = [self.moved(best, axis, n * way) for n in (1, 2)]
        options = [point for point in steps if 0 <= point[axis] < len(self.axes[axis])]
        if not options:
            return None
        if not self.fits(options[0], best, most_gib):
            others = [i for i in range(len(best)) if i != axis and best[i]]
            options = [self.moved(options[0], other, -1) for other in others]
        elif "pairs" not in self.runs[options[0]]:
            return None
        speed = self.runs[best]["pairs"]
        for point in options:
            if self.fits(point, best, most_gib):
                if self.runs[point].get("pairs", 0) > FASTER * speed:
                    return point
        return None

    def fits(self, point: Point, best: Point | None, most_gib: float) -> bool:
        """Return True if the run at `point` takes at most `most_gib`; run it unless that is known.

        A run that was stopped because it is slow fits if it did until then.
        """
        for other, run in self.runs.items():
            if run["peak_gib"] > most_gib and all(a <= b for a, b in zip(other, point)):
                return False
        if point not in self.runs:
            rival = self.runs[best]["ends"] if best else []
            self.runs[point] = self.measure(self.settings(point), rival)
        return self.runs[point]["peak_gib"] <= most_gib

    @staticmethod
    def moved(point: Point, axis: int, way: int) -> Point:
        return *point[:axis], point[axis] + way, *point[axis + 1 :]


if __name__ == "__main__":
    print(__doc__)
