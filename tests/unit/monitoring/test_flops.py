"""FLOP counts against closed formulas of papers; peak FLOPs by device name."""

import pytest
import torch
from support.loop_jobs import Net
from torch import nn
from torch.nn import functional as F

from models.dcgan import DCGAN
from models.gpt import GPT
from models.mlp import MLP
from trainer.cluster.world import World
from trainer.config.schema import Run, Sample, Trainer
from trainer.core import rng
from trainer.monitoring import flops
from trainer.task import Classification, LanguageModel
from trainer.tracking.several import Silent
from trainer.training import build


def counted(model, task, batch):
    return flops.count(flops.on_meta(model), lambda m, b: task.loss(m, b)[0], batch)


@pytest.mark.parametrize(("layers", "width", "heads", "tokens", "batch"), [
    (2, 32, 4, 64, 3), (1, 16, 1, 16, 1), (3, 24, 2, 10, 2),
])  # fmt: skip
def test_gpt_flops_match_the_papers_formula(layers, width, heads, tokens, batch):
    """PaLM, appendix B: 6 N + 12 L H Q T a token, N without embeddings that are looked up."""
    vocabulary = 50
    model = GPT(vocabulary, 64, layers, heads, width)
    x = torch.randint(vocabulary, (batch, tokens))
    matrices = layers * 12 * width * width + width * vocabulary
    per_token = 6 * matrices + 12 * layers * width * tokens
    assert counted(model, LanguageModel(), (x, x)) == per_token * tokens * batch


def test_mlp_flops_are_six_per_weight_minus_the_input_gradient():
    model = MLP((4, 5), (30, 7), 3)
    batch = (torch.randn(11, 4, 5), torch.zeros(11, dtype=torch.int64))
    weights = 20 * 30 + 30 * 7 + 7 * 3
    assert counted(model, Classification(), batch) == 11 * (6 * weights - 2 * 20 * 30)


def test_frozen_weights_need_no_weight_gradient():
    model = MLP((20,), (30,), 3)
    model.layers[1].requires_grad_(False)
    batch = (torch.randn(11, 20), torch.zeros(11, dtype=torch.int64))
    assert counted(model, Classification(), batch) == 11 * (2 * 20 * 30 + (6 - 2) * 30 * 3)
    model.requires_grad_(False)
    assert counted(model, Classification(), batch) == 11 * 2 * (20 * 30 + 30 * 3)


def test_counting_changes_neither_the_model_nor_the_generators():
    model = Net()  # with dropout and BatchNorm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generators = rng.capture()
    assert counted(model, Classification(), (torch.randn(5, 6), torch.zeros(5).long())) > 0
    rng.restore(generators)  # the batch of the test
    state = rng.capture()
    batch = (torch.ones(5, 6), torch.zeros(5).long())
    counted(model, Classification(), batch)
    assert all(torch.equal(state[name], value) for name, value in rng.capture().items())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_copy_has_no_data_and_keeps_parameters_tied():
    model = GPT(50, 16, 1, 1, 8)
    twin = flops.on_meta(model)
    assert {parameter.device.type for parameter in twin.parameters()} == {"meta"}
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


# --- as the run is built -----------------------------------------------------------------------

SYNTHETIC = {"_target_": "trainer.data.synthetic.Synthetic", "shape": [1, 8, 8], "classes": 10,
             "train_samples": 40, "eval_samples": 8}  # fmt: skip
MLP_NODE = {"_target_": "models.mlp.MLP", "input_shape": [1, 8, 8], "hidden": [16], "classes": 10}


def built(model, task="trainer.task.Classification", **trainer):
    settings = {"global_batch_size": 12, "accumulate": 3, "peak_flops_per_s": 1e9, **trainer}
    run = Run(
        name="a", run_dir="a", sample=Sample(shape=[1, 8, 8]), model=model, data=SYNTHETIC,
        task={"_target_": task}, optimizer={"_target_": "torch.optim.SGD", "lr": 0.1},
        trainer=Trainer(**settings),
    )  # fmt: skip
    return build.build_job(run, World(), build.build_data(run), Silent())


