"""Every configuration class, also one registered tomorrow: plain form and back, frozen, keyword-only, errors that help.

A new field needs good and bad values in the tables here; the test that says so fails until it has them.
"""

import copy
import dataclasses
import json
import math
import pickle
import tomllib

import pytest

import distopt
from distopt.batch import AdaptiveBatch, AdaScale, SquareRoot
from distopt.cli.models import CNN, MLP, Softmax
from distopt.cli.simulate_config import Data, Output, Run
from distopt.coding import MSGC, SRSGC, GradientCoding
from distopt.config import Algorithm, Configurable, FrozenMapping
from distopt.ddp import DGC, Dense, ExponentialWarmup, Link, ListWarmup, PaperWarmup, Schedule, TopK
from distopt.errors import ConfigError
from distopt.federated import (
    DIFF2,
    DPGD,
    ColumnPartition,
    DPFedAvg,
    FedAsync,
    FedFix,
    FedSpeed,
    KnownParticipation,
    LocalTraining,
    PlainStep,
    ServerAdam,
    ServerMomentum,
    TracedDelays,
    TracedParticipation,
)
from distopt.gossip import (
    A2CiD2,
    Choco,
    EdgeList,
    ErdosRenyi,
    Gossip,
    NoLoCo,
    PushSum,
    QuasiGlobalMomentum,
    RandomMatchings,
    RandomRegular,
    Ring,
    ScaleFree,
    SignCodec,
    Torus,
    Weighted,
)
from distopt.job import CheckpointSettings, LogSettings
from distopt.local import DiLoCo, SparseLoCo

KINDS = Configurable.__subclasses__()
CLASSES = [made for kind in KINDS for made in kind._known.values() if made.__module__.startswith("distopt.")]
SEQUENTIAL = {"n": 8, "burst": 1, "window": 3, "stragglers": 2}
REQUIRED = {
    ListWarmup: {"densities": (0.25, 0.05)},
    Link: {"latency_s": 1e-4, "bandwidth": 1e8},
    SRSGC: SEQUENTIAL,
    MSGC: SEQUENTIAL,
    ColumnPartition: {"column": "user"},
    TracedParticipation: {"path": "trace.csv"},
    TracedDelays: {"path": "trace.csv"},
    KnownParticipation: {"probability": 0.5},
    LocalTraining: {"steps": 5},
    FedFix: {"interval_s": 1.0},
    DIFF2: {"num_clients": 10, "fewest_samples": 100},
    DPGD: {"num_clients": 10, "fewest_samples": 100},
    DPFedAvg: {"epsilon": 2.0, "rounds": 5, "accountant": "rdp"},
    EdgeList: {"edges": ((0, 1), (1, 2))},
    Weighted: {"weights": ((0.5, 0.5), (0.5, 0.5))},
}

