"""The control channel between the coordinator and the sites, and what travels over it.

    hub = Hub(...)     at the coordinator: one ROUTER socket, the only port a run opens
    link = Link(...)   at each site's rank 0: one DEALER socket, outbound only

Encrypted and authenticated on both sides (CURVE): each site has a key of its own, the coordinator admits the keys of
its run and knows a site by its key, not by what it claims. A message is a JSON header and one blob of raw bytes;
nothing is ever unpickled. Besides commands and reports the channel carries heartbeats, downloads and uploads of state
in chunks, the rendezvous of gloo groups (`ChannelStore`, a torch.distributed.Store, so that no TCPStore of ours
listens), and the chunks of a star-shaped average.

What is large travels on a second connection of each site, its lane, so that heartbeats and commands are never behind it.

A connection that breaks is made again by itself, and then, or whenever the coordinator says it does not know a process
(it was restarted, or had given that process up), the site says hello once more, with what it holds and where it stands.
At the coordinator a closed connection is a death after NOTICE_S, unless the same process is back by then.

Both ends run their socket in a thread of their own, so that heartbeats keep their time while a step or a file takes
long. Anything that must be decided is put into `inbox` for the main thread.
"""

import contextlib
import json
import logging
import os
import queue
import random
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import zmq
import zmq.auth
from blake3 import blake3
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from config import BadInput
from timeouts import NOTICE_S
from wire import BLOCK, FORMATS, add_up

POLL_MS = 100
MAX_HEADER = 1 << 20
QUIET = logging.getLogger("curtail.auth")  # pyzmq would log every refused key; we tell of each once
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False
BURST = 100  # messages handled in one go; then what is to be sent goes out
MAX_KEYS, MAX_VALUE = 4096, 1 << 16  # rendezvous: keys at a time, bytes of one
HANDSHAKE_MS = 5000  # a connection that has not shown a key by then is closed


