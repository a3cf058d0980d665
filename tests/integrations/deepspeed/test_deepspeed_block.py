"""The block and every refusal, before DeepSpeed is called: none of this needs ranks, or DeepSpeed itself."""

import sys
import types

import pytest
import torch
from torch import nn

import distopt
from distopt.errors import CompatibilityError, ConfigError
from distopt.integrations import deepspeed as ours
from distopt.integrations.deepspeed.block import Block, take_block

BLOCK = {"algorithm": "topk", "density": 0.01}


class Called(Exception):
    """DeepSpeed has been called."""


@pytest.fixture(autouse=True)
def no_deepspeed(monkeypatch):
    """A DeepSpeed that must not be reached, and remembers with what it was."""
    fake = types.ModuleType("deepspeed")
    fake.given = {}

    def initialize(**given):
        fake.given.update(given)
        raise Called

    fake.initialize = initialize
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    return fake


class Mpu:
    def get_model_parallel_world_size(self):
        return 2


def of_deepspeed(name, package):
    """A module whose class DeepSpeed could have made."""
    return type(name, (nn.Linear,), {"__module__": package})(2, 2)


def expert():
    model = nn.Linear(2, 2)
    model.weight.allreduce = False
    return model


REFUSED = {
    "zero": ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage, got 2; set stage to 0"),
    "zero 1 and momentum": (
        {"zero_optimization": True, "distopt": {"algorithm": "dgc"}},
        "'dgc' with zero_optimization.stage 1, where each rank has a part of it; use",
    ),
    "zero 1 and overlap": (
        {"zero_optimization": {"stage": 1}, "distopt": {**BLOCK, "overlap": True}},
        "overlap needs ZeRO stage 0",
    ),
    "zero 1 its overlap": ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm, got True; set it"),
    "zero 1 offload": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        "offload_optimizer.device, got 'cpu'",
    ),
    "fp16": ({"fp16": {"enabled": True}}, 'fp16.enabled, got True; use "bf16"'),
    "apex": ({"amp": {"enabled": True}}, 'amp.enabled, got True; use "bf16"'),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, 'use "bfloat16"'),
    "prescale": ({"prescale_gradients": True}, "prescale_gradients, got True; set it to false"),
    "predivide": ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor, got 2.0; set it to 1.0"),
    "sum": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op, got 'sum'; set it to \"mean\""),
    "deepcompile": ({"compile": {"deepcompile": True}}, "compile.deepcompile, got True; set it to false"),
    "tensor parallel": ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size, got 2; set it to 0"),
    "sequence parallel": ({"sequence_parallel_size": 2}, "sequence_parallel_size, got 2; set it to 1"),
    "experts": ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled, got True; set it to false"),
    "hybrid engine": ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled, got True; set it to false"),
    "sparse": ({"sparse_gradients": True}, "sparse_gradients, got True; set it to false"),
    "wire": ({"communication_data_type": "fp16"}, "communication_data_type, got 'fp16'; values of the block"),
    "local files": ({"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage, got True; set it to"),
    "1-bit Adam": ({"optimizer": {"type": "OneBitAdam"}}, "'OneBitAdam', which was removed in 0.19.7; use"),
    "1-bit LAMB": ({"optimizer": {"type": "OneBitLamb"}}, "removed in 0.19.7"),
    "0/1 Adam": ({"optimizer": {"type": "ZeroOneAdam"}}, "removed in 0.19.7"),
    "momentum of Adam": ({"optimizer": {"type": "Adam"}, "distopt": {"algorithm": "dgc"}}, "got Adam; use"),
    "unmanaged overlap": (
        {"managed_gradient_accumulation": False, "distopt": {**BLOCK, "overlap": True}},
        "managed_gradient_accumulation=False; leave overlap out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_ds_config_asks_for_is_refused_before_deepspeed_is_called(name):
    config, message = REFUSED[name]
    with pytest.raises(CompatibilityError) as refusal:
        ours.initialize(model=nn.Linear(2, 2), config={"distopt": BLOCK, **config})
    assert message in str(refusal.value)


MODELS = {
    "pipeline": (lambda: of_deepspeed("PipelineModule", "deepspeed.runtime.pipe.module"), {}, "plain module"),
    "moe": (lambda: nn.Sequential(of_deepspeed("MoE", "deepspeed.moe.layer")), {}, "MoE as '0'"),
    "marked experts": (expert, {}, "allreduce=False for 'weight'"),
    "mpu": (lambda: nn.Linear(2, 2), {"mpu": Mpu()}, "get_model_parallel_world_size() is 2; leave mpu out"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_refused_before_deepspeed_is_called(name):
    make, keywords, message = MODELS[name]
    with pytest.raises(CompatibilityError) as refusal:
        ours.initialize(model=make(), config={"distopt": BLOCK}, **keywords)
    assert message in str(refusal.value)


def test_momentum_correction_refuses_an_optimizer_that_is_not_sgd():
    model = nn.Linear(2, 2)
    with pytest.raises(CompatibilityError, match="got AdamW"):
        ours.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters()), config={"distopt": {"algorithm": "dgc"}}
        )


def test_deepspeed_never_sees_the_block_and_all_the_rest(no_deepspeed):
    config = {"train_batch_size": 4, "fp16": {"enabled": "auto"}, "distopt": BLOCK}
    model, loader = nn.Linear(2, 2), object()
    with pytest.raises(Called):
        ours.initialize(model=model, config=config, collate_fn=loader, dist_init_required=False)
    expected = {"train_batch_size": 4, "fp16": {"enabled": "auto"}}
    assert no_deepspeed.given == {
        "model": model,
        "config": expected,
        "collate_fn": loader,
        "dist_init_required": False,
    }
    assert "distopt" in config


def test_one_config_from_one_place():
    args = types.SimpleNamespace(deepspeed_config="ds.json")
    with pytest.raises(ConfigError, match="one ds_config"):
        ours.initialize(args, model=nn.Linear(2, 2), config={"distopt": BLOCK})
    with pytest.raises(ConfigError, match="one ds_config"):
        ours.initialize(model=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"algorithm": "dgc", "densty": 0.1}, "densty"),
        ({"algorithm": "nothing"}, "nothing"),
        ({"algorithm": "gossip"}, "dgc, topk, dense"),
        ({**BLOCK, "overlap": "yes"}, "overlap of the block"),
        ({**BLOCK, "bucket_cap_mb": 0}, "bucket_cap_mb of the block"),
        ({"job": "distopt.toml", "density": 0.1}, "'density'"),
        ({"job": 3}, "job must be the path"),
        ("missing.toml", "missing.toml"),
        ({**BLOCK, "log": {"evry": 3}}, "evry"),
    ],
)
def test_a_block_that_breaks_a_rule(block, message):
    with pytest.raises(ConfigError) as refusal:
        take_block({"distopt": block})
    assert message in str(refusal.value)


def test_a_ds_config_without_a_block_is_not_trained_densely():
    with pytest.raises(ConfigError, match="must have a block 'distopt'"):
        take_block({"train_batch_size": 4})


def test_a_block_is_whatever_a_job_is(tmp_path):
    path = tmp_path / "distopt.toml"
    path.write_text('algorithm = "dgc"\ndensity = 0.01\n[log]\nfolder = "runs/log"\n')
    expected = Block(job=distopt.Job.load(path))
    assert take_block({"distopt": str(path)})[0] == expected
    assert take_block({"distopt": {"job": str(path)}})[0] == expected
    assert Block.load(distopt.DGC(density=0.01)).algorithm == expected.algorithm
    overlapping = take_block({"distopt": {"job": str(path), "overlap": True, "bucket_cap_mb": 5}})[0]
    assert overlapping == Block(job=expected.job, overlap=True, bucket_cap_mb=5)


def test_without_deepspeed_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(CompatibilityError, match=r"torch-distopt\[deepspeed\]"):
        ours.initialize(model=nn.Linear(2, 2), config={"distopt": BLOCK})
