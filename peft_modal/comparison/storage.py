"""The board that workers share: which run is waiting, taken, done or failed, in Optuna's storage.

Each run is an Optuna trial with the run's key among its attributes. Every worker adds trials for runs that have none,
so a run may get two when workers start together; the oldest live trial of a run stands for it and the others are never
looked at. A worker takes a run by moving that trial from waiting to running, which the database lets one of them do.
While it works it gives signs of life; the trial of a worker without them is failed by whoever notices, and its run gets
a new one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from peft_modal.comparison.plan import COST, Plan, Progress, conflicts
from peft_modal.errors import ConfigError, TrainingError
from peft_modal.extras import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

HEARTBEAT_S: Final = 10
GRACE_S: Final = 60
_ATTEMPTS: Final = 20
_PLAN: Final = "plan"
_FACTS: Final = ("figures", "error", "seconds", "host", "versions")
"""Of a run's progress, beside its state."""


class LostRunError(Exception):
    """Another worker has taken this run over; what was made of it here does not count."""


@dataclass(frozen=True)
class Claim:
    """A run that this worker has taken."""

    key: str
    trial: int
    """The storage's identifier."""


class Board:
    """One comparison in a storage.

    Args:
        url: Of a database that SQLAlchemy knows: `sqlite:///FILE`, `postgresql://USER:PASSWORD@HOST/NAME`.
        study: The comparison's name there.
        worker: Name of this worker.
        is_dead: Whether a worker is known to have ended, by other means than its signs of life.
        heartbeat: Seconds between signs of life.
        grace: Seconds without one after which a run is taken over.

    Raises:
        MissingExtraError: Optuna or the database's driver is not installed.
        ConfigError: The URL cannot be read, or the database cannot be reached.
    """

    def __init__(
        self,
        url: str,
        study: str,
        *,
        worker: str,
        is_dead: Callable[[str], bool] = lambda _: False,
        heartbeat: int = HEARTBEAT_S,
        grace: int = GRACE_S,
    ) -> None:
        self.worker = worker
        self.heartbeat = heartbeat
        self.study = study
        self._grace = grace
        self._is_dead = is_dead
        self._seen = 0.0
        self._optuna: Any = require("optuna", extra="search")
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self.url, engine = _engine(url)
        self._storage = self._connect(engine, heartbeat, grace)
        self._study_id = -1

    def bind(self, plan: Plan, *, finished: Mapping[str, Progress] | None = None) -> None:
        """Create the study, or join the one there.

        Runs do not depend on each other, so that a plan may come with other methods, seeds and learning rates than the
        last one: what both have in common is not made again.

        Args:
            plan: What is compared.
            finished: What is known of runs from elsewhere; it counts where the study knows nothing.

        Raises:
            ConfigError: Runs of the study there are of something else.
        """
        study = self._optuna.study.StudyDirection
        try:
            self._study_id = self._storage.create_new_study(
                [study.MAXIMIZE if plan.mode == "max" else study.MINIMIZE], self.study
            )
        except self._optuna.exceptions.DuplicatedStudyError:
            self._study_id = self._storage.get_study_id_from_name(self.study)
            # Who created it writes the plan next, unless it was killed in between.
            for _ in range(_ATTEMPTS):
                if _PLAN in self._storage.get_study_user_attrs(self._study_id):
                    break
                time.sleep(0.25)
        attributes = self._storage.get_study_user_attrs(self._study_id)
        if _PLAN not in attributes and self._storage.get_n_trials(self._study_id):
            raise ConfigError(f"'{self.study}' in {self.url} is a study of something else; choose another --study.")
        if _PLAN not in attributes:
            self._storage.set_study_user_attr(self._study_id, _PLAN, plan.to_dict())
            attributes = self._storage.get_study_user_attrs(self._study_id)
        known = attributes[_PLAN]
        found = conflicts(known, plan.to_dict())
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise ConfigError(
                f"'{self.study}' in {self.url} is another comparison: {', '.join(found[:4])}{more}; choose another "
                "--out (or --study), or give the same settings."
            )
        latest = {
            **plan.to_dict(),
            "methods": {**known["methods"], **plan.methods},
            "cost_rounds": plan.cost_rounds or known["cost_rounds"],
        }
        if latest != known:
            self._storage.set_study_user_attr(self._study_id, _PLAN, latest)
        self._adopt(finished or {})
        costs = self.progress().get(COST, Progress()).figures
        is_measured = costs is None or plan.methods.keys() <= costs.keys()
        if plan.cost_rounds and not (is_measured and known["cost_rounds"] in {0, plan.cost_rounds}):
            self.retry([COST])

    def progress(self) -> dict[str, Progress]:
        """How far every run is that has a trial."""
        return {key: _progress(trials[0]) for key, trials in self._live().items()}

    def offer(self, keys: Collection[str]) -> None:
        """Add a trial for each run that has none."""
        live = self._live()
        for key in keys:
            if key not in live:
                self._add(key)

    def take(self, keys: Sequence[str]) -> Claim | None:
        """Take the first of these runs that nobody has; None when there is none."""
        self._release_dead()
        self.offer(keys)
        live = self._live()
        state = self._optuna.trial.TrialState
        for key in keys:
            trial = live[key][0]
            if trial.state != state.WAITING:
                continue
            identifier = self._id(trial)
            # Before it runs, so that no running trial is ever without a sign of life.
            self._storage.record_heartbeat(identifier)
            with suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                if self._storage.set_trial_state_values(identifier, state.RUNNING):
                    self._storage.set_trial_user_attr(identifier, "worker", self.worker)
                    self._seen = time.monotonic()
                    return Claim(key, identifier)
        return None

    def sign_of_life(self, claim: Claim) -> None:
        """Tell the others that the run is still worked on.

        Raises:
            LostRunError: It was taken over.
        """
        try:
            self._storage.record_heartbeat(claim.trial)
            state = self._storage.get_trial(claim.trial).state
        except self._optuna.exceptions.StorageInternalError:
            # A server that restarts is no reason to end a long run, as long as nobody takes it over.
            if time.monotonic() - self._seen < self._grace:
                return
            raise
        self._seen = time.monotonic()
        if state != self._optuna.trial.TrialState.RUNNING:
            raise LostRunError

    def finish(self, claim: Claim, progress: Progress, *, value: float | None) -> None:
        """Record how a run ended.

        Args:
            claim: The run.
            progress: `done` with figures, or `failed` with the sentence.
            value: The validation figure, for those who look at the study with Optuna's own tools.

        Raises:
            LostRunError: It was taken over.
        """
        state = self._optuna.trial.TrialState
        with self._lost():
            for name in _FACTS:
                found = getattr(progress, name)
                if found is not None:
                    self._storage.set_trial_user_attr(claim.trial, name, found)
            if progress.state == "failed":
                self._storage.set_trial_state_values(claim.trial, state.FAIL)
            else:
                self._storage.set_trial_state_values(claim.trial, state.COMPLETE, [value or 0.0])

    def give_back(self, claim: Claim) -> None:
        """Let others take a run that this worker leaves unfinished."""
        with suppress(LostRunError), self._lost():
            self._storage.set_trial_state_values(claim.trial, self._optuna.trial.TrialState.FAIL)

    def retry(self, keys: Collection[str]) -> None:
        """Put finished runs up again; what they gave counts no more."""
        for key, trials in self._live().items():
            if key in keys and _progress(trials[0]).state in {"done", "failed"}:
                self._add(key, replaces=trials[0].number)

    def _add(self, key: str, **attributes: Any) -> None:  # noqa: ANN401 — JSON
        state = self._optuna.trial.TrialState.WAITING
        template = self._optuna.trial.create_trial(state=state, user_attrs={"run": key, **attributes})
        self._storage.create_new_trial(self._study_id, template)

    def _adopt(self, finished: Mapping[str, Progress]) -> None:
        live = self._live()
        for key, one in finished.items():
            if one.state == "done" and key not in live:
                known = {name: getattr(one, name) for name in _FACTS if getattr(one, name) is not None}
                template = self._optuna.trial.create_trial(
                    state=self._optuna.trial.TrialState.COMPLETE, value=0.0, user_attrs={"run": key, **known}
                )
                self._storage.create_new_trial(self._study_id, template)

    def _live(self) -> dict[str, list[FrozenTrial]]:
        """The trials that count, by run, the oldest first: it stands for the run."""
        trials = sorted(self._storage.get_all_trials(self._study_id, deepcopy=False), key=lambda trial: trial.number)
        replaced = {trial.user_attrs.get("replaces") for trial in trials}
        live: dict[str, list[FrozenTrial]] = {}
        for trial in trials:
            abandoned = trial.state == self._optuna.trial.TrialState.FAIL and "error" not in trial.user_attrs
            if not abandoned and trial.number not in replaced:
                live.setdefault(trial.user_attrs["run"], []).append(trial)
        return live

    def _release_dead(self) -> None:
        with warnings.catch_warnings():
            # Heartbeats outside of `Study.optimize` are called experimental.
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._optuna.storages.fail_stale_trials(
                self._optuna.load_study(study_name=self.study, storage=self._storage)
            )
        for trials in self._live().values():
            owner = trials[0].user_attrs.get("worker")
            if _progress(trials[0]).state == "running" and owner not in {None, self.worker} and self._is_dead(owner):
                self.give_back(Claim("", self._id(trials[0])))

    def _id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Say in a sentence that the database does not answer any more.

        Raises:
            TrainingError: It does not.
        """
        try:
            yield
        except self._optuna.exceptions.StorageInternalError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise TrainingError(
                f"{self.url} does not answer ({reason}); the same command goes on where this ended"
            ) from error

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except self._optuna.exceptions.UpdateFinishedTrialError as error:
            raise LostRunError from error

    def _connect(self, engine: Mapping[str, Any], heartbeat: int, grace: int) -> RDBStorage:
        from sqlalchemy import event
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            for attempt in range(_ATTEMPTS):
                try:
                    storage: RDBStorage = self._optuna.storages.RDBStorage(
                        engine["url"],
                        engine_kwargs=dict(engine["arguments"]),
                        heartbeat_interval=heartbeat,
                        grace_period=grace,
                    )
                    break
                except (ArgumentError, NoSuchModuleError, ValueError) as error:
                    raise ConfigError(f"--storage: '{self.url}' is no URL of a database ({error}).") from error
                except (SQLAlchemyError, self._optuna.exceptions.StorageInternalError) as error:
                    # Workers that start together create the same tables.
                    if attempt == _ATTEMPTS - 1 or not _is_race(error):
                        reason = str(error.__cause__ or error).strip().splitlines()[0]
                        raise ConfigError(f"--storage: cannot use {self.url}: {reason}") from error
                    time.sleep(0.2)
        if storage.engine.dialect.name == "sqlite":
            # SQLite knows no `SELECT ... FOR UPDATE`, by which Optuna decides who takes a trial; a transaction that
            # locks from its beginning does the same. https://docs.sqlalchemy.org/en/20/dialects/sqlite.html
            storage.engine.dispose()
            event.listen(storage.engine, "connect", _without_implicit_begin)
            event.listen(storage.engine, "begin", _begin_immediate)
        return storage


def _progress(trial: FrozenTrial) -> Progress:
    attributes = trial.user_attrs
    states: dict[str, Any] = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "done", "FAIL": "failed"}
    return Progress(
        state=states[trial.state.name],
        **{name: attributes.get(name) for name in _FACTS},
    )


def _engine(url: str) -> tuple[str, dict[str, Any]]:
    """The URL without its password, and what SQLAlchemy is given.

    Raises:
        ConfigError: It is no URL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            "--storage: expected a database's URL such as postgresql://USER:PASSWORD@HOST/NAME or sqlite:///FILE, got "
            f"'{url}'."
        ) from error
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if parsed.get_backend_name() == "postgresql":
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_driver_name() == "psycopg":
            require("psycopg", extra="postgresql")
    elif parsed.get_backend_name() == "sqlite":
        arguments["connect_args"] = {"timeout": 60}
    return parsed.render_as_string(hide_password=True), {
        "url": parsed.render_as_string(hide_password=False),
        "arguments": arguments,
    }


def _is_race(error: Exception) -> bool:
    text = str(error.__cause__ or error)
    return any(part in text for part in ("already exists", "UniqueViolation", "duplicate key", "UNIQUE", "locked"))


def _without_implicit_begin(connection: Any, _: object) -> None:  # noqa: ANN401 — a driver's connection
    connection.isolation_level = None


def _begin_immediate(connection: Any) -> None:  # noqa: ANN401 — SQLAlchemy's connection
    connection.exec_driver_sql("BEGIN IMMEDIATE")
