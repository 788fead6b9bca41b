"""Configuration: precedence, replacement of nodes, completeness, and sentences for every mistake."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch  # noqa: F401 - sets an environment variable on import, which no test is to be blamed for
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_modal.compose import build_trainer_kwargs, compose, find_config, list_configs, read_config
from peft_modal.compose.merge import merge, merge_all, parse_overrides, split_overrides
from peft_modal.compose.yaml_text import format_yaml, parse_yaml
from peft_modal.errors import ConfigError
from peft_modal.registry import Entry, Plugin, Registry

EARLY_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


@dataclass(frozen=True)
class Schedule:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)


class Net:
    def __init__(self, *, depth: int = 4, mode: Mode = Mode.FAST, weights: Path | None = None) -> None:
        self.depth, self.mode, self.weights = depth, mode, weights


class LowRank:
    def __init__(
        self, *, rank: int, alpha: float | None = None, kind: Literal["plain", "fancy"] = "plain",
        sites: str | list[str] | dict[str, Any] = "attn",
    ) -> None:  # fmt: skip
        if rank < 1:
            raise ConfigError(f"method.rank: {rank} is below 1")
        self.rank, self.alpha, self.kind, self.sites = rank, alpha, kind, sites


class Scale:
    def __init__(self, *, rank: int = 1, spread: float = 0.02) -> None:
        self.rank, self.spread = rank, spread


class Stack:
    node_args: ClassVar = {"methods": "method"}

    def __init__(self, *, methods: list[Any]) -> None:
        self.methods = methods


class Linear:
    runtime_args: ClassVar = frozenset({"spec"})

    def __init__(self, spec: object, *, hidden: int = 3) -> None:
        self.spec, self.hidden = spec, hidden


class Classify:
    def __init__(self, *, schedule: Schedule = Schedule(), note: str = "", extra: Schedule | None = None) -> None:
        self.schedule, self.note, self.extra = schedule, note, extra


class Denoise:
    needs_head: ClassVar = False


class Folder:
    def __init__(self, *, root: str = "", batch_size: int = 32) -> None:
        self.root, self.batch_size = root, batch_size


def here(cls: type) -> Entry:
    return Entry(f"{__name__}:{cls.__name__}")


POINTS = Plugin(
    "points",
    backbones={"net": here(Net)},
    heads={"linear": here(Linear)},
    tasks={"classify": here(Classify), "denoise": here(Denoise)},
    data={"folder": here(Folder), "lonely": here(Folder)},
)
CORE = Plugin(
    "core",
    modality="",
    methods={"low_rank": here(LowRank), "scale": here(Scale), "stack": here(Stack)},
    data={"folder": here(Scale)},
)
REGISTRY = Registry.from_plugins([(POINTS, "peft-modal"), (CORE, "peft-modal")])
BASE = {
    "backbone": {"name": "net"},
    "method": {"name": "low_rank", "rank": 4},
    "head": {"name": "linear"},
    "task": {"name": "classify"},
    "data": {"name": "folder"},
}


def composed(*layers, overrides=()):
    return compose(BASE, *layers, overrides=overrides, registry=REGISTRY)


def problems(*layers, overrides=()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        composed(*layers, overrides=overrides)
    return error.value.problems


def the_problem(*layers, overrides=()) -> str:
    (only,) = problems(*layers, overrides=overrides)
    return only


# Precedence and merging


def test_the_command_line_beats_files_and_later_files_beat_earlier_ones() -> None:
    low, high = {"method": {"rank": 5, "alpha": 1.0}}, {"method": {"rank": 6}}
    kwargs = composed(low, high, overrides=["method.kind=fancy"]).nodes["method"].kwargs
    assert (kwargs["rank"], kwargs["alpha"], kwargs["kind"]) == (6, 1.0, "fancy")
    assert composed(low, high, overrides=["method.rank=7"]).nodes["method"].kwargs["rank"] == 7


def test_another_name_drops_the_arguments_of_the_old_node() -> None:
    kwargs = composed({"method": {"name": "scale"}}).nodes["method"].kwargs
    assert kwargs == {"rank": 1, "spread": 0.02}


def test_the_same_name_keeps_the_arguments() -> None:
    assert composed({"method": {"name": "low_rank", "alpha": 2.0}}).nodes["method"].kwargs["rank"] == 4


def test_a_noun_alone_on_the_command_line_sets_its_name() -> None:
    node = composed(overrides=["method=scale", "method.spread=0.5"]).nodes["method"]
    assert node.cls is Scale
    assert node.kwargs == {"rank": 1, "spread": 0.5}


def test_the_order_of_name_and_argument_on_the_command_line_does_not_matter() -> None:
    one = composed(overrides=["method.rank=9", "method=scale"])
    two = composed(overrides=["method=scale", "method.rank=9"])
    assert one.to_dict() == two.to_dict()
    assert one.nodes["method"].kwargs["rank"] == 9


def test_lists_are_replaced() -> None:
    assert composed({"method": {"sites": ["a", "b"]}}, {"method": {"sites": ["c"]}}).nodes["method"].kwargs[
        "sites"
    ] == ["c"]


def test_another_class_path_inside_trainer_drops_the_old_arguments() -> None:
    old = {"trainer": {"profiler": {"class_path": "a.A", "init_args": {"x": 1}}}}
    new = {"trainer": {"profiler": {"class_path": "a.B"}}}
    assert merge(old, new) == new


def test_name_inside_trainer_is_an_ordinary_argument() -> None:
    old = {"trainer": {"logger": {"class_path": "a.L", "init_args": {"name": "x", "version": 1}}}}
    merged = merge(old, {"trainer": {"logger": {"init_args": {"name": "y"}}}})
    assert merged["trainer"]["logger"]["init_args"] == {"name": "y", "version": 1}


def test_a_head_can_be_removed() -> None:
    nodes = composed({"head": None, "task": {"name": "denoise"}}).nodes
    assert "head" not in nodes


keys = st.sampled_from(["a", "b", "name", "c"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(scalars | st.lists(scalars, max_size=3), lambda inner: st.dictionaries(keys, inner, max_size=3))
layers = st.dictionaries(st.sampled_from(["method", "data", "trainer"]), st.dictionaries(keys, trees, max_size=3))
hypothesis = settings(deadline=None, derandomize=True, max_examples=100)


@hypothesis
@given(layers)
def test_merging_nothing_changes_nothing(layer) -> None:
    assert merge({}, layer) == layer or any(isinstance(value, str) for value in layer.values())
    assert merge(layer, {}) == layer
    assert merge(layer, layer) == layer


@hypothesis
@given(layers, layers)
def test_the_upper_layer_survives_whole(low, high) -> None:
    def contains(big, small) -> bool:
        if isinstance(small, dict) and isinstance(big, dict):
            return all(key in big and contains(big[key], value) for key, value in small.items())
        return big == small

    before = format_yaml([low, high])
    assert contains(merge(low, high), high)
    assert format_yaml([low, high]) == before


@hypothesis
@given(layers, st.text("xyz", min_size=1, max_size=3))
def test_nothing_of_the_old_node_is_left_when_its_name_changes(low, name) -> None:
    low = {"method": {**low.get("method", {}), "name": "old"}}
    assert merge(low, {"method": {"name": name}}) == {"method": {"name": name}}


@hypothesis
@given(st.permutations(["method.a=1", "method.b.c=[1, 2]", "data.root=x", "seed=3", "method=lora"]))
def test_overrides_of_different_keys_commute(overrides) -> None:
    assert parse_overrides(overrides) == {
        "method": {"name": "lora", "a": 1, "b": {"c": [1, 2]}},
        "data": {"root": "x"},
        "seed": 3,
    }


@hypothesis
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), trees))
def test_yaml_is_read_back_as_it_was_written(value) -> None:
    assert parse_yaml(format_yaml(value), source="x") == value


@hypothesis
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_way_to_write_a_number_is_a_number(number) -> None:
    assert parse_yaml(repr(number), source="x") == number
    assert parse_yaml(f"{number:e}", source="x") == float(f"{number:e}")


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert parse_yaml(format_yaml({"a": "1e-3"}), source="x") == {"a": "1e-3"}


# Overrides


def test_overrides_are_separated_from_options_in_both_spellings() -> None:
    arguments = ["--config", "x", "--method.rank", "4", "--out=y", "--data.root=a=b", "--trainer.max_epochs", "-1"]
    assert split_overrides(arguments) == (
        ["--config", "x", "--out=y"],
        ["method.rank=4", "data.root=a=b", "trainer.max_epochs=-1"],
    )


@pytest.mark.parametrize("arguments", [["--method.rank"], ["--method.rank", "--out"]])
def test_an_override_without_value_is_one_sentence(arguments) -> None:
    with pytest.raises(ConfigError, match=r"--method\.rank: a value is missing; write --method\.rank=VALUE"):
        split_overrides(arguments)


def test_all_unreadable_overrides_are_reported() -> None:
    with pytest.raises(ConfigError) as error:
        parse_overrides(["data.root=*", "method..rank=3", "method.rank=4"])
    first, second = error.value.problems
    assert first.startswith("--data.root=*")
    assert "quotes" in first
    assert "method..rank" in second


# Completeness


def test_the_composed_configuration_is_complete_and_composes_to_itself() -> None:
    first = composed(
        {
            "backbone": {"mode": "SLOW", "weights": "/x/y"},
            "task": {"schedule": {"lr": "1e-4"}, "extra": {}, "note": "1e-3"},
            "method": {"sites": {"roles": ["attn"], "blocks": {"last": 4}}},
            "trainer": {
                "max_epochs": "3",
                "max_time": {"days": 1},
                "callbacks": [{"class_path": EARLY_STOPPING, "init_args": {"monitor": "val/loss"}}],
            },
        },
        overrides=["method.alpha=1e-3", "seed=5"],
    )
    content = first.to_dict()
    assert list(content) == ["backbone", "method", "head", "task", "data", "trainer", "seed"]
    assert content["backbone"] == {"name": "net", "depth": 4, "mode": "SLOW", "weights": "/x/y"}
    assert content["method"]["sites"] == {"roles": ["attn"], "blocks": {"last": 4}}
    assert content["method"]["alpha"] == 1e-3
    assert content["task"]["extra"] == {"lr": 1e-3, "betas": [0.9, 0.99]}
    assert content["head"] == {"name": "linear", "hidden": 3}
    assert content["trainer"]["max_epochs"] == 3
    assert content["trainer"]["max_time"] == {"days": 1}
    assert content["trainer"]["callbacks"][0]["init_args"]["patience"] == 3
    again = compose(parse_yaml(first.to_yaml(), source="x"), registry=REGISTRY)
    assert again == first
    assert again.to_yaml() == first.to_yaml()


def test_composing_leaves_the_given_mappings_alone() -> None:
    given_mapping = {"trainer": {"callbacks": [{"class_path": EARLY_STOPPING, "init_args": {"monitor": "x"}}]}}
    before = format_yaml(given_mapping)
    composed(given_mapping)
    assert format_yaml(given_mapping) == before


def test_a_shadowed_core_entry_is_written_by_its_full_name() -> None:
    result = composed({"data": {"name": "core.folder"}})
    assert result.to_dict()["data"]["name"] == "core.folder"
    assert compose(result.to_dict(), registry=REGISTRY) == result
    assert composed({"data": {"name": "points.folder"}}).to_dict()["data"]["name"] == "folder"


def test_nodes_build_objects_of_the_annotated_types() -> None:
    result = composed({"backbone": {"mode": "SLOW", "weights": "x"}, "task": {"schedule": {"betas": [0.5, 0.6]}}})
    net = result.nodes["backbone"].build()
    assert net.mode is Mode.SLOW
    assert net.weights == Path("x")
    assert result.nodes["task"].build().schedule == Schedule(betas=(0.5, 0.6))
    assert result.nodes["head"].build(spec="given").spec == "given"


def test_nested_nodes_are_checked_completed_and_built() -> None:
    stack = {"method": {"name": "stack", "methods": [{"name": "low_rank", "rank": 2}, {"name": "scale"}]}}
    result = composed(stack)
    assert result.to_dict()["method"]["methods"][1] == {"name": "scale", "rank": 1, "spread": 0.02}
    assert compose(result.to_dict(), registry=REGISTRY) == result
    first, second = result.nodes["method"].build().methods
    assert (first.rank, type(second)) == (2, Scale)
    stack["method"]["methods"][0] = {"name": "low_rank", "rank": 2, "alfa": 1}
    assert the_problem(stack).startswith("method.methods.0.alfa: method 'low_rank' has no such argument")


def test_trainer_objects_are_created_from_the_composed_configuration() -> None:
    callbacks = [{"class_path": EARLY_STOPPING, "init_args": {"monitor": "val/loss"}}]
    result = composed({"trainer": {"callbacks": callbacks}})
    before = result.to_dict()
    kwargs = build_trainer_kwargs(result.trainer, registry=REGISTRY)
    (callback,) = kwargs["callbacks"]
    assert (type(callback).__name__, callback.monitor) == ("EarlyStopping", "val/loss")
    assert result.to_dict() == before
    assert type(result.trainer["callbacks"][0]) is dict
    assert kwargs["max_steps"] == -1


# Mistakes


def test_all_mistakes_of_all_groups_come_in_one_error() -> None:
    found = problems(
        {
            "backbone": {"dept": 3},
            "method": {"rank": "many", "kind": "fanci"},
            "head": {"spec": 1},
            "task": {"schedule": {"l": 1}},
            "data": {"name": "fodler"},
            "trainer": {"max_epoch": 3, "precision": "half"},
            "tainer": {},
            "seed": -1,
        }
    )
    starts = [
        "tainer: unknown key; did you mean 'trainer'",
        "backbone.dept: backbone 'net' has no such argument; did you mean 'depth'",
        "method.rank: expected int, got 'many'",
        "method.kind: expected one of 'plain', 'fancy', got 'fanci'; did you mean 'fancy'?",
        "head.spec: the program supplies this argument",
        "task.schedule.l: 'Schedule' has no such argument; did you mean 'lr'",
        "data.name: unknown data 'fodler' for modality 'points'; did you mean 'folder'",
        "trainer.max_epoch: Lightning's Trainer has no such argument; did you mean 'max_epochs'",
        "trainer.precision: expected one of 64, 32, 16, 'transformer-engine'",
        "seed: expected an int from 0",
    ]
    assert len(found) == len(starts)
    for problem, start in zip(found, starts, strict=True):
        assert problem.startswith(start)
        assert "\n" not in problem


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ({"method": {"rank": None}}, "method.rank: expected int, got null."),
        ({"head": {"hidden": None}}, "head.hidden: expected int, got null."),
        ({"method": {"rank": True}}, "method.rank: expected int, got true."),
        ({"method": {"rank": 0}}, "method.rank: 0 is below 1"),
        ({"method": {"sites": [1]}}, "method.sites: expected text or list of text or mapping of text to anything"),
        ({"task": {"note": 2024}}, "task.note: expected text, got 2024; put it in quotes to keep it as text."),
        ({"task": {"schedule": {"betas": [1.0]}}}, "task.schedule.betas: expected list of 2: float, float"),
        ({"method": 3}, "method: expected a mapping such as {name: low_rank}, got 3."),
        ({"backbone": "nett"}, "backbone.name: unknown backbone 'nett'; did you mean 'net'"),
        ({"head": None}, "head: missing; write head: {name: ...} or --head=NAME; known: linear."),
        ({"data": None}, "data: missing;"),
        ({"task": {"name": "denoise"}}, "head: task 'denoise' uses no head"),
        ({"trainer": 3}, "trainer: expected a mapping"),
        ({"trainer": {"logger": "os.system"}}, "trainer.logger: expected Logger or list of Logger"),
        ({"seed": True}, "seed: expected an int"),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else None,
)
def test_a_mistake_is_one_clear_sentence(layer, sentence: str) -> None:
    assert the_problem(layer).startswith(sentence)


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        ({"class_path": "os.system"}, "class_path: 'os.system' may not be imported"),
        ({"class_path": "lightning.pytorchx.Y"}, "class_path: 'lightning.pytorchx.Y' may not be imported"),
        ({"class_path": "EarlyStopping"}, "class_path: expected a full import path"),
        ({"class_path": EARLY_STOPPING[:-1]}, "class_path: 'lightning.pytorch.callbacks' has no class 'EarlyStoppin'"),
        ({"class_path": "lightning.pytorch.nothing.X"}, "class_path: 'lightning.pytorch.nothing.X' cannot be imported"),
        (
            {"class_path": EARLY_STOPPING, "init_args": {"monitor": "x", "patienc": 3}},
            f"init_args.patienc: '{EARLY_STOPPING}' has no such argument; did you mean 'patience'",
        ),
        ({"class_path": EARLY_STOPPING}, "init_args.monitor:"),
        ({"class_path": EARLY_STOPPING, "init_arg": {"monitor": "x"}}, "init_arg: unknown key"),
    ],
    ids=["forbidden", "prefix", "short", "class", "module", "argument", "missing", "key"],
)
def test_a_mistake_in_a_trainer_object_names_its_place(callback, sentence: str) -> None:
    found = problems({"trainer": {"callbacks": [callback]}})
    assert found[0].startswith(f"trainer.callbacks.0.{sentence}")


def test_the_value_seen_is_shown_as_it_was_written() -> None:
    wrong = [{"class_path": EARLY_STOPPING, "init_args": {"monitor": "x"}}]
    assert f"got [{{'class_path': '{EARLY_STOPPING}'" in the_problem({"trainer": {"plugins": wrong}})


def test_one_wrong_value_does_not_implicate_its_neighbours() -> None:
    callbacks = [{"class_path": EARLY_STOPPING, "init_args": {"monitor": "x"}}]
    assert the_problem({"trainer": {"callbacks": callbacks, "precision": "half"}}).startswith("trainer.precision: ")


def test_a_node_without_name_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"method: 'name' is missing; .* known: low_rank, scale, stack"):
        compose({**BASE, "method": {"rank": 3}}, registry=REGISTRY)


def test_the_sentence_tells_which_source_holds_the_mistake(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: {rank: x, kind: y}\n")
    first, second = problems(path, overrides=["method.kind=z"])
    assert first == f"method.rank: expected int, got 'x'. (in {path})"
    assert second.endswith("got 'z'. (on the command line)")


def test_an_unknown_backbone_does_not_hide_or_invent_other_mistakes() -> None:
    found = problems({"backbone": "nothing", "method": {"rank": "x"}, "data": "core.fold"})
    assert [problem.partition(":")[0] for problem in found] == ["backbone.name", "method.rank", "data.name"]
    assert len(problems({"backbone": "nothing"})) == 1


def test_composing_nothing_says_what_to_name() -> None:
    with pytest.raises(ConfigError, match="--config NAME"):
        compose(registry=REGISTRY)


# Files


def test_a_local_file_is_found_with_and_without_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text("seed: 3\n")
    monkeypatch.chdir(tmp_path)
    assert read_config(find_config("own", REGISTRY)) == read_config(find_config("own.yaml", REGISTRY)) == {"seed": 3}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A plugin whose package holds two configurations."""
    package = tmp_path / "config_package_of_a_test"
    (package / "deep").mkdir(parents=True)
    (package / "top.yaml").write_text("# What it is for.\nseed: 1\n")
    (package / "deep" / "inner.yml").write_text("seed: 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Registry([], config_packages=[(package.name, "third-party"), ("not_there_at_all", "third-party")])


def test_configurations_of_plugins_are_listed_and_found(shipped: Registry) -> None:
    listed = {config.name: config for config in list_configs(shipped) if config.origin == "third-party"}
    assert set(listed) == {"top.yaml", "deep/inner.yml"}
    assert listed["top.yaml"].summary == "What it is for."
    assert read_config(find_config("top", shipped)) == {"seed": 1}
    assert read_config(find_config("deep/inner.yml", shipped)) == {"seed": 2}
    assert read_config(find_config("inner", shipped)) == {"seed": 2}


def test_a_local_file_comes_before_a_shipped_one(shipped: Registry, tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text("seed: 9\n")
    assert read_config(find_config("top.yaml", shipped)) == {"seed": 9}


def test_an_unknown_configuration_tells_where_it_looked_and_the_nearest(shipped: Registry, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config_package_of_a_test, not_there_at_all.*did you mean 'top.yaml'"
    ) as error:
        find_config("topp.yaml", shipped)
    assert str(tmp_path) in str(error.value)


def test_our_own_configurations_come_from_the_repository_or_the_package() -> None:
    names = [config.name for config in list_configs(REGISTRY) if config.origin == "peft-modal"]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"bad\.yaml, line \d+: not valid YAML"),
        ("a: 1\nmethod:\n  rank: 1\n  rank: 2\n", r"bad\.yaml, line 4: not valid YAML: the key 'rank' .* second time"),
        ("- a\n", r"bad\.yaml: expected a mapping"),
        ("a: !!python/object/apply:os.system [ls]\n", r"bad\.yaml, line 1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", r"bad\.yaml, line 2: not valid YAML"),
        ("a: 2024-13-45\n", r"bad\.yaml: not valid YAML: month"),
        ("a: \x07\n", r"bad\.yaml: not valid YAML"),
    ],
    ids=["syntax", "twice", "list", "python-object", "two-documents", "date", "control-character"],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_config(find_config(path, REGISTRY))


def test_merge_keys_of_yaml_may_be_overridden() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n", source="x")["b"] == {"x": 3, "y": 2}


def test_an_empty_file_is_an_empty_configuration(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert read_config(find_config(tmp_path / "empty.yaml", REGISTRY)) == {}
    assert merge_all([]) == {}
