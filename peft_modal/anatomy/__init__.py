"""Anatomy: the core adapter API. It says where, in any network, a method can act."""

from peft_modal.anatomy.anatomy import Anatomy
from peft_modal.anatomy.backbone import Backbone, FrozenMode
from peft_modal.anatomy.builder import AnatomyBuilder
from peft_modal.anatomy.context import Context, Contexts, in_backward
from peft_modal.anatomy.layout import MEAN_OF, Features, FeatureSpec, Segment, TokenLayout
from peft_modal.anatomy.registered import adopt_biases, registered, registrations
from peft_modal.anatomy.selector import Selector
from peft_modal.anatomy.sites import Access, Port, WeightSite

__all__ = [
    "MEAN_OF",
    "Access",
    "Anatomy",
    "AnatomyBuilder",
    "Backbone",
    "Context",
    "Contexts",
    "FeatureSpec",
    "Features",
    "FrozenMode",
    "Port",
    "Segment",
    "Selector",
    "TokenLayout",
    "WeightSite",
    "adopt_biases",
    "in_backward",
    "registered",
    "registrations",
]
