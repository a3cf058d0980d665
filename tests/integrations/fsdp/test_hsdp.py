"""HSDP on 2 x 2 gloo ranks: equal to FSDP2's own at density 1, replicas equal below, resumed to the bit, refusals."""

import pytest

import distopt

pytestmark = pytest.mark.job


@pytest.fixture
def hsdp():
    """What the ranks do."""
    import hsdp_rank

    return hsdp_rank


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0, "weight_decay": 0.0}, {"nesterov": True}])
@pytest.mark.parametrize("algorithm", [distopt.Dense(), distopt.TopK(density=1.0), distopt.DGC(density=1.0)])
def test_density_1_is_dense_hsdp(ranks, hsdp, algorithm, options):
    for distance, stats in ranks(4)(hsdp.against_hsdp, algorithm, **options):
        if isinstance(algorithm, distopt.DGC) and options.get("momentum", 0.9):
            assert distance <= 1e-6  # momentum of gradient and of decay are kept apart, and added
        else:
            assert distance == 0.0
        assert stats["steps"] == hsdp.STEPS
        assert stats["world_size"] == 2


def test_momentum_is_taken_over_and_given_back(ranks, hsdp):
    assert max(ranks(4)(hsdp.handed_over)) <= 1e-6


@pytest.mark.parametrize("algorithm", [distopt.DGC(density=0.01), distopt.TopK(density=0.01)])
def test_replicas_stay_equal_also_after_detach(ranks, hsdp, algorithm):
    told = ranks(4)(hsdp.replicas, algorithm)
    for inside, after, stats, momentum, momenta in told:
        assert hsdp.equal(inside, told[0][0])
        assert hsdp.equal(after, told[0][1])
        assert not hsdp.equal(inside, after)
        assert momentum == [0.9]
        assert momenta.count("DTensor") >= 4  # a rank with nothing of the last layer has no momentum of it
        # A gradient of this shard's elements in fp32, in each step; a sparse one is smaller.
        assert stats["bytes_dense"] == 4 * hsdp.STEPS * (stats["entries_compressed"] + stats["entries_sent_whole"])
        assert 0 < stats["last"]["entries_sent"] < stats["entries_compressed"]
    shards = [stats["entries_compressed"] + stats["entries_sent_whole"] for _, _, stats, _, _ in told]
    assert shards[0] == shards[2] > shards[1] == shards[3]
    assert shards[0] + shards[1] == sum(p.numel() for p in told[0][0])


@pytest.mark.parametrize("algorithm", [distopt.DGC(density=0.05), distopt.TopK(density=0.05)])
def test_resumed_is_uninterrupted(ranks, hsdp, algorithm, tmp_path):
    assert ranks(4)(hsdp.resumed, algorithm, tmp_path) == [True] * 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["shard-0-of-2", "shard-1-of-2"]


def test_accumulation(ranks, hsdp):
    for distance, *steps in ranks(4)(hsdp.accumulated):
        assert distance <= 1e-6
        assert steps == [1, 1]


def test_refusals_say_what_to_change(ranks, hsdp):
    for told in ranks(4)(hsdp.refusals):
        for name, words in {
            "one dimension": "mesh must have two dimensions, replicas and shards, got 1 dimensions; use",
            "no mesh": "got NoneType; use",
            "both dimensions": 'use fully_shard(module, mesh=mesh["shard"])',
            "other dimension": "must be sharded over the second dimension of the mesh, ranks",
            "not sharded": "got Linear without; call fully_shard",
            "hook": "the all-reduce hook of FSDP must be free, got <built-in function print> on '0'",
            "divided": "got set_gradient_divide_factor on 'the model'",
            "bf16": "got torch.float32 and torch.bfloat16",
            "replicas": "seed all replicas alike, or load one checkpoint on all",
            "clip": "leave out clip",
            "family": "got 'gossip'; use one of these",
            "checkpoint": "got a table checkpoint; leave it out",
            "twice": "call detach() on the first",
            "summed": "got set_force_sum_reduction_for_comms(True) on 'the model'",
            "attached before": "got set_gradient_divide_factor on 'the model'",
            "offload": "got CPUOffloadPolicy on 'the model'",
            "two backward passes": "accumulate under set_requires_gradient_sync(False)",
            "a part of the model": "once, got '0' again before",
        }.items():
            assert words in told.get(name, "nothing was refused"), name


@pytest.mark.parametrize(
    ("what", "words"),
    [("weights", "seed all replicas alike"), ("model", "set_gradient_divide_factor"), ("log", "file")],
)
def test_what_one_rank_has_wrong_all_ranks_hear(ranks, hsdp, what, words, tmp_path):
    for message, momentum in ranks(4)(hsdp.one_rank_differs, what, tmp_path):
        assert words in message
        assert momentum == [0.9]
