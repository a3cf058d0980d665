"""The laws of a split, for every registered partitioner, and the promises of each."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import ConfigError
from distopt.federated import (
    ColumnPartition,
    DirichletPartition,
    IIDPartition,
    NaturalPartition,
    Partition,
    QuantityPartition,
    ShardPartition,
    describe,
    label_counts,
    label_distributions,
)

EXAMPLES = [
    IIDPartition(),
    DirichletPartition(),
    DirichletPartition(alpha=0.01),
    DirichletPartition(alpha=0.05, min_samples=1),
    DirichletPartition(alpha=0.1, sizes="equal"),
    DirichletPartition(alpha=1e-6, sizes="equal", min_samples=1),
    ShardPartition(shards_per_client=1),
    ShardPartition(shards_per_client=2),
    QuantityPartition(),
    QuantityPartition(alpha=0.01, min_samples=0),
    QuantityPartition(law="power-law", exponent=2.0),
    NaturalPartition(),
    ColumnPartition(column="user"),
]
RANDOM = [each for each in EXAMPLES if not isinstance(each, NaturalPartition | ColumnPartition)]
BY_LABEL = [each for each in RANDOM if not isinstance(each, IIDPartition | QuantityPartition)]


def given_to(partition, labels):
    return {"user": labels} if isinstance(partition, ColumnPartition) else labels


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


def ten_labels(num_samples=1000):
    return np.random.default_rng(0).integers(0, 10, num_samples)


def test_every_partitioner_has_an_example_here():
    assert {type(each) for each in EXAMPLES} == set(Partition._known.values())
    assert sorted(Partition._known) == ["column", "dirichlet", "iid", "natural", "quantity", "shards"]


@pytest.mark.parametrize("partition", EXAMPLES, ids=repr)
@settings(deadline=None, max_examples=40)
@given(labels=st.lists(st.integers(-3, 6), min_size=1, max_size=60), share=st.floats(0, 1), seed=st.integers(0, 2**70))
def test_every_sample_is_used_once_by_as_many_clients_as_asked(partition, labels, share, seed):
    if partition in RANDOM:
        most = len(labels) // getattr(partition, "shards_per_client", 1)
        if most == 0:
            return
        num_clients = 1 + int(share * (most - 1))
    else:
        num_clients = len(set(labels))
    parts = partition.split(given_to(partition, labels), num_clients, seed)
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert min(map(len, parts)) >= getattr(partition, "min_samples", 0)
    assert same(partition.split(given_to(partition, labels), num_clients, seed), parts)


@pytest.mark.parametrize("partition", RANDOM, ids=repr)
def test_another_seed_gives_another_split(partition):
    splits = [partition.split(ten_labels(), 20, seed) for seed in range(3)]
    assert not any(same(splits[left], splits[right]) for left, right in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("partition", EXAMPLES, ids=repr)
def test_the_kind_of_labels_does_not_matter(partition):
    labels = ten_labels(200)
    num_clients = 10
    expected = partition.split(given_to(partition, labels), num_clients, 3)
    text = np.array(list("abcdefghij"))[labels]
    for other in (labels.tolist(), torch.from_numpy(labels), labels.astype(np.uint8), text, text.astype(object)):
        assert same(partition.split(given_to(partition, other), num_clients, 3), expected)


@pytest.mark.parametrize("partition", EXAMPLES, ids=repr)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((3, 2)), r"must be 1-D, got shape \(3, 2\); give one label or id per sample"),
        (5, r"must be 1-D, got shape \(\)"),
        ([[1], [2, 3]], r"must be 1-D, got values that make no array: .*; give one label"),
        ([], "must hold at least one sample, got none; give one"),
        ([1.0, np.nan], "must not hold nan, got it for sample 1; give one"),
        (np.array([1, "a"], dtype=object), "must be values of one kind: .*; give one .* all numbers or all text"),
    ],
)
def test_bad_labels(partition, labels, message):
    name = {NaturalPartition: "ids", ColumnPartition: "column 'user'"}.get(type(partition), "labels")
    with pytest.raises(ConfigError, match=f"^{name} {message}"):
        partition.split(given_to(partition, labels), 1)


@pytest.mark.parametrize("partition", EXAMPLES, ids=repr)
def test_a_bad_seed(partition):
    with pytest.raises(ConfigError, match=r"seed must be an integer of at least 0, got -1; give one number per run"):
        partition.split(given_to(partition, [1, 2, 3]), 3 if partition not in RANDOM else 1, -1)


@pytest.mark.parametrize("partition", RANDOM, ids=repr)
@pytest.mark.parametrize(
    ("num_clients", "message"),
    [
        (None, "num_clients must be an integer of at least 1, got None; give the number of clients"),
        (0, "num_clients must be an integer of at least 1, got 0"),
        (2.0, r"num_clients must be an integer of at least 1, got 2\.0"),
        (31, "num_clients must be at most the number of samples, 30, got 31; take fewer clients"),
    ],
)
def test_a_bad_number_of_clients(partition, num_clients, message):
    with pytest.raises(ConfigError, match=message):
        partition.split([0, 1] * 15, num_clients)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            ShardPartition(shards_per_client=4),
            "shards_per_client must be at most 3 for 10 clients and 30 samples, got 4",
        ),
        (
            DirichletPartition(min_samples=4),
            "min_samples must be at most 3 for 10 clients and 30 samples, got 4",
        ),
        (QuantityPartition(min_samples=4), "min_samples must be at most 3 for 10 clients and 30 samples, got 4"),
    ],
)
def test_more_than_there_is(partition, message):
    with pytest.raises(ConfigError, match=message):
        partition.split([0, 1, 2] * 10, 10)


@pytest.mark.parametrize("partition", [IIDPartition(), DirichletPartition(sizes="equal")], ids=repr)
def test_equal_sizes(partition):
    sizes = sorted(map(len, partition.split(ten_labels(1003), 10, 1)))
    assert sizes == [100] * 7 + [101] * 3


@pytest.mark.parametrize("partition", [IIDPartition(), QuantityPartition()], ids=repr)
def test_a_partition_that_does_not_look_at_the_labels(partition):
    labels = ten_labels()
    assert same(partition.split(labels, 10, 1), partition.split(np.sort(labels), 10, 1))
    counts = label_counts(IIDPartition().split(np.sort(ten_labels(20_000)), 4, 0), np.sort(ten_labels(20_000)))[1]
    assert abs(counts - 500).max() < 5 * 500**0.5


def distinct_labels(partition, labels, num_clients):
    return np.mean([(row > 0).sum() for row in label_counts(partition.split(labels, num_clients, 0), labels)[1]])


@pytest.mark.parametrize("sizes", ["uneven", "equal"])
def test_a_smaller_alpha_gives_each_client_fewer_labels(sizes):
    labels = ten_labels(5000)
    few, some, many = (
        distinct_labels(DirichletPartition(alpha=alpha, sizes=sizes), labels, 20) for alpha in (0.01, 0.3, 100)
    )
    assert few < 3 < some < 9 < many


def test_the_shares_of_a_label_are_dirichlet():
    """The variance of a share of Dir(alpha) over n clients is (1/n)(1-1/n)/(n alpha+1)."""
    labels = np.repeat(np.arange(400), 500)
    shares = label_counts(DirichletPartition(alpha=0.5).split(labels, 5, 0), labels)[1] / 500
    assert shares.mean() == pytest.approx(1 / 5)
    assert shares.var() == pytest.approx(0.2 * 0.8 / (5 * 0.5 + 1), rel=0.1)


def test_the_labels_of_a_client_are_dirichlet_while_they_last():
    labels = np.repeat(np.arange(5), 20_000)
    shares = label_distributions(DirichletPartition(alpha=0.5, sizes="equal").split(labels, 200, 0), labels)
    assert shares.mean(axis=0) == pytest.approx(np.full(5, 0.2))
    assert shares.var() == pytest.approx(0.2 * 0.8 / (5 * 0.5 + 1), rel=0.15)


@pytest.mark.parametrize("sizes", ["uneven", "equal"])
def test_which_samples_of_a_label_a_client_gets_is_random(sizes):
    parts = DirichletPartition(alpha=10.0, sizes=sizes).split([0] * 300, 3, 0)
    assert all((np.diff(part) > 1).any() for part in parts)
    assert all(abs(part.mean() - 149.5) < 5 * 300 / np.sqrt(12 * len(part)) for part in parts)


def test_filling_up_moves_no_more_than_is_missing():
    labels = ten_labels()
    before = DirichletPartition(alpha=0.05).split(labels, 30, 4)
    after = DirichletPartition(alpha=0.05, min_samples=10).split(labels, 30, 4)
    missing = sum(max(10 - len(part), 0) for part in before)
    assert missing > 20
    kept = sum(len(np.intersect1d(one, other)) for one, other in zip(before, after, strict=True))
    assert kept == len(labels) - missing
    for one, other in zip(before, after, strict=True):
        assert len(other) == 10 if len(one) <= 10 else 10 <= len(other) <= len(one)


def test_the_pathological_split():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 60))
    parts = ShardPartition(shards_per_client=2).split(labels, 20, 0)
    assert {len(part) for part in parts} == {30}
    assert max(len(row["labels"]) for row in describe(parts, labels)) == 2
    assert {count for row in describe(parts, labels) for count in row["labels"].values()} <= {15, 30}


def test_sizes_by_a_power_law():
    sizes = sorted(map(len, QuantityPartition(law="power-law", exponent=1.0, min_samples=0).split([0] * 2200, 4)))
    exact = 2200 * np.array([1 / 4, 1 / 3, 1 / 2, 1]) / (25 / 12)
    assert np.abs(sizes - exact).max() <= 1
    first = [
        int(np.argmax([len(part) for part in QuantityPartition(law="power-law").split([0] * 99, 9, seed)]))
        for seed in range(20)
    ]
    assert len(set(first)) > 3


def test_sizes_by_a_dirichlet_draw():
    partition = QuantityPartition(alpha=2.0, min_samples=0)
    shares = np.array([[len(part) for part in partition.split([0] * 10_000, 5, seed)] for seed in range(200)]) / 10_000
    assert shares.var() == pytest.approx(0.2 * 0.8 / (5 * 2.0 + 1), rel=0.1)


def test_one_client_per_id_in_ascending_order():
    ids = ["b", "a", "b", "c", "a"]
    parts = NaturalPartition().split(ids)
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2], [3]]
    assert same(NaturalPartition().split(ids, 3, seed=9), parts)
    with pytest.raises(ConfigError, match="num_clients must be the number of distinct ids, 3, got 4; leave it out"):
        NaturalPartition().split(ids, 4)
    with pytest.raises(ConfigError, match="num_clients must be an integer of at least 1, got '3'; leave it out"):
        NaturalPartition().split(ids, "3")


def test_a_column_of_any_table():
    text = "user,label\nb,0\na,1\nb,1\n"
    rows = list(csv.DictReader(io.StringIO(text)))
    structured = np.array([("b", 0), ("a", 1), ("b", 1)], dtype=[("user", "U1"), ("label", "i8")])

    class Frame:
        columns = ("user", "label")

        def __getitem__(self, name):
            return structured[name]

    for table in (rows, structured, {"user": ["b", "a", "b"]}, Frame()):
        parts = ColumnPartition(column="user").split(table)
        assert [part.tolist() for part in parts] == [[1], [0, 2]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": [1], "label": [2]}, "column must be one of 'id', 'label', got 'user'; name one of these"),
        ([{"user": 1}, {"id": 2}], "column must be in every row, got 'user', which row 1 lacks; it has 'id'; mend"),
        ([{"user": 1}, 7], "column must be in every row, got 'user', which row 1 lacks; it has 7; mend"),
        ([1, 2, 3], "a table must have named columns, got list; give a mapping of columns, .* natural partition"),
        ("user", "a table must have named columns, got str"),
    ],
)
def test_a_bad_table(table, message):
    with pytest.raises(ConfigError, match=message):
        ColumnPartition(column="user").split(table)


def test_the_description_is_plain_data():
    parts = [np.array([0, 1, 4]), np.array([2]), np.array([], dtype=np.int64), np.array([3])]
    labels = np.array([7, 7, 9, 7, 9])
    rows = describe(parts, labels)
    assert rows[0] == {"client": 0, "samples": 3, "labels": {7: 2, 9: 1}}
    assert rows[2] == {"client": 2, "samples": 0, "labels": {}}
    assert json.loads(json.dumps(rows))[1] == {"client": 1, "samples": 1, "labels": {"9": 1}}
    assert label_distributions(parts, labels).tolist() == [[2 / 3, 1 / 3], [0, 1], [0.5, 0.5], [1, 0]]
    with pytest.raises(ConfigError, match=r"must be in \[0, 3\), got 0 to 4 for client 0; give the labels that"):
        describe(parts, [1, 2, 3])
