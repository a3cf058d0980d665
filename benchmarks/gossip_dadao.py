"""DADAO on a ring, to float64's floor, beside decentralised gradient descent, EXTRA and gradient tracking.

    python benchmarks/gossip_dadao.py --json benchmarks/results/gossip_dadao.json

Distributed ridge regression: 16 nodes on a ring, 10 coefficients, 20 samples per node, and a ridge that makes the
largest curvature of a node 50 times the least of any. Features are drawn independently, and the mean of the nodes'
functions is then conditioned much better than a node's own, from which methods gain that follow the mean; or they are
"stretched", with scales from 1 to the root of the condition number, and the mean is conditioned like its parts. This
also with a condition number of 1,000. The error is the sum over nodes of the squared distance to the
solution of all, as a part of what it was at the start. A message is an exchange between two neighbours, a vector each
way. DADAO's gradients and messages come at random times and nobody waits; the others take rounds, in each of which all
nodes compute a gradient and all edges are used, two vectors each way for gradient tracking, which count twice.

The rates of the others are the best of a grid for this very problem and number of rounds (GRID, in units of 1/L):
decentralised gradient descent stops at an error that its rate decides, so it is shown with 1/L and with the best for
the last error. DADAO has nothing to choose. Slopes are digits per 1,000 gradients or messages, by least squares over
what lies between 1e-2 and 1e-20.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federated_jobs import run_all, write
from torch import Tensor

from distopt.gossip import DPSGD, GradientTracking, Mixing, Ring
from distopt.gossip.dadao import simulate_dadao
from distopt.gossip.mixing.rule import Surroundings
from distopt.gossip.simulated_mixer import SimulatedMixer
from distopt.plotting import COLOURS, load_matplotlib

NODES, SIZE, SAMPLES = 16, 10, 20
PROBLEMS = {"50": (50.0, False), "50, stretched": (50.0, True), "1000, stretched": (1000.0, True)}
GRADIENTS, MESSAGES = 35_000, 87_000  # where the sheet of figures looks
GRID = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6)
FITTED = (1e-2, 1e-20)
LOOK_EVERY = 320  # gradients


@dataclasses.dataclass
class Problem:
    """Node i's function is x'H_i x / 2 - c_i'x."""

    hessians: Tensor
    linear: Tensor
    start: Tensor
    smoothness: float
    convexity: float
    solution: Tensor

    def gradients(self, x: Tensor) -> Tensor:
        return torch.einsum("nij,nj->ni", self.hessians, x) - self.linear

    def error(self, x: Tensor) -> float:
        return float((x - self.solution).square().sum() / (self.start - self.solution).square().sum())


def ridge(seed: int, condition: float, *, stretched: bool) -> Problem:
    random = np.random.default_rng(seed)
    features = random.standard_normal((NODES, SAMPLES, SIZE))
    if stretched:
        features *= np.geomspace(1.0, condition**-0.5, SIZE)
    targets = random.standard_normal((NODES, SAMPLES))
    hessians = np.einsum("nmi,nmj->nij", features, features) / SAMPLES
    values = np.linalg.eigvalsh(hessians)
    ridge_ = (values[:, -1].max() - condition * values[:, 0].min()) / (condition - 1)
    hessians += ridge_ * np.eye(SIZE)
    linear = np.einsum("nmi,nm->ni", features, targets) / SAMPLES
    solution = np.linalg.solve(hessians.sum(0), linear.sum(0))
    return Problem(
        torch.tensor(hessians), torch.tensor(linear), torch.tensor(random.standard_normal((NODES, SIZE))),
        float(values[:, -1].max() + ridge_), float(values[:, 0].min() + ridge_), torch.tensor(solution),
    )  # fmt: skip


Curve = list[tuple[int, int, float]]  # gradients, messages, error


def dadao(problem: Problem, gradients: int, seed: int) -> Curve:
    found = simulate_dadao(
        lambda node, x: problem.hessians[node] @ x - problem.linear[node],
        start=problem.start,
        smoothness=problem.smoothness,
        strong_convexity=problem.convexity,
        topology="ring",
        solution=problem.solution,
        num_gradients=gradients,
        look_every=LOOK_EVERY,
        seed=seed,
    )
    first = found.errors[0]
    return [(g, m, e / first) for g, m, e in zip(found.gradients, found.messages, found.errors, strict=True)]