def test_job_counts_all_microbatches_of_a_step():
    job = built(MLP_NODE)
    assert job.flops_per_step == 12 * (6 * (64 * 16 + 16 * 10) - 2 * 64 * 16)
    assert job.peak_flops_per_s == 1e9
    assert list(job.notes) == []


def test_each_phase_counts_with_its_own_parameters():
    node = {"_target_": "models.dcgan.DCGAN", "input_shape": [1, 8, 8], "latent": 3, "width": 4}
    task = "trainer.task.Adversarial"
    both = built(node, task, global_batch_size=4, accumulate=1).flops_per_step
    model = DCGAN([1, 8, 8], latent=3, width=4)
    every = sum(
        counted(model, _Of(phase), (torch.zeros(4, 1, 8, 8), torch.zeros(4)))
        for phase in ("discriminator", "generator")
    )
    assert 0 < both < every  # where all parameters have gradients in both


class _Of:
    def __init__(self, phase):
        self.phase = phase

    def loss(self, model, batch):
        from trainer.task import Adversarial

        return Adversarial().loss(model, batch, self.phase)


class Looks(nn.Module):
    """Decides by the data, which a model without data cannot."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 10)

    def forward(self, x):
        x = self.body(x.flatten(1))
        return x if x.sum().item() > 0 else -x


class Uncopied(Looks):
    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


@pytest.mark.parametrize("kind", ["Looks", "Uncopied"])
def test_uncountable_model_logs_a_message_and_trains(kind):
    job = built({"_target_": f"{__name__}.{kind}"})
    assert job.flops_per_step is None
    (note,) = job.notes
    assert note.startswith("warning: no MFU, cannot count model FLOPs: ")
    assert F.relu(job.model(torch.zeros(2, 1, 8, 8))).shape == (2, 10)


def test_on_a_device_without_a_known_peak_nothing_is_counted():
    job = built({"_target_": f"{__name__}.Looks"}, peak_flops_per_s=None)
    assert (job.flops_per_step, job.peak_flops_per_s, list(job.notes)) == (None, None, [])


# --- names of devices --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arithmetic", "teraflops"), [
    ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
    ("NVIDIA H100 80GB HBM3", "fp32", 67),
    ("NVIDIA H100 PCIe", "bf16", 756),
    ("NVIDIA H100 NVL", "fp16", 835),
    ("NVIDIA H200", "bf16", 989.4),
    ("NVIDIA GH200 480GB", "tf32", 494.7),
    ("NVIDIA B200", "bf16", 2250),
    ("NVIDIA A100-SXM4-80GB", "tf32", 156),
    ("NVIDIA A100 80GB PCIe", "bf16", 312),
    ("NVIDIA A100-PCIE-40GB", "bf16", 312),
    ("NVIDIA A10", "bf16", 125),
    ("NVIDIA L4", "bf16", 121),
    ("NVIDIA L40S", "bf16", 362),
    ("NVIDIA L40", "bf16", 181),
    ("Tesla T4", "fp16", 65),
    ("Tesla T4", "bf16", None),
    ("Tesla V100-SXM2-16GB", "fp16", 125),
    ("Tesla V100-PCIE-32GB", "fp16", 112),
    ("Tesla V100S-PCIE-32GB", "fp32", 16.4),
    ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
    ("NVIDIA GeForce RTX 4090 D", "bf16", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
    ("NVIDIA A10G", "bf16", None),
    ("NVIDIA A1000", "bf16", None),
    ("Some Other Device", "bf16", None),
])  # fmt: skip
def test_device_peak_is_found_by_exact_name(name, arithmetic, teraflops):
    peak = flops.peak_flops_per_s(name, arithmetic)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))
