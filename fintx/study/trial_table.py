"""Trial table: the trials of a study as its storage holds them, and the lease on each.

A trial enters the storage whole (number, parameters, shape, where it comes from) in one write. From then on its lease
says who works on it: a token per attempt, host, process, and the last step; training renews it. A holder whose token is
not the lease's is superseded: it can neither renew nor report. The result is not in the storage but in the record
(which travels through it between machines that share no folder).
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
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
"""Value of a diverged, collapsed or out-of-memory trial: the sampler only ranks, and must learn to stay away."""

State = Literal["running", "interrupted", "failed"]
_ANSWERED = "entry:"


@dataclass(frozen=True)
class Lease:
    """A trial as the storage holds it, and who works on it."""

    number: int
    params: dict[str, Any]
    """What the sampler sees: coordinates and searched values."""
    shape: Shape
    entry: str | None
    """Identity of the queue entry that it comes from; none: the sampler's proposal."""
    note: str
    training: str
    """Where the values that a queue entry leaves open came from: "trial 7", "defaults", "sampler"; else empty."""
    finished: bool
    """Whether it has a record."""
    state: State
    """Of an unfinished one. interrupted: stopped on request; failed: its last attempt crashed or hung."""
    token: str
    """Of the attempt that holds it; any other attempt is superseded."""
    attempt: int
    """Number of the attempt, from 1."""
    failures: int
    """Attempts that crashed or hung, in all."""
    owner: str
    """`owner_of` the coordinator that holds it, or held it last."""
    host: str
    pid: int
    """Of the worker; 0: none yet."""
    step: int
    """The last that was reported."""
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
    """A queue entry that asks for what a trial of the study is already."""

    entry: str
    number: int


@dataclass(frozen=True)
class Withdrawal:
    """An unfinished trial whose queue entry is cancelled: it no longer counts."""

    number: int


Choice = Lease | Proposal | SameTrial | Withdrawal | None
"""An unfinished trial to continue, a new one, an entry that needs none, a cancelled one, or nothing to do."""


def owner_of(study_folder: Path, *, shared: bool) -> str:
    """A coordinator's name in its leases.

    With a journal the host is enough: the study's folder, which may be moved, is locked by one coordinator per host.
    Two on one host that share a database have different folders.
    """
    return f"{socket.gethostname()}:{study_folder.resolve()}" if shared else socket.gethostname()


def read(study_folder: Path, *, url: str = storage.JOURNAL) -> tuple[Lease, ...]:
    """The leases of a study, read without a lock; empty where there are none.

    Raises:
        FintxError: the database does not answer.
    """
    with storage.read_only(url, study_folder, study_folder.name) as study:
        return () if study is None else _leases_of(study)


def _leases_of(study: optuna.Study) -> tuple[Lease, ...]:
    """Every trial by number; one that answers more than one queue entry appears once for each."""
    by_number = {}
    for frozen in study.get_trials(deepcopy=False):
        stored = frozen.user_attrs
        if "shape" in stored and frozen.state in (TrialState.RUNNING, TrialState.COMPLETE):
            by_number[frozen.number] = Lease(
                number=frozen.number,
                params=dict(frozen.params),
                shape=Shape(**stored["shape"]),
                entry=stored["entry"],
                note=stored["note"],
                training=stored["training"],
                finished=frozen.state == TrialState.COMPLETE,
                **stored["lease"],
            )
    answered = (
        dataclasses.replace(by_number[number], entry=key.removeprefix(_ANSWERED))
        for key, number in study.user_attrs.items()
        if key.startswith(_ANSWERED) and number in by_number
    )
    return (*by_number.values(), *answered)