GOOD = {
    "density": [1, 1.0, 0.25, 1e-3, 1e-12],
    "warmup": [
        None,
        PaperWarmup(stage=2),
        ExponentialWarmup(stages=7, steps_per_epoch=3),
        ListWarmup(densities=(0.5,)),
    ],
    "values": ["fp32", "fp16", "bf16"],
    "indices": ["int32", "block16", "elias-fano"],
    "exchange": ["auto", "allgather", "balanced", "hierarchical", "dense"],
    "link": [None, Link(latency_s=1e-3, bandwidth=1.25e8), Link(latency_s=1e-5, bandwidth=1e9, reduction=4e9)],
    "ranks_per_node": [None, 1, 8],
    "latency_s": [1e-6, 0.3, 1],
    "bandwidth": [1.0, 1.25e8, 10**12],
    "reduction": [None, 4e9],
    "residuals": ["fp32", "bf16"],
    "nonfinite": ["error", "skip"],
    "peer_timeout": [0, 0.5, 120],
    "skip": [(), ("*.bias",), ("head.*", "emb.?")],
    "densities": [{}, {"fc.*": 0.01}, {"a.b": 1, "*": 0.5}],
    "masking": [True, False],
    "clip": [None, 1.0, 3, 1e-9],
    "weight_decay": ["momentum", "local"],
    "stage": [1, 4],
    "steps_per_epoch": [None, 1, 500],
    "stages": [1, 5],
    "n": [3, 8, 256],
    "burst": [1, 2],
    "window": [3, 5],
    "code": ["binary", "cyclic"],
    "stragglers": [0, 1, 2],
    "options": [{}, {"copies": 3}],
    "scheme": [None, MSGC(**SEQUENTIAL), {"scheme": "m-sgc", "burst": 1, "window": 2, "stragglers": 1}],
    "master": ["first", "sharded"],
    "stop": ["decodable", "minimal", "paper"],
    "mu": [0, 0.5, 2],
    "amplification_limit": [1.0, 1e6],
    "deadline_s": [0.1, 3600],
    "replicas": ["error", "warn", "ignore"],
    "replica_tolerance": [None, 1e-6],
    "check_rules": [True, False],
    "seed": [0, 7],
    "alpha": [1e-6, 0.1, 100],
    "sizes": ["uneven", "equal"],
    "min_samples": [0, 10],
    "shards_per_client": [1, 2],
    "law": ["dirichlet", "power-law"],
    "exponent": [0.5, 2],
    "column": ["user", "writer id"],
    "fraction": [0.01, 1],
    "count": [None, 10],
    "probability": [0.1, 1, (0.02, 0.5, 1.0)],
    "off_to_on": [0.05, 1],
    "period": [1, 100],
    "path": ["trace.csv", "a folder/trace.json"],
    "at_end": ["repeat", "error"],
    "mean_s": [1, 0.2, (0.2, 1.0)],
    "slowest": [1, 1.0, 5],
    "spread": [0.1, 1],
    "tail": [1.1, 3],
    "weighting": ["samples", "uniform"],
    "server_lr": [None, 1, 0.01, 10.0],
    "server_optimizer": [PlainStep(), ServerMomentum(momentum=0.5), ServerAdam(tau=0.1)],
    "rho": [0, 0.1],
    "lambda_": [0.5, 10],
    "server": ["paper", "public-simulator"],
    "cutoff": [1, 50],
    "momentum": [0, 0.9],
    "beta1": [0, 0.9],
    "beta2": [0, 0.99],
    "tau": [1e-9, 1],
    "error_feedback": [True, False],
    "drop_last": [True, False],
    "interval_s": [0.1, 60],
    "times_s": [None, 2, (0.5, 1.5)],
    "max_staleness": [None, 0, 7],
    "buffer_size": [1, 10],
    "concurrency": [None, 1, 32],
    "correction": ["staleness", "participation"],
    "discount": [0, 0.5, 2],
    "mixing": [0.1, 1],
    "floor": [1e-9, 1],
    "num_byzantine": [0, 3],
    "num_selected": [None, 2],
    "lr": [1e-3, 2],
    "lr_decay": [0.998, 1],
    "batch_size": [1, 64],
    "epochs": [None],
    "steps": [1, 20],
    "optimizer": ["SGD", "AdamW"],
    "max_norm": [None, 10.0],
    "hidden": [(), (32,), (256, 128)],
    "dataset": ["digits", "a folder"],
    "clients": [1, 1000],
    "rounds": [1, 10_000],
    "evaluate_every": [1, 10],
    "checkpoint_every": [0, 10],
    "exclude": [(), ("batch-norm", "head.*")],
    "folder": ["runs/simulate"],
    "target": [None, 0.9, 1],
    "tensorboard": [True, False],
    "mode": ["auto", "loop"],
    "spill": [True, False],
    "epsilon": [0.1, 3],
    "delta": [1e-9, 0.1],
    "accountant": ["closed-form", "rdp"],
    "noise": ["central", "distributed"],
    "noise_seed": [None, 0, 7],
    "num_clients": [1, 10],
    "fewest_samples": [1, 1651],
    "clip_difference": [0.1, 20],
    "interval": [1, 20],
    "noise_multiplier": [None],  # beside epsilon
    "expected_clients": [None, 0.5, 100],
    "sampling_probability": [None, 0.01, 1],
    "quantile": [None, 0.5, 1],
    "clip_lr": [0, 0.2],
    "share_std": [None, 3.0],
    "stop_at_epsilon": [None, 3.0],
    "cap": [None, 1, 8.0],
    "test": ["norm", "augmented", "coordinate"],
    "eta": [0.1, 1],
    "theta": [0.1, 1],
    "nu": [0.1, 1],
    "max_batch": [1, 8192],
    "ema": [1, 10],
    "growth": [1.1, 2, 100],
    "max_accumulation": [1, 8],
    "probe": [1, 65536],
    "raw": [True, False],
    "learning_rate": [None, SquareRoot(), AdaScale(cap=4.0)],
    "inner_steps": [1, 15, 500],
    "warmup_rounds": [0, 10],
    "outer_lr": [0.1, 1, 2.0],
    "outer_momentum": [0.5, 0.99],
    "nesterov": [False],  # True needs an outer momentum
    "fragments": [1, 15],
    "overlap": [0, 14],
    "chunk": [64, 65_536],
    "k": [1, 4096],
    "decay": [0.5, 1],
    "average": ["world", "senders"],
}
PRIVATE = (DIFF2, DPGD, DPFedAvg)
GOOD_FOR = {
    **{(made, "clip"): [1, 0.01] for made in PRIVATE},
    (CNN, "norm"): ["none", "group"],
    (Softmax, "norm"): ["none", "batch"],
    (LocalTraining, "options"): [{}, {"momentum": 0.9}],
    (FedSpeed, "alpha"): [0, 0.5, 1],
    (LocalTraining, "weight_decay"): [0, 1e-3],
    (FedAsync, "max_staleness"): [0, 7],
    (ListWarmup, "densities"): [(0.25,), (1, 0.5, 0.001)],
    (Gossip, "topology"): [Ring(), EdgeList(edges=((0, 1),)), RandomMatchings(of=Torus(rows=2))],
    (Gossip, "mixing"): [PushSum(), Choco(codec=SignCodec()), A2CiD2()],
    (Gossip, "correction"): ["off", "on", "auto"],
    (Gossip, "every"): [1, 50],
    (CheckpointSettings, "every"): [1, 500],
    (CheckpointSettings, "keep"): [1, 2],
    (LogSettings, "every"): [1, 50],
    (AdaptiveBatch, "every"): [None, 1, 50],
    (LogSettings, "report"): [True, False],
    (Gossip, "exchange"): ["synchronous", "overlapped", "asynchronous"],
    (Gossip, "optimizer_state"): ["keep", "average"],
    (Gossip, "buffers"): ["keep", "average"],
    (DiLoCo, "nesterov"): [True, False],
    (SparseLoCo, "values"): ["2bit", "2bit-bins", "int8", "fp16", "fp32"],
    **{(made, "buffers"): ["keep", "average"] for made in (DiLoCo, SparseLoCo)},
    **{(made, "grace"): [0.5, 5] for made in (DiLoCo, SparseLoCo)},
    **{(made, "peer_timeout"): [0.5, 600] for made in (DiLoCo, SparseLoCo)},
    (Gossip, "peer_timeout"): [0.5, 600],
    (Gossip, "grace"): [0.5, 5],
    (Torus, "rows"): [None, 2],
    (RandomMatchings, "of"): [None, Ring()],
    (RandomRegular, "degree"): [2, 5],
    (ErdosRenyi, "probability"): [None, 0.5, 1],
    (ScaleFree, "attach"): [1, 3],
    (EdgeList, "edges"): [((0, 1),), ((0, 1), (1, 2), (2, 0))],
    (EdgeList, "directed"): [True, False],
    (Weighted, "weights"): [((1.0,),), ((0.5, 0.5), (0.5, 0.5))],
    (Weighted, "directed"): [True, False],
    (Choco, "codec"): [SignCodec()],
    (Choco, "gamma"): [0.1, 1],
    (QuasiGlobalMomentum, "beta"): [0.5, 0.99],
    (NoLoCo, "momentum"): [0.1, 0.9],
    (NoLoCo, "outer_lr"): [0.1, 2],
    (NoLoCo, "pull"): [0.1, 1.5],
}

