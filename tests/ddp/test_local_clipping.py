"""Local gradient clipping: `g min(1, threshold N^-1/2 / (||g|| + 1e-6))` over the whole local gradient."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import SHAPES, Chosen, chosen_gradients, dgc, momentum_sgd

THRESHOLD = 60.0  # between the norms of the ranks' gradients, whatever their number


def gradients_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    """Rank 0's are small enough to stay as they are; the others' are clipped."""
    return {name: g * (1 + 20 * rank) / 8 for name, g in chosen_gradients(step, 0, rank, torch.float32).items()}


def on_clip(use_scaler: bool) -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Chosen(), bucket_cap_mb=0.0008)
    optimizer = momentum_sgd(model.parameters(), momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=use_scaler)
    attachment = dgc(density=1.0, clip=THRESHOLD).attach(model, optimizer, scaler=scaler)
    smallest_factor = 1.0
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(gradients_of(step, rank))).backward()
        scaler.unscale_(optimizer)
        expected = dict.fromkeys(SHAPES, 0.0)
        for other in range(size):
            gradients = gradients_of(step, other)
            norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()]))
            factor = min(1.0, THRESHOLD * size**-0.5 / (float(norm) + 1e-6))
            smallest_factor = min(smallest_factor, factor)
            assert (factor < 1) == (other > 0)
            for name, gradient in gradients.items():
                expected[name] = expected[name] + gradient * factor / size
        for name, parameter in model.module.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        scaler.step(optimizer)
        scaler.update()
    assert attachment.stats()["last"]["buckets_dense"] > 2  # the norm is of more than one bucket
    assert attachment.stats()["overlap"] is False
    return smallest_factor


@pytest.mark.parametrize("use_scaler", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_clips_its_whole_gradient(ranks, num_ranks, use_scaler):
    factors = ranks(num_ranks)(on_clip, use_scaler)
    assert num_ranks == 1 or max(factors) < 0.9
