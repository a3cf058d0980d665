"""distopt under Hugging Face's Trainer, on real gloo ranks with a model made here."""

import functools
import shutil
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import distopt
from distopt.integrations.transformers import DistoptCallback
from host_jobs import BATCH, DGC, STEPS, TOPK, WHOLE, build_model, digits, flat, here, launched, reset_accelerate


def sgd(model, momentum=0.9, weight_decay=1e-4):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, weight_decay=weight_decay)


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build_model()

    def forward(self, pixels, labels):
        scores = self.model(pixels)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class Watch(TrainerCallback):
    """Keeps the numbers: after training nothing is attached."""

    def __init__(self, callback):
        self.callback, self.settings = callback, []

    def on_step_end(self, args, state, control, optimizer=None, **_):
        group = optimizer.param_groups[0]
        self.settings.append((group.get("momentum"), group["weight_decay"]))
        if self.callback:
            self.stats = self.callback.attached.stats()
            self.step = self.callback.attached.attachment.state_dict()["step"]


def examples(size):
    batches = [digits(rank, size, STEPS) for rank in range(size)]
    rows = [row for step in range(STEPS) for rank in range(size) for row in zip(*batches[rank][step], strict=True)]
    return [{"pixels": pixels, "labels": label} for pixels, label in rows]


def trainer_for(size, make, folder, **options):
    reset_accelerate()
    defaults = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 1,
        "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "max_grad_norm": 0.0, "logging_strategy": "no",
        "lr_scheduler_type": "constant", "learning_rate": 0.01, "weight_decay": 0.1, "optim": "adamw_torch",
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    model = Digits()
    optimizers = (make(model) if make else None, None)
    return Trainer(model, args, train_dataset=examples(size), optimizers=optimizers)


def fit(folder, job=None, make=sgd, *, resume=None, elsewhere=None, **options):
    """One epoch, plainly or with a job: parameters, numbers, steps, the optimizer's settings on the way and after."""
    rank, size = here()
    with launched(rank, size):
        trainer = trainer_for(size, make, folder, **options)
        callback = DistoptCallback(trainer, job, resumes_from=elsewhere) if job else None
        watch = Watch(callback)
        for one in filter(None, (callback, watch)):
            trainer.add_callback(one)
        trainer.train(resume_from_checkpoint=resume)
    group = trainer.optimizer.param_groups[0]
    after = group.get("momentum"), group["weight_decay"]
    step, stats = getattr(watch, "step", None), getattr(watch, "stats", None)
    return flat(trainer.model), stats, step, watch.settings, after


def distances_to_plain(folder):
    """Largest distance of an exchange of everything from plain Trainer, by what is turned on."""
    no_momentum = functools.partial(sgd, momentum=0.0, weight_decay=0.0)
    cases = {
        "momentum": (WHOLE, {"make": functools.partial(sgd, weight_decay=0.0)}),
        "momentum and weight decay": (WHOLE, {}),
        "accumulation": (WHOLE, {"make": no_momentum, "gradient_accumulation_steps": 2}),
        "bf16": (WHOLE, {"make": no_momentum, "bf16": True}),
        "clipping": (WHOLE, {"make": no_momentum, "max_grad_norm": 0.1}),
        "AdamW": ({**TOPK, "density": 1.0}, {"make": None, "max_grad_norm": 0.1, "gradient_accumulation_steps": 2}),
    }
    distances = {}
    for name, (job, options) in cases.items():
        plain, whole = fit(folder, **options)[0], fit(folder, job, **options)[0]
        distances[name] = float((plain - whole).abs().max())
    return distances


def compressed(folder):
    dgc = fit(folder, {**DGC, "log": {"folder": f"{folder}/log", "every": 4}})
    topk = fit(folder, TOPK, None, gradient_accumulation_steps=2, bf16=True)
    return [(parameters.tolist(), *rest) for parameters, *rest in (dgc, topk)]


def resumed_fit(folder, job, **options):
    make = {"dgc": sgd, "topk": None}[job["algorithm"]]  # None: the AdamW of the arguments
    if not options.get("resume"):
        options |= {"save_strategy": "steps", "save_steps": STEPS // 2}
    parameters, _, step, during, after = fit(folder, job, make, **options)
    return parameters.tolist(), step, during[-1], after


def resumed_elsewhere(folder, moved):
    """A checkpoint that is not in `output_dir` must be named; another run's in its place is no help."""
    half = f"checkpoint-{STEPS // 2}"
    if here()[0] == 0:
        shutil.copytree(f"{folder}/{half}", f"{moved}/{half}")
    torch.distributed.barrier()
    through = resumed_fit(folder, DGC, resume=f"{folder}/{half}")
    for output_dir in (f"{folder}-empty", f"{folder}/../topk"):
        with pytest.raises(distopt.StateMismatchError, match="resumes_from"):
            resumed_fit(output_dir, DGC, resume=f"{moved}/{half}")
        torch.distributed.barrier()
    assert resumed_fit(f"{folder}-empty", DGC, resume=f"{moved}/{half}", elsewhere=f"{moved}/{half}") == through


def plain_then_compressed(folder):
    """Begins without distopt and goes on with it, whose momentum is then the plain run's."""
    through = fit(folder, save_strategy="steps", save_steps=STEPS // 2)[0]
    whole = fit(folder, WHOLE, resume=f"{folder}/checkpoint-{STEPS // 2}")[0]
    return float((through - whole).abs().max())


def _search(state, *_):
    state.is_hyper_param_search = True


def refusals(folder):
    """What is refused, and in which words."""

    def raises(words, job=DGC, error=distopt.CompatibilityError, **options):
        with pytest.raises(error, match=words):
            fit(folder, job, **options)

    raises("bare model", distopt.Gossip())
    raises("TrainingArguments.*runs/x.*=7", {**DGC, "checkpoint": {"folder": "runs/x", "every": 7}})
    raises("densty", {"algorithm": "dgc", "densty": 0.1}, distopt.ConfigError)
    raises("clip=1.0 to the algorithm", max_grad_norm=1.0)
    raises("defined for torch.optim.SGD", make=None)
    raises("per_device_train_batch_size", auto_find_batch_size=True)
    searching = mock.patch("transformers.TrainerState.compute_steps", autospec=True, side_effect=_search)
    with searching:
        raises("hyperparameter search")
    raises("restores itself", restore_callback_states_from_checkpoint=True)


def refused_alone(folder):
    """One process, without a launcher; and what needs a GPU to be set up."""
    trainer = trainer_for(1, sgd, folder)
    for name in ("deepspeed", "fsdp"):
        refusal = pytest.raises(distopt.CompatibilityError, match=f"integrations.{name}")
        with mock.patch.object(trainer, f"is_{name}_enabled", True), refusal:
            DistoptCallback(trainer, DGC)
    with pytest.raises(distopt.CompatibilityError, match="torchrun"):
        DistoptCallback(trainer, DGC)