DENSITY_RULE = ("must be a number in (0, 1]", "use 0.001 to send 0.1% of the gradient")
BAD_DENSITIES = [0, 0.0, -0.1, 1.5, 2.0, math.nan, math.inf, -math.inf, "0.1", True, False, None, [0.1], 10**400]
DECAY_RULE = ("must be a number in [0, 1)", "use 0.9 to remember about ten rounds")
NOT_DECAYS = [-0.1, 1, 1.5, math.nan, math.inf, "0.9", True, None]
NOT_COUNTS = [0, -1, 1.0, 2.5, "3", True, math.nan, [1]]
BAD = {
    "density": [(value, *DENSITY_RULE) for value in BAD_DENSITIES],
    "clip": [
        (value, "must be a positive number or None", "use the norm", "such as 1.0")
        for value in (0, 0.0, -1.0, -3, math.nan, math.inf, -math.inf, "1.0", True, (1.0,))
    ],
    "warmup": [
        (value, "must be a schedule or None", "use distopt.ddp.PaperWarmup(stage=500)")
        for value in (0.25, "paper", 500, (0.25, 0.05), True, PaperWarmup, DGC())
    ],
    "skip": [
        (value, "must be a tuple of name patterns", 'use ("*.bias", "head.*")')
        for value in ("*.bias", ["*.bias"], None, (1,), ("a", None), {"a": 1})
    ],
    "densities": [
        (value, "must map name patterns to densities", '{"fc*": 0.01}') for value in (0.1, "fc*", None, ("a",))
    ],
    "values": [(value, "must be one of 'fp32', 'fp16', 'bf16'") for value in ("int8", "FP16", 16, None, ["fp16"])],
    "indices": [(value, "must be one of 'int32', 'block16'") for value in ("int64", None)],
    "exchange": [
        (value, "must be one of 'auto', 'allgather', 'balanced', 'hierarchical', 'dense'")
        for value in ("fast", None, True, "whole")
    ],
    "link": [(value, "must be a distopt.ddp.Link or None", "have the link measured") for value in (1e8, "1gbit", {})],
    "latency_s": [(value, "must be positive seconds", "distopt link") for value in (0, -1.0, math.inf, "1ms", None)],
    "bandwidth": [(value, "must be positive", "distopt link") for value in (0, math.nan, "1gbit", None)],
    "reduction": [(value, "must be positive", "distopt link") for value in (0, math.inf, "fast")],
    "ranks_per_node": [(value, "must be an integer of at least 1", "ask the launcher") for value in (0, 1.5, "8")],
    "residuals": [(value, "must be one of 'fp32', 'bf16'") for value in ("fp16", None)],
    "nonfinite": [(value, "must be one of 'error', 'skip'") for value in ("ignore", None)],
    "peer_timeout": [
        (value, "must be a number of seconds of at least 0", "0 to not watch the other ranks")
        for value in (-1.0, math.inf, math.nan, "20", True, False, None)
    ],
    "weight_decay": [(value, "must be one of 'momentum', 'local'") for value in (1e-4, 0, None, "none")],
    "masking": [(value, "must be True or False") for value in (0, 1, "yes", None)],
    "stage": [
        (value, "must be an integer of at least 1", "length of one stage in steps or epochs")
        for value in [*NOT_COUNTS, None]
    ],
    "steps_per_epoch": [(value, "must be an integer of at least 1", "use len(loader)") for value in NOT_COUNTS],
    "stages": [(value, "must be an integer of at least 1", "the paper 4") for value in [*NOT_COUNTS, None]],
    "n": [(value, "must be an integer of at least 1", "number of workers") for value in [*NOT_COUNTS, None]],
    "burst": [(value, "must be an integer of at least 1", "in rounds") for value in [*NOT_COUNTS, None]],
    "window": [(value, "must be an integer of at least 2", "in rounds") for value in [*NOT_COUNTS, 1, None]],
    "code": [(value, "must be one of", "'cyclic'") for value in ("turbo", None, 3)],
    "stragglers": [(value, "must be an integer of at least 0", "straggle") for value in (-1, 1.5, "2", None)],
    "options": [(value, "must be a mapping", '{"copies": 3}') for value in (3, None, [("copies", 3)])],
    "scheme": [(value, "must be a sequential code", '"m-sgc"') for value in (3, "m-sgc", MSGC)],
    "master": [(value, "must be one of 'first', 'sharded'") for value in ("last", None)],
    "stop": [(value, "must be one of 'decodable', 'minimal', 'paper'") for value in ("never", None)],
    "mu": [(value, "must be a number of at least 0", "1.0") for value in (-1.0, math.nan, "1", None)],
    "amplification_limit": [(value, "must be a number above 0", "100.0") for value in (0, -1.0, math.nan, "1", None)],
    "deadline_s": [(value, "must be a number above 0", "300.0") for value in (0, -1.0, math.inf, "1", None)],
    "replicas": [(value, "must be one of 'error', 'warn', 'ignore'") for value in ("shrug", None)],
    "replica_tolerance": [(value, "must be a number above 0", "leave it out") for value in (0, -1.0, math.nan, "1")],
    "check_rules": [(value, "must be True or False") for value in (0, "no", None)],
    "seed": [(value, "must be an integer of at least 0", "every rank") for value in (-1, 1.5, "0", None)],
    "alpha": [(value, "must be a number in (0, 1e6]", "use 0.1") for value in (0, -1, math.nan, 1e7, "1", None)],
    "sizes": [(value, "must be one of 'uneven', 'equal'") for value in ("even", None)],
    "min_samples": [(value, "must be an integer of at least 0", "use 1") for value in (-1, 1.5, "1", None)],
    "shards_per_client": [(value, "must be an integer of at least 1", "uses 2") for value in [*NOT_COUNTS, None]],
    "law": [(value, "must be one of 'dirichlet', 'power-law'") for value in ("zipf", None)],
    "exponent": [(value, "must be a number in (0, 20]", "use 1.0") for value in (0, -1.0, 21, math.nan, "1", None)],
    "column": [(value, "must be the name of a column", 'column="user"') for value in ("", 3, None, ("user",))],
    "fraction": [(value, "must be a number in (0, 1]", "use 0.1") for value in (0, 1.5, math.nan, "1", True)],
    "count": [(value, "must be an integer of at least 1", "use fraction") for value in NOT_COUNTS],
    "probability": [
        (value, "must be a number in (0, 1] or one per client", "use 0.1")
        for value in (0, 1.5, math.nan, "0.1", True, None, (), ("a",), ((0.1,),))
    ],
    "off_to_on": [(value, "must be a number in (0, 1]", "uses 0.05") for value in (0, 1.5, math.nan, "1", None)],
    "period": [(value, "must be an integer of at least 1", "uses 100 rounds") for value in [*NOT_COUNTS, None]],
    "path": [(value, "must be the name of a file", "CSV or JSON") for value in ("", 3, None)],
    "at_end": [(value, "must be one of 'repeat', 'error'") for value in ("stop", None)],
    "mean_s": [
        (value, "must be a positive number of seconds or one per client", "use 1.0")
        for value in (0, -1.0, math.inf, math.nan, "1", True, None, (), ("a",))
    ],
    "slowest": [(value, "must be a number of at least 1", "use 5.0") for value in (0.5, math.nan, "5", True, None)],
    "spread": [(value, "must be a number in (0, 1]", "use 0.5") for value in (0, 1.5, math.nan, "1", None)],
    "weighting": [(value, "must be one of 'samples', 'uniform'") for value in ("sample", 1, None)],
    "server_lr": [
        (value, "must be a number in (0, 1e6]", "use 1.0") for value in (0, -1.0, 1e7, math.nan, math.inf, "1", True)
    ],
    "server_optimizer": [
        (value, "must be a server optimizer", "use distopt.federated.PlainStep()")
        for value in ("adam", None, 1.0, ServerAdam, {"beta": 1})
    ],
    "rho": [(value, "must be a number of at least 0", "use 0.1") for value in (-0.1, math.nan, math.inf, "1", None)],
    "lambda_": [(value, "must be a number above 0", "use 10.0") for value in (0, -1.0, math.inf, "1", True, None)],
    "server": [(value, "must be one of 'paper', 'public-simulator'") for value in ("simulator", None)],
    "cutoff": [
        (value, "must be an integer of at least 1 or math.inf", "use 50") for value in (0, 2.5, "50", True, None)
    ],
    "momentum": [(value, *DECAY_RULE) for value in NOT_DECAYS],
    "beta1": [(value, *DECAY_RULE) for value in NOT_DECAYS],
    "beta2": [(value, *DECAY_RULE) for value in NOT_DECAYS],
    "error_feedback": [(value, "must be True or False") for value in (0, "no", None)],
    "drop_last": [(value, "must be True or False") for value in (0, "no", None)],
    "interval_s": [(value, "must be a number above 0", "seconds") for value in (0, -1.0, math.inf, "1", True, None)],
    "times_s": [
        (value, "must be a positive number of seconds or one per client", "leave it out")
        for value in (0, -1.0, math.inf, math.nan, "1", True, (), ("a",))
    ],
    "max_staleness": [(value, "must be an integer of at least 0", "use 50") for value in (-1, 1.5, "7", True)],
    "buffer_size": [(value, "must be an integer of at least 1", "use 10") for value in [*NOT_COUNTS, None]],
    "concurrency": [(value, "must be an integer of at least 1", "leave it out") for value in NOT_COUNTS],
    "correction": [(value, "must be one of 'staleness', 'participation'") for value in ("none", None, 1)],
    "discount": [(value, "must be a number of at least 0", "use 0.5") for value in (-0.1, math.inf, "1", None)],
    "mixing": [(value, "must be a number in (0, 1]", "use 0.6") for value in (0, 1.5, math.nan, "1", None)],
    "floor": [(value, "must be a number in (0, 1e6]", "use 1e-6") for value in (0, -1.0, math.nan, "1", None)],
    "num_byzantine": [(value, "must be an integer of at least 0", "may be wrong") for value in (-1, 1.5, True, None)],
    "num_selected": [(value, "must be an integer of at least 1", "n - f - 2") for value in (0, 1.5, True)],
    "lr": [(value, "must be a number above 0", "use 0.1") for value in (0, -1.0, math.nan, "1", None)],
    "lr_decay": [(value, "must be a number in (0, 1]", "use 1.0") for value in (0, 1.5, math.nan, "1", None)],
    "batch_size": [(value, "must be an integer of at least 1", "use 32") for value in (0, 1.5, True, None)],
    "epochs": [(value, "must be None beside steps=5", "leave one") for value in (1, 2)],  # beside steps
    "steps": [(value, "must be an integer of at least 1", "use 5") for value in (0, 1.5, True)],
    "optimizer": [
        (value, "must be the name of a class in torch.optim", "'SGD'") for value in ("SDG", "Tensor", 3, None)
    ],
    "max_norm": [(value, "must be a number above 0", "use 10.0") for value in (0, -1.0, math.nan, "1")],
    "tau": [(value, "must be a number in (0, 1e6]", "use 0.001") for value in (0, -1.0, math.nan, "1", True, None)],
    "norm": [(value, "must be one of 'none', '") for value in ("layer", None)],
    "hidden": [(value, "must be widths of at least 1", "use (256, 128)") for value in (32, (0,), (1.5,), None, "32")],
    "dataset": [(value, "must be a name or a folder", 'use "digits"') for value in ("", 3, None)],
    "clients": [(value, "must be an integer of at least 1", "share the data") for value in [*NOT_COUNTS, None]],
    "rounds": [(value, "must be an integer of at least 1", "in all") for value in [*NOT_COUNTS, None]],
    "evaluate_every": [(value, "must be an integer of at least 1", "use 1") for value in [*NOT_COUNTS, None]],
    "checkpoint_every": [(value, "must be an integer of at least 0", "use 0") for value in (-1, 1.5, "1", None)],
    "exclude": [(value, "must be a list of names", '["batch-norm"]') for value in ("batch-norm", (1,), None)],
    "folder": [(value, "must be the name of a folder", "runs/simulate") for value in ("", 3, None)],
    "target": [(value, "must be a number in (0, 1]", "use 0.9") for value in (0, 1.5, math.nan, "1", True)],
    "tensorboard": [(value, "must be True or False") for value in (0, "no", None)],
    "mode": [(value, "must be one of 'auto', 'loop'") for value in ("fast", None)],
    "spill": [(value, "must be True or False") for value in (0, "no", None)],
    "epsilon": [(value, "must be a number above 0", "use 3.0") for value in (0, -1.0, math.inf, "3", True)],
    "delta": [(value, "must be a number in (0, 0.1]", "use 1e-5") for value in (0, 0.5, math.nan, "1", None)],
    "accountant": [(value, "must be one of 'closed-form', 'rdp'") for value in ("moments", None)],
    "noise": [(value, "must be one of 'central', 'distributed'") for value in ("local", None)],
    "noise_seed": [(value, "must be an integer of at least 0", "leave it out") for value in (-1, 0.5, "1", True)],
    "num_clients": [(value, "must be an integer of at least 1", "take part") for value in [*NOT_COUNTS, None]],
    "fewest_samples": [(value, "must be an integer of at least 1", "smallest") for value in [*NOT_COUNTS, None]],
    "clip_difference": [(value, "must be a number above 0", "smoothness") for value in (0, math.inf, "1", None)],
    "interval": [(value, "must be an integer of at least 1", "1 is DP-GD") for value in [*NOT_COUNTS, None]],
    "noise_multiplier": [(value, "where epsilon is not, and only there", "one of them") for value in (1.0, "1")],
    "expected_clients": [(value, "must be a number above 0", "mean of a round") for value in (0, math.inf, "1")],
    "sampling_probability": [(value, "must be a number in (0, 1]", "leave it out") for value in (0, 1.5, "1", True)],
    "quantile": [(value, "must be a number in (0, 1]", "use 0.5") for value in (0, 1.5, math.nan, "1")],
    "clip_lr": [(value, "must be a number of at least 0", "use 0.2") for value in (-0.1, math.inf, "1", None)],
    "share_std": [(value, "must be a number above 0", "leave it out") for value in (0, -1.0, math.inf, "1")],
    "stop_at_epsilon": [(value, "must be a number above 0", "leave it out") for value in (0, -1.0, math.inf, "1")],
    "test": [(value, "must be one of 'norm', 'augmented', 'coordinate'") for value in ("inner", None, True)],
    **{
        name: [(value, "must be a positive number", "use ") for value in (0, -0.1, math.nan, math.inf, "1", True, None)]
        for name in ("eta", "theta", "nu")
    },
    "max_batch": [(value, "must be an integer of at least 1", "use 8192") for value in [*NOT_COUNTS, None]],
    "ema": [(value, "must be an integer of at least 1", "use 10") for value in [*NOT_COUNTS, None]],
    "growth": [(value, "must be a number above 1", "use 2.0") for value in (1, 0, -1.0, math.nan, math.inf, "2", None)],
    "max_accumulation": [(value, "must be an integer of at least 1", "use 8") for value in [*NOT_COUNTS, None]],
    "probe": [(value, "must be an integer of at least 1", "use 65536") for value in [*NOT_COUNTS, None]],
    "raw": [(value, "must be True or False") for value in (0, "no", None)],
    "learning_rate": [(value, "must be a rule or None", "SquareRoot()") for value in (0.1, SquareRoot)],
    "cap": [(value, "must be a number of at least 1", "use 8.0") for value in (0, 0.5, -1.0, math.inf, "8", True)],
    "tail": [(value, "must be a number above 1", "use 2.0") for value in (1, 0, math.inf, math.nan, "2", None)],
    "inner_steps": [(value, "must be an integer of at least 1", "use 15") for value in [*NOT_COUNTS, None]],
    "warmup_rounds": [(value, "must be an integer of at least 0", "use 0") for value in (-1, 1.5, "1", True, None)],
    "outer_lr": [(value, "must be a number above 0", "use 1.0") for value in (0, -1.0, math.nan, 1e3, "1", True, None)],
    "outer_momentum": [(value, *DECAY_RULE) for value in NOT_DECAYS],
    "nesterov": [(value, "must be True or False") for value in (0, 1, "no", None)],
    "fragments": [(value, "must be an integer of at least 1", "use 1") for value in [*NOT_COUNTS, None]],
    "overlap": [(value, "must be an integer of at least 0", "use 0") for value in (-1, 1.5, "1", True, None)],
    "chunk": [(value, "must be an integer of at least 1", "use 4096") for value in [*NOT_COUNTS, None]],
    "k": [(value, "must be an integer of at least 1", "use 64") for value in [*NOT_COUNTS, None]],
    "decay": [(value, "must be a number in (0, 1]", "use 0.95") for value in (0, 1.5, math.nan, "1", True, None)],
    "average": [(value, "must be one of 'world', 'senders'") for value in ("mean", None, True)],
}
BAD_FOR = {
    (Gossip, "topology"): [(value, "must be a name or a topology", "use 'ring'") for value in (3, None, Ring)],
    (Gossip, "mixing"): [(value, "must be a name or a mixing rule", "use 'd-psgd'") for value in (3, None, PushSum)],
    (Gossip, "correction"): [(value, "must be one of 'off', 'on', 'auto'") for value in (True, None)],
    (Gossip, "every"): [(value, "must be an integer of at least 1", "use 1") for value in [*NOT_COUNTS, None]],
    (CheckpointSettings, "every"): [(value, "must be an integer of at least 1", "use 500") for value in NOT_COUNTS],
    (CheckpointSettings, "folder"): [(value, "must be the name of a folder", "runs/job") for value in ("", 3, None)],
    (CheckpointSettings, "keep"): [(value, "must be an integer of at least 1", "use 2") for value in NOT_COUNTS],
    (AdaptiveBatch, "every"): [(value, "must be an integer of at least 1", "leave it out") for value in NOT_COUNTS],
    (LogSettings, "every"): [(value, "must be an integer of at least 1", "use 50") for value in NOT_COUNTS],
    (LogSettings, "folder"): [(value, "must be the name of a folder", "runs/job") for value in ("", 3, None)],
    (LogSettings, "report"): [(value, "must be True or False") for value in (0, "no", None)],
    (Gossip, "exchange"): [(value, "must be one of 'synchronous', 'overlapped'") for value in ("async", None)],
    (Gossip, "optimizer_state"): [(value, "must be one of 'keep', 'average'") for value in ("reset", None)],
    (Gossip, "buffers"): [(value, "must be one of 'keep', 'average'") for value in ("mean", None)],
    **{
        (made, name): [(value, "must be a positive number of seconds") for value in (0, -1.0, math.inf, "1", None)]
        for made in (Gossip, DiLoCo, SparseLoCo)
        for name in ("peer_timeout", "grace")
    },
    **{
        (made, "buffers"): [(value, "must be one of 'average', 'keep'") for value in ("mean", None)]
        for made in (DiLoCo, SparseLoCo)
    },
    (SparseLoCo, "values"): [(value, "must be one of '2bit', '2bit-bins', 'int8'") for value in ("bf16", 2, None)],
    (Torus, "rows"): [(value, "must be an integer of at least 1", "as square as possible") for value in NOT_COUNTS],
    (RandomMatchings, "of"): [(value, "must be a topology or None", "Ring()") for value in ("ring", 3, Ring)],
    (RandomRegular, "degree"): [(value, "must be an integer of at least 2", "use 4") for value in (1, 2.5, "3", None)],
    (ErdosRenyi, "probability"): [(value, "must be a number in (0, 1]", "leave it out") for value in (0, 1.5, "1")],
    (ScaleFree, "attach"): [(value, "must be an integer of at least 1", "use 2") for value in [*NOT_COUNTS, None]],
    (EdgeList, "edges"): [(value, "edges must be", "use [[0, 1]") for value in ((), 3, None, ((0,),), (("a", "b"),))],
    **{(made, "directed"): [(value, "must be True or False") for value in (0, "no")] for made in (EdgeList, Weighted)},
    (Weighted, "weights"): [(value, "weights must be", "rows") for value in (None, (("a",),), ((1.0,), (0.5, 0.5)))],
    (Choco, "codec"): [(value, "must be a codec", "TopKCodec") for value in ("top-k", None, SignCodec)],
    (Choco, "gamma"): [(value, "must be a number in (0, 1]", "use 0.4") for value in (0, 1.5, "1", None)],
    (QuasiGlobalMomentum, "beta"): [(value, "above 0 and below 1", "use 0.9") for value in (0, 1, 1.5, "1", None)],
    **{
        (NoLoCo, name): [(value, "must be a number above 0", "leave it out") for value in (0, -1.0, 100.0, "1", None)]
        for name in ("momentum", "outer_lr", "pull")
    },
    **{
        (made, "clip"): [(value, "must be a number above 0", "use 1.0") for value in (0, -1.0, math.nan, "1", None)]
        for made in PRIVATE
    },
    **{
        (made, "rounds"): [
            (value, "must be an integer of at least 1", "share the epsilon") for value in [*NOT_COUNTS, None]
        ]
        for made in PRIVATE
    },
    (LocalTraining, "options"): [
        (value, "must be a mapping", '{"momentum": 0.9}') for value in (3, None, [("momentum", 0.9)])
    ],
    (LocalTraining, "weight_decay"): [
        (value, "must be a number of at least 0", "use 1e-3") for value in (-0.1, math.inf, "momentum", None)
    ],
    (Run, "seed"): [(value, "must be an integer of at least 0", "use 0") for value in (-1, 1.5, "0", None)],
    (FedSpeed, "alpha"): [
        (value, "must be a number in [0, 1]", "use 1.0") for value in (-0.1, 1.5, math.nan, "1", True, None)
    ],
    (ListWarmup, "densities"): [
        (value, "must be a non-empty tuple", "use (0.25, 0.05)") for value in ((), [0.25], 0.25, None, "0.25", {})
    ],
}


