"""The table of methods and backbones says what works, what does not, and why; a plugin's fault stays its own."""

from __future__ import annotations

import pytest
from contract.cases import registry
from plain_backbone import PlainBackbone
from tiny_backbones import TinyUNet, TinyViT

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter
from peft_modal.errors import RegistryError
from peft_modal.methods.base import Method
from peft_modal.methods.lora import LoRA
from peft_modal.registry import Entry, Plugin, Registry
from peft_modal.testing import MatrixRow, example_methods, matrix_table, method_matrix


class OfferedViT(TinyViT):
    @classmethod
    def tiny(cls) -> Backbone:
        return cls(depth=1)


class OfferedUNet(TinyUNet):
    @classmethod
    def tiny(cls) -> Backbone:
        return cls()


class WithoutTiny(PlainBackbone):
    pass


class WithExample(Method):
    identity_at_init = True

    def __init__(self, *, rank: int) -> None:
        self.rank = rank

    @classmethod
    def example(cls) -> Method:
        return cls(rank=2)

    def build(self, adapter: Adapter) -> None:
        LoRA(rank=self.rank).build(adapter)


class WithoutExample(WithExample):
    example = None


def _here(cls: type) -> Entry:
    return Entry(f"{__name__}:{cls.__qualname__}")


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], MatrixRow]:
    core = Plugin(
        name="core",
        modality="",
        methods={
            "lora": Entry("peft_modal.methods.lora:LoRA"),
            "vpt": Entry("peft_modal.methods.vpt:VPT"),
            "with_example": _here(WithExample),
            "without_example": _here(WithoutExample),
            "missing": Entry("peft_modal.methods.lora:Missing"),
        },
    )
    vision = Plugin(
        name="vision",
        backbones={"vit": _here(OfferedViT), "without_tiny": _here(WithoutTiny)},
        methods={"own": _here(WithExample)},
    )
    diffusion = Plugin(name="diffusion", backbones={"unet": _here(OfferedUNet)})
    found = method_matrix(Registry.from_plugins([(core, "a"), (vision, "b"), (diffusion, "c")]))
    return {(row.method, row.backbone): row for row in found}


def test_every_pair_has_a_row(rows: dict[tuple[str, str], MatrixRow]) -> None:
    methods = {"lora", "vpt", "with_example", "without_example", "missing", "vision.own"}
    assert set(rows) == {(m, b) for m in methods for b in ("vision.vit", "vision.without_tiny", "diffusion.unet")}


@pytest.mark.parametrize(
    "pair",
    [("lora", "vision.vit"), ("lora", "diffusion.unet"), ("with_example", "vision.vit"), ("vision.own", "vision.vit")],
)
def test_what_attaches_works(rows: dict[tuple[str, str], MatrixRow], pair: tuple[str, str]) -> None:
    assert rows[pair] == MatrixRow(*pair, works=True, reason="")


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("vpt", "diffusion.unet"), "this network has no token sequence"),
        (("lora", "vision.without_tiny"), "WithoutTiny offers no classmethod tiny()"),
        (("without_example", "vision.vit"), "WithoutExample needs arguments and offers no classmethod example()"),
        (("missing", "vision.vit"), "method 'missing' cannot be loaded"),
        (("vision.own", "diffusion.unet"), "it is a method of modality 'vision'"),
    ],
)
def test_what_does_not_says_why(rows: dict[tuple[str, str], MatrixRow], pair: tuple[str, str], reason: str) -> None:
    assert not rows[pair].works
    assert reason in rows[pair].reason


def test_table_has_one_line_for_each_method(rows: dict[tuple[str, str], MatrixRow]) -> None:
    lines = matrix_table(list(rows.values())).splitlines()
    assert lines[0] == "| method | diffusion.unet | vision.vit | vision.without_tiny |"
    assert "| lora | yes | yes | no |" in lines
    assert len(lines) == 2 + 6


def test_every_installed_class_can_be_made_and_every_pair_that_does_not_work_says_why() -> None:
    rows = method_matrix(registry())
    assert all(row.works or row.reason for row in rows)
    faults = ("offers no classmethod", "cannot be loaded", "is no Method", "makes no Backbone")
    assert not {row.reason for row in rows if any(fault in row.reason for fault in faults)}


class Raising(TinyViT):
    @classmethod
    def tiny(cls) -> Backbone:
        raise ZeroDivisionError("tiny is broken")


class RaisingMethod(LoRA):
    def __init__(self) -> None:
        raise RuntimeError("no licence")


class RaisingInBuild(Method):
    identity_at_init = True

    def build(self, adapter: Adapter) -> None:
        raise KeyError("blocks")


@pytest.fixture
def broken() -> Registry:
    plugin = Plugin(
        "broken",
        backbones={"good": _here(OfferedViT), "raising": _here(Raising)},
        methods={"good": _here(LoRA), "unmade": _here(RaisingMethod), "unbuilt": _here(RaisingInBuild)},
    )
    return Registry.from_plugins([(plugin, "third-party")])


def test_a_class_that_raises_gives_its_reason_and_the_others_are_tried(broken: Registry) -> None:
    reasons = {(row.method, row.backbone): row.reason for row in method_matrix(broken)}
    assert not reasons["broken.good", "broken.good"]
    assert reasons["broken.good", "broken.raising"] == "Raising.tiny() fails with ZeroDivisionError: tiny is broken"
    assert reasons["broken.unmade", "broken.good"] == "RaisingMethod cannot be made: RuntimeError: no licence"
    assert reasons["broken.unbuilt", "broken.good"] == "attaching fails with KeyError: 'blocks'"


def test_example_methods_are_the_core_s_and_the_modality_s_own() -> None:
    methods = example_methods(registry(), modality="pointcloud")
    assert {"lora", "compose", "idpt"} <= set(methods)
    assert "idpt" not in example_methods(registry(), modality="elsewhere")


def test_an_example_method_that_cannot_be_made_is_an_error(broken: Registry) -> None:
    with pytest.raises(RegistryError, match=r"method 'broken\.unmade': RaisingMethod cannot be made: .*no licence"):
        example_methods(broken, modality="broken")
