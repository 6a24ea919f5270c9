"""Which trials does a study have, who holds each, and how far is it? What the storage knows, as plain values.

A trial enters the storage whole (number, parameters, shape, where it comes from) in one write. From then on its lease
says who works on it: a token per attempt, host, process, and the last step; a worker renews it by training. Who has
another token is superseded: it can neither renew nor tell. What the storage doesn't hold is the result: that is the
record (which travels through it between machines that share no folder).
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from fintx.config.schema import Shape
from fintx.study import storage
from fintx.study.records import TrialRecord
from fintx.study.storage import Storage

WORST = 1e9
"""Told for a diverged, collapsed or out-of-memory trial: the sampler only ranks, and must learn to stay away."""

State = Literal["running", "interrupted", "failed"]
_ANSWERED = "entry:"


@dataclass(frozen=True)
class Lease:
    """A trial as the storage holds it."""

    number: int
    params: dict[str, Any]
    """What the sampler holds of it: coordinates and searched values."""
    shape: Shape
    entry: str | None
    """Identity of the queue entry that it comes from; none: the sampler's proposal."""
    note: str
    training: str
    """Where the values that a queue entry leaves open came from: "trial 7", "defaults", "sampler"; else empty."""
    finished: bool
    """Its record stands."""
    state: State
    """Of an unfinished one. interrupted: stopped on request; failed: its last attempt crashed or hung."""
    token: str
    """Of the attempt that holds it; who has another one is superseded."""
    attempt: int
    """From 1."""
    failures: int
    """Attempts that crashed or hung, in all."""
    owner: str
    """Host and study folder of the coordinator that holds it, or held it last."""
    host: str
    pid: int
    """Of the worker; 0: none yet."""
    step: int
    """Last step that was reported."""
    beat: int
    """Grows with every renewal."""
    detail: str
    """Why the last attempt ended, in a line; empty while all is well."""


_LEASE_FIELDS = ("state", "token", "attempt", "failures", "owner", "host", "pid", "step", "beat", "detail")


@dataclass(frozen=True)
class Proposal:
    """A trial that is not in the storage yet."""

    params: dict[str, Any]
    distributions: Mapping[str, BaseDistribution]
    shape: Shape
    entry: str | None
    note: str
    training: str


@dataclass(frozen=True)
class SameTrial:
    """A queue entry asks for what a trial of the study is already."""

    entry: str
    number: int


@dataclass(frozen=True)
class Withdrawal:
    """A trial that came to no end, and whose queue entry is cancelled: it counts no more."""

    number: int


Choice = Lease | Proposal | SameTrial | Withdrawal | None
"""An unfinished trial to take up, a new one, an entry that needs none, one that is not wanted, or nothing to do."""


def owner_of(study_folder: Path, *, shared: bool) -> str:
    """Names a coordinator's place.

    A journal lies in the study's folder, whose lock lets one coordinator in per host; the folder may be moved. Two on
    one host that share a database have different folders.
    """
    return f"{socket.gethostname()}:{study_folder.resolve()}" if shared else socket.gethostname()


def read(study_folder: Path, *, url: str = storage.JOURNAL) -> tuple[Lease, ...]:
    """The leases of a study, read without holding anything up; empty where there are none.

    Raises:
        FintxError: the database does not answer.
    """
    with storage.reading(url, study_folder, study_folder.name) as study:
        return () if study is None else leases_of(study)


def leases_of(study: optuna.Study) -> tuple[Lease, ...]:
    """Every trial by number; one that answers more than one queue entry stands once for each."""
    found = [_lease(frozen) for frozen in study.get_trials(deepcopy=False) if _is_real(frozen)]
    by_number = {lease.number: lease for lease in found}
    answered = [
        dataclasses.replace(by_number[number], entry=key.removeprefix(_ANSWERED))
        for key, number in study.user_attrs.items()
        if key.startswith(_ANSWERED) and number in by_number
    ]
    return (*found, *answered)


def _is_real(frozen: FrozenTrial) -> bool:
    return "shape" in frozen.user_attrs and frozen.state in (TrialState.RUNNING, TrialState.COMPLETE)


def _lease(frozen: FrozenTrial) -> Lease:
    held = frozen.user_attrs
    return Lease(
        number=frozen.number,
        params=dict(frozen.params),
        shape=Shape(**held["shape"]),
        entry=held["entry"],
        note=held["note"],
        training=held["training"],
        finished=frozen.state == TrialState.COMPLETE,
        **held["lease"],
    )


