"""Merged metrics of simulated ranks against torchmetrics on one rank with all samples."""

import math
import pickle

import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import classification, regression, retrieval, wrappers

from trainer.training import metric_states

SCORES = {
    "auroc": lambda: classification.BinaryAUROC(thresholds=None),
    "auroc_binned": lambda: classification.BinaryAUROC(thresholds=5),
    "average_precision": lambda: classification.BinaryAveragePrecision(),
    "accuracy": lambda: classification.BinaryAccuracy(),
    "confusion": lambda: classification.BinaryConfusionMatrix(),
    "f1": lambda: classification.BinaryF1Score(),
    "calibration": lambda: classification.BinaryCalibrationError(),
    "min_max": lambda: wrappers.MinMaxMetric(classification.BinaryAccuracy()),
    "composition": lambda: classification.BinaryRecall() + 2 * classification.BinaryPrecision(),
    "collection": lambda: torchmetrics.MetricCollection(
        [
            classification.BinaryPrecision(),
            classification.BinaryRecall(),
            classification.BinaryAUROC(),
        ]
    ),
    "no_groups": lambda: torchmetrics.MetricCollection(
        [classification.BinaryPrecision(), classification.BinaryRecall()], compute_groups=False
    ),
}
"""Metrics of scores (N,) and labels (N,) int64."""
VALUES = {
    "pearson": lambda: regression.PearsonCorrCoef(),
    "concordance": lambda: regression.ConcordanceCorrCoef(),
    "spearman": lambda: regression.SpearmanCorrCoef(),
    "kendall": lambda: regression.KendallRankCorrCoef(),
    "nrmse_mean": lambda: regression.NormalizedRootMeanSquaredError(normalization="mean"),
    "nrmse_range": lambda: regression.NormalizedRootMeanSquaredError(normalization="range"),
    "nrmse_std": lambda: regression.NormalizedRootMeanSquaredError(normalization="std"),
    "nrmse_l2": lambda: regression.NormalizedRootMeanSquaredError(normalization="l2"),
    "r2": lambda: regression.R2Score(),
    "explained_variance": lambda: regression.ExplainedVariance(),
    "cosine": lambda: regression.CosineSimilarity(reduction="sum"),
    "mse": lambda: regression.MeanSquaredError(),
    "multioutput": lambda: wrappers.MultioutputWrapper(regression.MeanAbsoluteError(), 1),
}
"""Metrics of predictions and targets, both (N,) float."""
AGGREGATES = {
    "mean": torchmetrics.MeanMetric,
    "sum": torchmetrics.SumMetric,
    "max": torchmetrics.MaxMetric,
    "min": torchmetrics.MinMetric,
    "cat": torchmetrics.CatMetric,
}
SHARES = st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4)
"""Batch sizes of every rank; an empty list is a rank that never updates."""


def merged_and_single(make, batches_by_rank):
    """Return (the metric merged over ranks, a metric updated with the batches in rank order)."""
    metrics = [make() for _ in batches_by_rank]
    single = make()
    for metric, batches in zip(metrics, batches_by_rank, strict=True):
        metric_states.disable_sync(metric)
        for batch in batches:
            metric.update(*batch)
            single.update(*batch)
    gathered = [metric_states.collect({"m": metric}) for metric in metrics]
    metric_states.merge({"m": metrics[0]}, pickle.loads(pickle.dumps(gathered)))
    return metrics[0], single


def computed(metric):
    try:
        value = metric.compute()
    except Exception as error:  # too few samples: one rank fails in the same way
        return type(error)
    values = value.values() if isinstance(value, dict) else [value]
    return [torch.as_tensor(item).double() for item in values]


def assert_equal(merged, single):
    values, expected = computed(merged), computed(single)
    if isinstance(expected, type) or isinstance(values, type):
        assert values is expected
        return
    for value, other in zip(values, expected, strict=True):
        assert value.shape == other.shape
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def batches_of(make_batch, shares):
    generator = torch.Generator().manual_seed(sum(map(sum, shares)))
    return [[make_batch(size, generator) for size in sizes] for sizes in shares]


def scores_and_labels(size, generator):
    scores = torch.rand(size, generator=generator)
    return scores, (torch.rand(size, generator=generator) > 0.5).long()


def two_vectors(size, generator):
    predictions = torch.randn(size, generator=generator)
    return predictions, predictions + 1 + torch.randn(size, generator=generator)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=12, deadline=None)
