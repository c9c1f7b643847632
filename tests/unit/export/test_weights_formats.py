"""Weight formats: a plain script resumes from them bit for bit, and other tools read them."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.loop_jobs import Net, a_job, a_saver, go_on
from support.mode_optimizers import ScheduleFree
from support.state_dicts import net
from torch import nn

from trainer.checkpoint import Content, Writer, lineage, save, state_tree
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Init
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import ConfigError
from trainer.export.contract import ExportError
from trainer.export.exported_model import Choices
from trainer.export.exporting import export
from trainer.export.formats import FORMATS
from trainer.importing import weights
from trainer.importing.formats import open_external
from trainer.storage import open_store
from trainer.training import loop
from trainer.training.contents import collect
from trainer.training.ema import Ema
from trainer.training.job import Phase


def a_run(folder, content, step=3, config=None):
    """Write one checkpoint; return the run's directory as text."""
    store = open_store(str(folder))
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    save(Writer(store, World(), attempt), content, step=step, config=config or {})
    return str(folder)


def of_model(folder, model):
    content = Content(objects={"run": State(step=3).state_dict()})
    state_tree.add_model(content, model, with_buffers=True)
    return a_run(folder, content)


def equal(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(actual[name], value), name


# --- checkpoint --------------------------------------------------------------------------------

SCRIPT = """
import sys

sys.modules["trainer"] = sys.modules["models"] = None  # as where this project is not installed
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.body(x)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)


def frozen(model):
    model.body[0].requires_grad_(False)
    return torch.optim.AdamW(model.parameters(), lr=9.0)


def grouped(model):
    return torch.optim.Adam([
        {"params": [p for n, p in model.named_parameters() if "bias" not in n]},
        {"params": [p for n, p in model.named_parameters() if "bias" in n]},
    ], lr=9.0)


for name in sys.argv[1:]:
    saved = torch.load(f"{name}.ckpt", weights_only=True)
    model = Net()
    optimizer = globals()[name](model)
    schedule = StepLR(optimizer, 2)
    model.load_state_dict(saved["model_state_dict"])
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    schedule.load_state_dict(saved["scheduler_state_dict"])
    named = {parameter: n for n, parameter in model.named_parameters()}
    groups = [[named[p] for p in group["params"]] for group in optimizer.param_groups]
    assert groups == saved["parameter_names"], groups
    x, y = torch.load(f"{name}.batch", weights_only=True)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    torch.save({
        "epoch": saved["epoch"], "step": saved["global_step"], "loss": saved["loss"],
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }, f"{name}.after")
"""


def adamw_without_a_layer(model):
    model.body[0].requires_grad_(False)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def two_groups(model):
    named = list(model.named_parameters())
    weights_ = {"params": [p for n, p in named if "bias" not in n], "weight_decay": 0.1}
    return torch.optim.Adam([weights_, {"params": [p for n, p in named if "bias" in n]}], lr=0.1)


CASES = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "frozen": adamw_without_a_layer,
    "grouped": two_groups,
}


def a_schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def one_more(folder, case, out):
    """Train 7 steps, export, and take an eighth; return the job after it and the exported step."""

    def job(max_steps):
        model = Net(dropout=0.0)
        return a_job(model=model, optimizer=CASES[case], schedule=a_schedule, max_steps=max_steps)

    first = job(7)
    saver = a_saver(folder)
    state = State()
    assert loop.train(first, state, saver, Stop(World()))
    done = export(str(folder), "checkpoint", out=str(out / f"{case}.ckpt"))
    microbatches, _ = next(first.data.batches(state.cursor))
    torch.save(tuple(microbatches[0]), out / f"{case}.batch")
    second = job(8)
    go_on(folder, second)
    return second, done, state


def test_plain_script_takes_the_same_next_step(tmp_path):
    jobs = {case: one_more(tmp_path / case, case, tmp_path) for case in CASES}
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-I", "script.py", *CASES],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case, (job, exported, reached) in jobs.items():
        after = torch.load(tmp_path / f"{case}.after", weights_only=True)
        assert (after["epoch"], after["step"]) == (1, 7)
        assert after["loss"] == reached.metrics.get("loss")
        assert exported.record["format"] == "checkpoint"
        equal(after["model"], job.model.state_dict())
        optimizer = job.phases[0].optimizer
        expected, actual = optimizer.state_dict(), after["optimizer"]
        if case != "frozen":  # there a script has other numbers for the same parameters
            assert expected["param_groups"] == actual["param_groups"]
        named = {id(parameter): name for name, parameter in job.model.named_parameters()}
        saved = torch.load(exported.path, weights_only=True)
        names = dict(enumerate(name for group in saved["parameter_names"] for name in group))
        states = {names[number]: state for number, state in actual["state"].items()}
        assert len(states) == len(optimizer.state)
        for parameter, values in optimizer.state.items():
            equal(states[named[id(parameter)]], values)
        assert after["schedule"] == job.phases[0].scheduler.state_dict()


