"""Which runs a comparison has, in which order, and which learning rate is chosen."""

import math

import comparisons
import pytest

from peft_modal.comparison.choose import choose
from peft_modal.comparison.items import parse_methods
from peft_modal.comparison.plan import COST, Plan, Progress, differences, make_plan
from peft_modal.errors import ConfigError


def keys(runs):
    return [run.key for run in runs]


def bench(methods="lora,full", overrides=(), grid=(0.3, 1, 3), seeds=(0, 1)):
    return make_plan(
        ["pointcloud_bench.yaml"], parse_methods(methods), overrides=overrides, grid=grid, seeds=seeds, cost_rounds=9
    )


def test_the_grid_comes_first_with_one_seed():
    assert keys(comparisons.make().due({})) == [
        f"runs/{method}/lr{lr}/seed0" for method in ("lora", "full") for lr in (0.1, 0.2, 0.3)
    ]


def test_other_seeds_follow_with_the_chosen_rate_and_the_first_seed_is_not_made_again():
    plan = comparisons.make()
    progress = {run.key: comparisons.done(val=run.lr) for run in plan.due({}) if run.method == "lora"}

    assert [key for key in keys(plan.due(progress)) if "lora" in key] == ["runs/lora/lr0.3/seed1"]
    assert keys(plan.chosen("lora", progress)) == ["runs/lora/lr0.3/seed0", "runs/lora/lr0.3/seed1"]


def test_costs_are_measured_when_every_training_is_finished():
    plan = comparisons.make(cost_rounds=2)
    progress = comparisons.complete(plan)
    del progress[COST]

    assert keys(plan.due(progress)) == [COST]
    assert plan.due({**progress, COST: Progress("done")}) == []
    assert plan.size == len(progress) + 1


def test_a_method_whose_whole_grid_failed_gets_no_other_seeds():
    plan = comparisons.make(methods=["lora"])
    progress = {run.key: Progress("failed", error="no") for run in plan.due({})}

    assert plan.due(progress) == []
    assert plan.choice("lora", progress) is None


def test_a_failed_learning_rate_is_not_chosen():
    plan = comparisons.make(methods=["lora"])
    small, middle, large = plan.grid("lora")
    progress = {
        small.key: comparisons.done(val=0.1), middle.key: comparisons.done(val=0.2), large.key: Progress("failed"),
    }  # fmt: skip

    choice = plan.choice("lora", progress)

    assert choice.lr == 0.2
    assert choice.values == {0.1: 0.1, 0.2: 0.2, 0.3: None}
    assert not choice.at_edge


def test_test_figures_have_no_part_in_the_choice():
    plan = comparisons.make(methods=["lora"])
    chosen = set()
    for test in (lambda run: run.lr, lambda run: -run.lr, lambda run: math.nan):
        progress = comparisons.complete(plan, val=lambda run: -abs(run.lr - 0.2), test=test)
        chosen.add(plan.choice("lora", progress).lr)

    assert chosen == {0.2}


def test_without_a_validation_figure_nothing_is_chosen_even_if_there_are_test_figures():
    plan = comparisons.make(methods=["lora"])

    assert plan.choice("lora", {run.key: comparisons.done(test=run.lr) for run in plan.due({})}) is None


def test_a_single_learning_rate_needs_no_validation_figure():
    plan = comparisons.make(methods=["lora"], lrs=[0.1])

    assert plan.choice("lora", {run.key: comparisons.done(test=0.5) for run in plan.due({})}).lr == 0.1


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", {0.1: 0.5, 0.2: 0.7, 0.3: 0.7}, 0.2),
        ("min", {0.1: 0.5, 0.2: 0.5, 0.3: 0.7}, 0.1),
        ("max", {0.1: math.nan, 0.2: 0.1, 0.3: math.inf}, 0.2),
        ("min", {0.1: None, 0.2: 3.0, 0.3: 2.0}, 0.3),
    ],
)
def test_the_best_finite_figure_decides_and_of_equals_the_smaller_rate(mode, values, best):
    assert choose(values, mode).lr == best


def test_the_same_effort_goes_into_every_method():
    plan = bench("lora,full,linear_probe,bitfit")

    assert len({tuple(run.lr for run in plan.grid(label)) for label in plan.methods}) == 1


def test_a_run_has_its_own_rate_and_seed_and_else_the_configuration():
    plan = bench("idpt,lora(rank=2)", overrides=["trainer.max_epochs=3"])
    run = plan.training("lora(rank=2)", 3e-3, 1)

    config = plan.run_config(run)

    assert (config["task"]["lr"], config["seed"], config["data"]["seed"]) == (3e-3, 1, 1)
    assert config["method"]["rank"] == 2
    assert config["trainer"]["max_epochs"] == 3
    assert plan.lrs == (3e-4, 1e-3, 3e-3)
    assert plan.run_config(plan.training("idpt", 1e-3, 0))["method"]["k"] == 20


def test_the_task_says_what_is_chosen_by():
    plan = bench()

    assert (plan.metric, plan.mode) == ("accuracy", "max")


def test_a_plan_survives_json():
    plan = bench()

    assert Plan.from_dict(plan.to_dict()) == plan


def test_plans_that_differ_say_where():
    assert differences(bench().to_dict(), bench(seeds=(0, 1, 2), overrides=["task.lr=2e-3"]).to_dict()) == [
        "config.task.lr (was 0.001, now 0.002)",
        "lrs (was [0.0003, 0.001, 0.003], now [0.0006, 0.002, 0.006])",
        "seeds (was [0, 1], now [0, 1, 2])",
    ]


def test_labels_that_look_alike_as_folders_get_folders_of_their_own():
    plan = comparisons.make(methods=["lora(a=[1])", "lora(a={1})"])

    assert len(set(keys(plan.due({})))) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"methods": "lroa"}, "lora"),
        ({"methods": "lora(rnk=3)"}, "rank"),
        ({"methods": "lora(rank=x)"}, "rank"),
        ({"overrides": ["method.rank=3"]}, "--method.rank: methods are named in --methods"),
        ({"overrides": ["seed=3"]}, "--seed: seeds are named in --seeds"),
        ({"overrides": ["data.seed=3"]}, "--data.seed: seeds are named in --seeds"),
        ({"overrides": ["data.shot=3"]}, "shots"),
    ],
)
def test_mistakes_are_found_before_anything_runs(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        bench(**arguments)


def test_mistakes_of_several_methods_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        bench("lroa,vpt(num_tokns=3)", overrides=["data.shot=3"])

    assert len(caught.value.problems) == 3
