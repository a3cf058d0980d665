"""Fisher-weighted averaging: each parameter counts as much as the client's data determine it.

    theta = sum_i lam_i F_i theta_i / sum_i lam_i F_i    (per coordinate; F_i: the diagonal Fisher information, floored)

Of the posteriors of the clients, taken as Gaussians with the diagonal precision F_i, this is the joint maximum. With
equal F it is the weighted average.

Source: Matena & Raffel, *Merging Models with Fisher-Weighted Averaging*, NeurIPS 2022. They floor F at 1e-6, so that a
parameter that no client's data determine becomes the average instead of 0/0.

Limits: the F of different clients must be of the same scale, means over samples, as `diagonal_fisher` returns them.
`diagonal_fisher` treats samples one by one: a model whose output for one depends on others (BatchNorm that trains) has
none.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from distopt.config import check_choice, check_count, check_number
from distopt.errors import ConfigError
from distopt.federated.checks import float_vector
from distopt.federated.rows import Ids, Rows, as_rows, block_numel, blocks, client_order

LABELS = ("sampled", "exact", "empirical")

LogLikelihood = Callable[[Tensor, Tensor], Tensor]  # (output of one sample, its target) -> scalar


@torch.no_grad()
def fisher_average(
    thetas: Rows, fishers: Rows, weights: Sequence[float] | Tensor, floor: float = 1e-6, ids: Ids = None
) -> Tensor | None:
    """`sum_i weights[i] F_i theta_i / sum_i weights[i] F_i`, added in float64 by ascending client id.

    Args:
        thetas: m flat floating-point models of d values, or a tensor of shape (m, d): models, not deltas.
        fishers: The diagonal Fisher information of each, as many values.
        weights: m numbers >= 0, lam. A client of weight 0 is not even read.
        floor: F counts as at least this; higher: nearer to the plain weighted average.
        ids: The client of each row; left out, the rows are in the order of the clients.

    Returns:
        (d,) in the dtype of the models; None if there is no model of weight above 0: leave the global one as it is.

    Raises:
        ConfigError: A Fisher value is negative or not finite, or what was given does not fit together.
    """
    models, informations = as_rows("thetas", thetas), as_rows("fishers", fishers)
    check_number("floor", floor, rule="a number above 0", remedy="use 1e-6", low=0.0, high=math.inf)
    factors = float_vector("weights", weights, remedy="use sample_weights or uniform_weights").tolist()
    if not len(models) == len(informations) == len(factors):
        raise ConfigError(
            f"there must be one Fisher information and one weight for each model, got {len(informations)} and "
            f"{len(factors)} for {len(models)}; leave out those of the clients that did not answer"
        )
    if models and models[0].shape != informations[0].shape:
        raise ConfigError(
            f"fishers must be as long as the models, got {informations[0].numel()} for {models[0].numel()}; flatten "
            "both in one order"
        )
    if min(factors, default=0.0) < 0:
        raise ConfigError(f"weights must be at least 0, got {min(factors)}; use sample_weights or uniform_weights")
    order = [i for i in client_order(ids, len(models)) if factors[i] > 0]
    if not order:
        return None
    out = torch.empty_like(models[order[0]])
    pairs = [row for i in order for row in (models[i], informations[i])]
    for target, *parts in blocks([out, *pairs], block_numel(out)):
        above, below, term = (torch.zeros_like(target, dtype=torch.float64) for _ in range(3))
        for i, theta, information in zip(order, parts[::2], parts[1::2], strict=True):
            floored = information.to(torch.float64, copy=True)
            _check_information(floored, i)
            floored.clamp_(min=floor).mul_(factors[i])
            below.add_(floored)
            above.add_(term.copy_(theta).mul_(floored))
        target.copy_(above.div_(below))
    return out


def _check_information(information: Tensor, i: int) -> None:
    if not ((information >= 0) & information.isfinite()).all():
        raise ConfigError(
            f"fishers must be finite and at least 0, got another value at {i}; reject that client's reply"
        )


def log_softmax_at(output: Tensor, target: Tensor) -> Tensor:
    """The log-likelihood of a class: `output` (classes,) are logits, `target` () is an integer."""
    return output.log_softmax(0).gather(0, target[None]).squeeze(0)  # vmap has no output[target]


def diagonal_fisher(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    labels: str = "sampled",
    log_likelihood: LogLikelihood = log_softmax_at,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of the log-likelihood, per parameter.

    Args:
        model: In eval mode; maps (n, ...) to (n, classes) logits, or to whatever `log_likelihood` understands.
        inputs: (n, ...), n >= 1.
        targets: (n, ...), with `labels="empirical"` only.
        labels: What the likelihood is of. "sampled": one class per sample, drawn from the model's own prediction, an
            unbiased estimate of the Fisher information; "exact": its expectation over all classes, as many times the
            work; "empirical": the targets, which is another matrix, small where the model fits them.
        log_likelihood: Of one sample; with `labels="empirical"` any, otherwise the classes' own.
        batch_size: Samples at a time; memory is that many gradients.
        generator: Draws the classes.

    Returns:
        For each parameter that requires a gradient, by name, a tensor like it; tied parameters once.

    Raises:
        ConfigError: A value breaks its rule, or the model is in training mode.
    """
    _check_fisher_arguments(model, inputs, targets, labels, log_likelihood, batch_size)
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def likelihood(parameters: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, parameters, (sample[None],))  # the rest is the model's own
        return log_likelihood(output[0], target)

    gradients = vmap(grad(likelihood), in_dims=(None, 0, 0))
    totals = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in named.items()}
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        observed = None if targets is None else targets[start : start + batch_size]
        for target, shares in _targets(model, batch, observed, labels, generator):
            for name, gradient in gradients(named, batch, target).items():
                totals[name] += torch.einsum("n,n...->...", shares, gradient.double().square())
    return {name: (total / len(inputs)).to(named[name].dtype) for name, total in totals.items()}


def _targets(
    model: nn.Module, batch: Tensor, observed: Tensor | None, labels: str, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets for the batch, (n, ...), and how much each sample's squared gradient counts with it, (n,) float64."""
    once = torch.ones(len(batch), dtype=torch.float64, device=batch.device)
    if observed is not None:
        yield observed, once
        return
    with torch.no_grad():
        probabilities = model(batch).double().softmax(1)
    if labels == "sampled":
        yield torch.multinomial(probabilities, 1, generator=generator).squeeze(1), once
        return
    for label in range(probabilities.shape[1]):
        yield torch.full((len(batch),), label, device=batch.device), probabilities[:, label]


def _check_fisher_arguments(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None,
    labels: str,
    log_likelihood: LogLikelihood,
    batch_size: int,
) -> None:
    check_choice("labels", labels, LABELS)
    check_count("batch_size", batch_size, low=1, remedy="use 32")
    if any(module.training for module in model.modules()):
        raise ConfigError("model must be in eval mode, got training mode; call model.eval() first")
    if (targets is not None) != (labels == "empirical"):
        given = "none" if targets is None else "some"
        raise ConfigError(f'targets must be given with labels="empirical" and only then, got {given} with {labels!r}')
    if log_likelihood is not log_softmax_at and labels != "empirical":
        raise ConfigError(
            f'log_likelihood must be left out with labels={labels!r}, which needs classes; use labels="empirical"'
        )
    if len(inputs) == 0 or (targets is not None and len(targets) != len(inputs)):
        num_targets = "no" if targets is None else len(targets)
        raise ConfigError(
            f"there must be at least one sample and a target for each, got {len(inputs)} inputs and {num_targets} "
            "targets; leave out a client without samples"
        )
