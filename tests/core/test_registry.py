"""Names, plugins, and what happens when one of them is broken."""

import importlib
import sys

import pytest

from peft_modal.errors import MissingExtraError, RegistryError
from peft_modal.plugin import PLUGIN as CORE_PLUGIN
from peft_modal.registry import Broken, Entry, Plugin, Registry, require


class Method:
    pass


class Folder:
    pass


def here(name: str) -> Entry:
    return Entry(f"{__name__}:{name}")


POINTS = Plugin(
    "points",
    extra="points",
    backbones={"net": here("Method")},
    methods={"idpt": here("Method")},
    data={"folder": here("Folder")},
)
IMAGES = Plugin(
    "images", methods={"prompting": here("Method")}, data={"folder": here("Method"), "lora": here("Folder")}
)
CORE = Plugin("core", modality="", methods={"lora": here("Method"), "idpt": here("Folder")})


@pytest.fixture
def registry() -> Registry:
    return Registry.from_plugins([(CORE, "peft-modal"), (POINTS, "peft-modal"), (IMAGES, "third-party")])


def test_a_short_name_means_the_given_modality_first(registry: Registry) -> None:
    assert registry.resolve("method", "idpt", modality="points").modality == "points"


def test_a_short_name_falls_back_to_the_core(registry: Registry) -> None:
    assert registry.resolve("method", "idpt", modality="images").modality == ""
    assert registry.resolve("method", "lora", modality="points").modality == ""


def test_the_full_name_reaches_any_modality_and_the_core(registry: Registry) -> None:
    assert registry.resolve("data", "images.folder", modality="points").distribution == "third-party"
    assert registry.resolve("method", "core.idpt", modality="points").modality == ""


def test_without_a_modality_a_unique_name_is_found_and_an_ambiguous_one_refused(registry: Registry) -> None:
    assert registry.resolve("backbone", "net", modality=None).modality == "points"
    with pytest.raises(RegistryError, match=r"'images\.folder' or 'points\.folder'"):
        registry.resolve("data", "folder", modality=None)


def test_an_import_path_of_an_allowed_package_gives_the_registered_entry(registry: Registry) -> None:
    by_colon = registry.resolve("data", f"{__name__}:Folder", modality="points")
    by_dots = registry.resolve("data", f"{__name__}.Folder", modality="points")
    assert by_colon == by_dots == registry.resolve("data", "points.folder", modality=None)


def test_an_unregistered_class_of_an_allowed_package_can_be_loaded(registry: Registry) -> None:
    resolved = registry.resolve("task", f"{__name__}:Folder", modality="points")
    assert registry.load(resolved) is Folder
    assert registry.name_of(resolved, modality="points") == f"{__name__}:Folder"


@pytest.mark.parametrize("path", ["os:system", "subprocess.Popen", "torch.nn:Linear"])
def test_other_packages_cannot_be_named(registry: Registry, path: str) -> None:
    with pytest.raises(RegistryError):
        registry.resolve("method", path, modality="points")


def test_an_unknown_name_gives_the_nearest_and_the_advice_to_reinstall(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"unknown method 'lorra'.*did you mean 'lora'.*pip install -e \."):
        registry.resolve("method", "lorra", modality="points")


def test_a_name_of_another_modality_is_pointed_out(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"another modality: write 'images\.prompting'"):
        registry.resolve("method", "prompting", modality="points")


def test_a_broken_plugin_is_mentioned_where_it_may_supply_the_name() -> None:
    registry = Registry.from_plugins([(CORE, "peft-modal")], broken=[Broken("audio", "sounds", "m", "ImportError: x")])
    with pytest.raises(RegistryError, match=r"Plugin 'audio' of distribution 'sounds' is broken.*ImportError: x"):
        registry.resolve("method", "petl_ast", modality="audio")


def test_two_owners_of_one_key_are_named_and_other_keys_work() -> None:
    twin = Plugin("twin", modality="points", methods={"idpt": here("Folder"), "other": here("Folder")})
    registry = Registry.from_plugins([(POINTS, "peft-modal"), (twin, "twin-dist")])
    with pytest.raises(RegistryError, match=r"'peft-modal'.*'twin-dist'"):
        registry.resolve("method", "idpt", modality="points")
    with pytest.raises(RegistryError, match=r"points\.idpt"):
        registry.check()
    assert registry.resolve("method", "other", modality="points").distribution == "twin-dist"
    states = [listed.state for listed in registry.entries("method") if listed.name == "idpt"]
    assert len(states) == 2
    assert all(state.startswith("broken: registered twice") for state in states)


def test_check_is_silent_without_conflicts(registry: Registry) -> None:
    registry.check()


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (object(), "is no peft_modal.registry.Plugin"),
        (Plugin("future", api=2), "upgrade peft-modal"),
        (Plugin("past", api=0), "upgrade the plugin"),
        (Plugin("core", modality="core"), "reserved"),
        (Plugin("dots", methods={"a.b": here("Method")}), "letters, digits and underscores"),
        (Plugin("path", methods={"a": Entry("no_colon")}), "package.module:Object"),
    ],
    ids=["no-plugin", "newer-api", "older-api", "reserved", "name", "target"],
)
def test_an_unusable_plugin_is_kept_as_broken_beside_the_others(plugin: object, reason: str) -> None:
    registry = Registry.from_plugins([(plugin, "bad-dist"), (CORE, "peft-modal")])
    (broken,) = registry.broken
    assert broken.distribution == "bad-dist"
    assert reason in broken.reason
    assert registry.resolve("method", "lora", modality=None).name == "lora"


