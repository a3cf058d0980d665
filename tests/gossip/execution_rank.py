"""What ranks run for the tests of how gossip is executed."""

import time

import torch
from gossip_rank import batches, flat, make_model, make_optimizer, step

from distopt.gossip import Gossip


def waiting_for_nobody(described, steps, lr=0.1, save=None, pace_s=0.002):
    """What is left of the mean that the ranks' updates make, and what each has done.

    Every rank takes another number of steps at another pace. With `save`, the second half is another attachment's,
    which takes the state of the first.
    """
    import distopt

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(rank)
    model = make_model()
    start, given = flat(model), batches(size)
    moved = torch.zeros_like(start)
    before = torch.zeros_like(start)

    def prepared(model):
        optimizer = make_optimizer(model.parameters(), 0.5, lr)

        def look(*_):
            before.copy_(flat(model))

        def count(*_):
            moved.add_(flat(model) - before)

        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(count)
        return optimizer, Gossip.from_dict(described).attach(model, optimizer)

    optimizer, attached = prepared(model)
    for number in range(steps + 5 * rank):
        if save is not None and number == steps // 2:
            distopt.checkpoint.save(attached, save)
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            torch.distributed.barrier()
            attached.detach()
            model = make_model()
            model.load_state_dict(kept)
            optimizer, attached = prepared(model)
            distopt.checkpoint.load(attached, save)
        step(model, optimizer, given.of(rank, number))
        time.sleep(pace_s * (rank + 1))
    attached.flush()
    state = attached._participant.state_dict()["rule"][0]
    weight = float(state["weight"]) if "weight" in state else 1.0
    found = {
        "sum": flat(model) + state.get("bias", torch.zeros(1, 1))[0],
        "weight": weight,
        "expected": start + moved,
        "round": attached._exchange.round,
        **attached.stats(),
    }
    distance = attached.consensus_distance()
    attached.detach()
    return {**found, "distance": distance}