def fields_of(made):
    return [field.name for field in dataclasses.fields(made)]


def build(made, **values):
    return made(**{**REQUIRED.get(made, {}), **values})


def toml_of(plain, table=""):
    """Enough of TOML to write a configuration: strings, numbers, booleans, arrays and tables."""
    nested = {key: value for key, value in plain.items() if isinstance(value, dict)}
    written = {key: "inf" if value == math.inf else json.dumps(value) for key, value in plain.items()}
    lines = [f"{json.dumps(key)} = {value}" for key, value in written.items() if key not in nested]
    for key, value in nested.items():
        path = f"{table}{json.dumps(key)}"
        lines += [f"[{path}]", toml_of(value, f"{path}.")]
    return "\n".join(lines)


EVERY_GOOD = [
    pytest.param(made, field, value, id=f"{made.__name__}-{field}-{value!r:.40}")
    for made in CLASSES
    for field in fields_of(made)
    for value in GOOD_FOR.get((made, field), GOOD.get(field, []))
]
EVERY_BAD = [
    pytest.param(made, field, *row[:1], row[1:], id=f"{made.__name__}-{field}-{row[0]!s:.20}")
    for made in CLASSES
    for field in fields_of(made)
    for row in BAD_FOR.get((made, field), BAD.get(field, []))
]