def test_a_missing_requirement_shows_in_the_state_and_names_the_extra_on_load() -> None:
    entry = Entry(f"{__name__}:Method", requires=("surely_not_installed",))
    registry = Registry.from_plugins([(Plugin("points", extra="points", methods={"m": entry}), "peft-modal")])
    command = 'pip install "peft-modal[points]"'
    assert [listed.state for listed in registry.entries()] == [f"missing extra: {command}"]
    with pytest.raises(MissingExtraError) as error:
        registry.load(registry.resolve("method", "m", modality="points"))
    assert command in str(error.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write an importable module `scratch_plugin_code` for one test."""

    def write(text: str) -> None:
        (tmp_path / "scratch_plugin_code.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    sys.modules.pop("scratch_plugin_code", None)


def scratch(name: str = "M") -> tuple[Registry, object]:
    plugin = Plugin("scratch", extra="all", methods={"m": Entry(f"scratch_plugin_code:{name}")})
    registry = Registry.from_plugins([(plugin, "scratch-dist")])
    return registry, registry.resolve("method", "m", modality="scratch")


def test_an_import_error_of_an_optional_package_names_the_extra_of_its_distribution(module) -> None:
    module("import surely_not_installed.part\n")
    registry, resolved = scratch()
    with pytest.raises(MissingExtraError, match=r'pip install "scratch-dist\[all\]"'):
        registry.load(resolved)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("1 / 0\n", "ZeroDivisionError"),
        ("from os import surely_not_there\n", "ImportError"),
        ("import os.surely_not_there\n", "ModuleNotFoundError"),
        ("class Other: pass\n", "AttributeError"),
    ],
    ids=["exception", "renamed", "submodule", "no-such-object"],
)
def test_any_other_failure_names_plugin_distribution_target_and_cause(module, text: str, cause: str) -> None:
    module(text)
    registry, resolved = scratch()
    with pytest.raises(RegistryError, match=r"'scratch'.*'scratch-dist'.*'scratch_plugin_code:M'") as error:
        registry.load(resolved)
    assert cause in str(error.value)


def test_a_sentence_raised_during_import_is_kept(module) -> None:
    module("from peft_modal.registry import require\nrequire('surely_not_installed', extra='own')\n")
    registry, resolved = scratch()
    with pytest.raises(MissingExtraError, match=r"peft-modal\[own\]"):
        registry.load(resolved)


def test_a_target_that_is_no_class_is_refused(module) -> None:
    module("M = 3\n")
    registry, resolved = scratch()
    with pytest.raises(RegistryError, match="3, not a class"):
        registry.load(resolved)


def test_the_name_of_a_class_is_short_unless_that_means_another_one(registry: Registry) -> None:
    loaded = registry.load(registry.resolve("method", "core.idpt", modality=None))
    assert loaded is Folder
    assert registry.short_name_of(Folder, modality="images") == "idpt"
    assert registry.short_name_of(Folder, modality="points") == "core.idpt"
    assert registry.short_name_of(int) == "builtins:int"


def test_entries_can_be_narrowed_down(registry: Registry) -> None:
    assert [listed.name for listed in registry.entries("method", "")] == ["idpt", "lora"]
    assert {listed.modality for listed in registry.entries("data")} == {"points", "images"}


def test_require_gives_the_module_or_both_commands(monkeypatch) -> None:
    assert require("json", extra="x").dumps(1) == "1"
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r'pip install "peft-modal\[vision\]" \(or only: pip install pillow\)'):
        require("PIL", extra="vision")


def test_discovery_isolates_a_plugin_that_fails_on_import(tmp_path, monkeypatch) -> None:
    (tmp_path / "exploding_plugin.py").write_text("raise SystemExit('boom')\n")
    (tmp_path / "working_plugin.py").write_text(
        "from peft_modal.registry import Entry, Plugin\n"
        "PLUGIN = Plugin('working', methods={'w': Entry('working_plugin:W')}, configs=('working_plugin',))\n"
    )
    info = tmp_path / "third_party-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[peft_modal.modalities]\nworking = working_plugin:PLUGIN\nexploding = exploding_plugin:PLUGIN\n"
        "absent = absent_plugin:PLUGIN\n[peft_modal.methods]\nagain = working_plugin:PLUGIN\n"
        "[peft_modal.configs]\nmore = third_party_configs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    registry = Registry.discover()
    reasons = {broken.name: broken.reason for broken in registry.broken if broken.distribution == "third-party"}
    assert reasons == {
        "exploding": "SystemExit: boom",
        "absent": "ModuleNotFoundError: No module named 'absent_plugin'",
    }
    # Named in two groups, registered once.
    assert registry.resolve("method", "w", modality="working").distribution == "third-party"
    assert {("working_plugin", "third-party"), ("third_party_configs", "third-party")} <= set(registry.config_packages)
    sys.modules.pop("working_plugin", None)


def test_the_core_declares_its_methods_for_every_modality() -> None:
    registry = Registry.from_plugins([(CORE_PLUGIN, "peft-modal")])
    registry.check()
    assert {listed.modality for listed in registry.entries()} == {""}
    assert registry.resolve("method", "lora", modality="anything").entry.paper


@pytest.mark.parametrize("name", sorted(CORE_PLUGIN.methods))
def test_every_method_of_the_core_can_be_loaded(name: str) -> None:
    registry = Registry.from_plugins([(CORE_PLUGIN, "peft-modal")])
    cls = registry.load(registry.resolve("method", name, modality=None))
    assert registry.short_name_of(cls) == name
