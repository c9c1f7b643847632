"""Direction of a better metric by name, class and configuration."""

import pytest
import torchmetrics
from torchmetrics import regression, text

from trainer.core import metric_mode


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("loss", "min"), ("val_loss", "min"), ("l1_error", "min"), ("perplexity", "min"),
        ("mae", "min"), ("test/mse", "min"), ("rmse", "min"), ("wer", "min"), ("cer", "min"),
        ("bits_per_byte", "min"), ("MeanSquaredError", "min"), ("Loss", "min"),
        ("accuracy", "max"), ("top5_accuracy", "max"), ("auroc", "max"), ("f1", "max"),
        ("neg_log_loss", "max"), ("negative_mse", "max"),
        ("soccer", None), ("fid", None), ("lossless", None), ("answer", None), ("map_50", None),
    ],
)  # fmt: skip
def test_by_name_knows_common_metrics(name, mode):
    assert metric_mode.by_name(name) == mode
    assert metric_mode.resolve(name) == mode or "max"


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        (regression.MeanAbsoluteError(), "min"),
        (text.WordErrorRate(), "min"),
        (regression.R2Score(), "max"),
        (torchmetrics.MeanMetric(), "max"),  # undecided: larger is better
    ],
)
def test_resolve_uses_higher_is_better_of_torchmetrics(metric, mode):
    assert metric_mode.resolve("score", None, metric.higher_is_better) == mode


def test_resolve_corrects_the_stored_default_of_earlier_versions():
    assert metric_mode.resolve("loss", "max") == "min"
    assert metric_mode.resolve("fid", "min") == "min"


@pytest.mark.parametrize(
    ("name", "mode", "higher_is_better", "contradicts"),
    [
        ("loss", "max", None, True),
        ("accuracy", "min", None, True),
        ("score", "max", False, True),
        ("score", "min", True, True),
        ("fid", "min", None, False),
        ("loss", "min", None, False),
        ("loss", None, None, False),
        ("score", "max", 3, False),  # an attribute of another kind
    ],
)
def test_contradiction_names_the_better_direction(name, mode, higher_is_better, contradicts):
    text_ = metric_mode.contradiction(name, mode, higher_is_better)
    assert bool(text_) == contradicts
    assert not contradicts or ("min" in text_ and "max" in text_) or "worst" in text_
