"""The head node: decides who trains when, keeps the journal and the durable model. CPU only, always on.

    python coordinator.py configs/demo.yaml [key=value ...]     run, or resume, the run of that name
    python coordinator.py keys configs/demo.yaml                make the CURVE keys of its sites
    python coordinator.py check runs/demo                       the invariants of a run, one line each

The decisions are rounds.py's; this file carries them out. On the virtual clock `simulate.drive` steps time and
`execute` waits for the sites where their answer is needed; on the wall clock `run_wall` passes on what arrives when it
arrives. Before anything is told to a site it is in the journal, fsynced.

Only the control channel listens, at sync.host:sync.port, for holders of a key (see channel.py).
"""

import fcntl
import math
import queue
import shutil
import signal
import sys
import time
import uuid
from pathlib import Path

import torch
from omegaconf import OmegaConf

import carbon
import config
import report
import simulate
import sync
from channel import Hub, make_keys, read_key
from config import BadInput
from data import Corpus
from journal import Journal, check, decision, effective
from model import GPT, shape_of
from rounds import Action, Run

LOST_PARTS = ("*.jsonl", "intervals.csv", "summary.json", "config.yaml", "address")


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""


class Coordinator:
    def __init__(self, cfg):
        self.cfg = cfg
        self.traces = carbon.load_traces(cfg)
        self.corpus = Corpus(cfg)
        self.dir = config.run_dir(cfg)
        self._lock_folder()
        shape = _shape(cfg, self.corpus.vocab)
        fresh_start = self._open_folder()
        self.states = sync.StateFolder(self.dir / "state")
        self.journal = Journal(self.dir / "journal.jsonl")
        self.hub = self._listen()
        self.run, self.samples = simulate.new_run(cfg, self.traces)
        self.virtual = cfg.clock.mode == "virtual"
        self.t = 0.0
        self.progress: dict[str, dict] = {}
        self.uploads: dict[int, dict] = {}
        self.results: dict[int, str] = {}  # round -> agreed digest, until stored
        self.owed_stores: dict[int, float] = {}  # round -> virtual time of the commit that made it
        self.owed_evals: set[int] = set()
        self.frozen_at: dict[str, float] = {}
        self.applied: dict[int, dict] = {}
        self.replaying = False
        if fresh_start:
            self._genesis(shape)
        else:
            self._restore()
        self.flat_numel = self.theta.numel()
        ahead, samples = simulate.new_run(cfg, self.traces)
        ahead.facts = ahead.facts.__class__(**{**vars(ahead.facts), "timed": True})
        ahead.schedule.timed = True
        simulate.drive(ahead, samples)
        self.predicted_end_s = max(r.end_s for r in ahead.meter.closed(1e-9 + self.run.facts.end_s) if r.state != "off") if ahead.meter.intervals else 0.0

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
        path = self.dir / "journal.jsonl"
        if self.cfg.fresh:
            for pattern in LOST_PARTS:
                for file in self.dir.glob(pattern):
                    file.unlink()
            for folder in ("state", "sites", "figures", "wandb", "logs"):
                shutil.rmtree(self.dir / folder, ignore_errors=True)
        fresh_start = not path.exists() or not path.stat().st_size
        if not fresh_start:
            first, last = (lambda rs: (rs[0], rs[-1]))(Journal(path).records)
            for name, here in (("config_digest", config.train_digest(self.cfg)), ("schedule_digest", config.schedule_digest(self.cfg))):
                if first[name] != here:
                    raise BadInput(f"{self.dir} was started with {name} {first[name]}, this config has {here}; take run=NEW, "
                                   f"fresh=true, or the config in {self.dir}/config.yaml")  # fmt: skip
            if last["type"] == "end" and last["reason"] == "budget":
                raise BadInput(f"{self.dir} is finished; take run=NEW or fresh=true")
        OmegaConf.save(self.cfg, self.dir / "config.yaml")
        return fresh_start

    def _listen(self) -> Hub:
        c, keys = self.cfg.sync, self.dir / "keys"
        names = list(self.cfg.sites)
        if c.host in config.LOOPBACK:
            make_keys(keys, names)
        allowed = {read_key(keys, name, secret=False)[0].decode(): name for name in names}
        hub = Hub(c.host, c.port, keys, allowed, self._read_state, c.chunk_mb << 20)
        (self.dir / "address.tmp").write_text(hub.address + "\n")
        (self.dir / "address.tmp").replace(self.dir / "address")
        return hub

    def _read_state(self, round_: int, name: str, start: int, stop: int) -> bytes | None:
        return self.states.read(round_, name, start, stop) if round_ <= self.run.stored else None

    def _genesis(self, shape) -> None:
        """theta_0 from the seed, on CPU in fp32; its digest stands in the journal before anyone sees it."""
        model = GPT(shape).init_weights(self.cfg.seed)
        self.theta = sync.Flat(model).read(model)
        self.m = torch.zeros_like(self.theta)
        self.digest = sync.digest(self.theta, self.cfg.sync.chunk_mb)
        self.run_id, self.epoch = uuid.uuid4().hex[:12], time.time()
        self._save_state(0)
        self.journal.add([{
            "t_s": 0.0, "type": "genesis", "digest": self.digest, "config_digest": config.train_digest(self.cfg),
            "schedule_digest": config.schedule_digest(self.cfg), "corpus_digest": self.corpus.digest,
            "wall": {"run_id": self.run_id, "epoch_unix": self.epoch, "versions": config.versions()},
        }])  # fmt: skip
        self.journal.flush()

    def _save_state(self, round_: int) -> None:
        facts = {"run_id": self.run_id, "digest_theta": self.digest, "config_digest": config.train_digest(self.cfg)}
        self.states.save(round_, self.theta, self.m, facts)

    def _restore(self) -> None:
        """Continue from the newest state that journal and disk both know. See `_go_live` for the virtual clock."""
        genesis, held = self.journal.records[0], effective(self.journal.records)
        self.run_id, self.epoch = genesis["wall"]["run_id"], genesis["wall"]["epoch_unix"]
        stored = {0: genesis["digest"]} | {r["round"]: r["digest_theta"] for r in held if r["type"] == "store"}
        on_disk = [s for s in self.states.manifest if stored.get(s["round"]) == s["digest_theta"]]
        if not on_disk:
            raise BadInput(f"{self.dir}/state holds no state the journal knows; restore it, or take fresh=true")
        start = on_disk[-1]["round"]
        self.theta, self.m = self.states.load(start)
        self.digest = sync.digest(self.theta, self.cfg.sync.chunk_mb)
        if self.digest != stored[start]:
            raise BadInput(f"{self.dir}/state round {start} has digest {self.digest[:12]}, the journal says "
                           f"{stored[start][:12]}: damaged; restore it, or take fresh=true")  # fmt: skip
        print(f"coordinator | resuming {self.dir} at round {start}", flush=True)
        if self.virtual:
            self._begin_replay(held, start)
        else:
            for record in held:
                if record["type"] == "commit" and record["round"] < start:
                    for ranges in record["batches"].values():
                        self.run.ledger.replay(ranges)
            self.run.round = self.run.stored = start
            rows = carbon.read_intervals(str(self.dir / "intervals.csv")) if (self.dir / "intervals.csv").exists() else []
            self.run.meter = carbon.Meter(list(self.cfg.sites), rows)
            opened = {r["round"] for r in held if r["type"] == "open"} - {r["round"] for r in held if r["type"] == "commit"}
            if held[-1]["type"] != "end" and opened:
                self.journal.add([{"t_s": round(time.time() - self.epoch, 3), "type": "cancel", "round": max(opened),
                                   "reason": "coordinator restarted", "tokens": 0}])  # fmt: skip

    # -- the virtual clock --------------------------------------------------------------------------------------------

    def _begin_replay(self, held: list[dict], start: int) -> None:
        """Decisions are a function of config and trace: go through them again up to the stored state, then live."""
        self.resume_round, self.replaying = start, start > 0
        end = next((i for i, r in enumerate(held) if r["type"] == "store" and r["round"] == start), 0)
        known = [r for r in held[1 : end + 1] if r["type"] != "eval" and not (r["type"] == "open" and r["round"] == start)]
        self.to_verify: dict[str, int] = {}
        for record in known:
            self.to_verify[decision(record)] = self.to_verify.get(decision(record), 0) + 1
        self.absences = {(r["t_s"], r["site"]): r["action"].removeprefix("left out: ") for r in known if r["type"] == "fault" and r["kind"] == "absent"}
        self.set_aside: list[dict] = []
        if not self.replaying:
            self._cancel_tail(0.0)

    def _verify(self, records: list[dict]) -> None:
        for record in records:
            if record["type"] == "open" and record["round"] == self.resume_round:
                self.set_aside.append(record)
                continue
            key = decision(record)
            if not self.to_verify.get(key):
                raise BadInput(f"{self.dir}: the journal does not follow from this config and trace at t_s={record['t_s']} "
                               f"({record['type']}); the trace file or the code changed: take run=NEW")  # fmt: skip
            self.to_verify[key] -= 1
            if not self.to_verify[key]:
                del self.to_verify[key]

    def _cancel_tail(self, t: float) -> None:
        self.journal.add([{"t_s": round(t, 3), "type": "cancel", "round": self.resume_round, "reason": "resumed", "tokens": 0}])
        self.journal.flush()

    def _go_live(self, t: float) -> None:
        """All decisions up to the stored state are repeated. From here on they are carried out."""
        self.replaying = False
        self._cancel_tail(t)
        self.journal.add(self.set_aside)
        for site, holds in list(self.run.holds.items()):
            if holds == self.run.round:
                self._fetch_now(t, site, holds, own_disk=True)

    def run_virtual(self) -> None:
        simulate.drive(self.run, self.samples, self.execute, self._journal, self._wait_ending)

    def _journal(self, records: list[dict]) -> None:
        if self.replaying:
            self._verify(records)
        else:
            self.journal.add(records)
            for record in records:
                self._tell(record)

    def _wait_ending(self, t: float, run: Run) -> None:
        self._settle()

    def execute(self, t: float, action: Action, run: Run) -> None:
        """Carry out one action on the virtual clock, waiting for the sites where the next decision needs them."""
        self.t = t
        if self.replaying:
            self._journal(run.take_records())
            if self.to_verify:
                site = action.site
                if action.kind == "fetch" and (round(t, 3), site) in self.absences:
                    run.absent(t, site, self.absences[round(t, 3), site])
                else:
                    simulate.imagine(t, action, run)
                return
            self._go_live(t)
            if action.kind in ("commit", "drop", "fetch"):
                if action.kind == "fetch":
                    self._fetch_now(t, action.site, action.data["round"])
                return
        d = action.data
        if action.kind == "freeze":  # the round is over in virtual time: let the sites train it
            for site in d["members"]:
                signal_ = self._signal(site, run.now.open_s, t)
                self.hub.send(site, {"type": "go", "round": d["round"], "steps": d["steps"][site], "signal": signal_})
            self._settle()
            self._await(lambda: run.phase != "freezing" or run.now is None or len(run.now.steps) == len(d["members"]), d["members"])
            return
        if action.kind == "start" or (action.kind == "drop" and not self.hub.connected(action.site)):
            return
        if any(t > made for made in self.owed_stores.values()) or action.kind in ("fetch", "evaluate", "end"):
            self._settle()
        self.journal.flush(t)
        if action.kind == "fetch":
            self._fetch_now(t, action.site, d["round"])
        elif action.kind == "store":
            self._await(lambda: run.stored >= d["round"] or run.ended, [action.site])
        elif action.kind == "attempt":
            self._send_attempt(d)
            self._await(lambda: run.phase != "reduce" or len(run.now.votes) == len(d["members"]), d["members"])
        elif action.kind == "evaluate":
            self._send(action)
            self._await(lambda: run.ended, [action.site])
        else:
            self._send(action)

    def _fetch_now(self, t: float, site: str, round_: int, own_disk: bool = False) -> None:
        wait_s = self.cfg.rounds.rejoin_wait_s
        until = time.monotonic() + wait_s
        if not self.hub.connected(site):
            print(f"coordinator | {site} is not connected; waiting up to {wait_s:g} s for "
                  f"`torchrun train.py CONFIG site={site}`", flush=True)  # fmt: skip
        while not self.hub.connected(site) and time.monotonic() < until:
            self._receive(0.1)
        if not self.hub.connected(site):
            self.run.holds.pop(site, None)
            self.run.fetching.discard(site)
            if not any(map(self.hub.connected, self.cfg.sites)):
                self.run.finish(t, f"no site has connected within rounds.rejoin_wait_s={wait_s:g} s", config.EXIT_FAILED)
                return
            self.run.absent(t, site, f"no process within rounds.rejoin_wait_s={wait_s:g} s")
            return
        self._send_fetch(site, round_, own_disk)
        self._await(lambda: self.progress.get(site, {}).get("holds") == round_ or self.run.ended, [site])

    def _settle(self) -> None:
        """Wait for what was promised but costs no virtual time: states to store, evaluations."""
        self._await(lambda: not self.owed_stores and not self.owed_evals or self.run.ended, list(self.cfg.sites))
        if not self.replaying:
            self._journal(self.run.take_records())

    def _await(self, done, sites: list[str]) -> None:
        """Receive until done(); a site that falls silent meanwhile is lost."""
        while not done():
            self._receive(0.05)
            self._check_alive(sites)

    def _check_alive(self, sites: list[str]) -> None:
        for site in sites:
            needed = self.run.schedule.sites[site].state != "off" or site in self.run.leaving
            if self.hub.connected(site) and self.hub.silent_s(site) > self.cfg.sync.dead_s:
                self.hub.dismiss(site)
                self.run.lost(self.t, site, f"has not been heard for {self.cfg.sync.dead_s:g} s")
            elif needed and not self.hub.connected(site) and self.run.holds.get(site) is not None and not self.run.ended:
                self.run.lost(self.t, site, "has left")

    # -- the wall clock -----------------------------------------------------------------------------------------------

    def run_wall(self) -> None:
        """Real time: pass on what arrives, tell what is due."""
        run, started = self.run, time.monotonic()
        behind = time.time() - self.epoch if self.journal.records[-1]["type"] != "genesis" else 0.0
        if not behind:
            self.epoch = time.time()
        while not run.ended:
            self.t = behind + time.monotonic() - started
            for site, mci in self.samples.due(self.t):
                run.observe(self.t, site, mci)
                if mci is not None:
                    self.hub.send(site, {"type": "signal", "t_s": self.t, "mci": mci})
            for name, site in run.schedule.sites.items():
                if site.state == "provisioning" and self.hub.connected(name):
                    run.provisioned(self.t, name)
            run.advance(self.t)
            self._carry_out()
            if run.ended:
                break
            due = min(run.next_time(), self.samples.next_time())
            self._receive(min(0.2, max(0.001, due - self.t)))
            self._carry_out()
            self._check_alive(list(self.cfg.sites))
        self._carry_out()
        self._await(lambda: not self.owed_stores, [])

    def _carry_out(self) -> None:
        records, actions = self.run.take()
        self._journal(records)
        self.journal.flush()
        for action in actions:
            d = action.data
            if action.kind == "fetch":
                self._send_fetch(action.site, d["round"])
            elif action.kind == "attempt":
                self._send_attempt(d)
            elif action.kind == "freeze":
                for site in d["members"]:
                    self.hub.send(site, {"type": "freeze", "round": d["round"]})
            elif action.kind not in ("start", "store"):
                self._send(action)

    # -- telling the sites --------------------------------------------------------------------------------------------

    def _send(self, action: Action) -> None:
        d, header = action.data, {"type": action.kind} | action.data
        if action.kind == "open":
            for site in d["members"]:
                base = self._account(site)
                signal_ = self._signal(site, self.t, self.t)
                self.hub.send(site, header | {"leases": d["leases"][site], "signal": signal_, **base})
        elif action.kind == "commit":
            round_ = d["round"] + 1
            if d["sender"]:
                self.results[round_] = d["digest"]
                self.owed_stores[round_] = self.t
            if d["evaluate"]:
                self.owed_evals.add(round_)
            for site in d["members"]:
                self.hub.send(site, header | {"send": site == d["sender"], "eval": site == d["evaluate"]})
            self.hub.forget(d["round"])
            carbon.write_intervals(self.dir / "intervals.csv", self.run.meter.closed(self.t))
        elif action.kind == "end":
            for site in self.cfg.sites:
                self.hub.send(site, header)
        elif action.site:
            self.hub.send(action.site, header)
        else:
            for site in d["members"]:
                self.hub.send(site, header)

    def _send_fetch(self, site: str, round_: int, own_disk: bool = False) -> None:
        own_disk = own_disk or self.cfg.sites[site].keep_disk
        self.hub.send(site, {"type": "fetch", "round": round_, "digest": self.digest if round_ == self.run.stored else None,
                             "numel": self.flat_numel, "own_disk": own_disk, "rewind": self.run.round})  # fmt: skip

    def _send_attempt(self, d: dict) -> None:
        if self.cfg.sync.topology == "star":
            self.hub.expect(d["round"], d["attempt"], d["members"])
        last = max([self.frozen_at.get(s, 0.0) for s in d["members"]])
        for rank, site in enumerate(d["members"]):
            waited = last - self.frozen_at.get(site, last)
            self.hub.send(site, {"type": "attempt", "round": d["round"], "attempt": d["attempt"], "rank": rank,
                                 "members": d["members"], "weight": d["weights"][site], "waited_s": waited})  # fmt: skip

    def _signal(self, site: str, t0: float, t1: float) -> list[list[float]]:
        """What the site's grid reported from t0 to t1, as [t_s, gCO2/kWh]: for its own log."""
        trace, start = self.traces[self.cfg.sites[site].region], config.start_unix(self.cfg)
        edges = [float(s - start) for s in trace.starts if t0 < s - start < t1]
        return [[t, trace.at(start + t)] for t in [t0, *edges] if trace.begin <= start + t < trace.end]

    def _account(self, site: str) -> dict:
        """What the site has drawn and emitted up to now, exact rule: the base of its log of the coming round."""
        rows = [r for r in self.run.meter.closed(self.t) if r.site == site]
        spent = carbon.account(rows, self.cfg, self.traces)["sites"][site]
        return {"energy_kwh": spent["energy_kwh"], "emissions_kg": spent["emissions_kg"]}

    # -- hearing the sites --------------------------------------------------------------------------------------------

    def _receive(self, timeout_s: float) -> None:
        """Handle one message, if one comes in time."""
        if not self.hub.is_alive():
            raise RuntimeError("the control channel's thread died")
        try:
            site, identity, header, payload = self.hub.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        handler = getattr(self, "_on_" + header["type"], None)
        if handler is None:
            return
        handler(site, header, payload) if header["type"] != "hello" else self._on_hello(site, header, identity)

    def _on_hello(self, site: str, hello: dict, identity: bytes) -> None:
        mine = {"site": site, "config digest": config.train_digest(self.cfg), "corpus digest": self.corpus.digest,
                "tokenizer digest": self.corpus.tokenizer_digest}  # fmt: skip
        wrong = [f"{k} {hello.get(k)!r} there, {v!r} here" for k, v in mine.items() if hello.get(k) != v]
        if wrong:
            print(f"coordinator | refused {site}: {'; '.join(wrong)}", flush=True)
            self.hub.answer(identity, {"type": "refused", "reason": f"{'; '.join(wrong)} (here: the coordinator)"})
            return
        if self.hub.connected(site) and self.hub.silent_s(site) < self.cfg.sync.dead_s:
            self.hub.answer(identity, {"type": "refused", "busy": True, "reason": f"site {site} is already connected"})
            return
        self.hub.admit(site, identity)
        self.run.present(site)
        self.progress[site] = {}
        self.hub.send(site, {"type": "welcome", "run_id": self.run_id, "round": self.run.stored})
        print(f"{site:15} | connected, torch {hello.get('versions', {}).get('torch')}, {hello.get('device')}, "
              f"{hello.get('ranks')} rank(s)", flush=True)  # fmt: skip

    def _on_bye(self, site: str, header: dict, payload) -> None:
        self.hub.dismiss(site)
        if not self.run.ended:
            self.run.lost(self.t, site, f"has left: {header['reason']}")

    def _on_current(self, site: str, header: dict, payload) -> None:
        self.progress[site]["holds"] = header["round"]
        self.run.current(self.t, site, header["round"])

    def _on_frozen(self, site: str, header: dict, payload) -> None:
        self.frozen_at[site] = time.monotonic()
        if self.run.now and header["round"] == self.run.now.number:
            if not self.virtual and header["steps"]:
                self.run.rates[site] = header["steps"] * self.cfg.data.tokens_per_step / max(header["train_s"], 1e-3)
            self.run.frozen(self.t, site, header["steps"], header["finite"], header["bad_step"])

    def _on_vote(self, site: str, header: dict, payload) -> None:
        if self.run.now and header["round"] == self.run.now.number:
            if not self.virtual:
                took = self.t - self.run.now.freeze_s
                self.run.sync_s = max(took, 0.5 * self.run.sync_s)
            self.run.voted(self.t, site, header["attempt"], header["digest"])

    def _on_failed(self, site: str, header: dict, payload) -> None:
        self.run.lost(self.t, site, f"could not average round {header['round']}: {header['reason']}")

    def _on_more(self, site: str, header: dict, payload) -> None:
        self.run.more(self.t, site)

    def _on_applied(self, site: str, header: dict, payload) -> None:
        self._compare(header["round"], site, header["digest_theta"], header["digest_m"])

    def _on_eval(self, site: str, header: dict, payload) -> None:
        self.owed_evals.discard(header["round"])
        self.run.evaluated(self.t, header["round"], header["val_loss"], header["val_bpb"])

    def _on_progress(self, site: str, header: dict, payload) -> None:
        self.progress[site].update(header)
        if not self.replaying:
            print(report.step_line(self.cfg, site, header, self.run, self.predicted_end_s), flush=True)

    def _on_upload(self, site: str, header: dict, payload) -> None:
        """A chunk of the agreed average (federated) or of a local round's result. The last one completes the state."""
        self.hub.send(site, {"type": "reply", "re": header["id"]})
        round_ = header["round"]
        if round_ != self.run.stored + 1:
            return
        upload = self.uploads.setdefault(round_, {})
        vector = upload.setdefault(header["name"], torch.empty(self.flat_numel))
        vector[header["start"] : header["stop"]] = torch.frombuffer(bytearray(payload), dtype=torch.float32)
        if not header["last"]:
            return
        c, r = self.cfg.sync.chunk_mb, self.cfg.rounds
        del self.uploads[round_]
        if "delta" in upload:
            if sync.digest(upload["delta"], c) != self.results.pop(round_):
                self.run.lost(self.t, site, f"sent another result of round {round_ - 1} than was agreed")
                return
            sync.outer_step_(self.theta, self.m, upload["delta"], r.outer, r.outer_lr, r.outer_momentum)
        else:
            self.theta = upload["theta"]
            self.m = upload["m"] if "m" in upload else torch.zeros_like(self.theta)
        self.digest, digest_m = sync.digest(self.theta, c), sync.digest(self.m, c)
        self._save_state(round_)
        made_at = self.owed_stores.pop(round_, self.t)
        self.run.store_done(made_at if self.virtual else self.t, round_, self.digest, digest_m)
        self._compare(round_, "coordinator", self.digest, digest_m)
        if self.virtual and made_at < self.t:
            self._journal(self.run.take_records())
            self.journal.flush(made_at)

    def _compare(self, round_: int, who: str, theta: str, m: str) -> None:
        """Every site's theta and m of a round must be the coordinator's, bit for bit."""
        seen = self.applied.setdefault(round_, {})
        seen[who] = (theta, m)
        self.applied = {k: v for k, v in self.applied.items() if k > round_ - 3}
        reference = seen.get("coordinator")
        for site, digests in seen.items():
            if reference and digests != reference and site != "coordinator":
                self.run.lost(self.t, site, f"holds theta {digests[0][:12]} of round {round_}, the coordinator {reference[0][:12]}")

    # -- telling people -----------------------------------------------------------------------------------------------

    def _tell(self, record: dict) -> None:
        if line := report.describe(record, self.cfg, self.run):
            print(line, flush=True)
        self.panel.log(record, self)

    def close(self) -> int:
        """Everything on disk, everyone told; returns the exit code."""
        self.journal.flush()
        end_s = self.run.meter.closed(math.inf) and self.journal.records[-1]["t_s"]
        carbon.write_intervals(self.dir / "intervals.csv", self.run.meter.closed(end_s))
        self.hub.close()
        self.journal.close()
        return self.run.code