def test_there_are_classes_and_each_is_known_by_its_name():
    assert {DGC, TopK, Dense, GradientCoding, MSGC, PaperWarmup, ExponentialWarmup, ListWarmup} <= set(CLASSES)
    assert {CNN, MLP, Softmax, Data, Run, Output} <= set(CLASSES)
    for kind in KINDS:
        assert all(made.name == name and made.tag == kind.tag for name, made in kind._known.items())


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
def test_every_field_has_good_and_bad_values_here(made):
    for field in fields_of(made):
        assert GOOD_FOR.get((made, field), GOOD.get(field)), f"add good values of {made.__name__}.{field} to GOOD"
        assert BAD_FOR.get((made, field), BAD.get(field)), f"add bad values of {made.__name__}.{field} to BAD"


@pytest.mark.parametrize(("made", "field", "value"), EVERY_GOOD)
def test_round_trip_through_json_and_toml(made, field, value):
    config = build(made, **{field: value})
    plain = config.to_dict()
    for arrived in (plain, json.loads(json.dumps(plain)), tomllib.loads(toml_of(plain))):
        again = made.from_dict(arrived)
        assert type(again) is made
        assert again == config
        assert again.to_dict() == plain
        assert next(kind for kind in KINDS if issubclass(made, kind)).from_dict(arrived) == config


