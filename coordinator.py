"""The head node: decides who trains when, keeps the journal and the durable model. CPU only, always on.

    python coordinator.py configs/demo.yaml [key=value ...]     run, or resume, the run of that name
    python coordinator.py keys configs/demo.yaml                make the CURVE keys of its sites
    python coordinator.py check runs/demo                       the invariants of a run, one line each

It may be killed at any moment and started again: the sites hold still or work off their leases meanwhile, the journal says
what was decided, and they say where they stand.

The decisions are rounds.py's; this file carries them out. On the virtual clock `simulate.drive` steps time and
`execute` waits for the sites where their answer is needed; on the wall clock `run_wall` passes on what arrives when it
arrives. Before anything is told to a site it is in the journal, fsynced.

Only the control channel listens, at sync.host:sync.port, for holders of a key (see channel.py).
"""

import contextlib
import errno
import fcntl
import resource
import shutil
import signal
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

import carbon
import config
import provision
import report
import signals
import simulate
import sync
import timeouts
import wire
from channel import Hub, make_keys
from config import BadInput
from data import Corpus
from journal import Journal, Replay, Unwritable, check, check_held, effective, read
from model import GPT, Shape, num_params, shape_of
from rounds import Action, Run
from vault import Vault

RUN_FILES = ("*.jsonl", "intervals.csv", "energy.csv", "signals.csv", "summary.json", "config.yaml", "address")
INTERVALS_EVERY_S, INTERVALS_SHARE = 5.0, 0.02  # intervals.csv is written every so often, and takes at most this share of the time
ABOUT_ALL = ("members", "leases", "rates", "weights")  # of an action: it grows with the members, and each is told its own
READINGS_EVERY_S = 1.0
PREDICT_S = 3.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
RUN_FOLDERS = ("state", "sites", "figures", "wandb", "logs")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