@given(shares=SHARES)
def test_merge_of_classification_equals_one_rank(name, shares):
    assert_equal(*merged_and_single(SCORES[name], batches_of(scores_and_labels, shares)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALUES)
@settings(max_examples=12, deadline=None)
@given(shares=SHARES)
def test_merge_of_regression_equals_one_rank(name, shares):
    def batch(size, generator):
        vectors = two_vectors(size, generator)
        return [v[:, None] for v in vectors] if name in ("cosine", "multioutput") else vectors

    assert_equal(*merged_and_single(VALUES[name], batches_of(batch, shares)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AGGREGATES)
@settings(max_examples=12, deadline=None)
@given(shares=SHARES)
def test_merge_of_aggregates_equals_one_rank(name, shares):
    make_batch = lambda size, generator: (torch.randn(size, generator=generator),)  # noqa: E731
    assert_equal(*merged_and_single(AGGREGATES[name], batches_of(make_batch, shares)))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=12, deadline=None)
@given(shares=SHARES)
def test_merge_of_retrieval_equals_one_rank(shares):
    def batch(size, generator):
        queries = torch.randint(3, (size,), generator=generator)
        scores, labels = scores_and_labels(size, generator)
        return scores, labels, queries

    class Retrieval(retrieval.RetrievalMAP):
        def update(self, scores, labels, queries):
            super().update(scores, labels, indexes=queries)

    assert_equal(*merged_and_single(Retrieval, batches_of(batch, shares)))


class EveryReduction(torchmetrics.Metric):
    """Metric with every kind of state: shapes and dtypes differ between ranks and updates."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(5), "sum")  # a default that counts once
        self.add_state("average", torch.tensor(0.0), "mean")
        self.add_state("highest", torch.tensor(-math.inf), "max")
        self.add_state("lowest", torch.tensor(math.inf, dtype=torch.float64), "min")
        self.add_state("row", torch.empty(0), "cat")
        self.add_state("rows", [], "cat")
        self.add_state("texts", [], None)
        self.add_state("masks", [], None)
        self.add_state("ordered", [], lambda elements: sorted(elements, key=float))
        self.add_state("folded", torch.zeros(2), lambda stacked: stacked.sum(0))

    def update(self, values):
        self.total += len(values)
        self.average = (
            self.average * (self._update_count - 1) + values.mean()
        ) / self._update_count
        self.highest = torch.maximum(self.highest, values.max())
        self.lowest = torch.minimum(self.lowest, values.min().double())
        self.row = torch.cat([self.row, values])
        self.rows.append(values[:, None].expand(-1, 2))
        self.texts += [f"{value:.3f}" for value in values.tolist()]
        self.masks.append((len(values), values > 0))
        self.ordered += list(values)
        self.folded = self.folded + torch.stack([values.sum(), values.square().sum()])

    def compute(self):
        return 0.0


@settings(max_examples=30, deadline=None)
@given(shares=SHARES)
def test_merge_of_every_reduction_equals_one_rank(shares):
    make_batch = lambda size, generator: (torch.randn(size, generator=generator),)  # noqa: E731
    merged, single = merged_and_single(EveryReduction, batches_of(make_batch, shares))
    assert merged.update_count == single.update_count
    for name in ("total", "average", "highest", "lowest", "row", "folded"):
        value, expected = getattr(merged, name), getattr(single, name)
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected)
    assert torch.equal(*(torch.cat([torch.empty(0, 2), *m.rows]) for m in (merged, single)))
    assert merged.texts == single.texts
    assert [(n, mask.tolist()) for n, mask in merged.masks] == [
        (n, mask.tolist()) for n, mask in single.masks
    ]
    assert sorted(map(float, merged.ordered)) == sorted(map(float, single.ordered))
    merged.reset()
    assert merged.rows == []
    assert int(merged.total) == 5


def test_merge_stacks_states_without_reduction_as_torchmetrics_does():
    class Plain(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("value", torch.zeros(2), None)

        def update(self, value):
            self.value = value

        def compute(self):
            return self.value

    batches = [[(torch.ones(2),)], [], [(torch.full((2,), 3.0),)]]
    assert merged_and_single(Plain, batches)[0].compute().tolist() == [[1, 1], [3, 3]]


def test_collect_copies_views_without_their_storage():
    metric = torchmetrics.CatMetric()
    metric.value = [torch.zeros(1_000_000)[:3]]
    assert len(pickle.dumps(metric_states.collect({"m": metric}))) < 10_000


def test_merge_leaves_the_wrapped_metrics_of_a_bootstrap_usable():
    make = lambda: wrappers.BootStrapper(torchmetrics.MeanMetric(), num_bootstraps=4)  # noqa: E731
    merged, single = merged_and_single(make, [[(torch.ones(5),)], [], [(torch.ones(3),)]])
    assert merged.compute().keys() == single.compute().keys()
    assert float(merged.compute()["mean"]) == 1


class Attributes(torchmetrics.Metric):
    """Metric that keeps its count as a plain attribute."""

    count = 0

    def update(self, value):
        self.count += len(value)

    def compute(self):
        return self.count


class ListSum(Attributes):
    def __init__(self):
        super().__init__()
        self.add_state("values", [], "sum")


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (object(), "is a object, not a torchmetrics.Metric"),
        (Attributes(), "Attributes has no states; register them with add_state"),
        (ListSum(), "ListSum.values is a list with dist_reduce_fx='sum'"),
        (wrappers.Running(torchmetrics.SumMetric()), "Running depends on the order of updates"),
        (torchmetrics.MetricCollection([ListSum()]), "ListSum.values"),
        (torchmetrics.MeanMetric(), ""),
        (wrappers.ClasswiseWrapper(classification.MulticlassAccuracy(3, average=None)), ""),
    ],
)
def test_merge_problem_names_what_cannot_be_merged(metric, reason):
    problem = metric_states.merge_problem(metric)
    assert reason in problem
    assert bool(problem) == bool(reason)
