"""Contracts on what an adapter does to the outputs: at the start, switched off, stacked, merged, stored, copied."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 — the bytes are our own, made a line before they are read
import random
import re
import tempfile
from pathlib import Path
from unittest import SkipTest

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from peft_modal.anatomy import Backbone
from peft_modal.attach import Adapter, merge_
from peft_modal.errors import MergeError
from peft_modal.methods.base import Method
from peft_modal.methods.lora import LoRA
from peft_modal.testing.sandbox import BackboneFactory, distance, gradients, outputs, quiet, shift

IDENTITY_TOLERANCE = 1e-6
"""Of the largest output entry; what `W + 0` and one more product by one may round."""
MERGE_TOLERANCE = 1e-5
"""Of the largest output entry: the merged network adds the same numbers in another order."""


def check_identity_at_init(backbone_factory: BackboneFactory, method: Method) -> None:
    """A fresh adapter changes the output exactly where the method says so.

    Raises:
        AssertionError: `identity_at_init` is declared wrongly.
    """
    with quiet():
        backbone = backbone_factory()
        bare = outputs(backbone)
        method.attach(backbone)
        error = distance(outputs(backbone), bare)
    if method.identity_at_init:
        assert error <= IDENTITY_TOLERANCE, (
            f"{method.describe()} declares identity_at_init = True, but attaching it changes the output by {error:.1e}"
        )
    else:
        assert error > IDENTITY_TOLERANCE, (
            f"{method.describe()} declares identity_at_init = False, but attaching it leaves the output as it was"
        )


def check_enable_disable(backbone_factory: BackboneFactory, method: Method) -> None:
    """A disabled adapter leaves no effect, and enabling brings the same output back, both to the bit.

    Raises:
        AssertionError: Either does not hold.
    """
    with quiet():
        backbone = backbone_factory()
        bare = outputs(backbone)
        adapter = method.attach(backbone)
        shift(adapter)
        on = outputs(backbone)
        adapter.enable(on=False)
        off = outputs(backbone)
        adapter.enable(on=True)
        again = outputs(backbone)
    assert distance(off, bare) == 0.0, f"a disabled {method.describe()} still changes the output"
    assert again.keys() == on.keys(), f"{method.describe()} exports other features after disable and enable"
    assert distance(again, on) == 0.0, f"{method.describe()} gives another output after disable and enable"
    if adapter.named_trained():
        assert distance(on, bare) > 0.0, f"the trained tensors of {method.describe()} have no effect on the output"


def check_stacking_with_lora(backbone_factory: BackboneFactory, method: Method) -> None:
    """LoRA stacks on the method, both learn, and each can be taken away first.

    Raises:
        AssertionError: Taking one away leaves something else than the other alone, or one gets no gradient.
        SkipTest: The network has no site for LoRA.
    """
    with quiet():
        for first_out in ("default", "stacked_lora"):
            backbone = backbone_factory()
            bare = outputs(backbone)
            methods = {"default": method, "stacked_lora": _any_lora(backbone)}
            adapters = {name: each.attach(backbone, name=name) for name, each in methods.items()}
            for adapter in adapters.values():
                shift(adapter)
            both = outputs(backbone)
            lora = adapters["stacked_lora"]
            assert gradients(backbone, lora).keys() == lora.named_trained().keys(), (
                f"LoRA stacked on {method.describe()} gets no gradient"
            )
            removed = adapters.pop(first_out)
            removed.detach()
            rest = outputs(backbone)
            assert distance(rest, both) > 0.0 or not removed.named_trained(), (
                f"'{first_out}' of {method.describe()} and LoRA has no effect"
            )
            left, adapter = adapters.popitem()
            assert distance(rest, _alone(backbone_factory, methods[left], adapter)) == 0.0, (
                f"after '{first_out}' of {method.describe()} and LoRA is detached, the other does not act as if alone"
            )
            adapter.detach()
            assert distance(outputs(backbone), bare) == 0.0, f"{method.describe()} and LoRA leave an effect behind"


def check_merge_equals_unmerged(backbone_factory: BackboneFactory, method: Method) -> None:
    """The merged network computes what network and adapter computed; or merging is refused and nothing happens.

    Raises:
        AssertionError: The outputs differ, or a refusal says nothing or leaves the network changed.
    """
    with quiet():
        backbone = backbone_factory()
        shift(method.attach(backbone))
        unmerged = outputs(backbone)
        refusal = None
        try:
            merge_(backbone)
        except MergeError as error:
            refusal = str(error).strip()
        deviation = distance(outputs(backbone), unmerged)
    if refusal is not None:
        assert refusal, f"{method.describe()} refuses to merge and does not say why"
        assert deviation == 0.0, f"a refused merge of {method.describe()} has an effect"
        return
    assert not backbone.adapters, f"{method.describe()} is still attached after merging"
    assert deviation <= MERGE_TOLERANCE, f"merging {method.describe()} changes the output by {deviation:.1e}"


def check_save_load_round_trip(backbone_factory: BackboneFactory, method: Method) -> None:
    """A fresh adapter of another name computes the same after it is filled from a safetensors file.

    Raises:
        AssertionError: The outputs differ, or a tensor's name in the file depends on the adapter's name.
    """
    with quiet(), tempfile.TemporaryDirectory() as folder:
        backbone = backbone_factory()
        adapter = method.attach(backbone, name="written")
        shift(adapter)
        wanted = outputs(backbone)
        path = Path(folder) / "adapter.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in adapter.state().items()}, path)
        reader = backbone_factory()
        fresh = method.attach(reader, name="read", generator=torch.Generator().manual_seed(99))
        fresh.rebuild(adapter.facts())
        stored = load_file(path)
        assert stored.keys() == fresh.state().keys(), (
            f"tensor names in the file of {method.describe()} depend on the adapter's name or on its initial values"
        )
        fresh.load(stored)
        assert distance(outputs(reader), wanted) == 0.0, f"{method.describe()} computes something else after loading"


def check_copy_and_pickle(backbone_factory: BackboneFactory, method: Method) -> None:
    """Backbone and adapter copied together act like the original and on their own.

    Raises:
        AssertionError: A copy computes something else, or follows the original's tensors.
    """
    with quiet():
        backbone = backbone_factory()
        bare = outputs(backbone)
        adapter = method.attach(backbone)
        shift(adapter)
        wanted = outputs(backbone)
        pair = (backbone, adapter)
        packed = pickle.dumps(pair)
        copies = {"deepcopy": copy.deepcopy(pair), "pickle": pickle.loads(packed)}  # noqa: S301 — our own bytes
        shift(adapter, seed=8)
        for how, (other, its_adapter) in copies.items():
            _check_copy(method, how, other, its_adapter, wanted=wanted, bare=bare)


def _check_copy(
    method: Method, how: str, backbone: Backbone, adapter: Adapter, *, wanted: dict[str, torch.Tensor],
    bare: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    name = f"the {how} of {method.describe()}"
    assert adapter.backbone is backbone, f"{name} is attached to another backbone"
    assert distance(outputs(backbone), wanted) == 0.0, f"{name} computes something else or follows the original"
    if adapter.named_trained():
        shift(adapter, seed=9)
        assert distance(outputs(backbone), wanted) > 0.0, f"{name} does not read its own tensors"
    adapter.detach()
    assert distance(outputs(backbone), bare) == 0.0, f"{name} leaves an effect after detach"


def check_attach_leaves_rng_alone(backbone_factory: BackboneFactory, method: Method) -> None:
    """Attaching draws from its own generator only, and equal seeds give equal adapters.

    Raises:
        AssertionError: A global random state moved, or the initial values depend on one.
    """
    with quiet():
        states = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            backbone = backbone_factory()
            before = _global_states()
            adapter = method.attach(backbone, generator=torch.Generator().manual_seed(5))
            assert _global_states() == before, f"attaching {method.describe()} moves a global random state"
            states.append(adapter.state())
    same = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert same, f"initial values of {method.describe()} depend on the global random state"


def _global_states() -> tuple[bytes, ...]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 — the global state is what is under test
    return (torch.get_rng_state().numpy().tobytes(), repr(numpy_state).encode(), repr(random.getstate()).encode())


def _alone(backbone_factory: BackboneFactory, method: Method, like: Adapter) -> dict[str, torch.Tensor]:
    """Outputs of the method alone on a fresh backbone, with the values of `like`."""
    backbone = backbone_factory()
    adapter = method.attach(backbone)
    values = like.state()
    # Tensors that every method trains belong to the adapter that came first; the other one never had them.
    adapter.load({name: values.get(name, own) for name, own in adapter.state().items()})
    return outputs(backbone)


def _any_lora(backbone: Backbone) -> LoRA:
    for op in ("linear", "conv"):
        for site in backbone.anatomy.sites:
            groups = getattr(backbone.network.get_submodule(site.holder), "groups", 1)
            if site.op == op and not site.parts and site.reach & {"call", "weight"} and groups == 1:
                return LoRA(sites={"path": f"^{re.escape(site.name)}$"}, rank=2)
    raise SkipTest(f"{type(backbone).__name__} has no linear or convolution that LoRA could act on")
