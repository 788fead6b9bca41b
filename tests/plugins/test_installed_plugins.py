"""The example distribution, installed by pip, with broken plugins beside it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from plugins.conftest import EXAMPLE, Environment

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1"

[project.entry-points."peft_modal.modalities"]
{points}

[tool.hatch.build.targets.wheel]
include = ["*.py"]
"""
BROKEN = {
    "no-good": {
        "raises_at_import": "raise RuntimeError('no licence found')",
        "leaves_at_import": "raise SystemExit(3)",
        "of_another_time": "from peft_modal.registry import Plugin\nPLUGIN = Plugin('of_another_time', api=99)",
        "no_plugin": "PLUGIN = 'hello'",
    },
    "half-good": {
        "a_twin": (
            "from peft_modal.registry import Entry, Plugin\n"
            "PLUGIN = Plugin('a_twin', modality='timeseries', methods={'conv_adapter': Entry('a_twin:Method')})"
        ),
        "bad_parts": (
            "from peft_modal.registry import Entry, Plugin\n"
            "PLUGIN = Plugin('bad_parts', methods={'absent': Entry('bad_parts.absent:Method')}, "
            "backbones={'faulty': Entry('bad_parts:Backbone')}, configs=('bad_parts_configs',))\n"
            "class Backbone:\n"
            "    @classmethod\n"
            "    def tiny(cls):\n"
            "        raise ZeroDivisionError('tiny is broken')\n"
        ),
    },
}


