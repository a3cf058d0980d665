"""Models whose clients can be computed by different processes: nothing of them changes that is not averaged."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distopt.errors import CompatibilityError
from distopt.federated.layout import Layout


def check_all_averaged(model: nn.Module, layout: Layout, where: str) -> None:
    """Raises `CompatibilityError` if a float tensor changes and is not averaged, or depends on a count of batches.

    Args:
        model: Any.
        layout: Of the model.
        where: For the message.
    """
    if apart := own_float_tensors(model, layout):
        raise CompatibilityError(
            f"all float tensors must be averaged in {where}, got {apart[0]!r} that is not; leave it out of "
            "exclude, or use mode='loop'"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.momentum is None:
            raise CompatibilityError(
                f"BatchNorm must have a momentum in {where}, got None in {name!r}, which counts the batches "
                "of one process; give one, or use mode='loop'"
            )


def own_float_tensors(model: nn.Module, layout: Layout) -> list[str]:
    """Names of the model's float tensors that change and are not averaged; frozen parameters do not change."""
    tensors = model.state_dict(keep_vars=True)
    same = {id(tensor) for name, tensor in tensors.items() if name in layout.names}
    same |= {id(p) for p in model.parameters() if not p.requires_grad}
    return [n for n, t in tensors.items() if t.is_floating_point() and id(t) not in same]