class Coordinator:
    def __init__(self, cfg):
        self.cfg, self.dir = cfg, config.run_dir(cfg)
        provision.check(cfg)
        self.virtual = cfg.clock.mode == "virtual"
        self.names, self.digest = list(cfg.sites), config.train_digest(cfg)
        self.trace, sources = (None, signals.sources(cfg)) if config.is_live(cfg) else (carbon.load_traces(cfg), None)
        self.corpus = Corpus(cfg)
        try:
            shape = shape_of(cfg.model, self.corpus.vocab)
        except ValueError as error:
            raise BadInput(str(error)) from None
        with torch.device("meta"):
            self.payload_bytes = 4 * num_params(GPT(shape))
        self.bytes_per_s = timeouts.FIRST_GUESS
        self.timeouts = timeouts.derive(cfg, self.payload_bytes)
        self._lock_folder()
        at_start = self._open_folder()
        self.journal = Journal(self.dir / "journal.jsonl")
        self.vault = Vault(cfg, self.dir / "state", self._has_written)
        cfg, self.live = self.cfg, self._open_signals(sources)
        self.prices = carbon.load_prices(cfg, self.trace)
        self.run, self.samples = simulate.new_run(cfg, self.trace, self.live)
        self.incarnations: dict[str, str] = {}  # of each site's last process
        self.energy = report.Lines(self.dir / "energy.csv", carbon.READINGS)
        self.readings = carbon.readings_of(self.dir)  # what the sites' meters said
        self.last_readings = {r.site: r for r in self.readings}
        self.unheard: set[str] = set()  # after a restart: sites that should say hello
        self.result: dict[str, torch.Tensor] = {}  # a round's result that a holder sent up, by its digest
        self.predicted_end_s = self._predict()
        self.hub = self._listen()  # as late as can be: a thousand sites may be waiting for it
        self.t = 0.0  # run time of what is being handled
        self.holds: dict[str, int] = {}  # site -> round it last reported to hold
        self.owed_stores: dict[int, float] = {}  # round -> run time of the commit that made it
        self.owed_evals: dict[int, str] = {}  # round -> site that measures it
        self.frozen_at: dict[str, float] = {}  # site -> monotonic time of its last freeze
        self.replay: Replay | None = None  # decisions to repeat before going live (virtual resume)
        (self._genesis if at_start else lambda shape: self._restore())(shape)
        self.run.attempt_s = self.timeouts.attempt_s
        self.jobs = provision.provisioner(cfg, self.vault.run_id, self.hub.address)
        self.run.on_demand = dict.fromkeys(self.jobs.jobs, False)
        self.panel = report.Panel(cfg, self.vault.run_id, "coordinator")
        self.attempt_began = 0.0
        self.wire_rates: dict[str, float] = {}  # site -> payload bytes/s of its last average
        self.took_s: dict[str, dict[str, float]] = {}  # wire format -> site -> seconds of its last average in it
        self._choose_wire([])
        self.fetch_id, self.fetches = 0, {}  # site -> its last fetch
        self.write_again = 0.0  # monotonic: not before
        self._receiving: tuple[str, torch.Tensor] | None = None

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _lock_folder(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.dir / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{self.dir} is in use by another coordinator; wait for it or take run=NEW") from None

    def _open_folder(self) -> bool:
        """True if this run starts at its beginning; raises BadInput if what is there cannot be resumed."""
        if self.cfg.fresh:
            provision.stop_left(self.cfg)  # it was perhaps killed, and its jobs run on
            for pattern in RUN_FILES:
                for file in self.dir.glob(pattern):
                    file.unlink()
            for folder in RUN_FOLDERS:
                shutil.rmtree(self.dir / folder, ignore_errors=True)
        path = self.dir / "journal.jsonl"
        records = Journal(path).records
        for name, here in (("config_digest", self.digest), ("schedule_digest", config.schedule_digest(self.cfg))):
            if records and records[0][name] != here:
                raise BadInput(f"{self.dir} was started with {name} {records[0][name]}, this config has {here}; take run=NEW, "
                               f"fresh=true, or the config in {self.dir}/config.yaml")  # fmt: skip
        if records and records[-1]["type"] == "end" and records[-1]["reason"] == "budget":
            raise BadInput(f"{self.dir} is finished; take run=NEW or fresh=true")
        if config.is_live(self.cfg):  # now is when the run began
            if not records and self.cfg.clock.start != "now":
                raise BadInput(
                    f"clock.start={self.cfg.clock.start}: signals.source={self.cfg.signals.source} reads the present; set clock.start=now"
                )
            began = int(records[0]["wall"]["epoch_unix"]) if records else int(time.time())
            self.cfg = config.begun(self.cfg, carbon.iso(began).replace(" ", "T"))
        OmegaConf.save(OmegaConf.merge(self.cfg, {"fresh": False, "site": None}), self.dir / "config.yaml")
        return not records

    def _open_signals(self, sources: dict | None) -> signals.Live | None:
        """Live signals: what to ask, what earlier processes of the run have heard, and where new readings are written."""
        if sources is None:
            return None
        path = self.dir / "signals.csv"
        write = report.Lines(path, carbon.SIGNALS).write
        return signals.Live(self.cfg, sources, carbon.read_signals(path) if path.exists() else [], write)

    @property
    def traces(self) -> dict[str, carbon.Trace]:
        """region -> its intensity; of live signals, what was heard up to now."""
        return self.live.traces(max(self.t, self.journal.records[-1]["t_s"])) if self.live else self.trace

    def _listen(self) -> Hub:
        c, keys, names, file = self.cfg.sync, self.dir / "keys", list(self.cfg.sites), self.dir / "address"
        if c.host in config.LOOPBACK:
            make_keys(keys, names)
        hub, before = None, file.read_text().strip().rpartition(":") if file.exists() else ("", "", "")
        if c.port == 0 and before[0] == c.host:  # where the sites of a run that goes on still look for us
            with contextlib.suppress(BadInput):
                hub = Hub(c.host, int(before[2]), keys, names, self._read_state, c.chunk_mb << 20)
        hub = hub or Hub(c.host, c.port, keys, names, self._read_state, c.chunk_mb << 20)
        tmp = self.dir / "address.tmp"
        tmp.write_text(hub.address + "\n")
        tmp.replace(self.dir / "address")
        return hub

    def _read_state(self, round_: int, name: str, start: int, stop: int) -> bytes | None:
        """What sites may download: stored states, and a result some of them have agreed on already."""
        if name in self.result:
            return bytes(sync.raw(self.result[name][start:stop]))
        return self.vault.states.read(round_, name, start, stop) if round_ <= self.run.stored else None

    def _genesis(self, shape: Shape) -> None:
        """theta_0 and its digest, in the journal before anyone sees it."""
        self.vault.genesis(shape, uuid.uuid4().hex[:12])
        self.epoch = float(config.start_unix(self.cfg)) if self.live else time.time()
        self.journal.add([{
            "t_s": 0.0, "type": "genesis", "digest": self.vault.digests[0][0], "config_digest": self.digest,
            "schedule_digest": config.schedule_digest(self.cfg), "corpus_digest": self.corpus.digest,
            "wall": {"run_id": self.vault.run_id, "epoch_unix": self.epoch, "versions": config.versions(),
                     "predicted_end_s": self.predicted_end_s},
        }])  # fmt: skip
        self.journal.flush()

    def _restore(self) -> None:
        """Continue from the newest state that journal and disk both know."""
        genesis, held = self.journal.records[0], effective(self.journal.records)
        self.epoch = genesis["wall"]["epoch_unix"]
        stored = {0: genesis["digest"]} | {r["round"]: r["digest_theta"] for r in held if r["type"] == "store"}
        start = self.vault.load(stored, genesis["wall"]["run_id"])
        print(f"coordinator | resuming {self.dir} at round {start}", flush=True)
        if self.virtual:  # decisions are a function of config and trace: repeat them up to the stored state
            self.replay = Replay(held, start)
            if self.replay.done:
                self._go_live(0.0)
            return
        run, now_s = self.run, max(time.time() - self.epoch, self.journal.records[-1]["t_s"])
        for r in held:
            self.incarnations |= r.get("wall", {}).get("incarnations", {})
        if (self.dir / "intervals.csv").exists():
            rows = carbon.read_intervals(str(self.dir / "intervals.csv"))
            gap_s = now_s - max((r.end_s for r in rows), default=0.0)
            alive = gap_s <= self.cfg.rounds.max_offline_s  # sites give up after that: they were off since
            run.meter = carbon.Meter(list(self.cfg.sites), rows, keep_last=alive)
        run.restore(now_s, self.journal.records, start)
        self.journal.add([{"t_s": round(now_s, 6), "type": "resume", "round": start}])
        self.journal.flush()
        for lost in run.unstored:
            attempt, commit = ([r for r in held if r["type"] == kind and r["round"] == lost["round"]][-1] for kind in ("attempt", "commit"))
            self.vault.agreed[lost["round"] + 1] = commit["digest"], attempt["wire"]
        while self.samples.next_time() <= now_s:
            t = self.samples.next_time()
            for site, mci, ahead in self.samples.due(t):
                run.observe(t, site, mci, ahead)
        run.schedule.resume()
        waiting = ("off", "provisioning") if provision.on_demand(self.cfg) else ("off",)  # a job may still be in its queue
        self.unheard = {name for name, site in run.schedule.sites.items() if site.state not in waiting}

    def _predict(self) -> float | None:
        """When the schedule should end by configured rates, for the ETA; where the trace ends if that takes too long to work out. With live
        signals nobody knows."""
        if self.live:
            return None
        ahead, samples = simulate.new_run(self.cfg, self.trace)
        ahead.facts, ahead.schedule.timed = replace(ahead.facts, timed=True), True
        until = time.monotonic() + PREDICT_S

        def check(records: list[dict]) -> None:
            if time.monotonic() > until:
                raise TimeoutError

        try:
            simulate.drive(ahead, samples, journal=check)
        except TimeoutError:
            return ahead.facts.end_s
        return max((r.end_s for r in ahead.meter.closed(ahead.facts.end_s) if r.state != "off"), default=0.0)

    # -- the virtual clock --------------------------------------------------------------------------------------------

    def run_virtual(self) -> None:
        simulate.drive(self.run, self.samples, self.execute, self._record, lambda t, run: self._settle())

    def _record(self, records: list[dict]) -> None:
        """What was decided goes to the journal's buffer and to people; on a resume, only what is new."""
        if self.replay:
            self.replay.verify(records)
            return
        self.journal.add(records)
        for record in records:
            if line := report.describe(record, self.cfg, self.run.committed_tokens):
                print(line, flush=True)
            self.panel.log(record, self.run, self.traces, self.prices, self._columns, self.readings)

    def execute(self, t: float, action: Action, run: Run) -> None:
        """Carry out one action, waiting for the sites where the next decision needs them."""
        self.t, d = t, action.data
        if self.replay:
            self._record(run.take_records())
            if not self.replay.done:
                self._repeat(t, action, run)
                return
            self._go_live(t)
            if action.kind in ("commit", "drop"):  # told before the stop
                return
        if action.kind == "freeze" and run.phase != "freezing":
            return  # all its members were lost while an action before this one was carried out
        if action.kind == "freeze":  # the round is over in virtual time: now the sites train it
            for site in d["members"]:
                part = self._signal(site, run.now.open_s, t)
                self.hub.send(site, {"type": "go", "round": d["round"], "steps": d["steps"][site], "signal": part})
            self._settle()
            self._await(lambda: run.phase != "freezing")
            return
        if action.kind in ("fetch", "evaluate", "end") or any(t > made for made in self.owed_stores.values()):
            self._settle()
        self.journal.flush(t)
        if action.kind == "fetch":
            self._fetch(t, action.site, d["round"])
            return
        self._tell(action)
        if action.kind == "store":
            self._await(lambda: run.stored >= d["round"] or not run.pending)
        elif action.kind == "attempt":
            self._await(lambda: run.phase != "reduce" or run.now.agreement.result or run.now.agreement.number > d["attempt"])
        elif action.kind == "evaluate":
            self._await(lambda: run.phase != "ending" or action.site not in run.holds)

    def _repeat(self, t: float, action: Action, run: Run) -> None:
        """What became of an action before the resume: what should have, but for the faults in the journal."""
        replay, d = self.replay, action.data
        for fault in replay.faults("lost", t, run):
            run.lost(t, fault["site"], fault["action"])
        if action.kind == "fetch" and replay.absent(t, action.site, run):
            return
        if action.kind == "freeze":
            for site in d["members"]:
                bad = replay.faults("non-finite loss", t, run, site)
                run.frozen(t, site, d["steps"][site], not bad, bad[0]["step"] if bad else -1)
        elif action.kind == "attempt":
            for site in d["members"]:
                if failed := replay.faults("average failed", t, run, site):
                    run.failed(t, site, d["attempt"], failed[0]["action"].partition(": ")[2])
                else:
                    run.voted(t, site, d["attempt"], "")
        elif action.kind == "give":
            run.at_head(t, d["attempt"], d["digest"])
        elif action.kind == "take":
            run.voted(t, action.site, d["attempt"], d["digest"])
        else:
            simulate.imagine(t, action, run)

    def _go_live(self, t: float) -> None:
        """All decisions up to the stored state are repeated; from here on they are carried out."""
        replay, self.replay = self.replay, None
        self.journal.add([{"t_s": round(t, 6), "type": "cancel", "round": replay.start, "reason": "resumed", "tokens": 0}])
        self._record(replay.set_aside)
        self.journal.flush()
        for site, round_ in list(self.run.holds.items()):
            if round_ == self.run.round:
                self._fetch(t, site, round_, own_disk=True)

    def _fetch(self, t: float, site: str, round_: int, own_disk: bool = False) -> None:
        """Have a site download a state, and wait for it; a site without a process is left out."""
        wait_s = self.cfg.rounds.rejoin_wait_s
        until = time.monotonic() + wait_s
        if not self.hub.connected(site):
            print(f"coordinator | waiting up to {wait_s:g} s for {site}: torchrun train.py CONFIG site={site}", flush=True)
        while not self.hub.connected(site) and time.monotonic() < until:
            self._receive(0.1)
        if not self.hub.connected(site):
            self.run.holds.pop(site, None)
            self.run.fetching.discard(site)
            why = f"no process within rounds.rejoin_wait_s={wait_s:g} s"
            if self.run.now and site in self.run.now.members:  # resumed into a round that needs it
                self.run.finish(t, f"{site}: {why}", config.EXIT_FAILED)
            elif any(map(self.hub.connected, self.cfg.sites)):
                self.run.absent(t, site, why)
            else:
                self.run.finish(t, f"{site}: {why}, and no other site is connected", config.EXIT_FAILED)
            return
        self._send_fetch(site, round_, own_disk)
        self._await(lambda: self.holds.get(site) == round_ or not self.hub.connected(site))

    def _settle(self) -> None:
        """Wait for what was promised but costs no virtual time: states to store, evaluations."""
        self._await(lambda: not (self.owed_stores or self.owed_evals))
        self._record(self.run.take_records())

    def _await(self, done) -> None:
        """Receive until done(), or the run has ended; a site that falls silent meanwhile is lost. What its loss asks for at
        once is carried out at once, the rest when the clock goes on."""
        while not done() and not self.run.ended:
            self._receive(0.05)
            self._check_alive()
            for action in self.run.take_urgent():
                self._tell(action)

    def _check_alive(self) -> None:
        for site in self.hub.silent(dead_s := self.timeouts.dead_s):
            self._lost(site, f"has not been heard for {dead_s:g} s")
        for site in self.hub.all_closed() if not self.virtual else ():
            self.run.hurry_store(self.t, site)

    def _lost(self, site: str, why: str, sure: bool = False) -> None:
        """A site's process is gone, or as good as gone; whoever waits for it is told."""
        self.hub.dismiss(site)
        self.holds.pop(site, None)
        self.owed_evals = {r: s for r, s in self.owed_evals.items() if s != site}
        if self.run.phase == "reduce":
            self.hub.forget(f"{site} {why}")
        self.run.lost(self.t, site, why, sure or self.virtual)

    # -- the wall clock -----------------------------------------------------------------------------------------------

    def run_wall(self) -> None:
        """Real time: pass on what arrives, tell what is due."""
        run, started = self.run, time.monotonic()
        offset = max(time.time() - self.epoch, self.journal.records[-1]["t_s"])
        heard_by, written = started + self.cfg.sync.dead_s, started
        self.now = lambda: offset + time.monotonic() - started
        if self.live:
            self.live.start()
        while not run.ended:
            self.t = self.now()
            for site, mci, ahead in self.samples.due(self.t):
                run.observe(self.t, site, mci, ahead)
                if mci is not None:
                    self.hub.send(site, {"type": "signal", "t_s": self.t, "mci": mci, "price": self._price(site, self.t)})
            if self.live:
                self._record([{"t_s": round(self.t, 6)} | news for news in self.live.news()])
            for name, site in run.schedule.sites.items():
                if site.state == "provisioning" and self.hub.connected(name):
                    run.provisioned(self.t, name)
            self.jobs.follow(self.t, run, self.hub.connected)
            run.advance(self.t)
            self._carry_out()
            due = min(run.next_time(), self.samples.next_time()) - self.t
            dead = self.timeouts.dead_s - self.hub.longest_silent_s()
            self._receive(min(0.2, max(0.001, min(due, dead))))
            self._check_alive()
            self._carry_out()
            if self.unheard and time.monotonic() > heard_by:
                for site in sorted(self.unheard):
                    self._lost(site, "has not come back since the coordinator was restarted")
                self.unheard.clear()
            if time.monotonic() - written > INTERVALS_EVERY_S:
                self._write_intervals()
                written = time.monotonic()
        self._carry_out()

    def _carry_out(self) -> None:
        records, actions = self.run.take()
        for record in records:
            if record["type"] == "attempt":
                if self.run.now and self.run.now.agreement.torn:  # with all alive: perhaps it only needs longer
                    self._measured(0.5 * self.bytes_per_s)
                record["wall"] = {"attempt_s": round(self.timeouts.attempt_s, 3)}
            if record["type"] == "open":
                record["wall"] = {"incarnations": {s: self.incarnations[s] for s in record["members"]}}
            if record["type"] == "site" and record["to"] == "on":
                record["wall"] = {"incarnations": {record["site"]: self.incarnations[record["site"]]}}
        self._record(records)
        self.journal.flush()
        for action in actions:
            if action.kind == "fetch":
                self._send_fetch(action.site, action.data["round"])
            elif action.kind == "freeze":
                for site in action.data["members"]:
                    self.hub.send(site, {"type": "freeze", "round": action.data["round"]})
            else:
                self._tell(action)

    # -- telling the sites --------------------------------------------------------------------------------------------

    def _tell(self, action: Action) -> None:
        """Send an action to those it is for."""
        d = action.data
        header = {"type": action.kind} | {k: v for k, v in d.items() if k not in ABOUT_ALL}
        if "members" in d:
            header["num_members"] = len(d["members"])
        if action.kind == "open":
            spent, rate = self._spent(), sum(d["rates"].values())
            for site in d["members"]:
                own = {"leases": d["leases"][site], "rate_ratio": rate / d["rates"][site], "signal": self._signal(site, self.t, self.t)}
                self.hub.send(site, header | own | {k: spent[site][k] for k in ("energy_kwh", "emissions_kg", "cost")})
        elif action.kind == "attempt":
            self.hub.attempt(d["round"], d["attempt"], d["members"], d["wire"], star=d["topology"] == "star")
            last = max(self.frozen_at.get(s, 0.0) for s in d["members"])
            self.attempt_began = time.monotonic()
            for rank, site in enumerate(d["members"]):
                waited_s = last - self.frozen_at.get(site, last)
                self.hub.send(site, header | {"rank": rank, "weight": d["weights"][site], "waited_s": waited_s,
                                         "chunk_s": self.timeouts.chunk_s})  # fmt: skip
        elif action.kind == "commit":
            made = d["round"] + 1
            if d["attempt"]:
                self._synced(d["wire"])
                self.vault.agreed[made] = d["digest"], d["wire"]
                self.owed_stores.setdefault(made, self.t)
                self.hub.kept(d["round"], d["attempt"])
            if d["evaluate"]:
                self.owed_evals[made] = d["evaluate"]
            for site in d["members"]:
                self.hub.send(site, header | {"send": site == d["sender"], "eval": site == d["evaluate"]})
            if d["attempt"]:
                result, self.result = self.result.get(d["digest"]), {}
                if result is not None:  # it is here already
                    self._write(made, "", {"delta": result})
            self._write_intervals()
        elif action.kind == "rollback":
            self.owed_stores, self.owed_evals, self.result = {}, {}, {}
            self.vault.roll_back()
            for site in self.cfg.sites:
                self.hub.send(site, {"type": "cancel"} | d)
        elif action.kind in ("cancel", "end"):
            for site in d.get("members", self.cfg.sites):
                self.hub.send(site, header)
        elif action.kind == "drop":
            self.fetches.pop(action.site, None)
            self.hub.send(action.site, header)
        elif action.kind in ("lease", "evaluate", "resend", "give", "take"):
            self.hub.send(action.site, header)

    def _send_fetch(self, site: str, round_: int, own_disk: bool = False) -> None:
        digest = self.vault.digests.get(round_, ("",))[0] or None
        self.fetch_id += 1
        self.fetches[site] = self.fetch_id
        self.hub.send(site, {"type": "fetch", "id": self.fetch_id, "round": round_, "digest": digest, "numel": self.vault.numel,
                             "own_disk": own_disk or self.cfg.sites[site].keep_disk, "rewind": self.run.round})  # fmt: skip

    def _signal(self, site: str, t0: float, t1: float) -> list[list[float | None]]:
        """What the site's grid reported from t0 to t1, as [t_s, gCO2/kWh, currency/MWh or None]: for its own log."""
        trace, start = self.traces[self.cfg.sites[site].region], config.start_unix(self.cfg)
        both = [trace] if self.prices is None else [trace, self.prices[carbon.price_column(self.cfg.sites[site])]]
        between = [one.starts[one.starts.searchsorted(start + t0, side="right") : one.starts.searchsorted(start + t1)] for one in both]
        edges = sorted({float(s - start) for some in between for s in some})
        return [[t, trace.at(start + t), self._price(site, t)] for t in [t0, *edges] if trace.begin <= start + t < trace.end]

    def _price(self, site: str, t: float) -> float | None:
        """Currency/MWh that the site pays at run time t; None without prices, or past their end."""
        if self.prices is None:
            return None
        prices, now = self.prices[carbon.price_column(self.cfg.sites[site])], config.start_unix(self.cfg) + t
        return prices.at(now) if now < prices.end else None

    def _intervals(self, t: float) -> list[carbon.Interval]:
        """Who was in which power state up to t, as far as the trace can account for it."""
        return self.run.meter.closed(min(t, self.run.facts.end_s))

    def _columns(self, t: float) -> carbon.Columns:
        """The same as arrays."""
        return self.run.meter.columns(min(t, self.run.facts.end_s))

    def _write_intervals(self) -> None:
        """intervals.csv as it is now. It is written whole: the longer that takes, the more rarely."""
        if (began := time.monotonic()) >= self.write_again:
            carbon.write_intervals(self.dir / "intervals.csv", self._intervals(self.t))
            self.write_again = began + (time.monotonic() - began) / INTERVALS_SHARE

    def _spent(self) -> dict[str, dict]:
        """What each site has drawn, emitted and cost up to now, exact rule: the base of its log of the coming round."""
        return carbon.account(self._columns(self.t), self.cfg, self.traces, self.readings, self.prices)["sites"]

    # -- hearing the sites --------------------------------------------------------------------------------------------

    def _receive(self, timeout_s: float) -> None:
        """Handle one message, if one comes in time."""
        if not self.hub.is_alive():
            raise RuntimeError("the control channel's thread died")
        message = self.hub.hear(timeout_s)
        self.t = self.t if self.virtual else self.now()
        if message is None:
            return
        site, identity, header, payload = message
        if header["type"] == "hello":
            self._on_hello(site, header, identity)
            return
        if "energy" in header and not self.virtual:  # virtual seconds cost what the config says
            self._metered(site, **header["energy"])
        if handler := getattr(self, "_on_" + header["type"], None):
            handler(site, header, payload)

    def _on_hello(self, site: str, hello: dict, identity: bytes) -> None:
        ours = {"site": site, "config digest": self.digest, "corpus digest": self.corpus.digest,
                "tokenizer digest": self.corpus.tokenizer_digest}  # fmt: skip
        wrong = "; ".join(f"{k} is {hello.get(k)!r}, the coordinator's {v!r}" for k, v in ours.items() if hello.get(k) != v)
        if wrong:
            print(f"coordinator | refused {site}: {wrong}", file=sys.stderr, flush=True)
            self.hub.answer(identity, {"type": "refused", "reason": wrong})
            return
        known, incarnation, status = self.incarnations.get(site), hello["incarnation"], hello.get("status")
        alive = self.hub.connected(site) and not self.hub.closed(site) and self.hub.silent_s(site) < self.cfg.sync.dead_s
        if alive and incarnation != known:
            self.hub.answer(identity, {"type": "refused", "busy": True, "reason": f"site {site} is already connected"})
            return
        again = bool(status) and known in (incarnation, None)
        if known and not again and (self.hub.connected(site) or site in self.unheard or self.run.counts_on(site)):
            self._lost(site, "was replaced by a new process", sure=True)
        self.hub.admit(site, identity, incarnation)
        self.incarnations[site] = incarnation
        self.unheard.discard(site)
        self.holds.pop(site, None)
        self.hub.send(site, {"type": "welcome", "run_id": self.vault.run_id})
        if not again:
            print(f"{site:15} | connected, torch {hello['versions']['torch']}, {hello['device']}, {hello['ranks']} rank(s)", flush=True)
        if self.virtual:
            if again:  # what it holds may be ahead of the stored state: back to that, exactly
                self.hub.send(site, {"type": "drop", "keep": True})
        elif again:
            self.run.back(self.t, site, status)
        else:
            self.run.present(site)

    def _metered(self, site: str, kwh: float, method: str) -> None:
        """What a site has drawn since its process started, by its meters: a row of energy.csv, at most one a second."""
        reading, last = carbon.Reading(site, self.incarnations[site], round(self.t, 3), kwh, method), self.last_readings.get(site)
        if last and (reading.t_s < last.t_s + READINGS_EVERY_S or (reading.incarnation == last.incarnation and kwh < last.kwh)):
            return
        self.energy.write(carbon.reading_line(reading))
        self.readings.append(reading)
        self.last_readings[site] = reading

    def _on_gone(self, site: str, header: dict, payload) -> None:
        self._lost(site, header.get("why", "has closed its connection"))

    def _on_bye(self, site: str, header: dict, payload) -> None:
        self._lost(site, f"has left: {header['reason']}", sure=True)

    def _on_leaving(self, site: str, header: dict, payload) -> None:
        if self.virtual:
            self._lost(site, f"has left: {header['reason']}")
        else:
            self.run.leave(self.t, site, header["reason"])

    def _on_summed(self, site: str, header: dict, payload) -> None:
        self.run.summed(header["attempt"], header["digest"])

    def _on_current(self, site: str, header: dict, payload) -> None:
        if header["id"] != self.fetches.get(site):
            return  # from before it was told to drop everything
        self.holds[site] = header["round"]
        if not self.virtual and header["download_s"]:
            vectors = 1 if self.cfg.rounds.outer == "none" else 2  # theta, and m
            self._measured(min(self.bytes_per_s, vectors * self.payload_bytes / header["download_s"]))
            self._choose_wire(list(self.wire_rates))
        self.run.current(self.t, site, header["round"])

    def _on_again(self, site: str, header: dict, payload) -> None:
        """A download did not arrive whole, or was of a round that is no longer kept."""
        if site in self.run.fetching or self.run.schedule.sites[site].state in ("starting", "on"):
            self._send_fetch(site, self.run.stored)

    def _on_frozen(self, site: str, header: dict, payload) -> None:
        self.frozen_at[site] = time.monotonic()
        if self.run.opened(header["round"], header["open_s"]):
            if not self.virtual and header["steps"]:
                self.run.rates[site] = header["steps"] * self.cfg.data.tokens_per_step / max(header["train_s"], 1e-3)
            self.run.frozen(self.t, site, header["steps"], header["finite"], header["bad_step"])

    def _on_vote(self, site: str, header: dict, payload) -> None:
        if self.run.attempting(site, header["round"], header["attempt"]):
            if header.get("bytes_per_s"):
                self.wire_rates[site] = header["bytes_per_s"]
                self.took_s.setdefault(self.run.now.wire, {})[site] = header["took_s"]
                self._choose_wire(self.run.now.agreement.members)
            self.run.voted(self.t, site, header["attempt"], header["digest"])

    def _synced(self, wire_: str) -> None:
        """An average in this format is over, at all members: how fast was the slowest link?"""
        if not self.virtual:
            took_s = max(time.monotonic() - self.attempt_began, 1e-3)
            self._measured(0.5 * (self.bytes_per_s + wire.num_bytes(wire_, self.vault.numel) / took_s))

    def _measured(self, bytes_per_s: float) -> None:
        """Time-outs follow the link, unless that would break an order the config insists on."""
        self.bytes_per_s = bytes_per_s
        with contextlib.suppress(BadInput):
            self.timeouts = timeouts.derive(self.cfg, self.payload_bytes, bytes_per_s)
            self.run.attempt_s = self.timeouts.attempt_s

    def _choose_wire(self, members: list[str]) -> None:
        """sync.wire=auto: by what averages took and by the slowest member's measured rate; on the virtual clock by sync.link_gbit."""
        if self.cfg.sync.wire != "auto":
            return
        link, numel, train_s = self.cfg.sync.link_gbit, self.vault.numel, self.cfg.rounds.train_s
        rate = min([self.wire_rates[s] for s in members if s in self.wire_rates] or [self.bytes_per_s])
        took_s = {f: max(by_site.values()) for f, by_site in self.took_s.items()}
        rate, took_s = (link * 1.25e8, {}) if link else (rate, took_s)
        name = wire.choose(numel, rate, train_s, took_s)
        if name != self.run.wire:
            self.run.wire = name
            each = (
                f"{f} {took_s[f]:.2g} s" if f in took_s else f"{f} perhaps {wire.num_bytes(f, numel) / rate:.2g} s" for f in wire.FORMATS
            )
            print(f"{'wire':15} | auto: {name}; an average takes {', '.join(each)} of {train_s:g} s", flush=True)

    def _on_failed(self, site: str, header: dict, payload) -> None:
        if self.run.now and header["round"] == self.run.now.number:
            self.run.failed(self.t, site, header["attempt"], header["reason"])

    def _on_more(self, site: str, header: dict, payload) -> None:
        if self.run.opened(header["round"], header["open_s"]):
            self.run.more(self.t, site, header["known"])

    def _on_eval(self, site: str, header: dict, payload) -> None:
        self.owed_evals.pop(header["round"], None)
        self.run.evaluated(self.t, header["round"], header["val_loss"], header["val_bpb"])

    def _on_progress(self, site: str, header: dict, payload) -> None:
        print(report.step_line(self.cfg, site, header, self.run, self.predicted_end_s), flush=True)

    def _on_applied(self, site: str, header: dict, payload) -> None:
        self._complain(self.vault.note(header["round"], site, header["digest_theta"], header["digest_m"]))

    def _complain(self, complaints: list[tuple[str, str]]) -> None:
        for site, complaint in complaints:
            self.run.differs(self.t, site, complaint)

    def _on_upload(self, site: str, header: dict, payload) -> None:
        """A chunk of the agreed average (federated) or of a local round's result; the last one makes a state durable."""
        self.hub.send(site, {"type": "reply", "re": header["id"]})
        if header["name"] == "result":
            self._on_result(header, payload)
            return
        if not self.virtual and self.run.holds.get(site, -1) < header["round"]:
            return  # from before the run went another way
        first, last = self.run.stored + 1, self.run.round  # a whole state may skip rounds, an average cannot
        if first <= header["round"] <= (first if header["name"] == "delta" else last):
            try:
                parts = self.vault.receive(header | {"site": site}, payload)
            except ValueError as error:
                self._spoiled(site, header["round"], header["name"], error)
                return
            if parts is not None and not ("delta" in parts and header["round"] not in self.vault.agreed):  # else: was rolled back
                self._write(header["round"], site, parts, header.get("digest", ""))

    def _spoiled(self, site: str, round_: int, name: str, error: ValueError) -> None:
        """What a site sent is not what was agreed, or not what it holds."""
        if self.virtual or name == "delta":
            self.run.differs(self.t, site, str(error))
        else:
            self.run.spoiled(self.t, site, round_, str(error))
            if not self.run.counts_on(site):
                self.hub.dismiss(site)  # it says hello anew

    def _on_result(self, header: dict, payload) -> None:
        """A chunk of what some members have agreed on and others lack."""
        digest, a = header["digest"], self.run.now.agreement if self.run.now else None
        if digest not in self.result:
            if header["start"] == 0:
                self.result = {}
                self._receiving = digest, torch.zeros(wire.num_bytes(self.run.now.wire, self.vault.numel) if a else 0, dtype=torch.uint8)
        if self._receiving is None or self._receiving[0] != digest:
            return
        vector = self._receiving[1]
        room = sync.raw(vector)[header["start"] : header["stop"]]
        if len(room) != len(payload):
            return
        room[:] = payload
        if header["last"] and a and sync.digest(vector) == digest:
            self.result = {digest: vector}
            self.run.at_head(self.t, header["attempt"], digest)

    def _write(self, round_: int, site: str, parts: dict[str, torch.Tensor], digest: str = "") -> None:
        """A state is here: have it written, whatever happens to those who hold it."""
        self.run.writing(round_)
        self.vault.write(round_, site, parts, digest)

    def _has_written(self, round_: int, site: str, name: str, error: Exception | None) -> None:
        """In the vault's thread: on to the main one."""
        self.hub.inbox.put((site, b"", {"type": "written", "round": round_, "name": name, "error": error}, b""))

    def _on_written(self, site: str, header: dict, payload) -> None:
        """A state is durable, or could not be made."""
        round_, error = header["round"], header["error"]
        if isinstance(error, ValueError):
            self.run.not_written()
            self._spoiled(site, round_, header["name"], error)
            return
        if error:
            raise error
        if round_ not in self.vault.digests or round_ <= self.run.stored:
            return  # a second sender's
        made_s = self.owed_stores.pop(round_, self.t) if self.virtual else self.t
        self.owed_stores.pop(round_, None)
        self.run.store_done(made_s, round_, *self.vault.digests[round_])
        self._complain(self.vault.complaints(round_))
        if made_s < self.t:  # the journal waits at the commit's moment: a state on disk is told of at once
            self._record(self.run.take_records())
            self.journal.flush(made_s)

    # -- the end ------------------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Ctrl-C or SIGTERM: the open round is void, everything committed stays, everyone is told."""
        if self.replay:  # nothing new was decided yet
            self.run.reason, self.run.code = "interrupted", config.EXIT_FAILED
            return
        self.run.finish(self.t, "interrupted", config.EXIT_FAILED)
        records, actions = self.run.take()
        self._record(records)
        for action in actions:
            if action.kind == "end":
                self._tell(action)

    def close(self) -> int:
        """Everything on disk, the sockets closed; returns the exit code."""
        if self.live:
            self.live.close()
        self.journal.flush()
        if not self.replay:
            carbon.write_intervals(self.dir / "intervals.csv", self._intervals(self.journal.records[-1]["t_s"]))
        self.hub.close()
        self.vault.close()
        self.journal.close()
        for site in self.jobs.close():
            print(f"coordinator: the job of {site} could not be stopped; try `python provision.py stop {self.dir}`", file=sys.stderr)
        return self.run.code

    def give_up(self) -> None:
        """The journal cannot be written: nothing more is told to anyone. The sites hold still; a restart resumes."""
        self.hub.close()
        self.vault.close()


def open_files(num_sites: int) -> int:
    """Two connections a site, and what a process has open anyway."""
    return 2 * num_sites + 200


def allow_connections(num_sites: int) -> None:
    """Raises BadInput if this system will not have so many."""
    need, (now, most) = open_files(num_sites), resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < need:
        raise BadInput(f"{num_sites} sites need {need} open files, this system allows {most}; raise it (ulimit -Hn) or take fewer sites")
    if now != resource.RLIM_INFINITY and now < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, most))