class ChannelError(RuntimeError):
    """The other side did not answer, or said no."""


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def make_keys(folder: Path, names: list[str]) -> list[str]:
    """A CURVE key pair per name (and one for the coordinator) in `folder`, existing ones kept. Returns the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in ["coordinator", *names]:
        if not (folder / f"{name}.key_secret").exists():
            _, secret = zmq.auth.create_certificates(folder, name)
            os.chmod(secret, 0o600)
            made.append(name)
    return made


def read_key(folder: Path, name: str, secret: bool) -> tuple[bytes, bytes | None]:
    """(public, secret or None) of a name, z85. Raises BadInput when the file is missing or not a key."""
    path = folder / f"{name}.key{'_secret' if secret else ''}"
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError):
        raise BadInput(f"no usable key {path}; make keys at the head node with `python coordinator.py keys CONFIG` "
                       "and copy this site's there") from None  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Both ends


class Pump(threading.Thread):
    """Owns one socket: sends what `post` queued, hands what arrives to `receive`, calls `tick` now and then.

    context: one that is shared, where many live in one process.
    """

    def __init__(self, name: str, context: zmq.Context | None = None):
        super().__init__(name=name, daemon=True)
        self.shares, self.context = context is not None, context or zmq.Context()
        self.inbox: queue.Queue = queue.Queue()
        self.error: str | None = None
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._wake_r, self._wake_w = os.pipe()
        self._closing = threading.Event()
        self.socket: zmq.Socket

    def post(self, parts: list) -> None:
        """Queue frames for sending, from any thread."""
        self._outgoing.put(parts)
        if not self._closing.is_set():
            os.write(self._wake_w, b".")

    def run(self) -> None:
        poller = zmq.Poller()
        self.register(poller)
        while not self._closing.is_set():
            self.turn(dict(poller.poll(POLL_MS)))
        self._drain()
        self.socket.close(linger=1000)

    def turn(self, ready: dict) -> None:
        """Once round: what polling found `ready`."""
        if self._wake_r in ready:
            os.read(self._wake_r, 4096)
        self._drain()
        for _ in range(BURST):
            if not self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                break
            self.receive(self.socket.recv_multipart(copy=False))
        self.tick(ready)

    def _drain(self) -> None:
        while True:
            try:
                parts = self._outgoing.get_nowait()
            except queue.Empty:
                return
            try:
                self.send_parts(parts)
            except zmq.ZMQError as error:  # a peer that has gone; the time-outs of whoever waits for it speak up
                self.error = str(error)

    def send_parts(self, parts: list) -> None:
        self.socket.send_multipart(parts, copy=False)

    def register(self, poller: zmq.Poller) -> None:
        """What to poll."""
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._wake_r, zmq.POLLIN)

    def receive(self, frames: list[zmq.Frame]) -> None:
        raise AssertionError("each end says what it does with a message")

    def tick(self, ready: dict) -> None:
        """Called at least every POLL_MS."""

    def close(self) -> None:
        """Send what is queued, then close the socket and the thread."""
        if not self._closing.is_set():
            self._closing.set()
            os.write(self._wake_w, b".")
            self.join(timeout=5)
            if not self.shares:
                self.context.destroy(linger=1000)


def pack(header: dict, payload=b"") -> list:
    return [json.dumps(header).encode(), payload]


def unpack(frames: list[zmq.Frame]) -> tuple[dict, memoryview] | None:
    """Header and payload, or None for anything that is not a message of ours."""
    if len(frames) != 2 or len(frames[0]) > MAX_HEADER:
        return None
    try:
        header = json.loads(frames[0].bytes)
    except ValueError:
        return None
    return (header, frames[1].buffer) if isinstance(header, dict) and isinstance(header.get("type"), str) else None


# ---------------------------------------------------------------------------------------------------------------------
# The coordinator's end


class Hub(Pump):
    """Listens at host:port (0: a free one, see .address) for the keys of `names` found in the folder `keys`; a key that is
    taken away from there is revoked at once.

    Answers by itself: heartbeats, rendezvous keys, state chunks (`read_state(round, name, start, stop) -> bytes or
    None`), chunks of star averages. The rest goes to `inbox` as (site, identity, header, payload), as do its own `gone` (a
    connection closed) and `summed` (a star average is complete). Messages of a process that was not admitted are
    dropped, its hello excepted.
    """

    def __init__(self, host: str, port: int, keys: Path, names: list[str], read_state, max_bytes: int):
        super().__init__("hub")
        self.read_state = read_state
        self._seen: dict[str, float] = {}
        self._identity: dict[str, bytes] = {}
        self._incarnation: dict[str, str] = {}  # of the process behind it: says which lane is its own
        self._connection: dict[int, bytes] = {}  # file descriptor -> identity of the process behind it
        self._closed: dict[str, float] = {}  # site whose connection closed -> when
        self._hellos: dict[bytes, tuple] = {}  # by identity: the last of those said since one of them went to `inbox`
        self._saying = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._waiting: list[tuple[bytes, dict, float]] = []
        self._averages: dict[tuple, dict] = {}
        self._left: dict[int, torch.Tensor] = {}  # chunk -> what a lossy wire left out of the last committed sum by star
        self._allow = AllowList(keys, names)
        self._auth = ThreadAuthenticator(self.context, log=QUIET)
        self._auth.start()
        self._auth.configure_curve_callback(domain="*", credentials_provider=self._allow)
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.curve_publickey, self.socket.curve_secretkey = read_key(keys, "coordinator", secret=True)
        self.socket.curve_server = True
        self.socket.router_mandatory = True
        self.socket.maxmsgsize = max_bytes + MAX_HEADER
        self.socket.handshake_ivl = HANDSHAKE_MS
        self.socket.backlog = max(128, len(names))  # all sites may come at once
        self._monitor = self.socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        self._junk: set[str] = set()  # addresses of which junk was told
        self._peer = "an unknown address"
        try:
            self.port = (self.socket.bind_to_random_port(f"tcp://{host}") if port == 0
                         else (self.socket.bind(f"tcp://{host}:{port}"), port)[1])  # fmt: skip
        except zmq.ZMQError as error:
            self._auth.stop()
            self.context.destroy(linger=0)
            raise BadInput(f"sync.port={port}: cannot listen at {host}:{port} ({error}); stop what holds it, or take "
                           "sync.port=0") from None  # fmt: skip
        self.address = f"{host}:{self.port}"
        self.start()

    def hear(self, timeout_s: float) -> tuple[str, bytes, dict, memoryview] | None:
        """The next of `inbox`, or None. Of the hellos that a process has said by now only the last counts: while the main thread is
        busy, as at its start, a thousand sites say many."""
        with contextlib.suppress(queue.Empty):
            message = self.inbox.get(timeout=timeout_s)
            with self._saying:
                return self._hellos.pop(message[1], message) if message[2]["type"] == "hello" else message
        return None

    def admit(self, site: str, identity: bytes, incarnation: str) -> None:
        """From now on this process speaks for the site; an older one of the same name is ignored."""
        self._identity[site], self._incarnation[site] = identity, incarnation
        self._seen[site] = time.monotonic()
        self._closed.pop(site, None)

    def dismiss(self, site: str) -> None:
        for known in (self._identity, self._incarnation, self._closed):
            known.pop(site, None)

    def connected(self, site: str) -> bool:
        return site in self._identity

    def closed(self, site: str) -> bool:
        """Its connection has closed and is not made again (yet)."""
        return site in self._closed

    def all_closed(self) -> list[str]:
        return list(self._closed)

    def silent_s(self, site: str) -> float:
        return time.monotonic() - self._seen.get(site, 0.0)

    def silent(self, dead_s: float) -> list[str]:
        """Connected sites that have not been heard for longer."""
        before, seen = time.monotonic() - dead_s, self._seen
        return [site for site in self._identity if seen[site] < before]

    def longest_silent_s(self) -> float:
        """Of all connected sites; 0 if there are none."""
        return time.monotonic() - min(map(self._seen.get, self._identity), default=time.monotonic())

    def send(self, site: str, header: dict, payload=b"") -> None:
        if site in self._identity:
            self.post([self._identity[site], *pack(header, payload)])

    def answer(self, identity: bytes, header: dict, payload=b"") -> None:
        self.post([identity, *pack(header, payload)])

    def attempt(self, round_: int, attempt: int, members: list[str], wire: str, star: bool) -> None:
        """Before an attempt: what is left of others is forgotten; by star, whose chunks to add up, in this order."""
        self._order({"averages": [round_, attempt, members, wire] if star else None, "why": "the next attempt began"})

    def kept(self, round_: int, attempt: int) -> None:
        """An attempt is committed."""
        self._order({"kept": [round_, attempt]})

    def forget(self, why: str) -> None:
        """An attempt cannot succeed: whoever still waits for a part of it is told so."""
        self._order({"averages": None, "why": why})

    def _order(self, order: dict) -> None:
        self.post([b"", json.dumps(order).encode()])  # in line with what is sent to the sites

    def send_parts(self, parts: list) -> None:
        if parts[0]:
            self.socket.send_multipart(parts, copy=False)
            return
        order = json.loads(parts[1])
        if "kept" in order:
            if average := self._averages.get(tuple(order["kept"])):
                self._left = average["left"]
            return
        asking = [(identity, request) for a in self._averages.values() for c in a["chunks"].values() for identity, request, _ in c.values()]
        asking += [(identity, header["id"]) for identity, header, _ in self._waiting]
        self._values, self._waiting, self._averages = {}, [], {}
        if order["averages"]:
            round_, attempt, members, wire = order["averages"]
            self._averages[round_, attempt] = {"members": members, "wire": wire, "chunks": {}, "hashed": blake3(), "summed": 0, "left": {}}
        for identity, request in asking:
            with contextlib.suppress(zmq.ZMQError):
                self.socket.send_multipart([identity, *pack({"type": "reply", "re": request, "error": order["why"]})])

    def receive(self, frames: list[zmq.Frame]) -> None:
        message = unpack(frames[1:])
        site = self._allow.site_of(frames[0].get("User-Id"))
        if message is None or site is None:
            return
        identity, (header, payload) = frames[0].bytes, message
        if header["type"] == "hello":
            self._connection[frames[0].get(zmq.SRCFD)] = identity
            with self._saying:
                if identity not in self._hellos:
                    self.inbox.put((site, identity, header, payload))
                self._hellos[identity] = site, identity, header, payload
            return
        of = header.get("lane_of")  # what comes by a process's lane counts as its own
        if self._identity.get(site) != identity if of is None else self._incarnation.get(site) != of:
            if header["type"] == "heartbeat":
                self.answer(identity, {"type": "stranger"})
            return
        self._seen[site] = time.monotonic()
        handler = getattr(self, "_on_" + header["type"], None)
        if handler:
            handler(site, identity, header, payload)
        else:
            self.inbox.put((site, identity, header, payload))

    def tick(self, ready: dict) -> None:
        self._watch(ready)
        now, still = time.monotonic(), []
        for identity, header, until in self._waiting:
            if all(key in self._values for key in header["keys"]):
                values = [self._values[k] for k in header["keys"]]
                self.answer(identity, {"type": "reply", "re": header["id"], "sizes": [len(v) for v in values]}, b"".join(values))
            elif now < until:
                still.append((identity, header, until))
        self._waiting = still

    def register(self, poller: zmq.Poller) -> None:
        super().register(poller)
        poller.register(self._monitor, zmq.POLLIN)

    def _watch(self, ready: dict) -> None:
        """Connections that came and went; keys that were revoked."""
        while self._monitor in ready and self._monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._peer = peer_of(event["value"]) or self._peer
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                identity = self._connection.pop(event["value"], None)
                for site in [s for s, i in self._identity.items() if i == identity]:
                    self._closed[site] = time.monotonic()
            elif self._peer not in self._junk and len(self._junk) < 1000:
                self._junk.add(self._peer)
                print(f"coordinator | refused a connection from {self._peer} that does not speak our protocol", flush=True)
        for site, since in list(self._closed.items()):
            if time.monotonic() - since >= NOTICE_S:
                del self._closed[site]
                self.inbox.put((site, self._identity[site], {"type": "gone"}, b""))
        for site in self._allow.refresh():
            if site in self._identity:
                self.inbox.put((site, self._identity[site], {"type": "gone", "why": "its key was revoked"}, b""))

    def _on_heartbeat(self, site, identity, header, payload) -> None:
        self.answer(identity, {"type": "heartbeat"})

    def _on_ping(self, site, identity, header, payload) -> None:
        self.answer(identity, {"type": "reply", "re": header["id"]})

    def _on_set(self, site, identity, header, payload) -> None:
        if len(self._values) < MAX_KEYS and len(payload) <= MAX_VALUE:
            self._values[header["key"]] = bytes(payload)
        self.answer(identity, {"type": "reply", "re": header["id"]})
        self.tick({})

    def _on_get(self, site, identity, header, payload) -> None:
        self._waiting.append((identity, header, time.monotonic() + header["timeout_s"]))
        self.tick({})

    def _on_chunk(self, site, identity, header, payload) -> None:
        data = self.read_state(header["round"], header["name"], header["start"], header["stop"])
        found = data is not None
        self.answer(identity, {"type": "reply", "re": header["id"], "found": found}, data if found else b"")

    def _on_reduce(self, site, identity, header, payload) -> None:
        """One member's part of a chunk of a star average, as bytes of the wire. When all are here, each gets the sum in member
        order. What a lossy wire leaves out of it goes into the same chunk of the next average, once this one is committed."""
        average = self._averages.get((header["round"], header["attempt"]))
        if average is None or site not in average["members"]:
            self.answer(identity, {"type": "reply", "re": header["id"], "error": "this attempt is over"})
            return
        index, (blocks, rest) = header["index"], divmod(len(payload), FORMATS[average["wire"]].block_bytes)
        parts = average["chunks"].setdefault(index, {})
        if rest or not blocks or any(len(data) != len(payload) for _, _, data in parts.values()):
            self.answer(identity, {"type": "reply", "re": header["id"], "error": "a chunk of another size than it should be"})
            return
        parts[site] = (identity, header["id"], torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        if len(parts) == len(average["members"]):
            summed, scratch = torch.empty(len(payload), dtype=torch.uint8), [torch.empty(blocks * BLOCK) for _ in range(2)]
            ordered = [parts[member][2] for member in average["members"]]
            left = add_up(average["wire"], ordered, summed, scratch, self._left.get(index))
            average["left"] |= {} if left is None else {index: left.bfloat16()}
            total = summed.numpy().data
            average["hashed"].update(total)  # each member's chunks come in order, so they are complete in order
            average["summed"] += 1
            if average["summed"] == header["of"]:  # told before the last answer goes out, so before any vote
                whole = average["hashed"].hexdigest()
                self.inbox.put((site, identity, {"type": "summed", "attempt": header["attempt"], "digest": whole}, b""))
            for member_identity, request, _ in parts.values():
                self.answer(member_identity, {"type": "reply", "re": request}, total)
            del average["chunks"][index]

    def close(self) -> None:
        if not self._closing.is_set():
            self._auth.stop()
        super().close()


class AllowList:
    """Says to the authenticator which keys may talk to us: those of `names` in the folder, looked up again every second (files
    that are as they were are not read again). Tells of each refused key once."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = folder, names
        self.refused: set[str] = set()
        self.sites = {read_key(folder, name, secret=False)[0].decode(): name for name in names}
        self._looked, self._files = time.monotonic(), None

    def site_of(self, z85: str | None) -> str | None:
        return self.sites.get(z85)

    def refresh(self) -> list[str]:
        """Sites whose key has gone since, or is another now."""
        if time.monotonic() - self._looked < 1.0:
            return []
        self._looked, found = time.monotonic(), {}
        with os.scandir(self.folder) as there:
            files = {(f.name, (s := f.stat()).st_mtime_ns, s.st_size, s.st_ino) for f in there if f.name.endswith(".key")}
        if files == self._files:
            return []
        self._files = files
        for name in self.names:
            with contextlib.suppress(BadInput):
                found[read_key(self.folder, name, secret=False)[0].decode()] = name
        revoked = [name for key, name in self.sites.items() if key not in found]
        for name in revoked:
            print(f"coordinator | the key of {name} is revoked", flush=True)
        self.sites = found
        return revoked

    def callback(self, domain: str, key: bytes) -> bool:
        z85 = key.decode()
        if z85 not in self.sites and z85 not in self.refused and len(self.refused) < 1000:
            self.refused.add(z85)
            print(f"coordinator | refused a connection with unknown key {z85[:8]}...", flush=True)
        return z85 in self.sites


