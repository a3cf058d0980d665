"""Deep Gradient Compression and top-k with error feedback for N ranks in one process, straight from the equations.

Independent of distopt: no buckets, no hook, no wire; per parameter, whole tensors, plain torch.
"""

import dataclasses
import math

import torch
from torch import Tensor
from training import DTYPES, LEARNING_RATE, Chosen, Run, chosen_gradients


@dataclasses.dataclass
class Simulated:
    parameters: dict[str, Tensor]
    velocity: list[dict[str, Tensor]]  # u, per rank
    residual: list[dict[str, Tensor]]  # v, per rank
    decay: dict[str, Tensor]
    sum_velocity: dict[str, Tensor]  # sum over ranks and steps of what was put into v
    updates: dict[str, Tensor]


def simulate(run: Run, num_ranks: int) -> Simulated:
    dtype = DTYPES[run.dtype]
    names = {name: p.detach() for name, p in Chosen(dtype).named_parameters()}
    corrected = run.algorithm.name == "dgc"
    m, nesterov, wd = run.momentum, run.nesterov, run.weight_decay
    zeros = {name: torch.zeros(p.shape) for name, p in names.items()}

    def fresh() -> dict[str, Tensor]:
        return {name: z.clone() for name, z in zeros.items()}

    u, v = [fresh() for _ in range(num_ranks)], [fresh() for _ in range(num_ranks)]
    decay, put_in, updates = fresh(), fresh(), fresh()
    own_momentum = {}  # TopK: the optimizer's
    for step in range(run.steps):
        grads = [_gradient(run, step, rank, dtype) for rank in range(num_ranks)]
        for name, p in names.items():
            g = [grad[name].float() if grad else zeros[name] for grad in grads]
            if p.dim() <= 1:
                update = sum(g) / num_ranks
                if corrected:
                    for rank in range(num_ranks):  # the same on all
                        u[rank][name] = m * (u[rank][name] + update) if nesterov else m * u[rank][name] + update
                    update = u[0][name] + update if nesterov else u[0][name].clone()
            else:
                sent = []
                for rank in range(num_ranks):
                    if corrected:
                        before = u[rank][name]
                        u[rank][name] = m * (before + g[rank]) if nesterov else m * before + g[rank]
                        add = u[rank][name] + g[rank] if nesterov else u[rank][name]
                    else:
                        add = g[rank]
                    put_in[name] += add
                    v[rank][name] = v[rank][name] + add
                    sent.append(_send(run, u[rank][name] if corrected else None, v[rank][name], dtype))
                update = sum(one.float() / num_ranks for one in sent)
            if corrected and wd:
                pf = p.float()
                decay[name] = m * (decay[name] + wd * pf) if nesterov else m * decay[name] + wd * pf
                update = update + decay[name] + (wd * pf if nesterov else 0)
            update = update.to(dtype)
            updates[name] += update.float()
            if not corrected:
                update = update + wd * p if wd else update
                buffer = own_momentum[name] = (
                    m * own_momentum[name] + update if name in own_momentum else update.clone()
                )
                update = (update + m * buffer if nesterov else buffer) if m else update
            p.sub_(LEARNING_RATE * update)
    return Simulated(names, u, v, decay, put_in, updates)


def _gradient(run: Run, step: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor] | None:
    if step >= run.steps_of(rank):
        return None
    parts = [chosen_gradients(step, micro, rank, dtype) for micro in range(run.micro_batches(step))]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _send(run: Run, u: Tensor | None, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Takes the k largest of v out of it, as they are after rounding for the wire, scattered into zeros."""
    k = math.ceil(run.algorithm.density * v.numel())
    chosen = torch.sort(v.abs().flatten(), descending=True, stable=True).indices[:k]
    wire = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[run.algorithm.values]
    if run.algorithm.exchange == "dense" and dtype.itemsize < wire.itemsize:
        wire = dtype
    sent = torch.zeros(v.numel())
    sent[chosen] = v.flatten()[chosen].to(wire).float()
    v.view(-1)[chosen] -= sent[chosen]
    if u is not None and run.algorithm.masking:
        u.view(-1)[chosen] = 0
    return sent.view(v.shape)