def test_checkpoint_has_counters_and_averages(tmp_path):
    job = a_job()
    job.ema = Ema(job.model, 0.9)
    for average in job.ema.averages.values():
        average.add_(1.0)
    state = State(step=9, samples=72, cursor={"epoch": 2, "batch": 1}, metrics={"loss": 0.5})
    run = a_run(tmp_path / "run", collect(job, state), 9)
    saved = torch.load(export(run, "checkpoint").path, weights_only=True)
    assert (saved["global_step"], saved["samples"], saved["loss"]) == (9, 72, 0.5)
    assert (saved["scheduler_state_dict"], saved["scaler_state_dict"]) == (None, {})
    equal(saved["model_state_dict"], job.model.state_dict())
    averaged = saved["ema_state_dict"]
    assert torch.equal(averaged["body.0.bias"], job.model.body[0].bias + 1.0)
    Net().load_state_dict(averaged, strict=True)


# --- weights of the evaluations ----------------------------------------------------------------


def schedule_free(**changes):
    """Return a job whose optimizer trains other weights than it evaluates."""
    job = a_job(
        optimizer=lambda model: ScheduleFree(model.parameters(), lr=0.1),
        eval_every=Every(steps=3), **changes,
    )  # fmt: skip
    job.phases[0].optimizer.train()
    return job


def loss_of(path, dataset):
    """Return the loss of exported weights on all samples, without the code under test."""
    model = Net().eval()
    model.load_state_dict(load_file(path), strict=True)
    inputs, labels = dataset.tensors
    return nn.functional.cross_entropy(model(inputs), labels).item()


def test_export_of_a_resumed_schedule_free_run_has_the_evaluated_weights(tmp_path):
    config = {"trainer": {"ema_decay": None}}
    run = tmp_path / "run"
    go_on(run, schedule_free(max_steps=7), config=config)
    job = schedule_free()
    go_on(run, job, config=config)
    logged = [line["loss"] for line in job.tracker.of("eval")]
    assert len(logged) == 2  # steps 9 and 12
    data, trained = job.evaluation.dataset, job.model.state_dict()
    done = export(str(run))
    assert (done.path.name, done.record["weights"]) == ("step-00000012-ema.safetensors", "ema")
    assert loss_of(done.path, data) == pytest.approx(logged[-1])
    as_ema = export(str(run), out=str(tmp_path / "ema"), choices=Choices(averaged=True))
    equal(load_file(as_ema.path), load_file(done.path))
    plain = export(str(run), choices=Choices(averaged=False))
    assert plain.path.name == "step-00000012.safetensors"
    equal(load_file(plain.path), trained)
    assert loss_of(plain.path, data) != pytest.approx(logged[-1], rel=1e-4)
    saved = torch.load(export(str(run), "checkpoint").path, weights_only=True)
    equal(saved["model_state_dict"], trained)
    equal(saved["ema_state_dict"], load_file(done.path))


def test_export_of_moving_averages_has_the_trained_weights_by_default(tmp_path):
    job = a_job()
    job.ema = Ema(job.model, 0.9)
    for average in job.ema.averages.values():
        average.add_(1.0)
    config = {"trainer": {"ema_decay": 0.9}}
    done = export(a_run(tmp_path / "run", collect(job, State(step=3)), config=config))
    assert done.record["weights"] == "model"
    equal(load_file(done.path), job.model.state_dict())


# --- other state -------------------------------------------------------------------------------


class Extra(nn.Linear):
    """A module with extra state."""

    def __init__(self):
        super().__init__(2, 2)
        self.counted = {"a": (1, 2)}

    def get_extra_state(self):
        return self.counted

    def set_extra_state(self, state):
        self.counted = state


