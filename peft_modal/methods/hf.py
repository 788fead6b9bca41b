"""HF: Hugging Face peft's weight-space tuners (https://github.com/huggingface/peft)."""

from __future__ import annotations

from typing import Any

from peft_modal.anatomy import Selector, WeightSite
from peft_modal.attach import Adapter
from peft_modal.errors import AttachError
from peft_modal.hf.settings import read_settings
from peft_modal.methods.base import Method


class HF(Method):
    """A tuner of Hugging Face peft at whole weights: DoRA, PiSSA, VeRA, OFT, FourierFT, CorDA and the like.

    Peft makes its layers over copies outside the network and they run as peft wrote them, in place of the operation's
    own call; where a weight is read inside a function (MultiheadAttention) the weight that amounts to the layer stands
    in. The network's modules and weights stay as they are, also with tuners that start from the weights (PiSSA, OLoRA,
    CorDA): their first factors are kept in the adapter file. A row slice of a fused tensor is refused.

    Args:
        tuner: One of peft's types in lower case (`lora`, `vera`, `oft`, `boft`, `fourierft`, `loha`, `lokr`, `hra`,
            `ia3`, ...), or `dora`, `rslora`, `pissa`, `olora`, `corda`, `eva` for the LoRA that goes by that name.
        sites: Weight sites to adapt; see `Selector`. A fused tensor is taken whole.
        config: Arguments of peft's configuration for this tuner, such as `{r: 8, lora_alpha: 16}`.

    Raises:
        ConfigError: The tuner cannot be bridged, or peft's configuration has no such key.
    """

    def __init__(
        self, *, tuner: str, sites: str | list[str] | dict[str, Any] = ["attn", "mlp"],  # noqa: B006 — never changed
        config: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.tuner = tuner
        self.sites = Selector.parse(sites)
        self.settings = read_settings(tuner, config or {})

    @classmethod
    def example(cls) -> HF:
        """DoRA of rank 4, for tables and tests that make every method without arguments."""
        return cls(tuner="dora", config={"r": 4})

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]
        """As peft initialises the tuner."""
        return self.settings.identity_at_init

    def describe(self) -> str:
        """`hf:<tuner>`."""
        return f"hf:{self.tuner}"

    def build(self, adapter: Adapter) -> None:
        """One of peft's layers per selected site, and calibration where the initialisation asks for data.

        Raises:
            AttachError: A selected site is a row slice, or peft cannot act on it.
        """
        from peft_modal.hf.calibration import Calibration
        from peft_modal.hf.layers import make_operations

        sites = adapter.backbone.anatomy.select(self.sites, needs=("call", "weight"), fused=True)
        for site in sites:
            if site.rows is not None:
                raise AttachError(
                    f"'{site.name}' is a row slice of '{site.path}', and peft's tuners act on whole tensors; "
                    f"select {_whole(adapter, site)} instead"
                )
        operations = make_operations(adapter.backbone, sites, self.settings)
        for site, operation in zip(sites, operations, strict=True):
            adapter.operate(site, operation)
        if self.settings.value_of_init in {"corda", "eva"}:
            adapter.listen(Calibration(adapter.backbone, sites, operations, self.settings), name="calibration")


def _whole(adapter: Adapter, part: WeightSite) -> str:
    sites = adapter.backbone.anatomy.sites
    whole = next(site for site in sites if part.name in site.parts)
    return f"'{whole.role}' ('{whole.name}')"