@pytest.mark.parametrize(("made", "field", "value"), EVERY_GOOD)
def test_equal_configurations_have_equal_hashes_and_copies(made, field, value):
    config = build(made, **{field: value})
    for other in (build(made, **{field: value}), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert hash(other) == hash(config)
        assert repr(other) == repr(config)


@pytest.mark.parametrize(("made", "field", "value", "parts"), EVERY_BAD)
def test_a_bad_value_is_refused_with_value_rule_and_remedy(made, field, value, parts):
    with pytest.raises(ConfigError) as caught:
        build(made, **{field: value})
    message = str(caught.value)
    assert message.startswith(field)
    assert f"got {value!r}" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
def test_frozen_and_keyword_only(made):
    config = build(made)
    for field in dataclasses.fields(made):
        assert field.kw_only
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)
    with pytest.raises(TypeError):
        made(0.1)


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
def test_an_unknown_key_names_the_known_ones(made):
    plain = {**build(made).to_dict(), "densty": 0.1, "zeal": 1}
    with pytest.raises(ConfigError) as caught:
        made.from_dict(plain)
    message = str(caught.value)
    called = made.tag if made.tag == made.name else f"{made.tag} {made.name!r}"
    assert f"unknown key 'densty', 'zeal' for {called}; " in message
    assert f"known keys are {', '.join(fields_of(made))}" in message


