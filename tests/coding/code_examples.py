"""Examples of every registered code, by constructor: the laws hold for all of them."""

from distopt.coding import CODES
from distopt.errors import ConfigError

SIZES = [(1, 0), (4, 0), (4, 1), (5, 1), (5, 2), (6, 1), (6, 2), (8, 3), (7, 3), (9, 2), (10, 3), (10, 4), (4, 3)]
LARGER = [(16, 3), (24, 5), (30, 2), (33, 6), (48, 7)]
SPEEDS = [1.0, 3.0, 2.0, 2.5, 1.0, 4.0, 0.5, 1.5, 2.0, 1.1]


def arguments_of(name, sizes):
    for n, s in sizes:
        if name == "heterogeneous":
            yield ([SPEEDS[i % 10] * (1 + i / n) for i in range(n)], s)
        elif name in ("approximate", "random_regular", "expander"):
            yield (n, s + 1)
        else:
            yield (n, s)


def examples(sizes):
    found = []
    for name, constructor in CODES.items():
        for arguments in arguments_of(name, sizes):
            try:
                found.append(constructor(*arguments))
            except ConfigError:
                if name not in ("fractional", "approximate", "cyclic_mds"):  # these do not exist for all sizes
                    raise
    return found


def by_name(codes):
    return {name: [code for code in codes if code.name == name] for name in CODES}
