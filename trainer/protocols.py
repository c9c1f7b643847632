"""Interfaces for user code: Task, DataSource and Tracker. None is a base class.

A model is any `nn.Module`. The configuration names each object by `_target_`; without a
configuration, pass the objects to `trainer.training.job.Job`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Any
"""Output of a dataset's collation: a tensor, or tuples, lists and dicts of tensors.

The first axis of each tensor is the batch axis.
"""


class Task(Protocol):
    """Loss and metrics of a model.

    Optional members:

    - `weight(batch)`: number of items (tokens, for example) that the mean loss of the batch is
      over, a number or a 0-dim tensor. The loss of a global batch and of an evaluation is then the
      mean over all items. Without it, every sample counts the same. `items` is the plural noun for
      the metric of items per second.
    - `phases`: mapping from phase names to a pattern, or a list of patterns, for the names of the
      parameters to train. Each step then takes one update per phase, in this order, with a separate
      optimizer and schedule; gradients are clipped and checked per phase and reach only its
      parameters. `loss`, `train_metrics` and `update` are called once per phase, with its name as
      the last argument, and may call all parts of the model. Metric names get the phase name as a
      prefix, and `loss` is the sum of the phases' losses, in training and in evaluation.
    - `samples(model, dataset)`: sample outputs of the trained model by name: a text (str), an image
      (uint8, (C, H, W)), a grid of images (N, C, H, W), or a JSON value. It is called on every rank
      when the run is complete, with the model in evaluation mode (averaged weights if available)
      and the evaluation dataset, or the training dataset without one. The run stores them
      in `samples/<name>.txt|png|json`, and their names and the step in `samples/index.json`.
      `trainer.task.Classification` writes `predictions.json`: `{"samples": [{"index", "label",
      "prediction", "probability"}, …], "confusion": [[…], …], "confusion_samples": n, "classes":
      [names or numbers]}`. Row i of `confusion` counts the predictions for class i; it is empty for
      more than 100 classes.
    """

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the mean loss over the samples of `batch` (0-dim), and the model's outputs.

        Called in training and in evaluation, on every rank, with that rank's samples only. It
        must not communicate.
        """

    def train_metrics(self, outputs: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Return the mean over `batch` of each metric that training logs (0-dim tensors).

        The loss is logged automatically. `figures`, the former name, is accepted with a warning.
        """

    def metrics(self) -> Mapping[str, Any]:
        """Return new torchmetrics metrics by name; called before training and evaluation."""

    def update(self, metrics: Mapping[str, Any], outputs: Any, batch: Batch) -> None:
        """Add one evaluation batch to `metrics`."""


class DataSource(Protocol):
    """Training and evaluation data.

    Training data is a dataset or a stream, evaluation data a dataset. A stream has `__iter__`;
    every rank iterates over it once per epoch (docs/data.md). A dataset has `__len__` and
    `__getitem__`, and optionally:

    - `__getitems__`: fetches a batch at once; otherwise samples are collated one by one, except
      those of a TensorDataset.
    - `get_seeded(indices, seeds)`: fetches a batch with random transforms. `seeds` has one 63-bit
      integer per sample.
    - `describe(index)`: the origin of a sample, for error messages.
    """

    @property
    def train(self) -> Any:
        """The dataset or stream to train on."""

    @property
    def eval(self) -> Any | None:
        """The dataset to evaluate on, or None."""


class Tracker(Protocol):
    """Destination of metrics and messages. Rank 0 only.

    A tracker that raises is dropped, and training continues. Calls must return quickly. Optional
    members:

    - `saved(save)`: called when a checkpoint is committed. `save` has `step`, `attempt`, `time`
      (start of the save, seconds since 1970), `save_s` (its duration), `stall_s` (how long it
      blocked training) and `bytes`.
    - `ended(outcome)`: called before `close` with `done`, `preempted` or `error`.
    - `problem(arguments)`, a class method: returns an error in the arguments, or an empty string.
      It is called before the run starts, to check for a missing library, for example.
    """

    def start(self, facts: Mapping[str, Any]) -> None:
        """Start an attempt.

        `facts` has `run_dir`, `store` (the run's), `attempt` (its number), `step` (the last step
        before it), `last_eval_step`, `max_steps`, `steps_per_epoch` (None: unknown),
        `world_size`, `config` (as stored, without secrets), `run_id` (the same in all attempts, new
        in a fork), `eval_every` and `save_every` (intervals.Every; None: never), `save_every_s`,
        and `peak_flops_per_s` of one device (None: unknown).

        Earlier training metrics after `step` and evaluations after `last_eval_step` are void: the
        attempt repeats these steps.
        """

    def log(self, line: Mapping[str, Any]) -> None:
        """Log one line: `step`, `epoch`, `samples`, `time`, `split` and metrics (floats)."""

    def message(self, text: str) -> None:
        """Write a message for the user, such as a warning."""

    def flush(self) -> None:
        """Make all logged lines durable; called before each checkpoint is committed.

        Called from another thread, possibly during a call of `log`.
        """

    def close(self) -> None:
        """End the attempt; called once, also after a failure."""
