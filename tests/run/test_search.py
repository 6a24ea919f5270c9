"""Which trials are handed out together: leases are made and looked at, nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fintx.config import load
from fintx.config.schema import StudySpec
from fintx.run.job import Job
from fintx.run.search import Search
from fintx.study import lifecycle, locks
from fintx.study.events import RunContext
from tests.helpers.jobs import next_jobs

OpenSearch = Callable[..., Search]
SHAPE = {"d_model": 8, "n_layers": 2, "n_heads": 1, "d_ff": 16}
ONE_SHAPE = ("architecture.n_layers={low=2, high=2}", "architecture.n_heads=[1]")


@pytest.fixture
def open_search(tiny_file: Path, tmp_path: Path, data_root: Path) -> Iterator[OpenSearch]:
    """Opens the tiny study, of one shape, on a machine with GPUs, where so small a model pays."""
    with ExitStack() as stack:

        def make(*changes: str, queue: tuple[dict, ...] = (), **options: Any) -> Search:
            spec = load.study(tiny_file, overrides=["study.n_trials=12", *ONE_SHAPE, *changes])
            tree = {**spec.model_dump(mode="json", exclude_none=True), "queue": list(queue)}
            spec = StudySpec.model_validate_json(json.dumps(tree))
            settings: dict[str, Any] = {"on_gpu": True} | options
            request, context = lifecycle.StudyRequest(spec), RunContext(tmp_path / "outputs", data_root, **settings)
            return Search(stack.enter_context(lifecycle.open_study(request, context)), request, context)

        yield make


def numbers(jobs: list[Job]) -> list[int]:
    return [job.number for job in jobs]


def test_random_trials_that_start_a_search_train_together_and_then_one_by_one(open_search: OpenSearch) -> None:
    """What TPE proposes depends on every result, so it is not asked ahead."""
    search = open_search("study.n_startup_trials=3")
    assert numbers(next_jobs(search)) == [0, 1, 2]
    assert numbers(next_jobs(search)) == [3]
    assert numbers(next_jobs(search)) == [4]


def test_what_is_proposed_to_start_is_the_same_together_and_one_by_one(open_search: OpenSearch) -> None:
    together = next_jobs(open_search("study.n_startup_trials=4", "study.name='a'"))
    single = open_search("study.n_startup_trials=4", "study.name='b'", "execution.population=false")
    alone = [job for _ in range(4) for job in next_jobs(single)]
    assert [job.config for job in together] == [job.config for job in alone] and len(together) == 4
    assert {job.population_size for job in alone} == {1}


def test_on_a_cpu_each_is_alone(open_search: OpenSearch) -> None:
    assert numbers(next_jobs(open_search(on_gpu=False))) == [0]


def test_true_asks_ahead_as_far_as_it_pays(open_search: OpenSearch) -> None:
    search = open_search("study.n_startup_trials=2", "execution.population=true")
    assert numbers(next_jobs(search)) == list(range(12))


def test_a_number_is_that_many_pay_or_not(open_search: OpenSearch) -> None:
    search = open_search("study.n_startup_trials=2", "execution.population=4", on_gpu=False)
    assert numbers(next_jobs(search)) == [0, 1, 2, 3]
    assert numbers(next_jobs(search)) == [4, 5, 6, 7]


def test_replicates_count_as_members(open_search: OpenSearch) -> None:
    search = open_search("study.replicates=2", "execution.population=6")
    assert numbers(next_jobs(search)) == [0, 1, 2]


def test_other_workers_get_their_share(open_search: OpenSearch) -> None:
    search = open_search("study.n_startup_trials=12", n_workers=3)
    assert [len(next_jobs(search)) for _ in range(3)] == [4, 4, 4]


def test_trials_of_other_programs_are_not_of_the_party(open_search: OpenSearch) -> None:
    shapes = (SHAPE, {**SHAPE, "n_heads": 2})
    entries = [
        {**entry, "values": {"optim.learning_rate": rate}} for entry, rate in zip(shapes, (1e-3, 2e-3), strict=True)
    ]
    search = open_search(queue=tuple(entries))
    assert numbers(next_jobs(search)) == [0]
    assert [job.config.shape.n_heads for job in next_jobs(search)][:1] == [2]


@pytest.mark.slow
def test_queued_trials_join_if_their_values_wait_for_no_result(open_search: OpenSearch) -> None:
    """An entry that is left to the best trial's values waits for that trial."""
    first, second = ({**SHAPE, "values": {"optim.learning_rate": rate}} for rate in (2e-3, 3e-3))
    search = open_search(queue=(first, second, {**SHAPE, "id": "best"}))
    assert numbers(next_jobs(search)) == [0, 1]
    assert next_jobs(search)[0].entry == "best"
    search = open_search("study.name='defaults'", queue=(first, {**SHAPE, "training": "defaults"}))
    assert [job.training for job in next_jobs(search)[:2]] == ["", "defaults"]


def test_what_was_given_back_is_taken_up_together(open_search: OpenSearch) -> None:
    search = open_search("study.n_startup_trials=3", "study.n_trials=3")
    for job in next_jobs(search):
        search.handle(job.number, "interrupted", {}, pid=1)
    again = next_jobs(search)
    assert numbers(again) == [0, 1, 2] and [job.attempt for job in again] == [2, 2, 2]


def test_the_last_attempt_is_alone(open_search: OpenSearch) -> None:
    """Whoever takes a worker down takes the others with it: twice, and then each shows by itself who it was."""
    search = open_search("study.n_startup_trials=3", "study.n_trials=3", "execution.max_failures=3")
    for together in (3, 3):
        jobs = next_jobs(search)
        assert len(jobs) == together
        for place, job in enumerate(jobs):
            search.handle(job.number, "died", {"text": "killed", "beside": place > 0}, pid=1)
    assert search.run.problem is None  # two failures so far, not six
    assert [numbers(next_jobs(search)) for _ in range(3)] == [[0], [1], [2]]


def test_what_never_began_is_given_back_without_blame(open_search: OpenSearch) -> None:
    search = open_search("study.n_startup_trials=2", "study.n_trials=2")
    for job in next_jobs(search):
        search.handle(job.number, "returned", {"text": "its worker died before its turn"}, pid=1)
    leases = {lease.number: lease for lease in search.study.trial_table.leases()}
    assert [(leases[n].state, leases[n].failures) for n in (0, 1)] == [("interrupted", 0)] * 2
    assert [job.population_size for job in next_jobs(search)] == [16, 16]


def test_a_request_to_stop_is_heard_at_once_and_once(open_search: OpenSearch) -> None:
    """Not at a later look: the trial that trains may end before it, and another would begin."""
    events: list[Any] = []
    search = open_search(notify=events.append)
    search.tick()
    locks.ask_to_stop(str(search.study.folder), outputs=search.context.study_root)
    search.tick()
    search.tick()
    assert [event.text for event in events[-1:]] == [locks.STOP_HEARD]
    assert search.run.stop_asked and next_jobs(search) == []


def test_a_request_that_cannot_be_read_just_now_is_heard_later(open_search: OpenSearch) -> None:
    search = open_search()
    file = search.study.folder / "stop"
    file.mkdir()  # stands for a network folder that is away: reading it fails
    search.tick()
    assert not search.run.stop_asked and search.run.problem is None
    file.rmdir()
    locks.ask_to_stop(str(search.study.folder), outputs=search.context.study_root)
    search.tick()
    assert search.run.stop_asked
