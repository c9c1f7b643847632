"""Freezing and optimizer groups by name patterns."""

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


def test_freeze_stops_matching_parameters_and_reports_each_pattern():
    model = Net()
    lines = parameters.freeze(model, ["body.0.*", "*.bias"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["body.1.weight", "body.4.weight"]
    assert lines == [
        "frozen  body.0.*  2 tensors, 56 parameters",
        "frozen  *.bias  3 tensors, 19 parameters",
    ]


def test_groups_assign_by_first_matching_rule_after_the_rest():
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
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0, 0.5]


def test_groups_without_rules_are_one_group_in_model_order():
    model = Net()
    groups, lines = parameters.groups(model, [])
    assert list(groups[0]["params"]) == list(model.parameters())
    assert lines == []


@pytest.mark.parametrize(("patterns", "text"), [
    (["body.0.wieght"], r"no parameter matches 'body\.0\.wieght'.*body\.0\.weight"),
    (["*"], "freezes every parameter"),
])  # fmt: skip
def test_freeze_with_no_match_or_everything_frozen_raises(patterns, text):
    with pytest.raises(ConfigError, match=text):
        parameters.freeze(Net(), patterns)


def test_groups_rule_with_assigned_or_frozen_matches_raises():
    model = Net()
    rules = [{"names": ["*.bias"], "lr": 1}, {"names": ["body.0.bias"], "lr": 2}]
    with pytest.raises(ConfigError, match=r"groups\[1\].*earlier pattern"):
        parameters.groups(model, rules)
    model.body[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        parameters.groups(model, [{"names": ["body.0.*"], "lr": 1}])


def test_groups_without_parameters_are_one_empty_group():
    assert parameters.groups(nn.Flatten(), []) == ([{"params": []}], [])


def test_groups_match_tied_parameters_by_first_name():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    groups, _ = parameters.groups(model, [{"names": ["0.*"], "lr": 1}])
    assert len(groups) == 1
    with pytest.raises(ConfigError, match="no parameter"):
        parameters.groups(model, [{"names": ["1.*"], "lr": 1}])


@pytest.mark.parametrize(("rules", "text"), [
    ({"names": ["a"]}, "is not a list"),
    ([{"lr": 1}], r"\[0\] needs a list of patterns"),
    ([{"names": "a", "lr": 1}], r"\[0\] needs a list of patterns"),
    ([{"names": [], "lr": 1}], r"\[0\] needs a list of patterns"),
    ([{"names": ["a"]}], r"\[0\] has no setting"),
])  # fmt: skip
def test_check_reports_malformed_group_rules(rules, text):
    run = Run(name="a", run_dir="a", optimizer={"_target_": "torch.optim.SGD", "groups": rules})
    problems = [problem for problem in build.check(run) if problem.key == "optimizer.groups"]
    assert len(problems) == 1
    assert re.search(text, problems[0].text)
