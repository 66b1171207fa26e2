# One way in. `make demo` and `make test` set up what they need on a fresh machine, and nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all paper lint bench-demo bench-simulate bench-clients bench-policies bench-deadline bench-sync bench-links bench-flower bench-train day-gpu bench-gpu storm rehearsal bench-recovery shapes hunt ablation referee clean

FULL := ours paper paper_two_site paper_centralized
MINI := mini_ours mini_paper mini_two_site mini_centralized
CLOCKLESS := $(addprefix tests/test_,rounds.py paper.py interop.py model.py ranks.py shapes.py cuda.py)

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $(READY)

demo: $(READY)  ## one paper day, three sites, real training: 2.5 to 3.5 minutes on 2 cores
	$(BIN)/python launch.py configs/demo.yaml fresh=true

# What no clock and no network decides takes the time that the others' processes leave.
both = nice -n 15 $(BIN)/python -m pytest -m "$(1)" $(CLOCKLESS) > $(VENV)/clockless.log 2>&1 & clockless=$$!; \
	trap "kill $$clockless 2> /dev/null" EXIT INT TERM; \
	$(BIN)/python -m pytest -m "$(1)" $(CLOCKLESS:%=--ignore=%); code=$$?; \
	wait $$clockless || code=1; cat $(VENV)/clockless.log; exit $$code

test: $(READY)  ## laws and smoke, at most 4 minutes
	@$(call both,not slow)

test-all: test  ## adds everything with many processes or other environments, at most 34 minutes
	@$(call both,slow)

paper: $(READY)  ## the paper's schedules, experiments, figures and table: about 13 minutes on 2 cores
	for c in $(FULL); do $(BIN)/python simulate.py configs/$$c.yaml --write || exit 1; done
	for c in $(MINI); do $(BIN)/python launch.py configs/$$c.yaml fresh=true || exit 1; done
	$(BIN)/python figures.py $(FULL:%=runs/%) --out figures/full_scale
	$(BIN)/python figures.py $(MINI:%=runs/%) --out figures
	cat figures/full_scale/table.md figures/table.md

hunt: $(READY)  ## every law with new random examples, 50 times as many; SEED=N repeats one; an hour or more on 2 cores
	seed=$${SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}; echo "make hunt SEED=$$seed repeats this"; \
	HUNT=50 $(BIN)/python -m pytest -m hypothesis --hypothesis-seed=$$seed $(LAWS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench-demo: $(READY)  ## the demo's numbers: time, memory, loss, emissions, stall, twice the same
	$(BIN)/python bench/demo.py

bench-simulate: $(READY)  ## seconds and memory of the simulator: a day; a year of 3 and 300 sites; a month of 100 and 1,000
	$(BIN)/python bench/simulate.py

bench-policies: $(READY)  ## who starts and stops best on real months, $$REFERENCE_DATA: about a minute
	$(BIN)/python bench/policies.py

bench-deadline: $(READY)  ## 1,000 random deadlines on real months, $$REFERENCE_DATA: about 8 minutes on 2 cores
	$(BIN)/python bench/deadline.py --draws 1000

bench-clients: $(READY)  ## a thousand sites at one coordinator: processor, memory, heartbeats, joins, a restart; about 20 minutes
	$(BIN)/python bench/clients.py

bench-sync: $(READY)  ## what a sync costs on loopback, its parts and its memory; about 10 minutes, 20 GiB for the last
	for n in 124e6 280e6; do for k in 2 3; do $(BIN)/python bench/sync.py --params $$n --sites $$k || exit 1; done; done
	$(BIN)/python bench/sync.py --params 124e6 --outer nesterov
	$(BIN)/python bench/sync.py --params 561e6

bench-links: $(READY)  ## the same on links of 1 Gbit/s, 100 Mbit/s, 10 Mbit/s: Linux, root; about 20 minutes
	for w in fp32 bf16 int8; do $(BIN)/python bench/sync.py --params 124e6 --rate 1gbit --chunk-mb 4 --wire $$w || exit 1; done
	for w in fp32 bf16 int8; do $(BIN)/python bench/sync.py --params 30e6 --rate 100mbit --chunk-mb 4 --wire $$w || exit 1; done
	$(BIN)/python bench/sync.py --params 2e6 --rate 10mbit
	$(BIN)/python bench/sync.py --params 561e6 --rate 1gbit --chunk-mb 4 --wire auto --goodput

bench-flower: $(READY)  ## the paper's design on Flower beside ours: arithmetic, then seconds a round; about 10 minutes
	$(BIN)/python bench/flower/run.py parity
	for n in 124e6 280e6; do $(BIN)/python bench/sync.py --params $$n --flower || exit 1; done

bench-train: $(READY)  ## tokens/s of one CPU thread beside transformers' model, then of a whole step; about 5 minutes
	OMP_NUM_THREADS=1 $(BIN)/python bench/train.py bench/configs/speed_cpu.yaml --transformers --threads 1
	$(BIN)/python bench/train.py configs/d4_cpu.yaml --threads 1

day-gpu: $(READY)  ## the three-site day at d8 on one GPU, which the sites share: ours, centralized, two sites; downloads 1 GB
	$(BIN)/python data.py prepare configs/d8_day.yaml
	$(BIN)/python launch.py configs/d8_day.yaml fresh=true
	$(BIN)/python launch.py configs/d8_day.yaml run=d8_centralized only=[california] policy.name=always clock.max_hours=null fresh=true
	$(BIN)/python launch.py configs/d8_day.yaml run=d8_two_site only=[california,texas] policy.name=always fresh=true
	$(BIN)/python figures.py runs/d8_day runs/d8_centralized runs/d8_two_site --out figures/d8

bench-gpu: $(READY)  ## everything that needs a GPU, on one: at most nine minutes; parts that do not take each other along when they fail
	$(BIN)/python bench/gpu.py runs/gpu

storm: $(READY)  ## 50 real faults on a real run, then the bill, for three seeds: about 8 minutes each
	for seed in 1 2 3; do $(BIN)/python bench/storm.py --seed $$seed --faults 50 || exit 1; done

rehearsal: $(READY)  ## the shipped d20 and paper configs, scaled down, by hand-started processes, with real faults: about 8 minutes
	$(BIN)/python bench/rehearsal.py

bench-recovery: $(READY)  ## deaths in the middle of an average: notice, recovery, rejoin; about 6 minutes
	$(BIN)/python bench/recovery.py

shapes: $(READY)  ## 30 random shapes of jobs: sites, ranks, FSDP, wires, compiled, ...; each run three times, about 10 minutes
	$(BIN)/python bench/shapes.py --runs 30

ablation: $(READY)  ## which protocol learns best: 50 minutes on 2 cores
	$(BIN)/python bench/ablation.py

referee: $(READY)  ## our accounting against Vessim's, in an environment of its own
	$(BIN)/python bench/referee.py

clean:
	rm -rf $(VENV) .venv-* runs data
