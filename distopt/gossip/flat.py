"""A model's tensors as flat vectors: what is exchanged, and where each tensor lies in it.

Parameters of one dtype and device share a vector. A tied parameter is there once; frozen ones stay where they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distopt.errors import CompatibilityError
from distopt.gossip.correction import Segment


@dataclass(frozen=True)
class Place:
    """A parameter in a vector.

    Attributes:
        segment: Where, and its name.
        shape: Of the parameter.
        stride: In the vector: the parameter's own, which may be that of channels_last.
    """

    segment: Segment
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, vector: Tensor) -> Tensor:
        """The parameter's part of (..., d): (..., *shape)."""
        part = vector[..., self.segment.start : self.segment.stop]
        return part.as_strided(
            (*part.shape[:-1], *self.shape), (*part.stride()[:-1], *self.stride), part.storage_offset()
        )


def layout(parameters: Mapping[str, Tensor]) -> list[Place]:
    """Places one behind the other, in this order."""
    places, at = [], 0
    for name, parameter in parameters.items():
        stop = at + parameter.numel()
        stride = parameter.stride() if is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
        places.append(Place(Segment(name, at, stop, parameter.dim()), tuple(parameter.shape), tuple(stride)))
        at = stop
    return places


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order of axes."""
    axes = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(axes).is_contiguous()


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """(d,), all elements, of each in the order of its axes."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class FlatParameters:
    """Parameters of one dtype and device as one vector.

    Where they allow it they become views of the vector, and an exchange copies nothing; a parameter that shares memory
    with another, or is of a class of its own, makes the vector a copy.

    Args:
        parameters: By name, all of one dtype and device.

    Attributes:
        vector: (1, d).
        parameters: In their order.
        places: Of the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = list(parameters.values())
        self.places = layout(parameters)
        first = self.parameters[0]
        size = self.places[-1].segment.stop
        self.vector = torch.empty((1, size), dtype=first.dtype, device=first.device)
        self._views = [place.view(self.vector[0]) for place in self.places]
        self.gather()
        if all(_may_move(parameter) for parameter in self.parameters) and not _share(self.parameters):
            for parameter, view in zip(self.parameters, self._views, strict=True):
                parameter.data = view

    @property
    def are_views(self) -> bool:
        """Whether the parameters are views of the vector."""
        pairs = zip(self.parameters, self._views, strict=True)
        return all(parameter.data_ptr() == view.data_ptr() for parameter, view in pairs)

    @property
    def segments(self) -> list[Segment]:
        """Of the parameters in the vector."""
        return [place.segment for place in self.places]

    @torch.no_grad()
    def gather(self) -> None:
        """Brings the vector up to date.

        Raises:
            CompatibilityError: The model has another dtype or device now.
        """
        for parameter, view, place in zip(self.parameters, self._views, self.places, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                if (parameter.dtype, parameter.device) != (view.dtype, view.device):
                    raise CompatibilityError(
                        f"a model must stay of the dtype and on the device with which it was attached, got "
                        f"{place.segment.name!r} of {parameter.dtype} on {parameter.device} after {view.dtype} on "
                        f"{view.device}; move it first, then attach"
                    )
                view.copy_(parameter)

    @torch.no_grad()
    def scatter(self) -> None:
        """Brings the parameters up to date."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                parameter.copy_(view)

    def gradients(self) -> Tensor:
        """(1, d), a copy; zero where a parameter has none.

        Raises:
            CompatibilityError: A gradient is sparse.
        """
        grads = torch.zeros_like(self.vector)
        for parameter, place in zip(self.parameters, self.places, strict=True):
            if parameter.grad is not None:
                if parameter.grad.layout != torch.strided:
                    raise CompatibilityError(
                        f"a rule that changes gradients needs dense ones, got that of {place.segment.name!r} in "
                        f"{parameter.grad.layout}; make the embedding with sparse=False, or use mixing='d-psgd'"
                    )
                place.view(grads[0]).copy_(parameter.grad)
        return grads

    def set_gradients(self, grads: Tensor) -> None:
        """From (1, d)."""
        for parameter, place in zip(self.parameters, self.places, strict=True):
            part = place.view(grads[0])
            if parameter.grad is None:
                parameter.grad = part.clone()
            else:
                parameter.grad.copy_(part)

    def by_parameter(self, values: Mapping[int, float]) -> Tensor | float:
        """(d,) of a value for each parameter, by its id; or the value, if it is one for all."""
        found = [values.get(id(parameter), 0.0) for parameter in self.parameters]
        if len(set(found)) == 1:
            return found[0]
        filled = torch.empty_like(self.vector[0])
        for place, value in zip(self.places, found, strict=True):
            filled[place.segment.start : place.segment.stop] = value
        return filled

    @torch.no_grad()
    def release(self) -> None:
        """Gives each parameter memory of its own again."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.data_ptr() == view.data_ptr():
                parameter.data = view.clone()


def group(parameters: Mapping[str, nn.Parameter]) -> list[FlatParameters]:
    """A vector for each dtype and device, in the order in which they come; `distopt.replica` checks them first."""
    kinds: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        kinds.setdefault((parameter.dtype, parameter.device), {})[name] = parameter
    return [FlatParameters(each) for each in kinds.values()]


def _may_move(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor and is_dense(parameter)


def _share(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether two of them lie in the same memory."""
    pointers = [parameter.untyped_storage().data_ptr() for parameter in parameters if parameter.numel()]
    return len(set(pointers)) < len(pointers)
