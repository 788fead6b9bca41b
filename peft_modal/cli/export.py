"""`export` and `import`: adapters in other programs' formats."""

from __future__ import annotations

from pathlib import Path

from peft_modal.anatomy import Backbone
from peft_modal.api import Exported, Model, build, load
from peft_modal.cli.options import Options
from peft_modal.cli.output import write, write_json
from peft_modal.compose import compose
from peft_modal.errors import ConfigError
from peft_modal.files import Header, fingerprint, read_index, save_adapter, versions
from peft_modal.hf.files import CONFIG, LoraFolder, export_lora, read_lora
from peft_modal.hf.importing import import_lora as map_onto
from peft_modal.registry import default_registry
from peft_modal.tasks.tensors import head_tensors, load_tensors, tensors_of


def export(options: Options) -> int:
    """Write an adapter file in another program's format."""
    assert options.adapter is not None
    assert options.out is not None
    _, header = read_index(options.adapter)
    backbone: type[Backbone] = compose(header.config).nodes["backbone"].cls
    write_format = default_registry().exporter(options.format, backbone.modality)
    written: Exported = write_format(load(options.adapter), options.out)
    if options.json:
        write_json({
            "out": str(options.out), "files": [str(path) for path in written.files], "notes": list(written.notes),
        })  # fmt: skip
    else:
        write(f"written: {', '.join(map(str, written.files))}")
        for note in written.notes:
            write(note)
    return 0


def export_peft(model: Model, out: Path) -> Exported:
    """The format of Hugging Face peft."""
    name = model.composed.nodes["backbone"].name
    return Exported(export_lora(model.adapter, out, head=model.head, backbone_name=name))


def import_lora(options: Options) -> int:
    """Make an adapter file of another program's LoRA; the configuration says backbone, head, task and data.

    Raises:
        ConfigError: A method is given, or the output is a folder.
    """
    assert options.input is not None
    assert options.out is not None
    if options.out.is_dir():
        raise ConfigError(f"--out: '{options.out}' is a folder; name the adapter file to write")
    if any(text.startswith(("method=", "method.")) for text in options.overrides):
        raise ConfigError("--method: the folder decides the method; leave it out")
    first = compose(*options.config, {"method": {"name": "linear_probe"}}, overrides=options.overrides)
    backbone = first.nodes["backbone"].build()
    found = map_onto(_read(options.input, backbone), backbone)
    composed = compose(*options.config, {"method": dict(found.method)}, overrides=options.overrides)
    data = composed.nodes["data"].build()
    data.prepare_data()
    data.setup("fit")
    model = build(composed, data.class_names)
    has_head = any(name.startswith("head.") for name in found.tensors)
    tensors = {**({} if has_head else head_tensors(model.head)), **found.tensors}
    # Tensors of the backbone's own that every method trains, where the folder does not know of them.
    own = {name: value for name, value in model.adapter.state().items() if name.startswith("backbone.")}
    load_tensors(model.adapter, model.head, {**own, **tensors})
    header = Header(
        config=composed.to_dict(), fingerprint=fingerprint(model.backbone.network.state_dict()),
        class_names=model.class_names, preprocessing=dict(data.preprocessing), versions=versions(),
    )  # fmt: skip
    save_adapter(options.out, tensors_of(model.adapter, model.head), header)
    method = str(found.method["name"])
    if options.json:
        write_json({"out": str(options.out), "method": dict(found.method), "head_trained": has_head})
    else:
        note = "" if has_head else "; the folder has no head, so the head is untrained"
        write(f"imported as method '{method}': {options.out}{note}")
    return 0


def _read(path: Path, backbone: Backbone) -> LoraFolder:
    """A folder of peft's, or what the modality's own reader knows."""
    importer = default_registry().importer(backbone.modality)
    if importer is not None and path.exists() and not (path / CONFIG).is_file():
        found: LoraFolder = importer(path, backbone)
        return found
    return read_lora(path)