@pytest.mark.parametrize("name", ["adam", "DGC", None, "", 3, ["dgc"], {"a": 1}])
def test_an_unknown_algorithm_names_the_known_ones(name):
    with pytest.raises(ConfigError) as caught:
        distopt.from_config({"algorithm": name})
    known = ", ".join(sorted(Algorithm._known))
    assert {"dense", "dgc", "fedavg", "gradient-coding", "topk"} <= set(Algorithm._known)
    assert str(caught.value) == f"'algorithm' must be one of {known}, got {name!r}; add it to the configuration"


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"algorithm": "dcg"}, "got 'dcg'; perhaps 'dgc' is meant"),
        ({"algorithm": "dgc", "densty": 0.1}, "; perhaps 'density' is meant"),
    ],
)
def test_what_is_nearly_right_is_told_what_may_be_meant(mapping, said):
    with pytest.raises(ConfigError) as caught:
        distopt.from_config(mapping)
    assert str(caught.value).endswith(said)


def test_a_name_belongs_to_one_class(monkeypatch):
    monkeypatch.setattr(Algorithm, "_known", dict(Algorithm._known))
    with pytest.raises(ConfigError, match=r"got 'dgc' for .*Mine, which is distopt.ddp.dgc.DGC's; choose another name"):

        class Mine(Algorithm, name="dgc"):
            pass

    for _ in range(2):  # a reload

        class Twice(Algorithm, name="twice"):
            pass

    with pytest.raises(ConfigError, match=r"got 'twice' for .*Other, which is .*Twice's"):

        class Other(Algorithm, name="twice"):
            pass


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nesterov": True}, r"nesterov=True needs an outer momentum .*, got outer_momentum=0; use outer_momentum=0.9"),
        ({"inner_steps": 5, "overlap": 5}, r"overlap must be less than inner_steps=5, got 5: .*use at most 4"),
        ({"inner_steps": 1, "overlap": 1}, r"overlap must be less than inner_steps=1, got 1: .*use at most 0"),
        ({"inner_steps": 4, "fragments": 5}, r"fragments must be at most inner_steps=4, got 5: .*use 4 or fewer"),
        ({"chunk": 64, "k": 65}, r"k must be at most chunk=64, got 65; use k=64 to send every entry"),
    ],
)
def test_settings_of_local_steps_that_cannot_be_combined(values, said):
    with pytest.raises(ConfigError, match=said):
        SparseLoCo(**values)


