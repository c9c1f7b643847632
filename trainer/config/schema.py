"""All settings of a run: frozen dataclasses with defaults, units, valid ranges and docs."""

import os
from dataclasses import dataclass, field, is_dataclass
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare a field with its default, one-line doc (including the unit) and valid values."""
    metadata = {
        "doc": doc, "choices": choices, "at_least": at_least, "at_most": at_most, "above": above,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type) and is_dataclass(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Shape and classes of one sample; model configurations refer to it."""

    shape: list[int] = setting([1, 28, 28], "Shape of one input, without the batch dimension.")
    classes: int = setting(10, "Number of label classes.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Length of training, batch sizes, evaluation and logging."""

    max_epochs: int | None = setting(15, "Maximum number of epochs.", at_least=1)
    max_steps: int | None = setting(None, "Maximum number of steps.", at_least=1)
    max_time: str | None = setting(
        None,
        "Save and exit with code 75 this long after the start: seconds, MM:SS, HH:MM:SS or "
        "D-HH:MM:SS.",
    )
    global_batch_size: int = setting(64, "Samples per step over all ranks.", at_least=1)
    accumulate: int = setting(1, "Microbatches per step on each rank.", at_least=1)
    freeze: list[str] = setting([], "Name patterns of parameters to freeze.")
    freeze_eval: bool = setting(
        False,
        "Keep modules without a trained parameter in evaluation mode: BatchNorm statistics stay, "
        "and dropout is off.",
    )
    clip_norm: float | None = setting(None, "Maximum 2-norm of the gradient.", above=0)
    precision: str = setting(
        "fp32",
        "Arithmetic of the forward and backward pass.",
        choices=("fp32", "tf32", "bf16", "fp16"),
    )
    on_nonfinite: str = setting(
        "stop",
        "Action if the loss or a gradient is NaN or infinite: stop before the next save, or skip "
        "and count the step (checks every gradient; 50 skipped steps in a row stop).",
        choices=("stop", "skip"),
    )
    on_damaged: str = setting(
        "stop",
        "Action if a sample cannot be read: stop with its name, or skip and count it.",
        choices=("stop", "skip"),
    )
    ema_decay: float | None = setting(
        None,
        "Decay per step of the exponential moving average of the weights. The averages are "
        "evaluated and saved.",
        above=0,
    )
    patience_evals: int | None = setting(
        None,
        "Stop early after this many evaluations without a better checkpoint.metric.",
        at_least=1,
    )
    eval_every_epochs: int | None = setting(1, "Evaluate every N epochs.", at_least=1)
    eval_every_steps: int | None = setting(None, "Evaluate every N steps.", at_least=1)
    eval_batch_size: int | None = setting(
        None,
        "Evaluation batch size per rank. Default: the training batch size per rank.",
        at_least=1,
    )
    data_workers: int = setting(
        0, "Data-loading processes per rank. 0 loads in the rank itself.", at_least=0
    )
    log_every_steps: int = setting(10, "Log training metrics every N steps.", at_least=1)
    peak_flops_per_s: float | None = setting(
        None, "Peak FLOP/s of one device, for the MFU. Default: from the GPU's name.", above=0
    )
    profile_first_step: int = setting(
        10, "First profiled step of the attempt, with profile=true.", at_least=1
    )
    profile_steps: int = setting(5, "Number of profiled steps, with profile=true.", at_least=1)
    deterministic: bool = setting(True, "Use deterministic kernels on GPUs.")
    smoke: bool = setting(
        True, "Try the first training batch and one evaluation batch before the first step."
    )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Ranks, devices, restarts and hang detection, if no external launcher started the ranks."""

    nproc: str = setting("auto", "Ranks on this node. auto: one per GPU, or 1 without GPUs.")
    threads: str = setting(
        "auto", "CPU threads per rank. auto: cores / ranks, unchanged when the run resumes."
    )
    device: str = setting("auto", "Device type to train on.", choices=("auto", "cpu", "cuda"))
    max_restarts: int = setting(0, "Maximum restarts of all ranks after a crash.", at_least=0)
    max_attempts_without_progress: int = setting(
        3,
        "Stop after this many consecutive attempts that failed with the same error before saving, "
        "in the same configuration and code. 0 disables this check and the next.",
        at_least=0,
    )
    max_losses_without_progress: int = setting(
        10,
        "Stop after this many attempts that were killed or lost before saving; from the third on, "
        "the next start waits. 0 disables limit and waiting.",
        at_least=0,
    )
    forgive: bool = setting(False, "Start although earlier attempts failed or were lost.")
    watchdog_s: float | None = setting(
        1800.0, "Write stack traces and exit with 75 after this many seconds without a step.",
        above=0,
    )  # fmt: skip
    peer_timeout_s: float = setting(
        60.0,
        "Treat a rank as lost after this many seconds without a heartbeat; the others exit with "
        "75.",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Distribution of the model over ranks; compilation and recomputation of its blocks."""

    strategy: str = setting("ddp", "Parallelism strategy.", choices=("single", "ddp", "fsdp"))
    bucket_cap_mb: float = setting(25.0, "DDP: gradient bucket size in MiB.", above=0)
    gradient_as_bucket_view: bool = setting(True, "DDP: store gradients as views of the buckets.")
    static_graph: bool = setting(False, "DDP: assume the same autograd graph in every step.")
    find_unused_parameters: bool = setting(False, "DDP: allow parameters without a gradient.")
    blocks: list[str] = setting([], "Class names of the model's blocks. Default: by size.")
    min_parameters: int = setting(
        1_000_000, "Minimum parameters of a block, if blocks are chosen by size.", at_least=1
    )
    compile: str = setting(
        "no", "Unit of torch.compile: the model or each block.", choices=("no", "model", "blocks")
    )
    compile_backend: str = setting("inductor", "Backend of torch.compile.")
    recompute: bool = setting(
        False,
        "Activation checkpointing: recompute each block's activations in the backward pass.",
    )
    reshard_after_forward: bool = setting(
        True, "FSDP2: free a block's parameters after its forward; gather again in the backward."
    )
    param_dtype: str = setting(
        "fp32",
        "FSDP2: dtype in which blocks are gathered and computed.",
        choices=("fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Save intervals, retention and the mirror."""

    every_steps: int | None = setting(None, "Save every N steps.", at_least=1)
    every_s: float | None = setting(
        600.0, "Save after this many seconds since the last save.", above=0
    )
    every_epochs: int | None = setting(1, "Save every N epochs.", at_least=1)
    keep_last: int = setting(2, "Newest checkpoints to keep.", at_least=1)
    keep_best: int = setting(1, "Best checkpoints to keep, if metric is set.", at_least=0)
    keep_every_steps: int | None = setting(
        None, "Keep every N-th step's checkpoint permanently.", at_least=1
    )
    timeout_s: float = setting(
        1800.0, "Exit with 75 if a save takes longer than this many seconds.", above=0
    )
    metric: str | None = setting(None, "Evaluation metric that selects the best checkpoint.")
    mode: str | None = setting(
        None,
        "Direction of a better metric: larger or smaller. Default: from its name or class.",
        choices=("max", "min"),
    )
    mirror: str | None = setting(
        None, "Second location for checkpoints (URL or directory), copied in the background."
    )
    mirror_keep_last: int = setting(2, "Newest checkpoints to keep in the mirror.", at_least=1)
    mirror_keep_best: int = setting(
        1, "Best checkpoints to keep in the mirror, if metric is set.", at_least=0
    )
    mirror_keep_every_steps: int | None = setting(
        None, "Keep every N-th step's checkpoint in the mirror permanently.", at_least=1
    )
    on_error: str = setting(
        "continue",
        "Action after a failed save: stop, or continue and retry at the next interval (three in a "
        "row stop).",
        choices=("continue", "stop"),
    )


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """Connection to S3 and other object stores. Credentials: see docs/storage.md."""

    endpoint_url: str | None = setting(
        None, "URL of the S3 server. Default: AWS_ENDPOINT_URL, or Amazon S3."
    )
    region: str | None = setting(None, "Region of the bucket. Default: from the environment.")
    path_style: bool = setting(
        False,
        "Use path-style URLs (server/bucket/key) instead of virtual-hosted ones; older servers "
        "need them.",
    )
    timeout_s: float = setting(60.0, "Timeout of one request in seconds.", above=0)
    retries: int = setting(8, "Maximum retries per request.", at_least=0)
    options: dict[str, Any] = setting(
        {}, "More options of obstore's store or HTTP client, or of the fsspec file system."
    )

    @property
    def server(self) -> str | None:
        """URL of the S3 server, by default from the environment; None: Amazon S3."""
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        return self.endpoint_url or next(filter(None, map(os.environ.get, names)), None)


@dataclass(frozen=True, kw_only=True)
class Preemption:
    """Signals that make the run save and exit with code 75."""

    signals: list[str] = setting(
        ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"], "Names of the signals."
    )
    grace_s: float | None = setting(
        None, "Seconds between the signal and SIGKILL. Default: from the batch script, or 30.",
        above=0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Init:
    """Initial weights of a run that has no checkpoint yet."""

    weights: str | None = setting(
        None,
        "Path or URL of the weights: a safetensors file or folder, a torch.save file, a DCP or "
        "OneFlow folder, or a Perdure run or checkpoint.",
    )
    strict: bool = setting(
        True, "Reject weights that do not match the model exactly. false: load what matches."
    )
    skip: list[str] = setting([], "Name patterns of model tensors to leave at initialization.")
    rename: dict[str, str] = setting(
        {}, "New tensor names by pattern; * matches the same text in both."
    )
    allow_pickle: bool = setting(
        False, "Load pickled weights. This executes any code in the pickle."
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Configuration of a run. Groups with a `_target_` accept any argument of the target."""

    name: str = setting("???", "Name of the run. Default: names of data and model.")
    run_dir: str = setting("???", "Run directory; the same directory is the same run.")
    seed: int = setting(0, "Seed of initial weights, sample order and dropout.", at_least=0)
    resume: str = setting(
        "auto", "auto, never, best, a step, the path of a checkpoint or run, or RUN@STEP."
    )
    resume_override: list[str] = setting(
        [],
        "Keys of changed settings that the same run takes over on resume: optimizer, scheduler, "
        "trainer.freeze, or a part such as optimizer.lr.",
    )
    sample: Sample = setting(Sample, "Shape and classes of one sample.")
    model: dict[str, Any] = setting({}, "The nn.Module, by _target_.")
    data: dict[str, Any] = setting({}, "The data, by _target_.")
    task: dict[str, Any] = setting({}, "Loss and metrics, by _target_.")
    optimizer: dict[str, Any] = setting({}, "The optimizer, by _target_.")
    scheduler: dict[str, Any] = setting({}, "The learning-rate scheduler, by _target_, or empty.")
    parallel: Parallel = setting(Parallel, "Distribution over ranks.")
    trainer: Trainer = setting(Trainer, "Length, batch sizes, evaluation, logging.")
    launch: Launch = setting(Launch, "Ranks, devices and restarts.")
    store: ObjectStore = setting(ObjectStore, "Connection to object stores.")
    checkpoint: Checkpoint = setting(Checkpoint, "Save intervals and retention.")
    preemption: Preemption = setting(Preemption, "Signals that make the run save and exit.")
    tracker: dict[str, Any] = setting({}, "Trackers by name, each by _target_.")
    report: bool = setting(False, "Write report.html to the run directory at the end.")
    profile: bool = setting(
        False, "Profile a few steps into <run_dir>/profile and print the slowest operations."
    )
    init: Init = setting(Init, "Initial weights.")