def _shape(cfg, vocab: int):
    try:
        return shape_of(cfg.model, vocab)
    except ValueError as error:
        raise BadInput(str(error)) from None


def run_command(argv: list[str]) -> int:
    cfg = config.load(argv)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    c = Coordinator(cfg)
    try:
        c.panel = report.Panel(cfg, c.run_id, "coordinator")
        print(report.opening(cfg, c.traces, c.theta.numel(), c.hub.address, c.predicted_end_s), flush=True)
        (c.run_virtual if c.virtual else c.run_wall)()
    except Interrupted:
        c.run.finish(c.t, "interrupted", config.EXIT_FAILED)
        _, actions = (lambda taken: (c._journal(taken[0]), taken[1]))(c.run.take())
        for action in actions:
            if action.kind == "end":
                c._send(action)
    finally:
        code = c.close()
    summary = report.write_summary(c.dir, cfg, c.traces)
    c.panel.finish(summary)
    print(report.table(summary, cfg), flush=True)
    if code:
        left = " The same command resumes." if code in (config.EXIT_FAILED, config.EXIT_BUDGET_LEFT) else ""
        print(f"coordinator: {c.run.reason}.{left}", file=sys.stderr, flush=True)
    return code


def _interrupt(number, frame) -> None:
    signal.signal(number, signal.SIG_IGN)
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
    cfg = OmegaConf.load(path.with_name("config.yaml"))
    results = check(Journal(path).records, cfg.budget.tokens // cfg.data.tokens_per_step)
    for ok, sentence in results:
        print(f"{'ok    ' if ok else 'BROKEN'} {sentence}")
    return 0 if all(ok for ok, _ in results) else 1


def main(argv: list[str]) -> int:
    if argv and argv[0] == "keys":
        return keys_command(argv[1:])
    if argv and argv[0] == "check":
        return check_command(argv[1:])
    return run_command(argv)


if __name__ == "__main__":
    config.command(main)
