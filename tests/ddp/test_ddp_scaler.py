"""Loss scaling and autocast: residuals are in unscaled units, and a step with inf leaves every rank as it was."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    assert_equal,
    assert_same_on_all_ranks,
    dgc,
    memories_of,
    mlp,
    momentum_sgd,
    samples,
    topk,
    values_of,
)

import distopt

SCALE = 2.0**16
ALGORITHMS = [dgc(), dgc(clip=0.5, values="fp16"), dgc(exchange="dense", nonfinite="skip"), topk(values="bf16")]


class Training:
    """One model that is trained with a loss scale or, with `scale=None`, without."""

    def __init__(self, algorithm, *, scale: float | None = SCALE, adamw: bool = False, **scaler_options) -> None:
        self.model = DistributedDataParallel(mlp(), bucket_cap_mb=0.002, gradient_as_bucket_view=adamw)
        if adamw:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        else:
            self.optimizer = momentum_sgd(self.model.parameters(), weight_decay=0.01)
        options = {"init_scale": scale or 1.0, "growth_interval": 1000, "enabled": scale is not None, **scaler_options}
        self.scaler = torch.amp.GradScaler("cpu", **options)
        self.attachment = algorithm.attach(self.model, self.optimizer, scaler=self.scaler)

    def step(self, step: int, *, factor: float = 1.0, unscale: bool = False) -> None:
        x, y = samples(step, dist.get_rank())
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), y) * factor
        self.scaler.scale(loss).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1e6)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def everything(self) -> dict:
        """Parameters, this rank's u and v, decay momentum, optimizer state."""
        state = {str(i): s for i, s in self.optimizer.state_dict()["state"].items()}
        optimizer = {i: {k: torch.as_tensor(t).clone() for k, t in s.items()} for i, s in state.items()}
        decay = {name: t.clone() for name, t in self.attachment.state_dict()["replicated"]["decay"].items()}
        memories = memories_of(self.attachment)
        return {"values": values_of(self.model.module), "memories": memories, "decay": decay, "optimizer": optimizer}


def on_scaled() -> None:
    for algorithm in ALGORITHMS:
        plain, scaled = Training(algorithm, scale=None), Training(algorithm, growth_interval=3)
        for step in range(8):
            plain.step(step)
            scaled.step(step, unscale=step % 2 == 1)
            assert_equal(scaled.everything(), plain.everything(), f"{algorithm.name} step {step}")
        assert scaled.scaler.get_scale() == SCALE * 4  # grew after steps 2 and 5
        assert not scaled.attachment.stats()["overlap"]
        assert_same_on_all_ranks(values_of(scaled.model.module))
        assert any(
            bool((memory["v"] != 0).any()) for memory in scaled.everything()["memories"].values() if "v" in memory
        )


def test_scaled_training_is_unscaled_training(ranks):
    ranks(2)(on_scaled)


def on_inf() -> None:
    rank = dist.get_rank()
    for algorithm, adamw in [(algorithm, False) for algorithm in ALGORITHMS] + [(topk(), True)]:
        training = Training(algorithm, adamw=adamw)
        for step in range(3):
            training.step(step)
        before = training.everything()
        training.step(3, factor=float("inf") if rank == 1 else 1.0)
        assert_equal(training.everything(), before, str(algorithm))
        assert training.scaler.get_scale() == SCALE / 2
        stats = training.attachment.stats()
        assert (stats["steps"], stats["skipped_steps"]) == (3, 1)
        clean = Training(algorithm, adamw=adamw)
        for step in (0, 1, 2, 4, 5):
            clean.step(step)
        for step in (4, 5):
            training.step(step)
        assert_equal(training.everything(), clean.everything(), f"{algorithm} afterwards")
        assert_same_on_all_ranks(values_of(training.model.module))


def test_an_inf_step_on_one_rank_never_happened_on_any(ranks):
    ranks(2)(on_inf)


def on_dense() -> None:
    """Plain averaging needs nothing of the scaler: it keeps its overlap and is DDP to the bit, inf included."""
    training = Training(distopt.Dense(), scale=3.0)  # no power of two: unscaling would round
    plain = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    optimizer = momentum_sgd(plain.parameters(), weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0, growth_interval=1000)
    for step in range(4):
        factor = float("inf") if step == 2 and dist.get_rank() == 1 else 1.0
        training.step(step, factor=factor)
        x, y = samples(step, dist.get_rank())
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(plain(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_equal(values_of(training.model.module), values_of(plain.module))
    assert training.scaler.get_scale() == scaler.get_scale() == 1.5
    assert training.attachment.stats()["overlap"]


def test_plain_averaging_under_a_scaler_is_ddp(ranks):
    ranks(2)(on_dense)


def on_autocast() -> None:
    rank = dist.get_rank()
    x, y = samples(0, rank)
    for algorithm in (dgc(density=0.2), topk(density=0.2, values="bf16")):
        ends = []
        for autocast in (False, True):
            model = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
            optimizer = momentum_sgd(model.parameters(), lr=0.1)
            algorithm.attach(model, optimizer)
            losses = []
            for _ in range(40):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    output = model(x)
                assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
                loss = nn.functional.mse_loss(output.float(), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            assert_same_on_all_ranks(values_of(model.module))
            ends.append(torch.stack([losses[0], losses[-1]]))
            dist.all_reduce(ends[-1])  # the loss of all ranks is what falls
        assert ends[1][1] < 0.7 * ends[1][0], ends
        torch.testing.assert_close(ends[1], ends[0], rtol=0.1, atol=0.05)


def test_bf16_autocast_trains(ranks):
    ranks(2)(on_autocast)