@dataclass(frozen=True)
class TrialTable:
    """The leases of one study, read and changed by one coordinator. Every method may raise `StorageAway`."""

    storage: Storage
    owner: str

    def leases(self) -> tuple[Lease, ...]:
        """Every trial by number; one that answers more than one queue entry appears once for each."""
        with self.storage.exclusive():
            return _leases_of(self.storage.study)

    def acquire(self, choose: Callable[[tuple[Lease, ...]], Choice]) -> Lease | None:
        """Look at all leases, choose, and take what was chosen, alone over all machines.

        Args:
            choose: pure; may be called again if the database is lost in between.

        Returns:
            The lease with a token of its own, or none if there was nothing to choose.
        """
        study, token = self.storage.study, secrets.token_hex(8)
        with self.storage.exclusive() as check:
            while isinstance(choice := choose(_leases_of(study)), SameTrial | Withdrawal):
                check()
                if isinstance(choice, SameTrial):
                    study.set_user_attr(f"{_ANSWERED}{choice.entry}", choice.number)
                else:
                    self.storage.backend.set_trial_state_values(self._trial_id(choice.number), TrialState.FAIL)
            if choice is None:
                return None
            check()
            if isinstance(choice, Lease):
                fresh = self._of_attempt(token, choice.attempt + 1, failures=choice.failures, step=choice.step)
                return self._write(dataclasses.replace(choice, **fresh))
            study.add_trial(self._frozen(choice, token))
            # Found by its token: what was created, if an earlier try was lost after its commit.
            return next(lease for lease in _leases_of(study) if lease.token == token)

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
            current = self._current(lease)
            if current is not None and not current.finished:
                check()
                self._finish(record, minimize=minimize)
            return current is not None

    def restore(
        self, records: Iterable[TrialRecord], distributions: Mapping[str, BaseDistribution], *, minimize: bool
    ) -> None:
        """Finish the trials of these records where the storage hasn't; a lost journal is made again."""
        with self.storage.exclusive() as check:
            check()
            study = self.storage.study
            for record in sorted(records, key=lambda record: record.trial_number):
                while len(trials := study.get_trials(deepcopy=False)) < record.trial_number:
                    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
                is_new = len(trials) == record.trial_number
                if is_new:
                    proposal = Proposal(
                        record.params, distributions, record.config.shape, record.entry, record.note, record.training
                    )
                    study.add_trial(self._frozen(proposal, secrets.token_hex(8)))
                if is_new or trials[record.trial_number].state == TrialState.RUNNING:
                    self._finish(record, minimize=minimize)

    def foreign_records(self, finished: Collection[int]) -> list[str]:
        """The records (JSON) of trials that other machines finished, other than the numbers given."""
        if not self.storage.shared:
            return []
        with self.storage.exclusive():
            trials = self.storage.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [frozen.user_attrs["record"] for frozen in trials if frozen.number not in finished]

    def definition(self, own: dict[str, Any]) -> dict[str, Any]:
        """The study's definition as the storage has it; written by whoever comes first."""
        with self.storage.exclusive():
            stored = self.storage.study.user_attrs.get("definition")
            if stored is None:
                self.storage.study.set_user_attr("definition", own)
            return stored or own

    # --- within the lock ---

    def _current(self, lease: Lease) -> Lease | None:
        """The lease as it is now, if its holder still has it."""
        leases = _leases_of(self.storage.study)
        return next((now for now in leases if (now.number, now.token) == (lease.number, lease.token)), None)

    def _change(self, lease: Lease, **changes: Any) -> Lease | None:
        with self.storage.exclusive() as check:
            current = self._current(lease)
            if current is None or current.finished:
                return None
            check()
            return self._write(dataclasses.replace(current, **changes))

    def _write(self, lease: Lease) -> Lease:
        fields = {name: getattr(lease, name) for name in _LEASE_FIELDS}
        self.storage.backend.set_trial_user_attr(self._trial_id(lease.number), "lease", fields)
        return lease

    def _of_attempt(self, token: str, attempt: int, *, failures: int = 0, step: int = 0) -> dict[str, Any]:
        """A lease's own fields as an attempt begins."""
        return {
            "state": "running", "token": token, "attempt": attempt, "failures": failures, "owner": self.owner,
            "host": socket.gethostname(), "pid": 0, "step": step, "beat": 0, "detail": "",
        }  # fmt: skip

    def _frozen(self, proposal: Proposal, token: str) -> FrozenTrial:
        return optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=proposal.params,
            distributions=dict(proposal.distributions),
            user_attrs={
                "shape": proposal.shape.model_dump(),
                "entry": proposal.entry,
                "note": proposal.note,
                "training": proposal.training,
                "lease": self._of_attempt(token, attempt=1),
            },
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