def run_command(argv: list[str]) -> int:
    cfg = config.load(argv)
    allow_connections(len(cfg.sites))
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    c = Coordinator(cfg)
    cfg = c.cfg
    try:
        print(report.opening(cfg, c.traces, c.prices, c.vault.numel, c.hub.address, c.predicted_end_s, c.timeouts), flush=True)
        (c.run_virtual if c.virtual else c.run_wall)()
        code = c.close()
    except Interrupted:
        try:
            c.interrupt()
        finally:  # jobs are stopped even if nobody reads what we say any more
            code = c.close()
    except (Unwritable, OSError) as error:
        c.give_up()
        if isinstance(error, OSError) and error.errno not in NO_SPACE:
            raise
        if isinstance(error, OSError):
            error = f"{error.filename or c.dir}: {error.strerror}; free space, then the same command resumes"
        print(f"coordinator: {error}", file=sys.stderr, flush=True)
        return config.EXIT_FAILED
    except BaseException:
        c.give_up()
        raise
    summary = report.write_summary(c.dir, cfg, c.traces, c.prices)
    c.panel.finish(summary)
    print(report.table(summary, cfg), flush=True)
    if code:
        again = " The same command resumes." if code in (config.EXIT_FAILED, config.EXIT_BUDGET_LEFT) else ""
        print(f"coordinator: {c.run.reason}.{again}", file=sys.stderr, flush=True)
    return code


def _interrupt(number, frame) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted


def keys_command(argv: list[str]) -> int:
    cfg = config.load(argv)
    folder = config.run_dir(cfg) / "keys"
    made = make_keys(folder, list(cfg.sites))
    print(f"{folder}: made {', '.join(made) if made else 'nothing new'}; copy coordinator.key and one SITE.key_secret to each site")
    return 0


def check_command(argv: list[str]) -> int:
    path = Path(argv[0] if argv else "") / "journal.jsonl"
    if not path.is_file():
        raise BadInput(f"{path} does not exist; say coordinator.py check RUN_DIR")
    cfg = config.read_yaml(path.with_name("config.yaml"))
    records = read(path)
    held = {file.parent.name: report.read_lines(file) for file in sorted(path.parent.glob("sites/*/held.jsonl"))}
    results = check(records, config.num_batches(cfg), cfg.data.tokens_per_step) + (check_held(records, held) if records else [])
    for ok, sentence in results:
        print(f"{'ok    ' if ok else 'BROKEN'} {sentence}")
    return 0 if all(ok for ok, _ in results) else 1


def main(argv: list[str]) -> int:
    commands = {"keys": keys_command, "check": check_command}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return run_command(argv)


if __name__ == "__main__":
    config.command(main)
