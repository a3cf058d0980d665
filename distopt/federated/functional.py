"""A user's loss as a function of parameters, for torch.func."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from distopt.errors import ConfigError

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


def scalar(loss: Tensor) -> Tensor:
    """The loss, if it is one number.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ConfigError(f"loss(model, batch) must be a tensor of one number, got {got}; take the mean over the batch")
    return loss


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


class LossModule(nn.Module):
    """`loss(model, batch)` as a module, so that `functional_call` can put other tensors into the model."""

    PREFIX = "model."

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of the batch."""
        return scalar(self._loss(self.model, batch))


def squared_gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: Loss, batches: Iterable[Batch]
) -> Tensor:
    """(d,), the mean over samples of the squared gradient of each one's loss, with the model in evaluation mode.

    Args:
        model: Any that computes samples one by one.
        parameters: Some of its own; their elements, flat and in this order, are the d.
        loss: Of a batch, here of one sample.
        batches: Memory is a gradient for each sample of one.

    Raises:
        ConfigError: There is no sample.
    """
    whole = LossModule(model, loss)
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    point = {names[id(parameter)]: parameter.detach() for parameter in parameters}
    of_each = vmap(grad(lambda at, sample: functional_call(whole, at, (sample,))), in_dims=(None, 0))
    total, count, mode = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), 0, model.training
    model.eval()
    try:
        for batch in batches:
            gradients = of_each(point, tuple(part.unsqueeze(1) for part in batch))  # each a batch of one
            total += torch.cat([gradients[name].double().square().sum(0).reshape(-1) for name in point])
            count += len(batch[0])
    finally:
        model.train(mode)
    if not count:
        raise ConfigError("there must be samples to look back at, got none; give Client.step the client's `samples`")
    return (total / count).to(parameters[0].dtype)
