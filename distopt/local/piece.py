"""One fragment of this rank's model: its parameters, as the flat float32 vector with which `Fragment` computes.

Parameters of 16 bits cannot hold theta: the difference between theta and what they hold is kept aside and added when
they are read, so that rounding is no pseudo-gradient and small outer steps are not lost.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distopt.errors import CompatibilityError, StateMismatchError
from distopt.local.configuration import LocalSteps
from distopt.local.fragment import Fragment


class Piece:
    """See the module.

    Args:
        algorithm: The configuration.
        parameters: Of the fragment, by name.

    Attributes:
        fragment: What is computed with it; begins with the parameters as they are.
    """

    def __init__(self, algorithm: LocalSteps, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self._forms = [(parameter.dtype, parameter.device) for parameter in self.parameters]
        self._shapes = [parameter.shape for parameter in self.parameters]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self._device = self.parameters[0].device
        self._rest: Tensor | None = None
        self.fragment = Fragment(algorithm, self._sizes, self._read())

    @property
    def numel(self) -> int:
        """D."""
        return sum(self._sizes)

    def _read(self) -> Tensor:
        flat = torch.empty(self.numel, dtype=torch.float32, device=self._device)
        for part, parameter in zip(flat.split(self._sizes), self.parameters, strict=True):
            part.copy_(parameter.detach().reshape(-1))
        return flat

    @torch.no_grad()
    def local(self) -> Tensor:
        """(d,) float32, this rank's model now, a copy.

        Raises:
            CompatibilityError: The model has another dtype or device than when it was attached.
        """
        for name, parameter, form in zip(self._names, self.parameters, self._forms, strict=True):
            if (parameter.dtype, parameter.device) != form:
                raise CompatibilityError(
                    f"a model must stay of the dtype and on the device with which it was attached, got {name!r} of "
                    f"{parameter.dtype} on {parameter.device} after {form[0]} on {form[1]}; move it first, then attach"
                )
        flat = self._read()
        return flat if self._rest is None else flat.add_(self._rest)

    @torch.no_grad()
    def become_(self, flat: Tensor) -> None:
        """Makes this rank's model (d,) float32."""
        for part, parameter in zip(flat.split(self._sizes), self.parameters, strict=True):
            parameter.copy_(part.view(parameter.shape))
        if any(dtype != torch.float32 for dtype, _ in self._forms):
            self._rest = flat - self._read()

    def views(self, flat: Tensor) -> list[Tensor]:
        """(d,) as one tensor for each parameter."""
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Of this rank: the fragment's, and the model's; copies."""
        state = {name: None if each is None else each.clone() for name, each in self.fragment.state_dict().items()}
        rest = None if self._rest is None else self._rest.clone()
        local = [parameter.detach().clone() for parameter in self.parameters]
        return {"names": list(self._names), "fragment": state, "local": local, "rest": rest}

    def check(self, state: Any) -> None:
        """Raises `StateMismatchError` if it is of other tensors."""
        found = {name: _form(state["fragment"].get(name)) for name in ("theta", "residual", "momentum")}
        own = {name: _form(each) for name, each in self.fragment.state_dict().items()}
        if state["names"] != self._names or found != own:
            raise StateMismatchError(
                f"a fragment's state must be of {', '.join(self._names)} with {own}, got {', '.join(state['names'])} "
                f"with {found}; load it into the configuration and the model that it was saved from"
            )

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Takes a state back, the model's parameters among it."""
        self.fragment.load_state_dict(state["fragment"])
        for parameter, saved in zip(self.parameters, state["local"], strict=True):
            parameter.copy_(saved)
        self._rest = None if state["rest"] is None else state["rest"].to(self._device)


def _form(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
