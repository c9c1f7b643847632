"""How the model is spread over ranks: DDP and its warm-up, FSDP2, mixed precision, clipping."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from trainer.cluster.world import World
from trainer.core import rng
from trainer.errors import ConfigError, closest

NOTHING = nullcontext()
"""The context of which nothing comes; one for all steps."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_WARM_UP_PASSES = 2  # static_graph rebuilds its buckets after the second


@dataclass(frozen=True)
class DdpOptions:
    """DistributedDataParallel's own options, with its own names."""

    bucket_cap_mb: float = 25.0
    gradient_as_bucket_view: bool = True
    static_graph: bool = False
    find_unused_parameters: bool = False


@dataclass(frozen=True)
class BlockOptions:
    """What is done to a model before it is spread; its names stay as they are."""

    blocks: Sequence[str] = ()
    """Names of the classes of modules that are blocks. Empty: by size."""
    min_parameters: int = 1_000_000
    """By size: a module with so many parameters that no inner one has taken."""
    compile: str = "no"
    """`no`; `model`: torch.compile of the whole; `blocks`: of each block, which starts sooner."""
    compile_backend: str = "inductor"
    recompute: bool = False
    """Compute each block's activations again in the backward instead of keeping them."""


@dataclass(frozen=True)
class FsdpOptions:
    """What FSDP2 gathers at a time, and in which dtype."""

    blocks: Sequence[str] = ()
    """Names of the classes of modules that are gathered one by one. Empty: by size."""
    min_parameters: int = 1_000_000
    """By size: a module with so many parameters that no inner one has taken."""
    reshard_after_forward: bool = True
    """Free a block's parameters after its forward, and gather them again in the backward."""
    param_dtype: str = "fp32"
    """In which blocks are gathered and computed: `fp32`, `bf16` or `fp16`. Gradients are summed in
    fp32; what is stored and updated is fp32, and so are all of BatchNorm and what the model
    returns, of which the loss is made."""


def modify(model: nn.Module, options: BlockOptions) -> None:
    """Let blocks recompute their activations, and compile; in place, before `wrap`.

    T. Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.

    Raises:
        ConfigError: there are no such blocks, or recomputing one would change what it computes.
    """
    if options.recompute or options.compile == "blocks":
        blocks = _blocks(model, options)
        if not blocks:
            raise ConfigError(
                f"no module below the model has {options.min_parameters:,} parameters, so there "
                "are no blocks; name their classes with parallel.blocks, or lower "
                "parallel.min_parameters"
            )
        if options.recompute:
            _recompute(blocks)
    if options.compile == "blocks":
        for block in blocks:
            _compile(block, options)
    elif options.compile == "model":
        _compile(model, options)


def _compile(module: nn.Module, options: BlockOptions) -> None:
    # A wrapper would put its own name into every parameter's; Module.compile() leaves containers
    # of torch's own classes as they are; and hooks, FSDP's among them, stay outside this way.
    module.forward = torch.compile(module.forward, backend=options.compile_backend)


def _recompute(blocks: Sequence[nn.Module]) -> None:
    for block in blocks:
        if any(isinstance(module, _NORMS) for module in block.modules()):
            raise ConfigError(
                f"parallel.recompute: {type(block).__name__} has a BatchNorm, whose statistics "
                "would take every batch twice; choose blocks without one (parallel.blocks)"
            )
        block.forward = _again(block.forward)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def recomputed(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return recomputed


def wrap(model: nn.Module, world: World, options: DdpOptions | FsdpOptions) -> nn.Module:
    """Return what training calls: `model` itself on one rank, else spread over ranks. Collective.

    DDP is a wrapper around `model`; FSDP2 changes it in place: its parameters become DTensors, and
    an optimizer has to be made afterwards.

    Raises:
        ConfigError: no module is of a class that `blocks` names.
    """
    if isinstance(options, FsdpOptions):
        return _shard(model, world, options)
    if world.size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        bucket_cap_mb=options.bucket_cap_mb,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
        static_graph=options.static_graph,
        find_unused_parameters=options.find_unused_parameters,
    )


class Inside(nn.Module):
    """Calls functions of a model in one forward of its own, so that a wrapper sees it as one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return `compute(model, *arguments)`."""
        return compute(self.model, *arguments)


def wrap_phases(
    model: nn.Module,
    world: World,
    options: DdpOptions | FsdpOptions,
    phases: Mapping[str, Sequence[str]],
) -> dict[str, nn.Module]:
    """Return what the training of each phase calls, as `Inside` is called. Collective.

    DDP is one wrapper for each phase, that reduces the gradients of this phase's parameters alone;
    FSDP2 is one for all, and changes `model` in place as in `wrap`.

    Args:
        model: the plain module.
        world: the ranks.
        options: whose type decides how.
        phases: by name, the names of the parameters that are trained in it.
    """
    if isinstance(options, FsdpOptions):
        return dict.fromkeys(phases, _shard(model, world, options, Inside(model)))
    named = dict(model.named_parameters())
    wrapped = {}
    for phase, names in phases.items():
        with training_only(model, [named[name] for name in names]):  # as its reducer takes them
            wrapped[phase] = wrap(Inside(model), world, options)
    return wrapped


@contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let a backward reach these parameters only; of the others, no gradient is computed.

    A sharded model computes them all the same: what it gathers is another parameter.
    """
    chosen = set(parameters)
    paused = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    for parameter in paused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in paused:
            parameter.requires_grad_(True)


def inside(
    wrapped: nn.Module, model: nn.Module, compute: Callable[..., Any], *arguments: Any
) -> Any:
    """Return `compute(model, *arguments)`, outside of training. Collective where it is sharded.

    Functions that call parts of a sharded model need what its root has gathered.
    """
    if isinstance(wrapped, Inside) and is_sharded(wrapped):
        return wrapped(compute, *arguments)
    return compute(model, *arguments)


def _shard(
    model: nn.Module, world: World, options: FsdpOptions, root: nn.Module | None = None
) -> nn.Module:
    """Shard parameters, gradients and optimizer state evenly over all ranks.

    Y. Zhao et al., PyTorch FSDP, VLDB 2023; per-parameter sharding as torch's `fully_shard` has it.
    """
    root = root or model
    blocks = world.together(lambda: _blocks(model, options))
    if world.size == 1:
        return root
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plain = policy = whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    norms: list[nn.Module] = []
    if options.param_dtype != "fp32":
        policy = MixedPrecisionPolicy(_DTYPES[options.param_dtype], torch.float32)
        whole = replace(policy, output_dtype=torch.float32)
        norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in dict.fromkeys([*norms, *blocks, root]):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=whole if module is root else plain if module in norms else policy,
            reshard_after_forward=options.reshard_after_forward and module is not root,
        )
    if any(True for _ in model.buffers()):  # rank 0's are everybody's, as under DDP
        root.register_forward_pre_hook(
            lambda *_: take_rank0_buffers(model, world) if model.training else None
        )
    return root


def _blocks(model: nn.Module, options: BlockOptions | FsdpOptions) -> list[nn.Module]:
    """Return the modules below `model` that are its blocks, inner ones first."""
    inner = [module for name, module in model.named_modules() if name][::-1]
    if options.blocks:
        found = [module for module in inner if type(module).__name__ in options.blocks]
        lacking = sorted(set(options.blocks) - {type(module).__name__ for module in found})
        if lacking:
            classes = {type(module).__name__ for module in inner}
            raise ConfigError(
                f"parallel.blocks: no module of the model is a {lacking[0]}"
                f"{closest(lacking[0], classes)}"
            )
        return found
    uses = _uses(model)
    taken: set[nn.Parameter] = set()
    chosen = []
    for module in inner:
        own = set(module.parameters()) - taken
        size = sum(parameter.numel() for parameter in own)
        if size < options.min_parameters or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        if all(uses[parameter] == count for parameter, count in _uses(module).items()):
            chosen.append(module)
            taken |= own
    return chosen


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Return how many modules use each parameter; tied ones have to be gathered for all of them."""
    return Counter(p for inner in module.modules() for p in inner.parameters(recurse=False))


def settle_buckets(
    wrapped: nn.Module, model: nn.Module, world: World, passes: Callable[[], None]
) -> None:
    """Bring DDP's reducer to its final buckets before any state is loaded. Collective.

    The first iteration of every reducer sums gradients in other buckets, and so in another order,
    than all later ones. With two ranks a sum is the same either way round; with three or more, a
    resumed run would differ from its first step on. So every attempt, fresh or resumed, first
    runs `passes` (a forward and a backward on the run's first batch) without an update; then
    buffers, gradients and generators are put back.

    A static graph needs the same on two ranks: its first iteration may not leave out the reduction,
    as accumulation does.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        return
    if world.size < 3 and not wrapped.static_graph:
        return
    generators = rng.capture()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for _ in range(_WARM_UP_PASSES):
        passes()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    rng.restore(generators)
    rebuilds_by_now = not (wrapped.find_unused_parameters or wrapped.static_graph)
    if rebuilds_by_now and not has_rebuilt_buckets(wrapped):
        raise RuntimeError("DDP kept its first buckets after the warm-up; resume is not exact")


def has_rebuilt_buckets(wrapped: DistributedDataParallel) -> bool:
    """Return whether the reducer has its final buckets.

    torch has no public word for it; a test fails when this attribute changes. Without unused
    parameters the reducer rebuilds at the second forward, with a static graph at the third, and
    with find_unused_parameters never.
    """
    return bool(wrapped._has_rebuilt_buckets)


def take_rank0_buffers(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers, as DDP's next forward would. Collective."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def reducing(wrapped: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return the context in which gradients are reduced over ranks only if `last` in the step."""
    if is_sharded(wrapped):
        wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDPModule's
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return NOTHING


def is_sharded(module: nn.Module) -> bool:
    """Return whether a forward of `module` gathers its parameters, on all ranks together."""
    return hasattr(type(module), "set_requires_gradient_sync")  # FSDPModule's: `fully_shard`'s


def reshard(module: nn.Module) -> None:
    """Drop gathered copies of the parameters, where `module` is sharded. No communication."""
    for inner in module.modules():
        if is_sharded(inner):
            inner.reshard()  # type: ignore[operator]  # FSDPModule's


def are_finite(model: nn.Module) -> bool:
    """Return whether all that is trained is, of what lies on this rank. No communication."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    largest = [torch.linalg.vector_norm(p, math.inf).isfinite() for p in local if p.numel()]
    return not largest or bool(torch.stack(largest).all())


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the gradients to this 2-norm over these parameters of all ranks; return what it was.

    Collective where they are sharded. The norm is 0-dim, the same on every rank.
    """
    norm = clip_grad_norm_(parameters, max_norm)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def choose_arithmetic(precision: str, *, deterministic: bool) -> None:
    """Set what matrix products and convolutions in float32 may be computed in, process-wide.

    `tf32` allows Ampere and later GPUs 10 bits of mantissa in them (NVIDIA A100 whitepaper, 2020);
    under every other precision all 23 are kept, also by cuDNN, whose own default is otherwise.
    """
    is_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = is_tf32
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of forward passes in `precision`."""
    if precision not in _DTYPES:
        return NOTHING
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler; it does nothing unless `precision` is fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
