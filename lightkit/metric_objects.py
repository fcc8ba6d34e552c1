"""torchmetrics objects that are logged: when they are computed and reset, and their states.

torchmetrics is never imported here: whoever has such an object has imported it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightkit.columns import Column, scalar
from lightkit.errors import LoggingError
from lightkit.readings import read


def is_metric(value: Any) -> bool:
    """Tells whether ``value`` is a torchmetrics Metric or MetricCollection."""
    module = sys.modules.get("torchmetrics")
    return module is not None and isinstance(value, (module.Metric, module.MetricCollection))


def is_collection(value: Any) -> bool:
    """Tells whether ``value`` is a torchmetrics MetricCollection."""
    return is_metric(value) and isinstance(value, nn.ModuleDict)


def members(dictionary: Any) -> Iterable[tuple[str, Any]]:
    """Returns names and values of a mapping, or names and metrics of a MetricCollection."""
    if is_collection(dictionary):  # its metrics share their states: no copies
        found: Iterable[tuple[str, Any]] = dictionary.items(copy_state=False)
        return found
    if not isinstance(dictionary, (Mapping, nn.ModuleDict)):
        raise LoggingError(
            f"self.log_dict was given {type(dictionary).__name__}; it takes a mapping of names to "
            f"values, or a torchmetrics MetricCollection."
        )
    return dictionary.items()


def last_value(name: str, metric: Any) -> Tensor | None:
    """Returns the value of the last batch; None where the metric was updated, not called."""
    value = getattr(metric, "_forward_cache", None)
    return None if value is None else _single(name, metric, value)


def compute_now(name: str, metric: Any) -> Tensor | None:
    """Returns the metric over all that it has seen; None where it has seen nothing."""
    if not getattr(metric, "update_called", True):
        return None
    return _single(name, metric, metric.compute())


def _single(name: str, metric: Any, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise LoggingError(
            f"self.log({name!r}): {type(metric).__name__} gives no single number. Log the parts "
            f"of its compute() in on_train_epoch_end or on_validation_epoch_end, and call its "
            f"reset()."
        )
    return scalar(name, value.detach())


def compute(columns: Sequence[Column]) -> None:
    """Computes the metric objects of ``columns``, once each, and reads them in one go."""
    found: list[tuple[Column, Tensor]] = []
    for column in columns:
        if column.metric is not None:
            value = compute_now(column.name, column.metric)
            if value is not None:
                found.append((column, value))
    for (column, _), number in zip(found, read([v for _, v in found]), strict=True):
        column.total = number


def reset(columns: Sequence[Column]) -> None:
    """Resets the metric objects of ``columns``; they begin anew with the next epoch."""
    for column in columns:
        if column.metric is not None:
            column.metric.reset()


def objects(task: nn.Module | None) -> dict[str, Any]:
    """Returns the metrics that are modules of a task, by their names in it."""
    if task is None or "torchmetrics" not in sys.modules:
        return {}
    found = ((name, module) for name, module in task.named_modules() if is_metric(module))
    return {name: module for name, module in found if not is_collection(module)}


def states(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the states of those metrics that have seen something, with their update counts.

    A metric's own ``state_dict`` holds persistent states only, and by default there are none.
    """
    return {
        name: {
            "updates": metric.update_count,
            "values": {
                key: list(value) if isinstance(value, list) else value
                for key in metric._defaults
                for value in (getattr(metric, key),)
            },
        }
        for name, metric in metrics.items()
        if metric.update_called
    }


def copied(value: Any) -> Any:
    """Returns states that stay when the metrics go on, which write into their tensors."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def load_states(metrics: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Gives metrics back what `states` returned; names that are gone are passed over.

    Those that had seen nothing are reset: an interrupted run may have left something in them.
    """
    for name, metric in metrics.items():
        state = saved.get(name)
        if state is None:
            metric.reset()
            continue
        device = metric.device
        for key, value in state["values"].items():
            setattr(metric, key, on_device(device, value))
        metric._update_count = state["updates"]
        metric._computed = None


@contextlib.contextmanager
def kept(task: nn.Module) -> Iterator[None]:
    """Gives the metrics of a task the states back at its end that they had."""
    metrics = objects(task)
    counts = {name: metric.update_count for name, metric in metrics.items()}
    before = copied(states(metrics))
    try:
        yield
    finally:
        used = {n: metric for n, metric in metrics.items() if metric.update_count != counts[n]}
        load_states(used, before)


def on_device(device: Any, value: Any) -> Any:
    """Returns a state of a metric, a tensor or a list, on a device."""
    if isinstance(value, list):
        return [on_device(device, item) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
