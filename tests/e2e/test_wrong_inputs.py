"""Mistakes of every kind through the command line: one sentence each, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import yaml
from safetensors.torch import save_file

from peft_modal.cli.main import main
from peft_modal.files import load_adapter, read_tensors, save_adapter, write_tensors

TINY = {
    "backbone": {
        "name": "point_mae", "weights": "random", "init": "torch", "dim": 24, "depth": 2, "num_heads": 3,
        "num_group": 8, "group_size": 4, "pointnet_dims": [8, 16, 16],
    },
    "method": {"name": "lora", "rank": 2},
    "head": {"name": "linear"},
    "task": {"name": "classification"},
    "data": {"name": "folder", "root": "good", "num_points": 32, "batch_size": 4},
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}  # fmt: skip
FIT = ["fit", "--config", "tiny.yaml", "--out", "out"]
ADAPTER = "run/adapter.safetensors"


def cloud(count=64, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


def classes(root, *names, count=6):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            np.save(root / name / f"{i}.npy", cloud(seed=10 * label + i) * (1, 1, 1 + label))


def with_one(root, name, content):
    """A folder of two classes with one file of its own."""
    classes(root, "a", "b")
    path = root / "a" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)


def header_of(path):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


class Code:
    def __reduce__(self):
        return (print, ("run",))


def write_configs(root):
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for name, text in {
        "syntax": "method: {name: lora",
        "tag": "method: !!python/object/apply:os.system ['true']",
        "list": "- method\n- lora\n",
        "twice": "method: {name: lora}\nmethod: {name: vpt}\n",
        "toplevel": "methd: {name: lora}\n",
        "import": "method: {name: os.path.join}\n",
        "callback": "trainer: {callbacks: [{class_path: subprocess.Popen}]}\n",
    }.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "latin.yaml").write_bytes("# Größe\nmethod: lora\n".encode("latin-1"))


def write_data(root):
    classes(root / "good", "a", "b")
    classes(root / "others", "x", "y")
    classes(root / "one_class", "a")
    classes(root / "single", "a", "b", count=1)
    (root / "empty").mkdir()
    mesh = trimesh.creation.icosphere(1)
    for kind in ("ply", "stl", "obj", "off"):
        whole = mesh.export(file_type=kind)
        whole = whole if isinstance(whole, bytes) else whole.encode()
        with_one(root / f"cut_{kind}", f"cut.{kind}", whole[: len(whole) // 2 + (3 if kind == "obj" else 0)])
    for name, value in {"nan": np.nan, "inf": np.inf}.items():
        broken = cloud()
        broken[3, 1] = value
        with_one(root / name, "broken.npy", broken)
    with_one(root / "point", "point.npy", cloud(1))
    with_one(root / "nothing", "nothing.npy", cloud(0))
    with_one(root / "columns", "columns.txt", b"1 2\n3 4\n")
    with_one(root / "words", "words.txt", b"x y z\n1 2 3\n")
    with_one(root / "zero_bytes", "zero.ply", b"")
    with_one(root / "objects", "objects.npy", np.array([Code()], dtype=object))
    (root / "clouds.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    names = [path.relative_to(root).as_posix() for path in sorted((root / "good").rglob("*.npy"))]
    rows = "".join(f"{name},{name.split('/')[1]}\n" for name in names)
    (root / "column.csv").write_text("path,class\n" + rows)
    (root / "file.csv").write_text("path,label\n" + rows + "good/a/none.npy,a\n")
    (root / "split.csv").write_text(
        "path,label,split\n" + rows.replace("\n", ",train\n", 11).replace("b\n", "b,tain\n")
    )


def write_weights(root):
    torch.save({"model": Code()}, root / "code.pth")
    (root / "weights_folder").mkdir()
    save_file({"blocks.0.weight": torch.zeros(3)}, root / "other_network.safetensors")


def write_adapters(root):
    adapter = root / ADAPTER
    whole = adapter.read_bytes()
    (root / "flipped.safetensors").write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
    (root / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (root / "empty.safetensors").write_bytes(b"")
    torch.save({"a": torch.zeros(3)}, root / "pickle.safetensors")
    save_file({"a": torch.zeros(3)}, root / "foreign.safetensors")
    (root / "absurd.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    huge = {"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    write_header(root / "shape.safetensors", huge)
    write_header(root / "nested.safetensors", b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    tensors, header = load_adapter(adapter)
    _, document = read_tensors(adapter)
    del document["checksum"]
    raw = {name: value.contiguous() for name, value in tensors.items()}
    document["format_version"] = 99
    save_file(raw, root / "newer.safetensors", metadata={"peft_modal": json.dumps(document)})
    document["format_version"] = 2
    save_file(raw, root / "unsigned.safetensors", metadata={"peft_modal": json.dumps(document)})
    write_tensors(root / "no_config.safetensors", raw, {**document, "config": 5})
    deep = '{"kind": ' + "[" * 5000 + "]" * 5000 + "}"
    save_file(raw, root / "deep.safetensors", metadata={"peft_modal": deep})
    header.config["backbone"]["init_seed"] = 7
    save_adapter(root / "other_weights.safetensors", tensors, header)
    header.config["backbone"]["dim"] = 48
    save_adapter(root / "other_backbone.safetensors", tensors, header)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a finished run and everything that can be wrong."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PEFT_MODAL_CACHE", str(root / "cache"))
        write_configs(root)
        write_data(root)
        write_weights(root)
        (root / "a_file").write_text("text")
        assert main(["fit", "--config", "tiny.yaml", "--out", "run"]) == 0
        write_adapters(root)
    return root


def case(name, *arguments, says, config="tiny.yaml"):
    """A `fit` with these arguments, or another verb where they begin with one."""
    if not arguments or arguments[0].startswith("--"):
        arguments = ("fit", "--config", config, "--out", "out", *arguments)
    return pytest.param(list(arguments), says, id=name)


def data(name, root, *says):
    return case(name, f"--data.root={root}", says=(root, *says))


def adapter(name, *says):
    path = f"{name}.safetensors"
    return case(f"adapter-{name}", "test", "--adapter", path, says=says or (path,))


CASES = [
    # Keys and values.
    case("unknown-key", "--method.rnak=4", says=("method.rnak", "did you mean 'rank'?", "command line")),
    case("unknown-method", "--method=lorra", says=("method.name", "did you mean 'lora'")),
    case("wrong-type", "--method.rank=four", says=("method.rank: expected int", "'four'")),
    case("null-where-a-number-belongs", "--task.lr=null", says=("task.lr: expected float", "null")),
    case("wrong-choice", "--task.keep=bset", says=("task.keep", "did you mean 'best'?")),
    case("rank-zero", "--method.rank=0", says=("method.rank", "0")),
    case("rank-huge", "--method.rank=1000000000", says=("method.rank", "1000000000", "rank")),
    case("dropout-above-one", "--method.dropout=1.5", says=("method.dropout", "1.5")),
    case("negative-lr", "--task.lr=-1", says=("task.lr: expected float of at least 0, got -1",)),
    case("lr-not-a-number", "--task.lr=.nan", says=("task.lr: expected float of at least 0, got nan",)),
    case("warm-up-share-two", "--task.warmup_share=2", says=("task.warmup_share: expected float from 0 to 1, got 2",)),
    case("clip-norm-zero", "--task.clip_norm=0", says=("task.clip_norm: expected float above 0 or null, got 0",)),
    case("patience-zero", "--task.patience=0", says=("task.patience: expected int of at least 1 or null, got 0",)),
    case("batch-size-zero", "--data.batch_size=0", says=("data.batch_size: expected int of at least 1, got 0",)),
    case("val-share-above-one", "--data.val_share=1.5", says=("data.val_share: expected float from 0 to 1",)),
    case("shares-leave-nothing", "--data.val_share=0.5", "--data.test_share=0.5", says=("data", "val_share", "0.5")),
    case("epochs-negative", "--trainer.max_epochs=-5", says=("trainer", "max_epochs", "-5")),
    case("seed-negative", "--seed=-1", says=("seed: expected an int from 0",)),
    case("weights-of-three-classes", "--task.class_weights=[1,2,3]", says=("task.class_weights", "2 classes (a, b)")),
    case("weight-negative", "--task.class_weights=[-1,2]", says=("task.class_weights", "-1")),
    case("best-without-validation", "--task.keep=best", "--data.val_share=0",
         says=("task.keep", "no validation samples")),
    case("patience-without-validation", "--task.patience=2", "--trainer.limit_val_batches=0",
         says=("task.patience", "trainer.limit_val_batches is 0")),
    case("neighbours", "--method=idpt", "--method.k=9", says=("9 neighbours", "8 patches")),
    case("unknown-device", "--trainer.accelerator=tpuu", says=("trainer", "tpuu")),
    case("unknown-precision", "--trainer.precision=7", says=("trainer.precision", "7")),
    case("devices-zero", "--trainer.devices=0", says=("trainer", "devices")),
    case("callback-outside-the-allow-list", "--trainer.callbacks=[{class_path: subprocess.Popen}]",
         says=("trainer.callbacks", "'subprocess.Popen' may not be imported")),
    case("import-outside-the-allow-list", "--method=os.path.join", says=("method.name", "os.path.join")),
    # Files of configuration.
    case("missing-config", "fit", "--config", "tinny.yaml", says=("tinny.yaml", "no such file")),
    case("yaml-syntax", "fit", "--config", "syntax.yaml", says=("syntax.yaml, line 1: not valid YAML",)),
    case("yaml-python-tag", "fit", "--config", "tag.yaml", says=("tag.yaml, line 1: not valid YAML", "python/object")),
    case("yaml-list", "fit", "--config", "list.yaml", says=("list.yaml: expected a mapping",)),
    case("yaml-duplicate-key", "fit", "--config", "twice.yaml", says=("line 2", "'method' stands here a second time")),
    case("yaml-not-utf8", "fit", "--config", "latin.yaml", says=("latin.yaml: cannot be read", "utf-8")),
    # The command line itself.
    case("unknown-verb", "fitt", says=("unknown verb 'fitt'; did you mean 'fit'",)),
    case("unknown-option", "fit", "--confg", "tiny.yaml", says=("unknown option '--confg'", "'--config'")),
    case("value-missing", "fit", "--config", says=("--config", "expected one argument")),
    case("override-value-missing", "--task.lr", says=("--task.lr: a value is missing",)),
    case("adapter-missing", "test", says=("--adapter", "required")),
    case("nothing-to-compose", "fit", "--out", "out", says=("name a configuration with --config",)),
    case("out-is-a-file", "fit", "--config", "tiny.yaml", "--out", "a_file", says=("--out: 'a_file' is a file",)),
    case("out-below-a-file", "fit", "--config", "tiny.yaml", "--out", "a_file/run", says=("a_file/run", "cannot be")),
    case("out-holds-a-finished-run", "fit", "--config", "tiny.yaml", "--out", "run",
         says=("finished run", "--overwrite")),
    # Data.
    data("folder-missing", "nowhere", "neither a folder nor a CSV"),
    data("folder-empty", "empty", "found no files at all"),
    case("one-class", "--data.root=one_class", says=("needs two classes or more", "one class: a")),
    data("one-sample-per-class", "single", "class 'a' has 1 files", "none to train on"),
    data("truncated-ply", "cut_ply", "cut.ply"),
    data("truncated-stl", "cut_stl", "cut.stl"),
    data("truncated-obj", "cut_obj", "cut.obj"),
    data("truncated-off", "cut_off", "cut.off"),
    data("h5", "clouds.h5", "neither a folder nor a CSV"),
    data("nan-points", "nan", "broken.npy", "1 of 64 points with NaN"),
    data("infinite-points", "inf", "broken.npy", "1 of 64 points with NaN or infinite"),
    data("single-point", "point", "point.npy", "single point"),
    data("zero-points", "nothing", "nothing.npy", "holds no points"),
    data("two-columns", "columns", "columns.txt", "at least 3 columns"),
    data("words-for-numbers", "words", "words.txt", "cannot be read as .txt"),
    data("file-of-no-bytes", "zero_bytes", "zero.ply", "is empty"),
    data("pickled-objects", "objects", "objects.npy", "Python objects"),
    data("csv-without-its-column", "column.csv", "path,label", "found: path, class"),
    data("csv-names-a-missing-file", "file.csv", "line 14", "none.npy' does not exist"),
    data("csv-with-an-unknown-split", "split.csv", "split is 'tain', expected train, val or test"),
    # Weights.
    case("weights-missing", "--backbone.weights=none.pth", says=("backbone.weights", "none.pth")),
    case("weights-are-a-folder", "--backbone.weights=weights_folder", says=("weights_folder",)),
    case("weights-with-code", "--backbone.weights=code.pth", says=("code.pth", "could run code")),
    case("weights-of-another-network", "--backbone.weights=other_network.safetensors", says=("backbone weights",)),
    case("weights-h5", "--backbone.weights=clouds.h5", says=("clouds.h5", "not a weights file")),
    # Adapter files.
    adapter("flipped", "does not fit its checksum"),
    adapter("cut", "no readable safetensors file"),
    adapter("empty", "no readable safetensors file"),
    adapter("pickle", "no readable safetensors file"),
    adapter("foreign", "not one that peft_modal wrote"),
    adapter("absurd", "no readable safetensors file"),
    adapter("shape", "no readable safetensors file"),
    adapter("nested", "no readable safetensors file"),
    adapter("deep", "header of 'deep.safetensors' is damaged"),
    adapter("newer", "format version 99", "reads up to 2"),
    adapter("unsigned", "its checksum is missing"),
    adapter("no_config", "config cannot be read"),
    adapter("other_weights", "other weights of 'point_mae'", "fingerprint"),
    adapter("other_backbone", "other weights of 'point_mae'"),
    case("adapter-nowhere", "test", "--adapter", "none.safetensors", says=("does not exist",)),
    case("adapter-fixes-its-method", "test", "--adapter", ADAPTER, "--method.rank=3", says=("--method", "fixes")),
    case("classes-differ", "test", "--adapter", ADAPTER, "--data.root=others", says=("classes a, b", "x, y")),
    case("predict-on-nothing", "predict", "--adapter", ADAPTER, "--input", "none", "--out", "out",
         says=("'none' does not exist",)),
    case("predict-on-another-kind", "predict", "--adapter", ADAPTER, "--input", "clouds.h5", "--out", "out",
         says=("clouds.h5", "is not a", ".npy")),
    case("predict-on-a-broken-file", "predict", "--adapter", ADAPTER, "--input", "nan", "--out", "out",
         says=("broken.npy", "NaN")),
    case("predict-into-a-file", "predict", "--adapter", ADAPTER, "--input", "good", "--out", "a_file",
         says=("a_file", "cannot be written")),
    case("predict-on-no-input", "predict", "--adapter", ADAPTER, "--out", "out",
         says=("--input PATH is missing: this adapter predicts on files",)),
    case("predict-with-another-s-flag", "predict", "--adapter", ADAPTER, "--prompt", "a cat", "--out", "out",
         says=("--prompt: it is for adapters of modality 'diffusion', and this one is of 'pointcloud'",)),
    case("export-in-another-s-format", "export", "--adapter", ADAPTER, "--format", "kohya", "--out", "out",
         says=("no format 'kohya' for modality 'pointcloud'; known: peft",)),
    case("stack-heads", "predict", "--adapter", ADAPTER, "--adapter", f"{ADAPTER}:0.5", "--input", "good",
         "--out", "out", says=("has a head of its own",)),
    case("list-unknown-kind", "list", "method", says=("unknown kind 'method'; did you mean 'methods'",)),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), CASES)
def test_a_mistake_ends_in_one_sentence(world, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(world)
    monkeypatch.setenv("PEFT_MODAL_CACHE", str(world / "cache"))
    capsys.readouterr()

    code = main(arguments)

    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("epoch ")]
    assert code == 2, error
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    for fragment in says:
        assert fragment in error
    assert not list(world.glob("out/adapter*"))
    shutil.rmtree(world / "out", ignore_errors=True)


def test_several_mistakes_are_reported_together(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    mistakes = ["--method.rank=0", "--task.lr=-1", "--task.patiense=3", "--data.batch_size=0", "--trainer.max_epochs=x"]

    assert main([*FIT, *mistakes, "--config", "toplevel.yaml"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    places = ("methd:", "method.rank:", "task.lr:", "task.patiense:", "data.batch_size:", "trainer.max_epochs:")
    assert [sum(f"error: {place}" in line for line in lines) for place in places] == [1] * len(places)
    assert len(lines) == len(places)
    assert not Path("out").exists()


def test_a_wrong_key_of_a_file_names_the_file(world, monkeypatch, capsys):
    monkeypatch.chdir(world)

    assert main([*FIT, "--config", "toplevel.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: methd: unknown key; did you mean 'method'? (in toplevel.yaml)"


def test_the_cases_number_forty_and_more():
    assert len({c.id for c in CASES}) == len(CASES) > 40
