"""What a user writes about one of peft's tuners, checked, and turned into peft's configuration object."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from peft_modal.errors import ConfigError, nearest
from peft_modal.extras import require
from peft_modal.hf.tuners import DECIDED, PRESETS, REFUSED, TUNERS, Tuner

_NESTED_REFUSED = {
    "cache_file": "is a pickle, which is never opened here",
    "covariance_file": "is a pickle, which is never opened here",
    "tau": "is not needed: every calibration batch is used once",
    "adjust_scaling_factors": "is not needed: ranks stay as they are",
    "prune_temporary_fields": "is decided by the bridge",
    "use_float16_for_covariance": "is decided by the bridge: covariances are float32",
    "verbose": "is decided by the bridge",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A tuner of peft's with the arguments of its configuration."""

    name: str
    """Key of `TUNERS`."""
    arguments: Mapping[str, Any]
    """As given, with presets; defaults are peft's."""

    @property
    def tuner(self) -> Tuner:
        """What the bridge knows of it."""
        return TUNERS[self.name]

    def peft_config(self, targets: list[str], *, feedforward: list[str]) -> Any:  # noqa: ANN401 — peft's PeftConfig
        """Peft's configuration object for these module paths.

        Args:
            targets: Paths of the modules to adapt.
            feedforward: Those of them that IA3 scales at their input.

        Raises:
            ConfigError: peft does not take the arguments.
        """
        cls = _config_class(self.name)
        arguments = copy.deepcopy({**self.tuner.defaults, **self.arguments})
        for key, nested in _nested(cls).items():
            if isinstance(arguments.get(key), Mapping):
                arguments[key] = nested(**arguments[key])
        if self.name == "ia3":
            arguments["feedforward_modules"] = feedforward
        try:
            return cls(target_modules=targets, **arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(f"method.config: peft's '{self.name}' refuses it: {one_line(error)}") from error

    @property
    def value_of_init(self) -> object:
        """What the configuration says of the initialisation."""
        field = next((f for f in dataclasses.fields(_config_class(self.name)) if f.name == self.tuner.init), None)
        return self.arguments.get(self.tuner.init, None if field is None else field.default)

    @property
    def takes_from_weight(self) -> bool:
        """Whether the first factors are taken out of the weight, which leaves a residual in its place."""
        value = self.value_of_init
        return isinstance(value, str) and value.partition("_niter_")[0] in {"pissa", "olora"}

    @property
    def identity_at_init(self) -> bool:
        """Whether a fresh tuner leaves the output as it is."""
        value = self.value_of_init
        if isinstance(value, str):
            value = value.partition("_niter_")[0]
        # `1 == True`, but only True is one of peft's values.
        return any(value == known and type(value) is type(known) for known in self.tuner.identity)

    @property
    def changes_bias(self) -> bool:
        """Whether the tuner adds to a layer's bias."""
        return self.tuner.changes_bias or bool(self.arguments.get("lora_bias"))

    @property
    def has_dropout(self) -> bool:
        """Whether inputs, ranks or whole updates are dropped while training."""
        return any("dropout" in key and key != "rank_dropout_scale" and value for key, value in self.arguments.items())


def read_settings(tuner: str, config: Mapping[str, Any]) -> Settings:
    """Check a tuner's name and the keys and plain types of its configuration.

    Raises:
        ConfigError: Lists every mistake.
        MissingExtraError: peft is not installed.
    """
    require("peft", extra="hf")
    name, preset = PRESETS.get(tuner, (tuner, {}))
    if name in REFUSED:
        raise ConfigError(f"method.tuner: '{tuner}' cannot be bridged: {REFUSED[name]}")
    if name not in TUNERS:
        raise ConfigError(f"method.tuner: peft has no tuner '{tuner}' that is bridged; "
                          f"{nearest(tuner, [*TUNERS, *PRESETS])}")  # fmt: skip
    cls = _config_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = []
    for key, value in config.items():
        where = f"method.config.{key}"
        if key in DECIDED:
            problems.append(f"{where}: {DECIDED[key]}; remove it")
        elif key not in fields:
            problems.append(
                f"{where}: peft's '{name}' has no such key; {nearest(str(key), set(fields) - set(DECIDED))}"
            )
        elif key in preset and value != preset[key]:
            problems.append(f"{where}: {value!r} contradicts `tuner: {tuner}`; write `tuner: {name}`")
        else:
            problems += _check_value(cls, key, value, default=fields[key].default, where=where)
    if problems:
        raise ConfigError(*problems)
    settings = Settings(name, {**config, **preset})
    _check_init(settings)
    settings.peft_config(["x"], feedforward=["x"])
    return settings


def one_line(error: BaseException) -> str:
    """The message of a foreign error as one line without its end."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _config_class(name: str) -> Any:  # noqa: ANN401 — a class of peft's
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name.upper() not in found:
        raise ConfigError(f"method.tuner: the installed peft has no '{name}' (any more); use peft 0.21")
    return found[name.upper()]


def _nested(cls: type) -> dict[str, Any]:
    """Keys whose value is a configuration of its own."""
    found = {}
    for key, hint in typing.get_type_hints(cls).items():
        for part in (hint, *typing.get_args(hint)):
            if key not in DECIDED and isinstance(part, type) and dataclasses.is_dataclass(part):
                found[key] = part
    return found


def _check_value(cls: type, key: str, value: object, *, default: object, where: str) -> list[str]:
    nested = _nested(cls).get(key)
    if nested is not None and value is not None:
        if not isinstance(value, Mapping):
            return [f"{where}: expected a mapping, got {value!r}"]
        known = {field.name for field in dataclasses.fields(nested)} - set(_NESTED_REFUSED)
        return [
            f"{where}.{inner}: {_NESTED_REFUSED[inner]}; remove it"
            if inner in _NESTED_REFUSED
            else f"{where}.{inner}: there is no such key; {nearest(str(inner), known)}"
            for inner in value
            if inner not in known
        ]
    hint = typing.get_type_hints(cls)[key]
    kinds = {typing.get_origin(part) or part for part in (typing.get_args(hint) or (hint,))}
    if typing.get_origin(hint) in {dict, list, typing.Literal}:
        kinds = {typing.get_origin(hint)}
    accepted = tuple(kind for kind in kinds if isinstance(kind, type))
    if typing.Literal in kinds or typing.Any in kinds or not accepted:
        return []
    fits = (
        type(value) in accepted
        or (value is None and default is None)
        or (float in accepted and type(value) is int)
        or (dict in accepted and isinstance(value, Mapping))
    )
    names = ", ".join(sorted({"null" if kind is type(None) else kind.__name__ for kind in accepted}))
    return [] if fits else [f"{where}: expected {names}, got {value!r}"]


def _check_init(settings: Settings) -> None:
    where = f"method.config.{settings.tuner.init}"
    value = settings.value_of_init
    if value in {"loftq", "lora_ga"}:
        reason = DECIDED[f"{value}_config"]
        raise ConfigError(f"{where}: '{value}' {reason}; `pissa` starts from the weights themselves")
    if settings.name == "tinylora" and value is False:
        raise ConfigError(f"{where}: with false peft leaves tinylora's vector uninitialised; use 'uniform'")
    eva = settings.arguments.get("eva_config") or {}
    if value == "eva" and eva.get("rho", 1.0) != 1.0:
        raise ConfigError(
            f"method.config.eva_config.rho: {eva['rho']} would give layers other ranks after calibration; only 1.0"
        )