@pytest.fixture(scope="module")
def with_broken(
    make_environment: Callable[..., Environment], example: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    environment = make_environment(example)
    folder = tmp_path_factory.mktemp("distributions")
    for distribution, modules in BROKEN.items():
        (folder / distribution).mkdir()
        points = "\n".join(f'{name} = "{name}:PLUGIN"' for name in modules)
        (folder / distribution / "pyproject.toml").write_text(PROJECT.format(distribution=distribution, points=points))
        for name, code in modules.items():
            (folder / distribution / f"{name}.py").write_text(code + "\n")
    environment.install(*(folder / distribution for distribution in BROKEN))
    return environment


def listed(environment: Environment) -> dict[str, list[dict[str, str]]]:
    result = environment.program("list", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_list_shows_every_name_of_the_example(example: Environment) -> None:
    tables = listed(example)
    found = {
        (kind, row["name"])
        for kind, rows in tables.items()
        for row in rows
        if row["distribution"] == "peft-modal-timeseries" and row["state"] == "ok"
    }
    assert found == {
        ("modalities", "timeseries"),
        ("backbones", "patch_transformer"),
        ("methods", "conv_adapter"),
        ("heads", "attentive_pooling"),
        ("data", "signals"),
        ("data", "archive"),
        ("data", "folder"),
        ("configs", "timeseries_conv_adapter.yaml"),
        ("configs", "timeseries_pretrain_nano.yaml"),
    }


@pytest.mark.slow
def test_its_shipped_weights_and_code_are_the_installed_ones(example: Environment) -> None:
    result = example.run(
        "-c",
        "from peft_modal_timeseries.backbone import PatchTransformerBackbone as B; b = B(); b.load_weights(); "
        "import peft_modal_timeseries; print(peft_modal_timeseries.__file__)",
    )
    assert result.stdout.startswith(str(example.root)), result.stderr


@pytest.mark.slow
def test_a_run_by_the_name_of_its_configuration(example: Environment) -> None:
    result = example.program("fit", "--config", "timeseries_conv_adapter.yaml", "--trainer.fast_dev_run=true")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_our_own_contract_suite_takes_its_backbone_and_method_in(example: Environment) -> None:
    suite = EXAMPLE.parents[1] / "tests" / "contract"
    selected = (
        "patch_transformer and (conv_adapter or lora-patch and not bi_lora or vpt_deep or compose-patch or anatomy)"
    )
    result = example.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, f"--rootdir={EXAMPLE.parents[1]}",
        str(suite / "test_contracts.py"), str(suite / "test_anatomies.py"), cwd=EXAMPLE.parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:]
    assert "45 passed" in result.stdout, result.stdout[-500:]


def test_broken_plugins_break_nothing_and_are_named(with_broken: Environment) -> None:
    tables = listed(with_broken)
    states = {row["name"]: (row["distribution"], row["state"]) for row in tables["modalities"]}
    assert states["timeseries"] == ("peft-modal-timeseries", "ok")
    assert states["pointcloud"][1] == "ok"
    assert states["raises_at_import"] == ("no-good", "broken: RuntimeError: no licence found")
    assert states["leaves_at_import"][1] == "broken: SystemExit: 3"
    assert "plugin API 99" in states["of_another_time"][1]
    assert "'hello' is no peft_modal.registry.Plugin" in states["no_plugin"][1]


@pytest.mark.slow
def test_a_name_with_two_owners_names_both_and_others_work(with_broken: Environment) -> None:
    rows = [row for row in listed(with_broken)["methods"] if row["name"] == "conv_adapter"]
    assert len(rows) == 2
    assert all("registered twice" in row["state"] and "'a_twin'" in row["state"] for row in rows)

    result = with_broken.program("fit", "--config", "timeseries_conv_adapter.yaml", "--print_config")

    assert result.returncode == 2
    assert "method 'timeseries.conv_adapter' is registered twice" in result.stderr
    assert "'peft-modal-timeseries'" in result.stderr
    assert "'half-good'" in result.stderr
    again = with_broken.program("fit", "--config", "timeseries_conv_adapter.yaml", "--method=lora", "--print_config")
    assert again.returncode == 0, again.stderr


def test_a_configuration_package_that_cannot_be_imported_is_named(with_broken: Environment) -> None:
    rows = {row["name"]: row["state"] for row in listed(with_broken)["configs"]}
    assert rows["timeseries_conv_adapter.yaml"] == "ok"
    assert rows["bad_parts_configs"] == "broken: ModuleNotFoundError: No module named 'bad_parts_configs'"


@pytest.mark.slow
def test_an_unknown_name_tells_of_the_broken_plugins(with_broken: Environment) -> None:
    result = with_broken.program("fit", "--config", "timeseries_conv_adapter.yaml", "--method=sleep_adapter")
    assert result.returncode == 2
    assert "unknown method 'sleep_adapter'" in result.stderr
    assert "Plugin 'raises_at_import' of distribution 'no-good' is broken" in result.stderr


@pytest.mark.slow
def test_an_unknown_configuration_tells_of_the_broken_plugins(with_broken: Environment) -> None:
    result = with_broken.program("fit", "--config", "sleep.yaml")
    assert result.returncode == 2
    assert "Plugin 'raises_at_import' of distribution 'no-good' is broken and may ship it" in result.stderr
    assert "Package 'bad_parts_configs' of distribution 'half-good' is broken and may hold it" in result.stderr


@pytest.mark.slow
def test_the_matrix_goes_on_past_classes_that_raise(with_broken: Environment) -> None:
    result = with_broken.program("list", "--matrix", "--json")
    assert result.returncode == 0, result.stderr
    assert "Backbone.tiny() fails with ZeroDivisionError: tiny is broken" in result.stdout
    assert "bad_parts.absent" in result.stdout


@pytest.mark.slow
def test_a_run_without_them_goes_on_beside_them(with_broken: Environment) -> None:
    result = with_broken.program("fit", "--config", "pointcloud_idpt.yaml", "--print_config")
    assert result.returncode == 0, result.stderr


def test_list_imports_nothing_heavy(example: Environment) -> None:
    code = (
        "import sys; from peft_modal.cli.main import main; main(['list']); "
        "sys.exit(','.join(m for m in ('torch', 'numpy', 'lightning') if m in sys.modules) or 0)"
    )
    result = example.run("-c", code)
    assert result.returncode == 0, result.stderr