def test_extra_state_and_tied_weights_load_strictly(tmp_path):
    model = nn.ModuleDict({"a": Extra(), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    job = a_job(model=model)
    run = a_run(tmp_path / "run", collect(job, State(step=3)))
    saved = torch.load(export(run, "checkpoint").path, weights_only=True)
    assert saved["parameter_names"] == [["a.weight", "a.bias"]]  # one tensor, one parameter
    assert len(saved["optimizer_state_dict"]["param_groups"][0]["params"]) == 2
    other = nn.ModuleDict({"a": Extra(), "b": nn.Linear(2, 2, bias=False)})
    other["a"].counted = None
    other.load_state_dict(saved["model_state_dict"], strict=True)
    assert other["a"].counted == {"a": (1, 2)}
    shared = saved["model_state_dict"]
    assert shared["a.weight"].data_ptr() == shared["b.weight"].data_ptr()


@pytest.mark.parametrize("choices", [
    Choices(averaged=True), Choices(dtype="bf16"), Choices(part="body"),
])  # fmt: skip
@pytest.mark.parametrize("format", ["checkpoint", "bundle"])
def test_checkpoint_rejects_changed_weights(tmp_path, choices, format):
    run = a_run(tmp_path / "run", collect(a_job(), State(step=3)))
    with pytest.raises(ConfigError, match=f"does not work with format={format}"):
        export(run, format, choices=choices)
    assert not (tmp_path / "run" / "exports").exists()


def test_checkpoint_of_another_loop_raises_config_error(tmp_path):
    content = Content()
    state_tree.add_model(content, net(1), with_buffers=True)
    with pytest.raises(ConfigError, match="was not written by a run"):
        export(a_run(tmp_path / "run", content), "checkpoint")


# --- bundle ------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two networks and a top-level tensor."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.generator = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.discriminator = nn.Linear(2, 1)
        self.register_buffer("temperature", torch.tensor(0.5))


def trained(model, optimizer, steps=2):
    """Take steps; the gradients are functions of the weights alone."""
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p * p).sum() for p in model.parameters()).backward()
        optimizer.step()


def several(seed=1):
    job = a_job(model=Two(seed))
    parts = {"discriminator": job.model.discriminator, "generator": job.model.generator}
    job.phases = []
    for name, part in parts.items():
        optimizer = torch.optim.Adam(part.parameters(), lr=0.1)
        schedule = a_schedule(optimizer)
        trained(part, optimizer)
        schedule.step()
        job.phases.append(Phase(name=name, wrapped=part, optimizer=optimizer, scheduler=schedule))
    return job


def test_bundle_resumes_every_model_with_its_optimizer(tmp_path):
    job = several()
    run = a_run(tmp_path / "run", collect(job, State(step=3)))
    done = export(run, "bundle")
    assert done.path.name == "step-00000003.tar"
    saved = torch.load(done.path, weights_only=True)
    assert saved["global_step"] == 3
    equal(saved["model_state_dict"], {"temperature": torch.tensor(0.5)})
    fresh = Two(2)
    for phase in job.phases:
        original, part = getattr(job.model, phase.name), getattr(fresh, phase.name)
        part.load_state_dict(saved[f"{phase.name}_state_dict"], strict=True)
        optimizer = torch.optim.Adam(part.parameters(), lr=9.0)
        optimizer.load_state_dict(saved[f"optimizer_{phase.name}_state_dict"])
        schedule = a_schedule(optimizer)
        schedule.load_state_dict(saved[f"scheduler_{phase.name}_state_dict"])
        trained(part, optimizer)
        trained(original, phase.optimizer)
        equal(part.state_dict(), original.state_dict())
        assert schedule.get_last_lr() == phase.scheduler.get_last_lr()


def test_checkpoint_with_several_optimizers_raises_config_error(tmp_path):
    run = a_run(tmp_path / "run", collect(several(), State(step=3)))
    with pytest.raises(ConfigError, match=r"per phase \(discriminator, generator\); use"):
        export(run, "checkpoint")


def test_bundle_with_one_optimizer(tmp_path):
    job = a_job(model=Two(1))
    trained(job.model, job.phases[0].optimizer)
    run = a_run(tmp_path / "run", collect(job, State(step=3)))
    saved = torch.load(export(run, "bundle").path, weights_only=True)
    assert set(saved) >= {"generator_state_dict", "discriminator_state_dict", "model_state_dict"}
    fresh = Two(2)
    torch.optim.SGD(fresh.parameters()).load_state_dict(saved["optimizer_state_dict"])


