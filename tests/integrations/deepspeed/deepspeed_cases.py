"""Training of the digits under real DeepSpeed, on each rank of a pool."""

import contextlib
import functools
import logging
import os
import warnings

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

MICRO_BATCH = 8


@functools.cache
def prepare():
    """What DeepSpeed wants of its environment on the CPU; the kernel would compile for two minutes."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(dist.get_rank()), OMP_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def ds_config(*, momentum=0.0, weight_decay=0.0, lr=0.1, kind="SGD", **more):
    params = {"lr": lr, "weight_decay": weight_decay}
    params |= {"momentum": momentum} if kind == "SGD" else {"torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": kind, "params": params},
        **more,
    }


def make_engine(config, model=None, **keywords):
    """An engine: plain DeepSpeed's where the config has no block."""
    prepare()
    import deepspeed

    from distopt.integrations import deepspeed as ours

    model = model if model is not None else make_model()
    initialize = ours.initialize if "distopt" in config else deepspeed.initialize
    keywords.setdefault("model_parameters", list(model.parameters()))
    return initialize(model=model, config=config, **keywords)[0]


def train(engine, first, last, *, seed=0):
    """Steps `first` to `last` on this rank's samples; losses."""
    images, labels = digits()
    losses = []
    for step in range(first, last):
        for micro in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * micro + dist.get_rank() + seed)
            chosen = torch.randint(len(images), (MICRO_BATCH,), generator=generator)
            inputs = images[chosen].to(next(engine.module.parameters()).dtype)
            loss = nn.functional.cross_entropy(engine(inputs).float(), labels[chosen])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def weights(engine):
    """All parameters of the model, flat; the master weights too, where DeepSpeed has some."""
    parameters = [p.detach().float().flatten() for p in engine.module.parameters()]
    parameters += [m.detach().flatten() for group in getattr(engine.optimizer, "fp32_groups", []) for m in group]
    return torch.cat(parameters).numpy()


def run(config, steps=6, **keywords):
    """Weights after training, with the attachment's numbers (None without a block)."""
    engine = make_engine(config, **keywords)
    train(engine, 0, steps)
    attachment = getattr(engine, "distopt", None)
    stats = attachment.stats() if attachment is not None else None
    result = weights(engine), stats
    if attachment is not None:
        attachment.detach()
    return result


def same(ours, others):
    return len(ours) == len(others) and all(np.array_equal(a, b) for a, b in zip(ours, others, strict=True))


@contextlib.contextmanager
def warnings_of_distopt():
    """The warnings that distopt logs meanwhile."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("distopt").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("distopt").removeHandler(handler)


def held_back(engine):
    """The sum of all that this rank has not sent."""
    ranks = engine.distopt.state_dict()["ranks"]
    memories = [memory for of_rank in ranks.values() for memory in of_rank.values() if "v" in memory]
    return sum(float(memory["v"].double().sum()) for memory in memories)


def settings(engine):
    return [(group["momentum"], group["weight_decay"]) for group in engine.basic_optimizer.param_groups]


def ours_on(engine):
    """What an attachment has put on the engine."""
    patched = ("buffered_allreduce_fallback", "save_checkpoint", "load_checkpoint", "step", "distopt")
    return [name for name in (*patched, "distopt_recorder", "module_state_dict") if name in vars(engine)]


def taken_over(block):
    from distopt.integrations.deepspeed import attach

    engine = make_engine(ds_config(momentum=0.9, weight_decay=1e-3))
    with warnings_of_distopt() as found:
        attachment = attach(engine, block)
        during = settings(engine)
        train(engine, 0, 3)
        stats = attachment.stats()
        attachment.detach()
    return {
        "rank": dist.get_rank(),
        "while": during,
        "after": settings(engine),
        "buffers": sum("momentum_buffer" in state for state in engine.basic_optimizer.state.values()),
        "untouched": ours_on(engine) == [],
        "stats": stats,
        "warnings": found,
    }


def trains_on_after_detach():
    """Attached at density 1, detached half way: plain DeepSpeed's weights, also where DDP was inside."""
    from distopt.integrations.deepspeed import attach

    config = ds_config(momentum=0.9, gradient_accumulation_steps=2)
    plain = run(config)[0]
    engine = make_engine(config)
    for overlap, first in ((False, 0), (True, 2)):
        attachment = attach(engine, {"algorithm": "dgc", "density": 1.0}, overlap=overlap)
        train(engine, first, first + 2)
        attachment.detach()
    train(engine, 4, 6)
    return same([plain], [weights(engine)]), ours_on(engine)


