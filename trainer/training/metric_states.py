"""Merging of torchmetrics states over ranks, as on one rank with all samples.

torchmetrics synchronizes on its own in `compute()`, with one collective per state and list element.
Ranks with different numbers of elements then wait for each other forever. Here its synchronization
is disabled. Each rank's states are collected in one message, and rank 0 merges them and computes.

Each rank evaluates a contiguous block of samples. List states in rank order are therefore in the
order of the samples. The reductions:

| `dist_reduce_fx` | tensor state | list state |
|---|---|---|
| sum | sum; a default that is not zero counts once | rejected |
| mean | mean, weighted by the number of updates | rejected |
| max, min | element-wise | rejected |
| cat | concatenated | all elements |
| None | stacked, as torchmetrics does | all elements |
| function | called with the stacked states | called with all elements |

A rank without updates contributes nothing to mean, None and function. The state of a single
contributing rank is used unchanged.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core import nested


@dataclass(frozen=True)
class RankState:
    """States of one metric on one rank, on the CPU."""

    updates: int
    """Number of updates since the last reset."""
    values: Mapping[str, Any]
    """A tensor or a list per state."""


def disable_sync(metric: Any) -> None:
    """Disable the collectives of a metric and of all metrics in it."""
    for part in _parts(metric):
        part.distributed_available_fn = _never_available


def _never_available() -> bool:  # a named function, since metrics are pickled and copied
    return False


def merge_problem(metric: Any) -> str:
    """Return why the states of a metric cannot be merged over ranks, or an empty string."""
    from torchmetrics import Metric, MetricCollection  # slow to import
    from torchmetrics.wrappers import Running

    if not isinstance(metric, (Metric, MetricCollection)):
        return (
            f"is a {type(metric).__name__}, not a torchmetrics.Metric, so its values on several "
            "ranks cannot be merged"
        )
    parts = _parts(metric)
    if not any(part._defaults for part in parts):
        return f"{type(metric).__name__} has no states; register them with add_state"
    for part in parts:
        if isinstance(part, Running):
            return f"{type(part).__name__} depends on the order of updates over all ranks"
        for name, default in part._defaults.items():
            kind = _reduction_name(part._reductions[name])
            if isinstance(default, list) and kind in ("sum", "mean", "max", "min"):
                return (
                    f"{type(part).__name__}.{name} is a list with dist_reduce_fx={kind!r}, which "
                    "torchmetrics cannot reduce; use 'cat' or None"
                )
    return ""


def collect(metrics: Mapping[str, Any]) -> list[RankState]:
    """Return copies of this rank's states, one per metric and per metric inside another."""
    return [
        RankState(part.update_count, nested.map_leaves(_to_cpu, part.metric_state))
        for metric in metrics.values()
        for part in _parts(metric)
    ]


def merge(metrics: Mapping[str, Any], ranks: Sequence[Sequence[RankState]]) -> None:
    """Replace the states of `metrics` by those of all ranks; `ranks` has what `collect` returned.

    The next `reset` restores the defaults.
    """
    parts = [part for metric in metrics.values() for part in _parts(metric)]
    for part, states in zip(parts, zip(*ranks, strict=True), strict=True):
        _merge_part(part, states)


def _parts(metric: Any) -> list[Any]:
    """Return the metric and all metrics in it, in the same order on every rank."""
    from torchmetrics import Metric

    modules = metric.modules() if isinstance(metric, nn.Module) else ()
    return [module for module in modules if isinstance(module, Metric)]


