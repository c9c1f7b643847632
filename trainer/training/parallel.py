"""Parallel strategies and numerics: DDP and its warm-up, FSDP2, mixed precision, clipping."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from trainer.cluster.world import World
from trainer.core import rng
from trainer.errors import ConfigError, closest

if TYPE_CHECKING:
    from trainer.config.schema import Parallel

NOTHING = nullcontext()
"""Shared no-op context."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_WARM_UP_PASSES = 2  # static_graph rebuilds its buckets after the second


def modify(model: nn.Module, options: "Parallel") -> None:
    """Compile the model or its blocks, and recompute block activations; in place, before `wrap`.

    Parameter names do not change. Activation checkpointing: T. Chen et al., Training Deep Nets
    with Sublinear Memory Cost, 2016.

    Raises:
        ConfigError: the model has no blocks, or a block has BatchNorm and would be recomputed.
    """
    if options.recompute or options.compile == "blocks":
        blocks = _blocks(model, options)
        if not blocks:
            raise ConfigError(
                f"the model has no blocks: no submodule has {options.min_parameters:,} parameters. "
                "List block classes in parallel.blocks, or lower parallel.min_parameters"
            )
        for block in blocks if options.recompute else ():
            _recompute(block)
    if options.compile != "no":
        # Module.compile() does not compile containers of torch's own classes, and a wrapper would
        # add its name to every parameter's. Hooks, FSDP's among them, stay outside.
        for module in blocks if options.compile == "blocks" else [model]:
            module.forward = torch.compile(module.forward, backend=options.compile_backend)


