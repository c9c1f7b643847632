"""Freezing and groups of parameters by patterns over their names."""

import re

import pytest
import torch
from support.loop_jobs import Net
from torch import nn

from trainer.config.schema import Run
from trainer.errors import ConfigError
from trainer.training import build, parameters


def names_of(model, group):
    ids = {id(p) for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in ids]


def test_frozen_parameters_are_those_that_match_and_a_line_tells():
    model = Net()
    lines = parameters.freeze(model, ["body.0.*", "*.bias"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["body.1.weight", "body.4.weight"]
    assert lines == [
        "frozen  body.0.*  2 tensors, 56 parameters",
        "frozen  *.bias  3 tensors, 19 parameters",
    ]


def test_the_first_rule_that_matches_has_a_parameter_and_the_rest_come_first():
    model = Net()
    biases = {"names": ["*.bias", "body.1.*"], "weight_decay": 0.0}
    rules = [biases, {"names": ["body.4.*"], "lr": 1}]
    groups, lines = parameters.groups(model, rules)
    assert [names_of(model, group) for group in groups] == [
        ["body.0.weight"],
        ["body.0.bias", "body.1.weight", "body.1.bias", "body.4.bias"],
        ["body.4.weight"],
    ]
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {}, {"weight_decay": 0.0}, {"lr": 1},
    ]  # fmt: skip
    assert lines == [
        "weight_decay=0.0  *.bias  3 tensors, 19 parameters",
        "weight_decay=0.0  body.1.*  1 tensors, 8 parameters",
        "lr=1  body.4.*  1 tensors, 24 parameters",
    ]
    ours = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    assert [g["weight_decay"] for g in ours.param_groups] == [0.5, 0.0, 0.5]


def test_without_rules_there_is_one_group_in_the_models_order():
    model = Net()
    groups, lines = parameters.groups(model, [])
    assert list(groups[0]["params"]) == list(model.parameters())
    assert lines == []


@pytest.mark.parametrize(("patterns", "wanted"), [
    (["body.0.wieght"], r"no parameter is called 'body\.0\.wieght'.*body\.0\.weight"),
    (["*"], "leaves nothing to train"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing_or_everything_is_refused(patterns, wanted):
    with pytest.raises(ConfigError, match=wanted):
        parameters.freeze(Net(), patterns)


def test_a_rule_whose_matches_are_taken_or_frozen_is_refused():
    model = Net()
    taken = [{"names": ["*.bias"], "lr": 1}, {"names": ["body.0.bias"], "lr": 2}]
    with pytest.raises(ConfigError, match=r"groups\[1\].*earlier pattern"):
        parameters.groups(model, taken)
    model.body[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        parameters.groups(model, [{"names": ["body.0.*"], "lr": 1}])


def test_a_model_without_anything_to_train_has_one_empty_group():
    assert parameters.groups(nn.Flatten(), []) == ([{"params": []}], [])


def test_tied_parameters_go_by_their_first_name():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    groups, _ = parameters.groups(model, [{"names": ["0.*"], "lr": 1}])
    assert len(groups) == 1
    with pytest.raises(ConfigError, match="no parameter"):
        parameters.groups(model, [{"names": ["1.*"], "lr": 1}])


@pytest.mark.parametrize(("rules", "wanted"), [
    ({"names": ["a"]}, "is not a list"),
    ([{"lr": 1}], r"\[0\] has no names"),
    ([{"names": "a", "lr": 1}], r"\[0\] has no names"),
    ([{"names": [], "lr": 1}], r"\[0\] has no names"),
    ([{"names": ["a"]}], r"\[0\] has no setting"),
])  # fmt: skip
def test_rules_of_another_form_are_a_problem_of_the_configuration(rules, wanted):
    run = Run(name="a", run_dir="a", optimizer={"_target_": "torch.optim.SGD", "groups": rules})
    found = [problem for problem in build.check(run) if problem.key == "optimizer.groups"]
    assert len(found) == 1
    assert re.search(wanted, found[0].text)
