set positional-arguments

# just lies in the same environment as fintx, whoever calls it from wherever
export PATH := parent_directory(just_executable()) + ":" + env("PATH")

[private]
default:
    @just --list --unsorted

# run studies: sweep FILE… (the same command again continues)
[no-exit-message]
sweep *args:
    @fintx sweep "$@"

# run what is not done yet of a file of hand-picked trials: manual [sweeps/manual.toml]
[no-exit-message]
manual *args:
    @fintx manual "$@"

# train a study's best again with fresh seeds, and say what holds: confirm STUDY (the same command again continues)
[no-exit-message]
confirm *args:
    @fintx confirm "$@"

# write a study's report, as far as the study is: report STUDY…
[no-exit-message]
report *args:
    @fintx report "$@"

# set studies side by side: compare 2M_h1 2M_h3 2M_h5
[no-exit-message]
compare *args:
    @fintx compare "$@"

# does loss fall with size: scaling 'outputs/*_h3'
[no-exit-message]
scaling *args:
    @fintx scaling "$@"

# ask a running study to stop when its running trials are finished: stop STUDY
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

# how far is every study, and what is its best trial
[no-exit-message]
status *args:
    @fintx status "$@"

# restore a checkpoint and report its metrics: eval PATH [--data FILE] | eval STUDY --test (for what is confirmed)
[no-exit-message]
eval *args:
    @fintx eval "$@"

# bring in and list price histories: data import FILE --symbol SPY | data yahoo SPY ^VIX | data list
[no-exit-message]
data *args:
    @fintx data "$@"

# check every kept file against its manifest
[no-exit-message]
verify *args:
    @fintx verify "$@"

# count a shape's parameters, or list the depths that fit a budget: params --budget 200M --d-model 1024
[no-exit-message]
params *args:
    @fintx params "$@"

# run the quick tests (those marked slow: just test -m slow)
[no-exit-message]
test *args:
    @pytest -n auto --dist worksteal -m "not slow" "$@"

# format, lint, types, then the quick tests
[no-exit-message]
check:
    @ruff format --check . && ruff check . && mypy && pytest -n auto --dist worksteal -m "not slow"

# measure speed, beside rivals if given: bench [PART …] [--rivals PYTHON] [--write] (tools/bench/README.md)
bench *args:
    @python tools/bench/drive.py "$@"