def _recompute(block: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    if any(isinstance(module, _NORMS) for module in block.modules()):
        raise ConfigError(
            f"parallel.recompute: {type(block).__name__} contains BatchNorm, whose running "
            "statistics would be updated twice per batch; choose blocks without it "
            "(parallel.blocks)"
        )
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def wrap(model: nn.Module, world: World, options: "Parallel") -> nn.Module:
    """Return the module that training calls, parallelised over all ranks. Collective.

    DDP wraps `model`; on one rank it is `model` itself. FSDP2 changes `model` in place: its
    parameters become DTensors, so build the optimizer afterwards.

    Raises:
        ConfigError: no module has a class listed in `parallel.blocks`.
    """
    if options.strategy == "fsdp":
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
    """Wrapper that calls any function of the model within a single forward.

    DDP and FSDP hooks then run once, even if the function calls parts of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return `compute(model, *arguments)`."""
        return compute(self.model, *arguments)


def wrap_phases(
    model: nn.Module,
    world: World,
    options: "Parallel",
    phases: Mapping[str, Sequence[str]],
) -> dict[str, nn.Module]:
    """Return, by phase, the module that its training calls as `Inside` is called. Collective.

    DDP gets one wrapper per phase, which reduces only that phase's gradients. FSDP2 shares one
    root among all phases and changes `model` in place, as in `wrap`.

    Args:
        model: the plain module.
        world: the ranks.
        options: the parallel settings.
        phases: parameter names by phase.
    """
    if options.strategy == "fsdp":
        return dict.fromkeys(phases, _shard(model, world, options, Inside(model)))
    named = dict(model.named_parameters())
    wrapped = {}
    for phase, names in phases.items():
        with training_only(model, [named[name] for name in names]):  # DDP registers only these
            wrapped[phase] = wrap(Inside(model), world, options)
    return wrapped


@contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Disable gradients for all parameters of `model` but these.

    FSDP2 computes all gradients regardless, since it gathers into other parameters.
    """
    active = set(parameters)
    frozen = [p for p in model.parameters() if p.requires_grad and p not in active]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def inside(
    wrapped: nn.Module, model: nn.Module, compute: Callable[..., Any], *arguments: Any
) -> Any:
    """Return `compute(model, *arguments)`, outside of training. Collective if sharded.

    A function that calls parts of a sharded model needs the parameters its root gathers.
    """
    if isinstance(wrapped, Inside) and is_sharded(wrapped):
        return wrapped(compute, *arguments)
    return compute(model, *arguments)


def _shard(
    model: nn.Module, world: World, options: "Parallel", root: nn.Module | None = None
) -> nn.Module:
    """Shard parameters, gradients and optimizer state evenly over all ranks.

    Each block is gathered on its own, in `param_dtype`; gradients are reduced in fp32, and
    BatchNorm and the model's outputs stay fp32. Y. Zhao et al., PyTorch FSDP, VLDB 2023;
    per-parameter sharding as in torch's `fully_shard`.
    """
    root = root or model
    blocks = world.run_on_all(lambda: _blocks(model, options))
    if world.size == 1:
        return root
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    fp32 = policy = root_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    norms: list[nn.Module] = []
    if options.param_dtype != "fp32":
        policy = MixedPrecisionPolicy(_DTYPES[options.param_dtype], torch.float32)
        root_policy = replace(policy, output_dtype=torch.float32)
        norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in dict.fromkeys([*norms, *blocks, root]):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=root_policy if module is root else fp32 if module in norms else policy,
            reshard_after_forward=options.reshard_after_forward and module is not root,
        )
    if any(True for _ in model.buffers()):  # broadcast from rank 0, as under DDP
        root.register_forward_pre_hook(
            lambda *_: take_rank0_buffers(model, world) if model.training else None
        )
    return root


def _blocks(model: nn.Module, options: "Parallel") -> list[nn.Module]:
    """Return the submodules that are blocks, by class or else by size, innermost first.

    By size, a module is a block if at least `min_parameters` of its parameters are in no inner
    block, and if no module outside uses any of them.
    """
    modules = [module for name, module in model.named_modules() if name][::-1]
    if options.blocks:
        classes = {type(module).__name__ for module in modules}
        for name in sorted(set(options.blocks) - classes):
            raise ConfigError(
                f"parallel.blocks: the model has no module of class {name}{closest(name, classes)}"
            )
        return [module for module in modules if type(module).__name__ in options.blocks]
    uses = _uses(model)
    assigned: set[nn.Parameter] = set()
    blocks = []
    for module in modules:
        free = set(module.parameters()) - assigned
        size = sum(parameter.numel() for parameter in free)
        if size < options.min_parameters or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        if all(uses[parameter] == count for parameter, count in _uses(module).items()):
            blocks.append(module)
            assigned |= free
    return blocks


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Return how many modules use each parameter; tied ones are used by several."""
    return Counter(p for user in module.modules() for p in user.parameters(recurse=False))


def settle_buckets(
    wrapped: nn.Module, model: nn.Module, world: World, passes: Callable[[], None]
) -> None:
    """Bring DDP's reducer to its final buckets before any state is loaded. Collective.

    The first iteration of a reducer sums gradients in different buckets, and so in a different
    order, than all later ones. Two ranks give the same sum in either order; with three or more, a
    resumed run would differ from its first step. Therefore every attempt, fresh or resumed, first
    runs `passes` (a forward and a backward on the run's first batch) without an update, then
    restores buffers, gradients and generators.

    A static graph needs this on two ranks too: its first iteration must not skip the reduction,
    as gradient accumulation does.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        return
    if world.size < 3 and not wrapped.static_graph:
        return
    generators = rng.capture()
    with buffers_restored(model):
        for _ in range(_WARM_UP_PASSES):
            passes()
    for parameter in model.parameters():
        parameter.grad = None
    rng.restore(generators)
    rebuilds_by_now = not (wrapped.find_unused_parameters or wrapped.static_graph)
    if rebuilds_by_now and not has_rebuilt_buckets(wrapped):
        raise RuntimeError("DDP did not rebuild its buckets in the warm-up: resume is not exact")


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restore the buffers at the end of the block, also those that were replaced or created."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    owners = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, buffers in owners:
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, before in values:
                buffer.copy_(before)


def has_rebuilt_buckets(wrapped: DistributedDataParallel) -> bool:
    """Return whether the reducer has its final buckets.

    torch has no public attribute for it; a test fails when this one changes. The reducer rebuilds
    at the second forward, with a static graph at the third, and with find_unused_parameters never.
    """
    return bool(wrapped._has_rebuilt_buckets)


def take_rank0_buffers(model: nn.Module, world: World) -> None:
    """Broadcast rank 0's buffers to all ranks, as DDP's next forward would. Collective."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def reducing(wrapped: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return a context that reduces gradients over ranks only in the `last` microbatch."""
    if is_sharded(wrapped):
        wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDPModule's
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return NOTHING


def is_sharded(module: nn.Module) -> bool:
    """Return whether `module` is FSDP2's: its forward gathers parameters from all ranks."""
    return hasattr(type(module), "set_requires_gradient_sync")  # as added by `fully_shard`


def reshard(module: nn.Module) -> None:
    """Free gathered parameters if `module` is sharded. No communication."""
    for submodule in module.modules():
        if is_sharded(submodule):
            submodule.reshard()  # type: ignore[operator]  # FSDPModule's


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or a plain tensor itself."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def are_finite(model: nn.Module) -> bool:
    """Return whether this rank's part of the trained parameters is finite. No communication."""
    local = [local_part(p.detach()) for p in model.parameters() if p.requires_grad]
    largest = [torch.linalg.vector_norm(p, math.inf).isfinite() for p in local if p.numel()]
    return not largest or bool(torch.stack(largest).all())


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip gradients to a global 2-norm of `max_norm`; return the norm before, 0-dim.

    Collective if the parameters are sharded. The norm is the same on every rank.
    """
    norm = clip_grad_norm_(parameters, max_norm)
    total: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return total


def choose_arithmetic(precision: str, *, deterministic: bool) -> None:
    """Set the arithmetic of fp32 matrix products and convolutions, for the process.

    `tf32` allows a 10-bit mantissa on Ampere and later GPUs (NVIDIA A100 whitepaper, 2020). Every
    other precision uses all 23 bits, also in cuDNN, which allows TF32 by default.
    """
    is_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = is_tf32
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context for forward passes in `precision`."""
    if precision not in _DTYPES:
        return NOTHING
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, disabled unless `precision` is fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
