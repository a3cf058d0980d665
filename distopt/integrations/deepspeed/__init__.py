"""DeepSpeed as the host: the compression that left DeepSpeed with 1-bit Adam, as a block of ds_config.

    from distopt.integrations import deepspeed

    config = {..., "distopt": {"algorithm": "dgc", "density": 0.001}}
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config=config)
    engine.distopt.stats()

At ZeRO stage 0 DeepSpeed averages its gradients in one method, `buffered_allreduce_fallback`, which it reaches only at
the boundary of gradient accumulation, before clipping and the step. That method is replaced on the one engine; its
gradients go through the same hook as those of DistributedDataParallel.

Limits: nothing overlaps with the backward pass, unless `"overlap": true` puts DistributedDataParallel inside the
engine. What DeepSpeed does elsewhere with gradients (ZeRO, fp16, MoE, pipelines, ...) is refused before DeepSpeed is
called; docs/deepspeed.md has the list. DeepSpeed itself is imported when `initialize` runs.
"""

from distopt.integrations.deepspeed.initialize import attach, initialize

__all__ = ["attach", "initialize"]