def in_rounds(problem: Problem, rounds: int, per_round: int, step: Callable[[Tensor], Tensor]) -> Curve:
    x, curve = problem.start.clone(), [(0, 0, 1.0)]
    for number in range(1, rounds + 1):
        x = step(x)
        if number * NODES % LOOK_EVERY == 0:
            curve.append((number * NODES, number * per_round, problem.error(x)))
        if curve[-1][2] > 1e6:
            break
    return curve


def by_rule(rule: Mixing, vectors: int) -> Callable[[Problem, int, float], Curve]:
    """With one of distopt's own rules, whose messages hold so many vectors."""

    def run(problem: Problem, rounds: int, lr: float) -> Curve:
        around = Surroundings(topology=Ring(), num_ranks=NODES, every=1)
        mixer = SimulatedMixer(Ring().graph(NODES), torch.device("cpu"))
        state = rule.begin(problem.start, around)

        def step(x: Tensor) -> Tensor:
            grads = problem.gradients(x)
            rule.gradient_(state, grads)
            x = x - lr * grads
            rule.stepped_(state, x)
            rule.exchange_(state, x, mixer, lr, None)
            return x

        return in_rounds(problem, rounds, NODES * vectors, step)

    return run


def extra(problem: Problem, rounds: int, lr: float) -> Curve:
    """Shi, Ling, Wu and Yin, "EXTRA", SIAM Journal on Optimization 2015, equation 2.13."""
    weights = torch.tensor(Ring().graph(NODES).weights)
    half = (weights + torch.eye(NODES, dtype=torch.float64)) / 2
    before: list[Tensor] = []

    def step(x: Tensor) -> Tensor:
        grads = problem.gradients(x)
        mixed = 2 * half @ x - half @ before[0] if before else weights @ x
        moved = mixed - lr * (grads - before[1] if before else grads)
        before[:] = [x, grads]
        return moved

    return in_rounds(problem, rounds, NODES, step)


OTHERS: dict[str, Callable[[Problem, int, float], Curve]] = {
    "gradient descent": by_rule(DPSGD(), 1),
    "EXTRA": extra,
    "gradient tracking": by_rule(GradientTracking(), 2),
}


def at(curve: Curve, column: int, amount: int) -> float:
    """The error when so much was spent."""
    return next((row[2] for row in curve if row[column] >= amount), curve[-1][2])


def slope(curve: Curve, column: int) -> float | None:
    """Digits per 1,000 of that column."""
    high, low = FITTED
    floor = next((i for i, row in enumerate(curve) if row[2] < low), len(curve))
    rows = [row for row in curve[:floor] if row[2] < high]
    if len(rows) < 3:
        return None
    return float(-1000 * np.polyfit([row[column] for row in rows], np.log10([row[2] for row in rows]), 1)[0])


def straightness(curve: Curve) -> list[float] | None:
    """The slope over gradients of the first and of the second half of what is fitted."""
    high, low = FITTED
    middle = (high * low) ** 0.5
    parts = [
        [row for row in curve if top > row[2] >= bottom] for top, bottom in ((high, middle), (middle, low))
    ]  # by error
    if min(map(len, parts)) < 3:
        return None
    return [float(-1000 * np.polyfit([r[0] for r in part], np.log10([r[2] for r in part]), 1)[0]) for part in parts]