def test_bundle_with_equal_keys_raises_config_error(tmp_path):
    class Model(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.add_module(part, nn.Linear(2, 2))
            self.scale = nn.Parameter(torch.ones(1))

    for part, text in (("model", "a submodule named 'model'"), ("optimizer", "both be named")):
        job = a_job(model=Model(part))
        run = a_run(tmp_path / part, collect(job, State(step=3)))
        with pytest.raises(ConfigError, match=text):
            export(run, "bundle")


# --- oneflow -----------------------------------------------------------------------------------


def test_oneflow_folder_has_every_tensor(tmp_path):
    model = net(1)
    done = export(of_model(tmp_path / "run", model), "oneflow")
    expected = model.state_dict()
    source = open_external(done.url)
    equal({name: source.fetch(name) for name in source.tensors}, expected)
    for name, value in expected.items():
        dims = "".join(f"  dim: {dim}\n" for dim in value.shape)
        text = (done.path / name / "meta").read_text()
        kind = {torch.float32: "kFloat", torch.bool: "kBool", torch.bfloat16: "kBFloat16"}.get(
            value.dtype, "kInt64"
        )
        assert text == f"shape {{\n{dims}}}\ndata_type: {kind}\n"
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        assert (done.path / name / "out").read_bytes() == flat.numpy().tobytes()
    assert (done.path / FORMATS["oneflow"].last_file).read_bytes() == b""


class Named(nn.Module):
    """A model with a tensor name that cannot be a folder name."""

    def __init__(self, name, dtype=torch.float32):
        super().__init__()
        self.register_buffer(name, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(("model", "text"), [
    (Named("a/b"), "the tensor name 'a/b' cannot be a folder name"),
    (Named("/etc/x"), r"tensor '/etc/x': .* outside of the folder; use format=safetensors"),
    (Named("snapshot_done"), "cannot be a folder name"),
    (
        Named("w", torch.complex64),
        r"'w': OneFlow does not support torch\.complex64; use format=safetensors",
    ),
])  # fmt: skip
def test_oneflow_error_names_the_tensor_and_leaves_no_files(tmp_path, model, text):
    with pytest.raises(ExportError, match=text):
        export(of_model(tmp_path / "run", model), "oneflow")
    assert not (tmp_path / "run" / "exports").exists()


# --- safetensors -------------------------------------------------------------------------------


def test_large_weights_are_shards_that_safetensors_opens(tmp_path):
    model = net(1)
    done = export(of_model(tmp_path / "run", model), options={"max_shard_bytes": "100"})
    files = sorted(path.name for path in done.path.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((done.path / FORMATS["safetensors"].last_file).read_text())
    saved = {}
    for name, file in index["weight_map"].items():
        with safe_open(done.path / file, "pt") as shard:
            saved[name] = shard.get_tensor(name)
            shard_bytes = sum(shard.get_tensor(key).nbytes for key in shard.keys())  # noqa: SIM118
            assert shard_bytes <= 100 or len(list(shard.keys())) == 1
    equal(saved, model.state_dict())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in saved.values())


@pytest.mark.parametrize("text", ["", "0", "5XB", "-1", "many", "5 G", "1e9"])
def test_malformed_shard_size_raises_config_error(tmp_path, text):
    run = of_model(tmp_path / "run", net(1))
    with pytest.raises(ConfigError, match="is not a size in bytes"):
        export(run, options={"max_shard_bytes": text})


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_shards(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=11)
    model = GPT2LMHeadModel(config)
    run = of_model(tmp_path / "run", model)
    done = export(run, options={"max_shard_bytes": "1.5kB"})
    config.save_pretrained(done.path)
    loaded = GPT2LMHeadModel.from_pretrained(done.path)
    equal(loaded.state_dict(), model.state_dict())
    assert len(list(done.path.glob("*.safetensors"))) > 2


# --- round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["state_dict", "safetensors", "checkpoint", "bundle", "oneflow"])
def test_export_initializes_a_run(tmp_path, format):
    job = several()
    if format == "checkpoint":
        job.phases = a_job(model=job.model).phases
    run = a_run(tmp_path / "run", collect(job, State(step=3)))
    options = {"max_shard_bytes": "20"} if format == "safetensors" else {}
    done = export(run, format, options=options)
    fresh = Two(5)
    loaded = weights.load(fresh, Init(weights=done.url))
    equal(fresh.state_dict(), job.model.state_dict())
    assert "loaded       12 tensors" in loaded.lines[1]