def compiled():
    config = ds_config(momentum=0.9, distopt={"algorithm": "dgc", "density": 0.05, "exchange": "allgather"})
    eager = make_engine(config)
    train(eager, 0, 3)
    engine = make_engine(config)
    engine.compile(backend="eager")
    train(engine, 0, 3)
    return same([weights(eager)], [weights(engine)]) and engine.distopt.stats()["steps"] == 3


def backward_twice(overlap):
    engine = make_engine(ds_config(distopt={"algorithm": "topk", "density": 0.5, "overlap": overlap}))
    images, labels = digits()
    engine.backward(nn.functional.cross_entropy(engine(images[:8]), labels[:8]))
    return message_of(lambda: engine.backward(nn.functional.cross_entropy(engine(images[:8]), labels[:8])))


def lost_before_clipping():
    import distopt

    engine = make_engine(ds_config(distopt={"algorithm": "topk", "density": 0.5}))
    images, labels = digits()
    engine.backward(nn.functional.cross_entropy(engine(images[:8]), labels[:8]))

    def clip():
        raise AssertionError("a collective of DeepSpeed waits for the lost rank")

    engine.clip_fp32_gradients = clip
    engine.distopt._hook.fail(distopt.PeerLostError("lost rank 1", (1,)))
    return message_of(engine.step)


def message_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused_at_attach():
    from torch.nn.parallel import DistributedDataParallel

    import distopt
    from distopt.integrations.deepspeed import attach

    algorithm = distopt.TopK(density=0.5)
    messages = {}
    for stage, name, refused in ((2, "zero", algorithm), (1, "momentum of zero 1", distopt.DGC(density=0.5))):
        config = ds_config(zero_optimization={"stage": stage}, zero_allow_untested_optimizer=True)
        messages[name] = message_of(attach, make_engine(config), refused)
    engine = make_engine(ds_config())
    attach(engine, algorithm)
    messages["twice"] = message_of(attach, engine, algorithm)
    wrapped = DistributedDataParallel(make_model())
    messages["wrapped"] = message_of(make_engine, ds_config(distopt=algorithm), wrapped)
    messages["overlap"] = message_of(attach, make_engine(ds_config(), wrapped), algorithm, overlap=False)
    embedding = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    messages["sparse"] = message_of(attach, make_engine(ds_config(), embedding), algorithm)
    return messages


def different_blocks(first, second):
    block = {"algorithm": "topk", "density": 0.25, **(second if dist.get_rank() else first)}
    return message_of(make_engine, ds_config(distopt=block))


def on_one_rank_only(method, good, bad):
    """Rank 1 cannot write to the folder: what both ranks hear, and what is left on the engine."""
    from distopt.integrations.deepspeed import attach

    folder = bad if dist.get_rank() else good
    engine = make_engine(ds_config(momentum=0.9))
    block = {"algorithm": "dgc", "density": 0.5, **({"log": {"folder": folder}} if method == "log" else {})}
    if method == "log":
        return message_of(attach, engine, block), ours_on(engine)
    attach(engine, block)
    return message_of(engine.save_checkpoint, folder), []


def coalesced():
    from distopt.integrations.deepspeed import attach

    config = ds_config(zero_optimization={"stage": 1}, zero_allow_untested_optimizer=True)
    engine = make_engine(config)
    attachment = attach(engine, {"algorithm": "topk", "density": 0.5})
    message = message_of(engine.coalesce_grad_reduction)
    attachment.detach()
    with engine.coalesce_grad_reduction():
        return message


def goes_back(folder):
    """Six steps with a checkpoint after each, then the first after an earlier one."""
    block = {"algorithm": "topk", "density": 0.5, "checkpoint": {"folder": folder, "every": 1, "keep": 2}}
    engine = make_engine(ds_config(distopt=block))
    train(engine, 0, 2)
    engine.save_checkpoint(folder, tag="kept")
    train(engine, 2, 6)
    engine.load_checkpoint(folder, tag="kept")
    train(engine, 2, 3)
    engine.load_checkpoint(folder)
    return engine.global_steps


def from_files(folder):
    import json
    from pathlib import Path
    from types import SimpleNamespace

    job, config = Path(folder) / "distopt.toml", Path(folder) / f"ds-{dist.get_rank()}.json"
    job.write_text('algorithm = "topk"\ndensity = 0.05\n')
    config.write_text(json.dumps(ds_config(distopt={"job": str(job), "overlap": True})))
    prepare()
    from distopt.integrations import deepspeed as ours

    model, args = make_model(), SimpleNamespace(deepspeed_config=str(config), local_rank=dist.get_rank())
    made = ours.initialize(args, model, model_parameters=model.parameters())
    assert len(made) == 4
    assert args.deepspeed_config == str(config)
    train(made[0], 0, 2)
    return made[0].distopt.stats()


