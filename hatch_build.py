"""Build hook: copies `configs/` into real wheels only.

A plain `force-include` would also copy it into the site-packages of an editable install, where it goes stale.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the shipped YAML files to standard wheels as `peft_modal/configs`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Extend the wheel's file list before it is built."""
        if version == "standard":
            build_data["force_include"]["configs"] = "peft_modal/configs"
