"""The command line: light, and one sentence for every mistake."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lightning.pytorch  # noqa: F401 - sets an environment variable on import, which no test is to be blamed for
import pytest

import peft_modal
from peft_modal.cli import listing
from peft_modal.cli import main as main_module
from peft_modal.cli.main import main
from peft_modal.cli.options import Options, parse
from peft_modal.errors import ConfigError, RegistryError
from peft_modal.plugin import PLUGIN as CORE_PLUGIN
from peft_modal.registry import Broken, Entry, Plugin, Registry

REPOSITORY = Path(peft_modal.__file__).parents[1]


class Rotation:
    """Rotates weights.

    One angle for each pair of channels.

    Args:
        angles: How many angles.
        spec: Comes from the program.
    """

    runtime_args: ClassVar = frozenset({"spec"})

    def __init__(self, spec: object, *, angles: int, mode: str | None = None) -> None:
        self.spec, self.angles, self.mode = spec, angles, mode


@dataclass
class Fields:
    """A class that documents its arguments one by one."""

    width: int = 3
    """Width of the thing."""


PLUGIN = Plugin(
    "shapes",
    extra="shapes",
    methods={
        "rotation": Entry(f"{__name__}:Rotation", summary="Rotates weights.", paper="Someone, 2020"),
        "fields": Entry(f"{__name__}:Fields"),
        "absent": Entry(f"{__name__}:Fields", requires=("surely_not_installed",)),
    },
)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry.from_plugins(
        [(CORE_PLUGIN, "peft-modal"), (PLUGIN, "shapes-dist")],
        broken=[Broken("sounds", "sounds-dist", "sounds.plugin", "ImportError: no luck")],
    )
    for module in (main_module, listing):
        monkeypatch.setattr(module, "default_registry", lambda: made)
    return made


def run_python(code: str, folder: Path, *more: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (REPOSITORY, *more)))
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )


def the_error(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert not captured.out
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").removesuffix("\n")


# Weight


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["fit", "--help"], ["predict", "--help"], ["list"], ["list", "--json"], ["--method.help"],
     ["--version"]],
)  # fmt: skip
def test_help_and_list_import_neither_torch_nor_lightning(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from peft_modal.cli.main import main; "
        f"assert main({arguments!r}) == 0; "
        "print(sorted({'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = run_python(code, tmp_path)
    assert done.stderr == "[]\n"
    assert done.stdout


def test_importing_the_package_is_light_and_exports_lazily(tmp_path: Path) -> None:
    code = "import sys, peft_modal; print('torch' in sys.modules, sorted(dir(peft_modal)) == peft_modal.__all__)"
    assert run_python(code, tmp_path).stdout == "False True\n"
    assert peft_modal.__all__ == sorted(peft_modal.__all__)
    with pytest.raises(AttributeError, match="laod"):
        _ = peft_modal.laod


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["list"]])
def test_help_and_list_read_no_yaml_which_keeps_them_below_half_a_second(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from peft_modal.cli.main import main; "
        f"assert main({arguments!r}) == 0; "
        "print(sorted({'yaml', 'matplotlib', 'jinja2', 'unittest'} & set(sys.modules)), file=sys.stderr)"
    )
    assert run_python(code, tmp_path).stderr == "[]\n"


def test_python_dash_m_runs_it(tmp_path: Path) -> None:
    code = "import runpy, sys; sys.argv = ['peft_modal', 'fti']; runpy.run_module('peft_modal', run_name='__main__')"
    done = run_python(code, tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: unknown verb 'fti'; did you mean 'fit'?\n"


# Help


def test_no_arguments_and_help_print_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for verb in ("fit", "validate", "test", "predict", "merge", "list"):
        assert f"  {verb} " in bare


@pytest.mark.parametrize("arguments", [["--method.help", "rotation"], ["fit", "--method.help=rotation", "--json"]])
def test_the_help_of_a_node_shows_every_argument(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("method rotation", "One angle for each pair", "Paper: Someone, 2020", "How many angles.", "required"):
        assert text in shown
    assert "text or null" in shown
    assert "Comes from the program" not in shown


def test_the_help_of_a_node_reads_texts_under_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method.help", "fields"]) == 0
    assert "Width of the thing." in capsys.readouterr().out


def test_the_help_of_a_noun_without_name_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--method.help", "--json"]) == 0
    shown = capsys.readouterr().out
    assert "rotation" in shown
    assert "lora" in shown


def test_the_help_of_an_unknown_node_gives_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'rotation'" in the_error(capsys, "--method.help", "rotatoin")


# List


def test_list_shows_every_entry_with_origin_and_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()

    def line(word: str) -> str:
        return next(line for line in lines if word in line.split())

    assert "shapes-dist" in line("rotation")
    assert 'missing extra: pip install "shapes-dist[shapes]"' in line("absent")
    assert "broken: ImportError: no luck" in line("sounds")
    assert "core" in line("lora")


def test_list_can_be_narrowed_and_read_by_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["methods"]
    rows = {row["name"]: row for row in shown["methods"]}
    assert rows["rotation"]["modality"] == "shapes"
    assert rows["lora"]["modality"] == "core"
    assert rows["lora"]["state"] == "ok"


def test_list_shows_a_plugin_that_is_installed_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(
        "from peft_modal.registry import Entry, Plugin\n"
        "PLUGIN = Plugin('beside', methods={'beside_method': Entry('beside:M')})\n"
    )
    info = tmp_path / "beside-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: beside\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[peft_modal.modalities]\nbeside = beside:PLUGIN\nwrong = beside:nothing\n")
    done = run_python("from peft_modal.cli.main import main; main(['list', '--json'])", tmp_path, tmp_path)
    shown = json.loads(done.stdout)
    assert "beside_method" in {row["name"] for row in shown["methods"]}
    states = {row["name"]: row["state"] for row in shown["modalities"] if row["distribution"] == "beside"}
    assert states["beside"] == "ok"
    assert states["wrong"].startswith("broken: AttributeError")


def test_an_unknown_kind_gives_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'methods'" in the_error(capsys, "list", "metods")


# Options


def test_options_carry_what_was_typed() -> None:
    options = parse(
        "fit", ["--config", "a", "--config=b", "--method.rank", "4", "--out", "x", "--data=folder", "--overwrite"]
    )
    assert options == Options(
        verb="fit", config=("a", "b"), overrides=("method.rank=4", "data=folder"), out=Path("x"), overwrite=True
    )
    assert parse("predict", ["--adapter", "f", "--input", "p", "--out=o"]).input == Path("p")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "--confg", "x"], "unknown option '--confg'; did you mean '--config'?"),
        (["fit", "--conf", "x"], "unknown option '--conf'; did you mean '--config'?"),
        (["fit", "--methd.rank=4"], "unknown option '--methd.rank'; did you mean '--method.rank'?"),
        (["fit", "--overwite"], "unknown option '--overwite'; did you mean '--overwrite'?"),
        (["fit", "x.yaml"], "peft-modal fit: unexpected argument 'x.yaml'"),
        (["fit", "--config"], "peft-modal fit: --config: expected one argument"),
        (["fit", "--method.rank"], "--method.rank: a value is missing"),
        (["test"], "peft-modal test: the following arguments are required: --adapter"),
        (["list", "--method=lora"], "unknown option '--method'"),
        (["--config", "x"], "a verb must come first"),
        (["tets"], "unknown verb 'tets'; did you mean 'test'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_options_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    shown = the_error(capsys, *arguments)
    assert shown.startswith(sentence)
    assert "\n" not in shown


def test_every_unknown_option_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(the_error(capsys, "fit", "--confg=x", "--jsn").splitlines()) == 2


def test_every_mistake_of_a_configuration_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    lines = the_error(capsys, "fit", "--print_config", "--method=rotatoin", "--task=clasification").splitlines()
    assert lines[0].startswith("method.name: unknown method 'rotatoin'")
    assert lines[1].startswith("error: task.name: unknown task 'clasification'")


# Failures


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def dispatch(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(main_module, "_dispatch", dispatch)


def test_an_unexpected_exception_is_called_a_bug(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, ValueError("what is this"))
    assert "bug in peft_modal or in a plugin: ValueError: what is this" in the_error(capsys, "list", code=1)


@pytest.mark.parametrize("error", [ValueError("x"), ConfigError("x"), RegistryError("x")])
def test_the_traceback_is_shown_on_request(monkeypatch, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    failing(monkeypatch, error)
    monkeypatch.setenv("PEFT_MODAL_DEBUG", "1")
    main(["list"])
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_says_so(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "peft_modal", "list", "--json"],
        check=False, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_a_plugin_warns_of_is_said_like_what_the_core_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = Plugin("acme", methods={"spin": Entry("acme_shapes.methods:Spin")})
    registry = Registry.from_plugins([(plugin, "acme-shapes")])

    def warn(_: Options) -> int:
        logging.getLogger("acme_shapes.methods.spin").warning("%d angles are zero", 3)
        logging.getLogger("peft_modal.data.cache").warning("made again")
        logging.getLogger("another").info("unheard")
        return 0

    monkeypatch.setattr(main_module, "default_registry", lambda: registry)
    monkeypatch.setattr(listing, "warn", warn, raising=False)
    monkeypatch.setattr(main_module, "handler_of", lambda _: f"{listing.__name__}:warn")

    assert main(["list"]) == 0
    assert capsys.readouterr().err == "warning: 3 angles are zero\nwarning: made again\n"
    assert logging.getLogger("acme_shapes").handlers == []


def test_what_the_package_warns_of_is_said_once_and_only_during_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("peft_modal.data.cache")

    def warn(_: list[str]) -> int:
        logger.warning("cache file '%s' cannot be read: it is made again", "a")
        return 0

    monkeypatch.setattr(main_module, "_dispatch", warn)

    assert main(["list"]) == 0
    assert capsys.readouterr().err == "warning: cache file 'a' cannot be read: it is made again\n"
    warn([])
    assert capsys.readouterr().err == ""