def resumed(block, folder, **more):
    """Four steps, saved after two, against two steps of an engine that has loaded."""
    config = ds_config(momentum=0.9, weight_decay=1e-3, distopt=block, **more)
    first = make_engine(config)
    train(first, 0, 2)
    first.save_checkpoint(folder)
    train(first, 2, 4)
    second = make_engine(config)
    train(second, 7, 8)  # what is there before must not matter
    second.load_checkpoint(folder)
    train(second, 2, 4)
    names = list(torch.load(f"{folder}/global_step2/mp_rank_00_model_states.pt", weights_only=False)["module"])
    return (
        same([weights(first)], [weights(second)])
        and held_back(first) == held_back(second) != 0
        and names == list(make_model().state_dict())
        and second.distopt.stats()["steps"] == first.distopt.stats()["steps"] - 1
    )


def from_plain_checkpoint(block, folder):
    config = ds_config(momentum=0.9, weight_decay=1e-3)
    plain = make_engine(config)
    train(plain, 0, 2)
    plain.save_checkpoint(folder)
    train(plain, 2, 4)
    engine = make_engine({**config, "distopt": block})
    with warnings_of_distopt() as found:
        engine.load_checkpoint(folder)
    train(engine, 2, 4)
    return same([weights(plain)], [weights(engine)]), found


def plain_takes_up(block, folder):
    config = ds_config(momentum=0.9, weight_decay=1e-3)
    engine = make_engine({**config, "distopt": block})
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    assert settings(engine) == [(0.0, 0.0)]
    train(engine, 2, 3)
    plain = make_engine(config)
    plain.load_checkpoint(folder)
    train(plain, 2, 3)
    return settings(plain)[0]


def saved_with_held_back(block, folder):
    engine = make_engine(ds_config(momentum=0.9, distopt=block))
    train(engine, 0, 3)
    engine.save_checkpoint(folder, tag="two")
    return held_back(engine)


def held_back_after_load(block, folder):
    engine = make_engine(ds_config(momentum=0.9, distopt=block))
    engine.load_checkpoint(folder, tag="two")
    held = held_back(engine)
    engine.save_checkpoint(folder, tag="two")  # in place of what two ranks have saved
    engine.load_checkpoint(folder, tag="two")
    train(engine, 3, 5)
    return {"held": held, "weights": weights(engine)}


def without_deepspeeds_reduction(config):
    """Trains although every reduction of DeepSpeed's own raises."""

    def reduce(*args, **kwargs):
        raise AssertionError("DeepSpeed reduces gradients too")

    engine = make_engine(config)
    engine.allreduce_bucket = reduce
    if engine.zero_optimization_stage():
        engine.optimizer.allreduce_bucket = reduce
    train(engine, 0, 2)
    return engine.distopt.stats()["steps"]


def as_the_page_shows(script, config, folder):
    """Runs the script of docs/deepspeed.md with its ds_config, whose Adam is torch's here."""
    import json

    prepare()
    given = json.loads(config)
    given["optimizer"]["params"]["torch_adam"] = True
    path = f"{folder}/ds-{dist.get_rank()}.json"
    with open(path, "w") as file:
        json.dump({**given, "train_micro_batch_size_per_gpu": MICRO_BATCH}, file)
    model = make_model()
    names = {"model": model, "params": list(model.parameters())}
    exec(script.replace('"ds.json"', repr(path)), names)
    train(names["engine"], 0, 2)
    return names["engine"].distopt.stats()["algorithm"]


def not_finite(nonfinite, bf16):
    """A step in which rank 1 has a NaN: what engine.step() raises, and whether the weights moved."""
    block = {"algorithm": "dgc", "density": 0.05, "nonfinite": nonfinite, "exchange": "allgather"}
    config = ds_config(momentum=0.9, weight_decay=1e-3, bf16={"enabled": bf16}, distopt=block)
    engine = make_engine(config)
    train(engine, 0, 2)
    before = weights(engine)
    images, labels = digits()
    inputs = images[:8].to(next(engine.module.parameters()).dtype)
    loss = nn.functional.cross_entropy(engine(inputs).float(), labels[:8])
    engine.backward(loss * (float("nan") if dist.get_rank() else 1.0))
    message = message_of(engine.step)
    unmoved = same([before], [weights(engine)])
    engine.zero_grad()
    train(engine, 3, 4)  # who has caught the error may go on
    return message, unmoved and not same([before], [weights(engine)])
