"""Durations and what is said about them. Knows nothing about subjects."""

import math
import time


class Stopwatch:
    """Milliseconds since it was made."""

    def __init__(self):
        self.start = time.perf_counter_ns()

    def ms(self):
        return (time.perf_counter_ns() - self.start) / 1e6


def percentile(values, share):
    """The nearest-rank percentile: always a value that was seen."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values):
    return percentile(values, 0.5)


class Table:
    """All samples of a run: (operation, subject) -> list of values."""

    def __init__(self):
        self.values = {}

    def add(self, operation, subject, *values):
        self.values.setdefault((operation, subject), []).extend(values)

    def get(self, operation, subject):
        return self.values.get((operation, subject), [])

    def subjects(self, operation):
        return [subject for (name, subject) in self.values if name == operation]