@pytest.mark.parametrize("mapping", [None, "dgc", 3, ["algorithm", "dgc"]])
def test_what_is_no_mapping(mapping):
    with pytest.raises(ConfigError, match=r"must be a mapping with the key 'algorithm', got"):
        Algorithm.from_dict(mapping)


def test_the_example_of_the_readme():
    config = distopt.from_config({"algorithm": "dgc", "density": 0.001})
    assert config == distopt.DGC(density=1e-3)
    assert distopt.from_config({"algorithm": "dgc"}) == distopt.DGC()


def test_a_part_is_made_from_its_own_mapping():
    config = distopt.from_config({"algorithm": "topk", "warmup": {"schedule": "paper", "stage": 500}})
    assert config.warmup == PaperWarmup(stage=500)
    with pytest.raises(ConfigError, match=r"unknown key 'steps' for schedule 'paper'; known keys are stage, steps_per"):
        distopt.from_config({"algorithm": "topk", "warmup": {"schedule": "paper", "steps": 500}})
    with pytest.raises(ConfigError, match=r"'schedule' must be one of exponential, list, paper, got 'linear'"):
        distopt.from_config({"algorithm": "topk", "warmup": {"schedule": "linear"}})


def test_a_part_s_name_stands_for_it_with_its_defaults():
    named = distopt.from_config({"algorithm": "gossip", "topology": {"topology": "random-matchings", "of": "ring"}})
    assert named == Gossip(topology=RandomMatchings(of=Ring()))
    with pytest.raises(ConfigError, match=r"'schedule' must be one of .*, got 'papr'; perhaps 'paper' is meant"):
        distopt.from_config({"algorithm": "topk", "warmup": "papr"})


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"schedule 'list':.*'densities'; add the missing key"):
        Schedule.from_dict({"schedule": "list"})


def test_a_class_makes_only_its_own_kind():
    with pytest.raises(ConfigError, match=r"must be one of dgc, got 'topk'"):
        DGC.from_dict({"algorithm": "topk"})


@pytest.mark.parametrize(
    ("densities", "parts"),
    [
        ({"fc*": 1.5}, ("densities['fc*'] must be a number in (0, 1], got 1.5", "use 0.001")),
        ({"fc*": "0.1"}, ("densities['fc*']", "got '0.1'")),
        ({"fc*": True}, ("densities['fc*']", "got True")),
        ({1: 0.1}, ("densities must have name patterns as keys, got 1",)),
    ],
)
def test_a_bad_density_of_a_pattern_names_the_pattern(densities, parts):
    with pytest.raises(ConfigError) as caught:
        TopK(densities=densities)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("value", [0, 1.5, math.nan, "0.1", True])
def test_a_bad_density_of_a_list_names_its_place(value):
    with pytest.raises(ConfigError, match=r"densities\[1\] must be a number in \(0, 1\], got"):
        ListWarmup(densities=(0.25, value))


def test_a_configuration_does_not_change_with_the_mapping_it_was_given():
    mine = {"fc*": 0.01}
    config = TopK(densities=mine)
    mine["*"] = 1.0
    assert config.densities == {"fc*": 0.01}
    with pytest.raises(TypeError):
        config.densities["*"] = 1.0


def test_the_order_of_patterns_counts_because_the_first_match_does():
    one, two = FrozenMapping({"a*": 0.1, "*": 0.2}), FrozenMapping({"*": 0.2, "a*": 0.1})
    assert one != two
    assert TopK(densities=one) != TopK(densities=two)
    assert one == {"a*": 0.1, "*": 0.2}
    assert one != "a*"
    assert dict(one) == dict(two)