def _to_cpu(value: Any) -> Any:
    """Copy a tensor; a view would be pickled with all of the memory that it is part of."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _merge_part(part: Any, states: Sequence[RankState]) -> None:
    from torchmetrics import PearsonCorrCoef
    from torchmetrics.regression import NormalizedRootMeanSquaredError

    for name, default in part._defaults.items():
        function, is_list = part._reductions[name], isinstance(default, list)
        values = [state.values[name] for state in states]
        if is_list:
            merged: Any = _merge_lists(values, function)
        else:
            merged = _merge_tensors(values, [s.updates for s in states], default.cpu(), function)
        device = torch.device("cpu") if is_list and part.compute_on_cpu else part.device
        setattr(part, name, nested.map_leaves(partial(_to_device, device=device), merged))
    part._update_count = sum(state.updates for state in states)
    part._computed = None
    if isinstance(part, PearsonCorrCoef) and part.n_total.dim() > 1:
        _pool_pearson(part)
    elif isinstance(part, NormalizedRootMeanSquaredError) and part.total.dim() > 1:
        _pool_nrmse(part)


def _pool_pearson(part: Any) -> None:
    """Pool the stacked moments; torchmetrics' own pooling is NaN if ranks have one sample each."""
    count: Tensor = part.n_total
    offsets: dict[str, Tensor] = {}
    for axis in ("x", "y"):
        mean, offset = _pool_means(getattr(part, f"mean_{axis}"), count)
        squares = (getattr(part, f"var_{axis}") + count * offset.square()).sum(0)
        largest = (getattr(part, f"max_abs_dev_{axis}") + offset.abs()).amax(0)
        setattr(part, f"mean_{axis}", mean)
        setattr(part, f"var_{axis}", squares)
        setattr(part, f"max_abs_dev_{axis}", largest)
        offsets[axis] = offset
    part.corr_xy = (part.corr_xy + count * offsets["x"] * offsets["y"]).sum(0)
    part.n_total = count.sum(0)


def _pool_nrmse(part: Any) -> None:
    """Pool the stacked moments; torchmetrics' own pooling is wrong for more than two ranks."""
    count: Tensor = part.total
    mean, offset = _pool_means(part.mean_val, count)
    part.var_val = (part.var_val + count * offset.square()).sum(0)
    part.mean_val, part.total = mean, count.sum(0)
    part.min_val, part.max_val = part.min_val.amin(0), part.max_val.amax(0)
    part.target_squared = part.target_squared.sum(0)


def _pool_means(means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over ranks, and each rank's offset from it."""
    mean = (means * counts).sum(0) / counts.sum(0)
    return mean, means - mean


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _merge_lists(values: Sequence[Any], function: Callable[..., Any] | None) -> list[Any]:
    lists = [value if isinstance(value, list) else [value] for value in values]
    elements = [element for elements in lists for element in elements]
    if not elements or len([part for part in lists if part]) == 1:
        return elements
    if _reduction_name(function) in ("cat", None):
        return elements
    assert function is not None  # noqa: S101 (for the type checker)
    result = function(elements)
    return result if isinstance(result, list) else [result]  # `reset` clears a list


def _merge_tensors(
    values: Sequence[Tensor],
    updates: Sequence[int],
    default: Tensor,
    function: Callable[..., Any] | None,
) -> Tensor:
    contributions = [
        (value, count)
        for value, count in zip(values, updates, strict=True)
        if count or value.shape != default.shape or not torch.equal(value, default)
    ]
    if len(contributions) <= 1:
        return contributions[0][0] if contributions else default
    tensors = [value for value, _ in contributions]
    name = _reduction_name(function)
    if name == "sum":
        total = reduce(operator.add, tensors)
        return total - default * (len(tensors) - 1) if default.any() else total
    if name == "mean":
        weights = [max(count, 1) for _, count in contributions]
        terms = [value * weight for value, weight in zip(tensors, weights, strict=True)]
        return reduce(operator.add, terms) / sum(weights)
    if name in _PAIRWISE:
        return reduce(_PAIRWISE[name], tensors)
    if name == "cat":
        return torch.cat([torch.atleast_1d(tensor) for tensor in tensors])
    stacked = torch.stack(tensors)
    return stacked if function is None else function(stacked)


_PAIRWISE = {"max": torch.maximum, "min": torch.minimum}


def _reduction_name(function: Callable[..., Any] | None) -> str | None:
    """Return torchmetrics' name of a reduction; None: no reduction; `custom`: a user's function."""
    from torchmetrics.utilities import data

    names = {
        getattr(data, f"dim_zero_{name}"): name for name in ("sum", "mean", "max", "min", "cat")
    }
    return None if function is None else names.get(function, "custom")
