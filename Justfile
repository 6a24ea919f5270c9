set positional-arguments

# just is installed beside fintx: use the fintx of that environment, wherever just is called from
export PATH := parent_directory(just_executable()) + ":" + env("PATH")

[private]
default:
    @just --list --unsorted

# run studies, or continue them: sweep FILE…
[no-exit-message]
sweep *args:
    @fintx sweep "$@"

# run the hand-picked trials that are not done yet: manual [sweeps/manual.toml]
[no-exit-message]
manual *args:
    @fintx manual "$@"

# train a study's best trials again with fresh seeds, or continue that: confirm STUDY
[no-exit-message]
confirm *args:
    @fintx confirm "$@"

# write a study's report, finished or not: report STUDY…
[no-exit-message]
report *args:
    @fintx report "$@"

# compare studies: compare 2M_h1 2M_h3 2M_h5
[no-exit-message]
compare *args:
    @fintx compare "$@"

# fit studies that differ in size, and say whether loss falls with it: scaling 'outputs/*_h3'
[no-exit-message]
scaling *args:
    @fintx scaling "$@"

# ask a running study to stop once its running trials are finished: stop STUDY
[no-exit-message]
stop *args:
    @fintx stop "$@"

# print what a sweep file would run, and run nothing: plan FILE
[no-exit-message]
plan *args:
    @fintx plan "$@"

# show and edit a queue: queue list FILE | queue add FILE --d-model 768 … | queue cancel FILE ID
[no-exit-message]
queue *args:
    @fintx queue "$@"

# show how far each study is, and its best trial
[no-exit-message]
status *args:
    @fintx status "$@"

# restore a checkpoint and report its metrics: eval PATH [--data FILE] | eval STUDY --test (confirmed trials)
[no-exit-message]
eval *args:
    @fintx eval "$@"

# import and list price histories: data import FILE --symbol SPY | data yahoo SPY ^VIX | data list
[no-exit-message]
data *args:
    @fintx data "$@"

# check every imported file against its manifest
[no-exit-message]
verify *args:
    @fintx verify "$@"

# count a shape's parameters, or list the depths that fit a budget: params --budget 200M --d-model 1024
[no-exit-message]
params *args:
    @fintx params "$@"

# run the quick tests (the slow ones: just test -m slow)
[no-exit-message]
test *args:
    @pytest -n auto --dist worksteal -m "not slow" "$@"

# check format, lint and types, then run the quick tests
[no-exit-message]
check:
    @ruff format --check . && ruff check . && mypy && pytest -n auto --dist worksteal -m "not slow"

# measure speed, against rivals if given: bench [PART …] [--rivals PYTHON] [--write] (tools/bench/README.md)
bench *args:
    @python tools/bench/drive.py "$@"
