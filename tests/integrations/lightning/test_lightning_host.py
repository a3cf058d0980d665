"""distopt under Lightning's Trainer and Fabric, on real gloo ranks."""

import functools
import json
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import distopt
from host_jobs import BATCH, build_model, digits, flat, launched

pytest.importorskip("lightning")
pytestmark = pytest.mark.job

import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from distopt.integrations.lightning import DistoptCallback  # noqa: E402

DGC = {"algorithm": "dgc", "density": 0.01, "exchange": "allgather"}
WHOLE = {**DGC, "density": 1.0}
TOPK = {**DGC, "algorithm": "topk"}
STEPS = 8


def here():
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sgd(parameters, momentum=0.9, weight_decay=1e-4):
    return torch.optim.SGD(parameters, 0.1, momentum=momentum, weight_decay=weight_decay)


def adamw(parameters):
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.1)


class Digits(lightning.LightningModule):
    def __init__(self, make, *, manual=False, optimizers=1):
        super().__init__()
        self.model, self.make, self.count = build_model(), make, optimizers
        self.automatic_optimization = not manual
        self.settings = []

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None

    def on_train_batch_end(self, *_):
        group = self.trainer.optimizers[0].param_groups[0]
        self.settings.append((group.get("momentum"), group["weight_decay"]))

    def configure_optimizers(self):
        made = [self.make(self.parameters()) for _ in range(self.count)]
        return made if self.count > 1 else made[0]


class Stats(Callback):
    """Keeps the numbers: after `fit` nothing is attached."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        callback = next(c for c in trainer.callbacks if isinstance(c, DistoptCallback))
        self.stats = callback.attached.stats()
        self.step = callback.attached.attachment.state_dict()["step"]


def loader(size):
    pixels, labels = zip(*[batch for rank in range(size) for batch in digits(rank, size, STEPS // 2)], strict=True)
    data = TensorDataset(torch.cat(pixels), torch.cat(labels))
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, shuffle=False))


def trainer_for(size, *callbacks, strategy=None, **options):
    return lightning.Trainer(
        accelerator="cpu", devices=size, strategy=strategy or DDPStrategy(process_group_backend="gloo"), logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, max_epochs=2,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks), callbacks=list(callbacks),
        **options,
    )  # fmt: skip


def fit(job=None, make=sgd, *, resume=None, keep=None, manual=False, **options):
    """Two epochs, plainly or with a job: parameters, numbers, steps, the optimizer's settings on the way and after."""
    rank, size = here()
    stats = Stats()
    callbacks = [] if job is None else [DistoptCallback(job), stats]
    if keep:
        callbacks.append(ModelCheckpoint(keep, filename="{step}", save_on_train_epoch_end=True, save_top_k=-1))
    with launched(rank, size), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, trainer = Digits(make, manual=manual), trainer_for(size, *callbacks, **options)
        trainer.fit(module, loader(size), ckpt_path=resume)
    group = trainer.optimizers[0].param_groups[0]
    after = group.get("momentum"), group["weight_decay"]
    return flat(module), getattr(stats, "stats", None), getattr(stats, "step", None), module.settings, after


