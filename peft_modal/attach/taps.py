"""Taps: intermediate features handed to the head, to prompts, or to a side network."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from peft_modal.anatomy import Backbone, Port
from peft_modal.attach.attachment import Attachment
from peft_modal.attach.hub import Phase, hang, unhang


class TapAttachment(Attachment):
    """Reads the tensor at a port into `context.taps[key]`; prompts are not in it.

    Args:
        order: See `Attachment`.
        port: Where to read.
        key: Name of the tensor in the context and in `Features.extras`.
        detach: Cut the gradient, for methods that do not back-propagate through the backbone.
    """

    def __init__(self, order: int, port: Port, key: str, *, detach: bool) -> None:
        super().__init__(order)
        self.port, self.key, self.cut = port, key, detach
        self.touches = (port.module,)
        self.backbone: Backbone | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Read; the tensor itself goes on unchanged."""
        assert self.backbone is not None
        self.backbone.contexts.current().taps[self.key] = tensor.detach() if self.cut else tensor
        return tensor

    @override
    def hang(self, backbone: Backbone) -> None:
        self.backbone = backbone
        hang(backbone, self.port, Phase.TAP_IN if self.port.side == "in" else Phase.TAP_OUT, self.order, self)

    @override
    def unhang(self, backbone: Backbone) -> None:
        unhang(backbone, self.port, self)

    @override
    def describe(self) -> str:
        return f"a tap at '{self.port.name}'"

    @override
    def where(self) -> tuple[Port, ...]:
        return (self.port,)
