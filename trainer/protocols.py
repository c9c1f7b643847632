"""What a user implements: a Task, data, a Tracker. Nothing here is a base class to inherit.

A model is any `nn.Module`. Everything is named by `_target_` in the configuration, or passed to
`loop.Job` by hand.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Any
"""What a dataset's collation yields: a tensor, or tuples, lists and dicts of tensors.

The first axis of each tensor counts the samples.
"""


class Task(Protocol):
    """What a step computes, and what an evaluation measures.

    A task may also have `weight(batch)`: how many items (tokens, say) the mean loss of this batch
    is over, a number or a 0-dim tensor. The loss of a global batch, and of an evaluation, is then
    the mean over all items; without it, all samples count alike. `items` names them, in the
    plural, for the figure of how many a second.

    A task may have `phases`, a mapping: by the phase's name, a pattern of the names of the
    parameters that are trained in it, or a list of them. Each step then takes one update for each
    phase, in this order, with an optimizer and a schedule of its own; gradients are clipped and
    looked at phase by phase, and reach its own parameters alone. `loss`, `train_metrics` and
    `update` are called once per phase, with the phase's name as the last argument; all parts of
    the model may be called in any of them. Names of figures get the phase's name before them, and
    `loss` is the sum of the phases' losses, in training and in evaluation.

    A task may have `samples(model, dataset)`: what to show a person of the trained model, by name:
    a text (str), an image (uint8, (C, H, W)), several as a grid (N, C, H, W), or what JSON can
    hold. It is asked once, when the run is finished, on every rank alike: with the model in
    evaluation, the averaged weights if there are any, and the dataset that is evaluated on, or
    trained on if there is no other. Files `samples/<name>.txt|png|json` in the run hold them, and
    `samples/index.json` their names and the step. `trainer.task.Classification` has
    `predictions.json`: `{"samples": [{"index", "label", "prediction", "probability"}, …],
    "confusion": [[…], …], "confusion_samples": n, "classes": [names or numbers]}`, where row i of
    the confusion counts the predictions for class i; it is empty for more than 100 classes.
    """

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Return the mean loss over the samples of `batch` (0-dim), and the model's outputs.

        Called in training and in evaluation, on every rank, with that rank's samples only. It
        must not communicate.
        """

    def train_metrics(self, outputs: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Return means over the samples of `batch` that training logs beside the loss (0-dim)."""

    def metrics(self) -> Mapping[str, Any]:
        """Return new torchmetrics metrics by name; called once, before the first evaluation."""

    def update(self, metrics: Mapping[str, Any], outputs: Any, batch: Batch) -> None:
        """Add one evaluation batch to `metrics`."""


class DataSource(Protocol):
    """Training data, and what to evaluate on.

    Training data is a dataset or a stream, evaluation data a dataset. A stream has `__iter__`, and
    is read once an epoch by every rank (docs/data.md). A dataset has `__len__` and `__getitem__`.
    Where it has `tensors` (as TensorDataset does) or `__getitems__`, a batch is fetched whole;
    otherwise samples are collated one by one. Where it has `get_seeded(indices, seeds)`, that
    makes the batches: with a number for each sample, of 63 bits, from which it draws whatever is
    random in it. `describe(index)` says where a sample comes from, for messages about one that
    cannot be read.
    """

    @property
    def train(self) -> Any:
        """The dataset or stream to train on."""

    @property
    def eval(self) -> Any | None:
        """The dataset to evaluate on, or None."""


class Tracker(Protocol):
    """Where figures go. Rank 0 only; the other ranks have none.

    One that raises is dropped, and training goes on; it must not be slow. A tracker may also have

    - `saved(save)`: a checkpoint is committed. `save` has `step`, `attempt`, `time` (when the save
      began, in seconds since 1970), `save_s` (how long it took), `stall_s` (how long the training
      waited for it) and `bytes`;
    - `ended(outcome)`: just before `close`; `done`, `preempted` or `error`;
    - as a class method, `problem(arguments)`: what is wrong with its arguments, or an empty text.
      It is asked before anything starts, whether a library is there, say.
    """

    def start(self, facts: Mapping[str, Any]) -> None:
        """Begin an attempt.

        `facts` has `run_dir`, `store` (the run's), `attempt` (its number), `step` (where it starts
        from), `last_eval_step`, `max_steps`, `steps_per_epoch` (None: unknown), `world_size`,
        `config` (as it is stored, without secrets), `run_id` (the same over all attempts, another
        one in a fork), `eval_every` and `save_every` (policy.Every; None: never), `save_every_s`,
        and `peak_flops_per_s` of one device (None: unknown).

        Training figures of later steps than `step` and evaluations of later steps than
        `last_eval_step` are void: they will come again.
        """

    def log(self, line: Mapping[str, Any]) -> None:
        """Take one line: `step`, `epoch`, `samples`, `time`, `split` and figures (floats)."""

    def message(self, text: str) -> None:
        """Write a message for the user, such as a warning."""

    def flush(self) -> None:
        """Make every line taken so far durable; called before each checkpoint is committed.

        It comes from another thread than the rest, and may come while `log` is being called.
        """

    def close(self) -> None:
        """End the attempt; called once, also after a failure."""