@dataclass(frozen=True)
class TrialTable:
    """The leases of one study, read and changed by one coordinator. Every method may raise `StorageAway`."""

    storage: Storage
    owner: str

    def leases(self) -> tuple[Lease, ...]:
        """As `leases_of`, up to date."""
        with self.storage.exclusive():
            return leases_of(self.storage.study)

    def acquire(self, choose: Callable[[tuple[Lease, ...]], Choice]) -> Lease | None:
        """Look at all leases, choose, and take what was chosen, alone over all machines.

        Args:
            choose: pure; may be called again if the database is lost in between.

        Returns:
            The lease with a token of its own, or none if there was nothing to choose.
        """
        with self.storage.exclusive() as check:
            while isinstance(chosen := choose(leases_of(self.storage.study)), SameTrial | Withdrawal):
                check()
                if isinstance(chosen, SameTrial):
                    self.storage.study.set_user_attr(f"{_ANSWERED}{chosen.entry}", chosen.number)
                else:
                    self.storage.backend.set_trial_state_values(self._trial_id(chosen.number), TrialState.FAIL)
            if chosen is None:
                return None
            check()
            if isinstance(chosen, Lease):
                return self._write(self._taken(chosen))
            token = secrets.token_hex(8)
            self.storage.study.add_trial(self._new(chosen, token))
            # Found by its token: what was created, if an earlier try was lost after its commit.
            return next(lease for lease in leases_of(self.storage.study) if lease.token == token)

    def renew(self, lease: Lease, *, step: int, pid: int) -> Lease | None:
        """Say that the holder trains on; none if it is superseded."""
        return self._change(lease, step=step, pid=pid, beat=lease.beat + 1)

    def release(self, lease: Lease, state: State, detail: str, *, step: int) -> Lease | None:
        """Give an unfinished trial back: interrupted, or failed, which counts; none if it is superseded."""
        failures = lease.failures + (state == "failed")
        return self._change(lease, state=state, detail=detail, step=step, failures=failures, pid=0)

    def tell(self, lease: Lease, record: TrialRecord, *, minimize: bool) -> bool:
        """Finish a trial with its record; false if the holder is superseded, whose record then doesn't count."""
        with self.storage.exclusive() as check:
            current = self._current(lease.number)
            if current is None or current.token != lease.token:
                return False
            if not current.finished:
                check()
                self._finish(record, minimize=minimize)
            return True

    def restore(
        self, kept: Iterable[TrialRecord], distributions: Mapping[str, BaseDistribution], *, minimize: bool
    ) -> None:
        """Tell whatever records stand that the storage doesn't know as finished; a lost journal is made again."""
        with self.storage.exclusive() as check:
            check()
            study = self.storage.study
            for record in sorted(kept, key=lambda record: record.trial_number):
                while len(trials := study.get_trials(deepcopy=False)) < record.trial_number:
                    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
                if len(trials) == record.trial_number:
                    study.add_trial(self._new(_proposal(record, distributions), secrets.token_hex(8)))
                    self._finish(record, minimize=minimize)
                elif trials[record.trial_number].state == TrialState.RUNNING:
                    self._finish(record, minimize=minimize)

    def foreign_records(self, known: Iterable[int]) -> list[str]:
        """The records (JSON) of trials that other machines finished and this one hasn't heard of."""
        if not self.storage.shared:
            return []
        known = set(known)
        with self.storage.exclusive():
            trials = self.storage.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [frozen.user_attrs["record"] for frozen in trials if frozen.number not in known]

    def definition(self, mine: dict[str, Any]) -> dict[str, Any]:
        """The study's definition as the storage has it; the first to come writes his."""
        with self.storage.exclusive():
            held = self.storage.study.user_attrs.get("definition")
            if held is None:
                self.storage.study.set_user_attr("definition", mine)
            return held or mine

    # --- within the lock ---

    def _current(self, number: int) -> Lease | None:
        return next((lease for lease in leases_of(self.storage.study) if lease.number == number), None)

    def _change(self, lease: Lease, **changes: Any) -> Lease | None:
        with self.storage.exclusive() as check:
            current = self._current(lease.number)
            if current is None or current.finished or current.token != lease.token:
                return None
            check()
            return self._write(dataclasses.replace(current, **changes))

    def _taken(self, lease: Lease) -> Lease:
        return dataclasses.replace(
            lease, state="running", token=secrets.token_hex(8), attempt=lease.attempt + 1, beat=0, pid=0, detail="",
            owner=self.owner, host=socket.gethostname(),
        )  # fmt: skip

    def _write(self, lease: Lease) -> Lease:
        fields = {name: getattr(lease, name) for name in _LEASE_FIELDS}
        self.storage.backend.set_trial_user_attr(self._trial_id(lease.number), "lease", fields)
        return lease

    def _new(self, proposal: Proposal, token: str) -> FrozenTrial:
        lease = {
            "state": "running", "token": token, "attempt": 1, "failures": 0, "owner": self.owner,
            "host": socket.gethostname(), "pid": 0, "step": 0, "beat": 0, "detail": "",
        }  # fmt: skip
        attributes = {
            "shape": proposal.shape.model_dump(),
            "entry": proposal.entry,
            "note": proposal.note,
            "training": proposal.training,
            "lease": lease,
        }
        return optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=proposal.params,
            distributions=dict(proposal.distributions),
            user_attrs=attributes,
        )

    def _finish(self, record: TrialRecord, *, minimize: bool) -> None:
        trial_id = self._trial_id(record.trial_number)
        if self.storage.shared:
            self.storage.backend.set_trial_user_attr(trial_id, "record", record.model_dump_json())
        value = (WORST if minimize else -WORST) if record.value is None else record.value
        self.storage.backend.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])

    def _trial_id(self, number: int) -> int:
        backend = self.storage.backend
        study_id = backend.get_study_id_from_name(self.storage.study.study_name)
        return backend.get_trial_id_from_study_id_trial_number(study_id, number)


def _proposal(record: TrialRecord, distributions: Mapping[str, BaseDistribution]) -> Proposal:
    return Proposal(record.params, distributions, record.config.shape, record.entry, record.note, record.training)