def peer_of(fd: int) -> str | None:
    """The address at the other end of an accepted connection; None if it has gone already."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        return str(connection.getpeername()[0])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# A site's end


def dealer(context: zmq.Context, keys: Path, site: str) -> zmq.Socket:
    socket_ = context.socket(zmq.DEALER)
    socket_.curve_publickey, socket_.curve_secretkey = read_key(keys, site, secret=True)
    socket_.curve_serverkey, _ = read_key(keys, "coordinator", secret=False)
    return socket_


class Link(Pump):
    """Connects to the coordinator. Commands arrive in `inbox` as (header, payload).

    `hello` is said with `status` (kept up to date by the main thread) at the start and whenever we are not known.
    """

    def __init__(self, address: str, keys: Path, site: str, heartbeat_s: float, dead_s: float, hello: dict,
                 context: zmq.Context | None = None):  # fmt: skip
        super().__init__("link", context)
        self.address, self.heartbeat_s, self.dead_s = address, heartbeat_s, dead_s
        self.hello, self.status = hello, {}
        self.welcomed, self._parting = False, False
        self._greeted = 0.0
        self._moved: str | None = None
        self._lost_track = False
        self._heard = time.monotonic()
        self._beat = self._heard - heartbeat_s * random.random()  # a thousand sites that start together do not speak at once
        self._replies: dict[int, queue.SimpleQueue] = {}
        self._next_id = 0
        self._lock = threading.Lock()
        self.socket = dealer(self.context, keys, site)
        self._lane: Lane | None = None  # from the first that needs it
        self._new_lane = lambda: Lane(self.address, keys, site, self._arrived, context)
        self._monitor = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        self.socket.connect(f"tcp://{address}")
        self.start()

    def send(self, header: dict, payload=b"") -> None:
        self.post(pack(header, payload))

    def request(self, header: dict, payload=b"", timeout_s: float = 60.0, large: bool = False) -> tuple[dict, memoryview]:
        """Send and wait for the answer. Raises ChannelError after timeout_s, or once the coordinator counts as dead. large: the
        request or its answer is; it takes the lane, and so may overtake what was sent before."""
        return self.ask(header, payload, timeout_s, large)()

    def ask(self, header: dict, payload=b"", timeout_s: float = 60.0, large: bool = False):
        """Send; returns what waits for the answer, as `request` does."""
        with self._lock:
            self._next_id += 1
            number = self._next_id
            box = self._replies[number] = queue.SimpleQueue()
            if large and self._lane is None:
                self._lane = self._new_lane()
        if large:
            self._lane.post(pack(header | {"id": number, "lane_of": self.hello["incarnation"]}, payload))
        else:
            self.send(header | {"id": number}, payload)

        def wait() -> tuple[dict, memoryview]:
            until = time.monotonic() + timeout_s
            try:
                while time.monotonic() < until and self.silent_s() < self.dead_s:
                    with contextlib.suppress(queue.Empty):
                        answer = box.get(timeout=min(0.5, timeout_s))
                        if "error" in answer[0]:
                            raise ChannelError(answer[0]["error"])
                        return answer
                why = f"within {timeout_s:.1f} s" if time.monotonic() >= until else f"and no heartbeat for {self.dead_s:g} s"
                raise ChannelError(f"no answer to {header['type']} from the coordinator at {self.address} {why}")
            finally:
                self._replies.pop(number, None)

        return wait

    def silent_s(self) -> float:
        """Seconds since the coordinator was last heard."""
        return time.monotonic() - self._heard

    def greet(self) -> None:
        """Say hello once more: what we are told does not fit where we stand."""
        self._lost_track = True

    def move(self, address: str) -> None:
        """The coordinator listens elsewhere now."""
        self._moved = address

    def register(self, poller: zmq.Poller) -> None:
        super().register(poller)
        poller.register(self._monitor, zmq.POLLIN)

    def receive(self, frames: list[zmq.Frame]) -> None:
        message = unpack(frames)
        if message is None:
            return
        self._heard = time.monotonic()
        header, payload = message
        if header["type"] == "reply":
            self._arrived(header, payload)
        elif header["type"] == "stranger":
            self._greet()
        elif header["type"] == "welcome" and self.welcomed:
            return
        elif header["type"] != "heartbeat":
            self.inbox.put((header, payload))

    def _arrived(self, header: dict, payload) -> None:
        """An answer, by either way."""
        if box := self._replies.get(header["re"]):
            box.put((header, payload))

    def _greet(self) -> None:
        """Say hello, with where we stand."""
        if time.monotonic() - self._greeted > 0.2 and not self._parting:
            self._greeted = time.monotonic()
            for box in list(self._replies.values()):  # what was asked before has no answer any more
                box.put(({"error": "the connection to the coordinator was made anew"}, b""))
            self._send_now(pack(self.hello | {"status": self.status}))

    def _send_now(self, parts: list) -> None:
        """Send, or leave it when the queue of a link that is down is full."""
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart(parts, zmq.NOBLOCK, copy=False)

    def send_parts(self, parts: list) -> None:
        self._send_now(parts)

    def tick(self, ready: dict) -> None:
        if self._monitor in ready:
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._greet()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH or not self.welcomed:
                sure = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH  # else a tunnel may be open whose far end is not
                why = f"the coordinator at {self.address} does not accept our key" + ("" if sure else ", or is not there")
                self.inbox.put(({"type": "refused", "reason": why, "sure": sure}, b""))
        if self._lost_track and self.welcomed:
            self._lost_track = False
            self._greet()
        if self._moved:
            with contextlib.suppress(zmq.ZMQError):
                self.socket.disconnect(f"tcp://{self.address}")
            self.address, self._moved = self._moved, None
            self.socket.connect(f"tcp://{self.address}")
            with self._lock:
                lane, self._lane = self._lane, None  # the next request opens one to there
            if lane:
                lane.abandon()
        if self.welcomed and not self._parting and time.monotonic() - self._beat >= self.heartbeat_s:
            self._beat = time.monotonic()
            self._send_now(pack({"type": "heartbeat"}))

    def close(self, last_word: dict | None = None) -> None:
        """Send what is queued and a last word, then close. Nothing comes after it: a heartbeat would be that of a stranger, who greets
        when he is told so, and would be taken for one that has come back."""
        if not self._closing.is_set():
            if last_word:
                self._parting = True
                self.send(last_word)
            self.socket.disable_monitor()
            if self._lane:
                self._lane.close()
        super().close()


class Lane(Pump):
    """A site's second connection, for what is large. `arrived(header, payload)` gets the answers."""

    def __init__(self, address: str, keys: Path, site: str, arrived, context: zmq.Context | None = None):
        super().__init__("lane", context)
        self.arrived = arrived
        self.socket = dealer(self.context, keys, site)
        self.socket.connect(f"tcp://{address}")
        self.start()

    def receive(self, frames: list[zmq.Frame]) -> None:
        message = unpack(frames)
        if message and message[0]["type"] == "reply":
            self.arrived(*message)

    def send_parts(self, parts: list) -> None:
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart(parts, zmq.NOBLOCK, copy=False)

    def abandon(self) -> None:
        """Stop without waiting: who waits for an answer has been told that there is none."""
        self._closing.set()
        os.write(self._wake_w, b".")


class ChannelStore(dist.Store):
    """The rendezvous of one process group over the control channel, under a prefix of its own."""

    def __init__(self, link: Link, prefix: str, timeout_s: float):
        super().__init__()
        self.link, self.prefix, self.timeout_s = link, prefix, timeout_s

    def set(self, key: str, value) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.link.request({"type": "set", "key": f"{self.prefix}/{key}"}, data, self.timeout_s)

    def get(self, key: str) -> bytes:
        return self._get([key])[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._get(keys)  # our own time-out: gloo's is that of one connection

    def _get(self, keys: list[str]) -> list[bytes]:
        wanted = [f"{self.prefix}/{key}" for key in keys]
        get = {"type": "get", "keys": wanted, "timeout_s": self.timeout_s}
        header, payload = self.link.request(get, timeout_s=self.timeout_s + 1)
        out, at = [], 0
        for size in header["sizes"]:
            out.append(bytes(payload[at : at + size]))
            at += size
        return out