def distances_to_plain():
    """Largest distance of an exchange of everything from plain Lightning, by what is turned on."""
    no_momentum = functools.partial(sgd, momentum=0.0, weight_decay=0.0)
    cases = {
        "momentum": (WHOLE, {"make": functools.partial(sgd, weight_decay=0.0)}),
        "momentum and weight decay": (WHOLE, {}),
        "manual optimization": (WHOLE, {"make": no_momentum, "manual": True}),
        "accumulation": (WHOLE, {"make": no_momentum, "accumulate_grad_batches": 2}),
        "bf16": (WHOLE, {"make": no_momentum, "precision": "bf16-mixed"}),
        "clipping": (WHOLE, {"make": no_momentum, "gradient_clip_val": 0.1}),
        "AdamW": ({**TOPK, "density": 1.0}, {"make": adamw, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
    }
    distances = {}
    for name, (job, options) in cases.items():
        plain, whole = fit(**options)[0], fit(job, **options)[0]
        distances[name] = float((plain - whole).abs().max())
    return distances


def test_everything_sent_is_plain_training(ranks):
    for distances in ranks(2)(distances_to_plain):
        rounded = distances.pop("momentum and weight decay")  # its momentum is a sum of its own
        assert 0 < rounded < 1e-6
        assert set(distances.values()) == {0.0}, distances


def compressed(folder):
    dgc = fit({**DGC, "log": {"folder": folder, "every": 4}})
    topk = fit(TOPK, adamw, accumulate_grad_batches=2, precision="bf16-mixed")
    return [(parameters.tolist(), *rest) for parameters, *rest in (dgc, topk)]


def test_replicas_stay_equal_and_fewer_bytes_go(ranks, tmp_path):
    first, second = ranks(2)(compressed, str(tmp_path))
    for (ours, stats, *_), (theirs, *_) in zip(first, second, strict=True):
        assert ours == theirs
        assert stats["bytes_sent"] < 0.1 * stats["bytes_dense"]
    (_, _, steps, during, after), (_, _, accumulated, untouched, _) = first
    assert (steps, accumulated) == (STEPS, STEPS // 2)
    assert set(during) == {(0.0, 0.0)}
    assert after == (0.9, 1e-4)
    assert set(untouched) == {(None, 0.1)}  # top-k takes nothing from AdamW
    for rank in range(2):
        written = [json.loads(line)["step"] for line in (tmp_path / f"stats-{rank}.jsonl").read_text().splitlines()]
        assert written == [1, 4, 8]


def resumed_fit(resume, job, make=sgd, keep=None):
    parameters, _, step, during, after = fit(job, make, resume=resume, keep=keep)
    return parameters.tolist(), step, during[-1], after


def test_a_checkpoint_carries_every_rank(ranks, tmp_path):
    for job, make in ((DGC, sgd), (TOPK, adamw)):
        folder = tmp_path / job["algorithm"]
        half = str(folder / f"step={STEPS // 2}.ckpt")
        through = ranks(2)(resumed_fit, None, job, make, keep=str(folder))
        assert ranks(2)(resumed_fit, half, job, make) == through
    half = str(tmp_path / "dgc" / f"step={STEPS // 2}.ckpt")
    (_, steps, during, after), *_ = ranks(1)(resumed_fit, half, DGC)
    assert steps > STEPS // 2
    assert (during, after) == ((0.0, 0.0), (0.9, 1e-4))


def plain_then_compressed(folder):
    """Begins without distopt and goes on with it, whose momentum is then the plain run's."""
    fit(keep=folder)
    half = f"{folder}/step={STEPS // 2}.ckpt"
    through = fit(make=sgd)[0]
    whole = fit(WHOLE, resume=half)[0]
    return float((through - whole).abs().max())


def test_a_plain_checkpoint_goes_on_compressed(ranks, tmp_path):
    assert max(ranks(2)(plain_then_compressed, str(tmp_path))) < 1e-6


class Fails(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if index == 1:
            raise ValueError("the loop has failed")


def refusals(folder):
    """What is refused, and in which words."""
    rank, size = here()

    def raises(words, *, job=DGC, error=distopt.CompatibilityError, module=None, callbacks=(), resume=None, **options):
        with pytest.raises(error, match=words):
            trainer_for(size, DistoptCallback(job), *callbacks, **options).fit(
                module or Digits(sgd), loader(size), ckpt_path=resume
            )

    with launched(rank, size), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raises("bare model", job=distopt.Gossip())
        raises("ModelCheckpoint.*runs/x.*=7", job={**DGC, "checkpoint": {"folder": "runs/x", "every": 7}})
        raises("densty", job={"algorithm": "dgc", "densty": 0.1}, error=distopt.ConfigError)
        raises("clip=0.5 to the algorithm", gradient_clip_val=0.5)
        raises("one optimizer", module=Digits(sgd, manual=True, optimizers=2))
        saving = ModelCheckpoint(folder, filename="failed", save_on_exception=True)
        raises("loop has failed", error=ValueError, callbacks=[Fails(), saving])
        torch.distributed.barrier()
        raises("an earlier one", error=distopt.StateMismatchError, resume=f"{folder}/failed.ckpt")


def test_refusals_say_what_to_do(ranks, tmp_path):
    ranks(2)(refusals, str(tmp_path))
    with pytest.raises(distopt.CompatibilityError, match='strategy="ddp"'):
        trainer_for(1, DistoptCallback(DGC), strategy="auto").fit(Digits(sgd), digits(0, 1, 1))