def perform(job: tuple[str, int, int]) -> dict[str, Any]:
    """All of them on one problem."""
    name_of_problem, seed, gradients = job
    condition, stretched = PROBLEMS[name_of_problem]
    problem = ridge(seed, condition, stretched=stretched)
    rounds = int(2.6 * gradients / NODES)  # DADAO uses about 2.5 messages per gradient
    curves = {"DADAO": (None, dadao(problem, gradients, seed))}
    for name, run in OTHERS.items():
        tried = {unit: run(problem, rounds, unit / problem.smoothness) for unit in GRID}
        best = min(tried, key=lambda unit: at(tried[unit], 0, gradients))
        curves[name + ", best"] = (best, tried[best])
        if name == "gradient descent":
            curves[name + ", 1/L"] = (1.0, tried[1.0])
    values = torch.linalg.eigvalsh(problem.hessians.mean(0))
    found: dict[str, Any] = {"condition_of_mean": float(values[-1] / values[0])}
    found["ways"] = {
        name: {
            "rate_times_L": unit,
            "after_gradients": at(curve, 0, GRADIENTS),
            "after_messages": at(curve, 1, MESSAGES),
            "least": min(row[2] for row in curve),
            "digits_per_1000_gradients": slope(curve, 0),
            "digits_per_1000_messages": slope(curve, 1),
            "by_half": straightness(curve),
            "curve": [[g, m, float(f"{e:.4g}")] for g, m, e in curve[:: max(1, len(curve) // 125)]],
        }
        for name, (unit, curve) in curves.items()
    }
    return found


def say(job: tuple[str, int, int], result: dict[str, Any]) -> str:
    reached = result["ways"]["DADAO"]["after_gradients"]
    return f"condition {job[0]}, seed {job[1]}: DADAO {reached:.2g} after {GRADIENTS} gradients"


def listed(values: list[float | None], form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in values)


def show(name_of_problem: str, results: list[dict[str, Any]]) -> None:
    means = listed([each["condition_of_mean"] for each in results], ".0f")
    print(
        f"\ncondition {name_of_problem}; of the mean function: {means}\n"
        f"{'':24}{f'after {GRADIENTS:,} gradients':>30}{f'after {MESSAGES:,} messages':>30}"
        f"{'digits per 1,000 gradients':>28}{'per 1,000 messages':>24}{'rate x L':>20}"
    )
    for name in results[0]["ways"]:
        of = {key: [each["ways"][name][key] for each in results] for key in results[0]["ways"][name]}
        print(
            f"{name:24}{listed(of['after_gradients'], '.1e'):>30}{listed(of['after_messages'], '.1e'):>30}"
            f"{listed(of['digits_per_1000_gradients'], '.3f'):>28}{listed(of['digits_per_1000_messages'], '.3f'):>24}"
            f"{listed(of['rate_times_L'], 'g'):>20}"
        )
    halves = [each["ways"]["DADAO"]["by_half"] for each in results]
    print(f"DADAO's slope in the first and in the second half of its digits: {halves}")


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The first seed of each problem."""
    figure = load_matplotlib()(figsize=(4.2 * len(results), 7), layout="constrained")
    grid = figure.subplots(2, len(results), sharey=True, squeeze=False)
    for number, (problem, found) in enumerate(results.items()):
        for column, label in enumerate(("gradients", "messages")):
            axes = grid[column][number]
            for (name, each), colour in zip(found[0]["ways"].items(), COLOURS, strict=False):
                rows = [row for row in each["curve"] if row[2] < 10]
                axes.plot([row[column] for row in rows], [row[2] for row in rows], color=colour, label=name)
            axes.set(xlabel=f"{label}, of all nodes together", yscale="log")
            axes.grid(alpha=0.3)
        grid[0][number].set_title(f"ring of {NODES}, condition {problem}", fontsize=10)
    for row in grid:
        row[0].set_ylabel("error, of the first")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of data and clocks")
    parser.add_argument("--gradients", type=int, default=45_000, help="of all nodes together")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    parser.add_argument("--json", type=Path, help="also write the figures here, and a plot beside them")
    options = parser.parse_args()
    jobs = [(name, seed, options.gradients) for name in PROBLEMS for seed in range(options.seeds)]
    results: dict[str, list[dict[str, Any]]] = {}
    for (name, _, _), found in zip(jobs, run_all(perform, jobs, options.processes, say), strict=True):
        results.setdefault(name, []).append(found)
    for name, each in results.items():
        show(name, each)
    if options.json:
        problem = {"nodes": NODES, "size": SIZE, "samples": SAMPLES, "problems": PROBLEMS, "grid": GRID}
        write(options.json, options, {"problem": problem, "results": results})
        plot(results, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
