"""distopt under Lightning's Trainer and Fabric, on real gloo ranks."""

import functools
import warnings
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import distopt
from distopt.integrations.lightning import DistoptCallback
from host_jobs import BATCH, DGC, STEPS, TOPK, WHOLE, build_model, digits, flat, here, launched


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


def compressed(folder):
    dgc = fit({**DGC, "log": {"folder": folder, "every": 4}})
    topk = fit(TOPK, adamw, accumulate_grad_batches=2, precision="bf16-mixed")
    return [(parameters.tolist(), *rest) for parameters, *rest in (dgc, topk)]


def resumed_fit(resume, job, keep=None):
    make = {"dgc": sgd, "topk": adamw}[job["algorithm"]]
    parameters, _, step, during, after = fit(job, make, resume=resume, keep=keep)
    return parameters.tolist(), step, during[-1], after


def plain_then_compressed(folder):
    """Begins without distopt and goes on with it, whose momentum is then the plain run's."""
    fit(keep=folder)
    half = f"{folder}/step={STEPS // 2}.ckpt"
    through = fit(make=sgd)[0]
    whole = fit(WHOLE, resume=half)[0]
    return float((through - whole).abs().max())


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


def refused_alone():
    """One process."""
    trainer = trainer_for(1, DistoptCallback(DGC), strategy="auto")
    with pytest.raises(distopt.CompatibilityError, match='strategy="ddp"'):
        trainer.fit(Digits(sgd), digits(0, 1, 1))
    with pytest.raises(distopt.CompatibilityError, match="FSDPStrategy"):  # whose trainer needs a GPU
        DistoptCallback(DGC).setup(SimpleNamespace(strategy=FSDPStrategy()), Digits(sgd), "fit")
