"""From text to batches: source -> text shards (parquet) -> token shards (uint16) -> batch b.

    python data.py prepare configs/demo.yaml      everything the config needs, once; done again only what is missing
    python data.py download my.yaml               only the parquet files of an hf:// source
    python data.py tokenizer my.yaml              only up to the tokenizer
    python data.py tokenize my.yaml               from the text that is there to token shards, and checks them

Stopped at any moment, each goes on where it was when called again: what is not finished has a temporary name.

Sources: `stdlib` is the text of the installed Python's own library (without site-packages and tests): real, always
there, nothing to download. A folder with .parquet files (column `text`), which are read in place; a folder without
any, whose .txt, .md and .py files are packed into parquet. Or `hf://OWNER/DATASET`, a Hugging Face dataset of parquet
files such as nanochat's karpathy/fineweb-edu-100b-shuffle; HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are obeyed, and
nothing but `download` and `prepare` ever goes to the network.

Tokenizers: `bytes` (256 tokens, 0 separates documents), `bpe-N`, a byte-level BPE of N tokens trained on the first
data.tokenizer_chars characters of the training text, or the path of a byte-level tokenizer.json.

Held out for validation is the last file of a Hugging Face dataset or of a folder of more than 20 parquet files,
otherwise one document in 20, chosen by hash.

    data/SOURCE/text/*.parquet              packed text (stdlib, text files), or the dataset's files as on the hub
    data/SOURCE/files.json                  hub only: the commit, and name and size of its parquet files
    data/SOURCE/bpe-N.json                  the tokenizer                           } of a hub source in a folder
    data/SOURCE/tokens-TOKENIZER/*.bin      token shards                            } shards-N each: another number
      .../*.json, meta.json                 facts of one shard, and of them all     } of files is another corpus
      .../verified.json                     shards of a large corpus that were found good, by size and time

Costs: `download` some 100 MB a file of nanochat's FineWeb-EDU; `tokenizer` about 5 MB of text a second on 2 cores;
`tokenize` a second of one core for 3 MB of text (`bytes`: for 35 MB), 2 bytes of disk a token, and a few hundred MB of
memory a worker, as it holds a thousand documents, never a shard. The text may be removed once the tokens are there.
At every start a corpus below 2 GB is read and checked, of a larger one only the sizes and times of its files, after the
first time.

Batch b is the same at every site: a fixed function of b, the seed and the corpus digest. An epoch is a seeded
permutation of all windows of seq_len + 1 tokens; tokens that do not fill a last window are left out (less than one
window a shard). It takes 8 bytes a window in memory (12e9 tokens at seq_len 2048: 47 MB).
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from blake3 import blake3

import config
from config import BadInput

DOCS_PER_SHARD = 1000
DOCS_PER_READ = 1000
HELD_OUT_ONE_IN = 20
LAST_HELD_OUT_ABOVE = 20  # parquet files of a folder
TEXT_SUFFIXES = (".txt", ".md", ".py")
SEPARATOR = "<|bos|>"
SEPARATORS = (SEPARATOR, "<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>")  # what a tokenizer.json may call it
MAX_VOCAB = 2**16  # token shards are uint16
DOWNLOADS = 8  # files at once
TEXT_BYTES_PER_WORKER = 2**26  # a process takes seconds to start: not worth it for less
HASHED_AT_EVERY_START_BYTES = 2 * 10**9
FORMAT = 2  # of meta.json; what has another one is made again


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value))
    tmp.rename(path)


@contextmanager
def locked(folder: Path):
    """One process prepares, the others wait and find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Progress:
    """A line every ten seconds with the rate so far, and one at the end; quietly: not of what is over before."""

    EVERY_S = 10.0

    def __init__(self, what: str, total: int, quietly: bool = False):
        self.what, self.total, self.quietly, self.done, self.amounts = what, total, quietly, 0, {}
        self.start_s = self.said_s = time.monotonic()

    def add(self, **amounts: float) -> None:
        """One more file is done; amounts by unit."""
        self.done += 1
        for unit, amount in amounts.items():
            self.amounts[unit] = self.amounts.get(unit, 0) + amount
        last = self.done == self.total and not (self.quietly and self.said_s == self.start_s)
        if last or time.monotonic() - self.said_s > self.EVERY_S:
            self.said_s = time.monotonic()
            took_s = max(self.said_s - self.start_s, 1e-9)
            sums = ", ".join(f"{v:,.0f} {u} ({v / took_s:,.0f}/s)" if u == "tokens" else f"{v:,.1f} {u} ({v / took_s:,.1f}/s)"
                             for u, v in self.amounts.items())  # fmt: skip
            say(f"{self.what} {self.done}/{self.total} files: {sums} in {took_s:,.1f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class TextShard:
    """A parquet file with a column `text`. `split` is train or val; None: one document in 20, by hash, is val."""

    path: Path
    name: str  # of its token shards
    split: str | None

    def documents(self) -> Iterator[tuple[int, list[str]]]:
        """(number of the first, texts), a thousand documents at a time."""
        try:
            with pq.ParquetFile(self.path) as file:
                kind, first = file.schema_arrow.field("text").type, 0
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise pa.ArrowInvalid(f"column `text` is {kind}")
                for batch in file.iter_batches(DOCS_PER_READ, columns=["text"]):
                    yield first, [text or "" for text in batch.column(0).to_pylist()]
                    first += len(batch)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise BadInput(f"{self.path} cannot be read as parquet with a column `text` ({str(error).splitlines()[0]}); "
                           "remove it and fetch it again")  # fmt: skip


def hub_dataset(cfg) -> str | None:
    """OWNER/DATASET of an hf:// source."""
    source = cfg.data.source
    if not source.startswith("hf://"):
        return None
    name = source.removeprefix("hf://")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadInput(f"data.source={source!r} must be hf://OWNER/DATASET, e.g. hf://karpathy/fineweb-edu-100b-shuffle")
    return name


def source_dir(cfg) -> Path:
    """Where a source's text lives; the stdlib differs from Python to Python."""
    source = cfg.data.source
    if dataset := hub_dataset(cfg):
        label = dataset.replace("/", "--") + (f"@{quote(cfg.data.revision, safe='')}" if cfg.data.revision else "")
    elif source == "stdlib":
        label = f"stdlib-{platform.python_version()}"
    else:
        label = f"{Path(source).name}-{hashlib.sha256(str(Path(source).resolve()).encode()).hexdigest()[:8]}"
    return Path(cfg.data.dir) / label


def corpus_dir(cfg) -> Path:
    """Where tokenizers and token shards live: a hub source is as many corpora as numbers of files are asked of it."""
    return source_dir(cfg) / f"shards-{cfg.data.shards or 'all'}" if hub_dataset(cfg) else source_dir(cfg)


def text_shards(cfg) -> list[TextShard]:
    """The text of a source; packs text files first, downloads nothing."""
    if hub_dataset(cfg):
        return hub_shards(cfg)
    if cfg.data.source != "stdlib":
        root = Path(cfg.data.source)
        if not root.is_dir():
            raise BadInput(f"data.source={cfg.data.source!r} is neither `stdlib` nor a folder nor hf://OWNER/DATASET; give a folder "
                           f"with .parquet files, or with {', '.join(TEXT_SUFFIXES)}")  # fmt: skip
        if files := sorted(root.rglob("*.parquet")):
            names = [str(path.relative_to(root)) for path in files]
            return in_place(root, names, last_held_out=len(files) > LAST_HELD_OUT_ABOVE)
    packed = sorted(pack_text(cfg).glob("*.parquet"))
    return [TextShard(p, p.stem.split("_")[1], p.stem.split("_")[0]) for p in packed]


def in_place(root: Path, names: list[str], last_held_out: bool) -> list[TextShard]:
    splits = ["train"] * (len(names) - 1) + ["val"] if last_held_out else [None] * len(names)
    return [TextShard(root / name, quote(name.removesuffix(".parquet"), safe=""), split) for name, split in zip(names, splits)]


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "ensurepip"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def documents(source: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every text file of a source, in a fixed order."""
    if source == "stdlib":
        root, files = Path(sysconfig.get_paths()["stdlib"]), stdlib_files()
    else:
        root = Path(source)
        files = sorted(p for p in root.rglob("*") if p.suffix in TEXT_SUFFIXES)
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of test-like files in other encodings
        if text.strip():
            yield str(path.relative_to(root)), text


def held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def pack_text(cfg) -> Path:
    """Text files as parquet shards (column `text`), train_*.parquet and val_*.parquet."""
    folder = source_dir(cfg) / "text"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name, text in documents(cfg.data.source):
        splits["val" if held_out(name) else "train"].append(text)
    if not all(splits.values()):
        counts = ", ".join(f"{k} {len(v)}" for k, v in splits.items())
        raise BadInput(f"data.source={cfg.data.source}: too few documents ({counts}); at least about 40 are needed")
    folder.mkdir(parents=True)
    for split, texts in splits.items():
        for i in range(0, len(texts), DOCS_PER_SHARD):
            table = pa.table({"text": texts[i : i + DOCS_PER_SHARD]})
            pq.write_table(table, folder / f"{split}_{i // DOCS_PER_SHARD:05d}.parquet")
    (folder / "done").touch()
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face datasets


def chosen_files(cfg, files: dict[str, int]) -> list[str]:
    """The first data.shards - 1 files and the last one, which nanochat holds out."""
    names, count = sorted(files), cfg.data.shards or len(files)
    if count > len(names):
        raise BadInput(f"data.shards={count} exceeds the {len(names)} parquet files of {cfg.data.source}; lower it")
    return names[: count - 1] + names[-1:]


def missing_files(cfg, files: dict[str, int]) -> list[str]:
    text = source_dir(cfg) / "text"
    return [n for n in chosen_files(cfg, files) if not (text / n).is_file() or (text / n).stat().st_size != files[n]]


def hub_shards(cfg) -> list[TextShard]:
    listing = source_dir(cfg) / "files.json"
    files = json.loads(listing.read_text())["files"] if listing.exists() else {}
    if not files or (missing := missing_files(cfg, files)):
        what = f"{len(missing)} files, {missing[0]} first," if files else "its files"
        raise BadInput(f"data.source={cfg.data.source}: {what} are not in {source_dir(cfg) / 'text'}; run data.py download CONFIG")
    names = chosen_files(cfg, files)
    return in_place(source_dir(cfg) / "text", names, last_held_out=len(names) > 1)


def download(cfg) -> None:
    """The parquet files that data.shards asks for, several at a time, all of the commit that the first call found."""
    if not (dataset := hub_dataset(cfg)):
        raise BadInput(f"data.source={cfg.data.source} is not on the Hugging Face hub; only hf://OWNER/DATASET is downloaded")
    from huggingface_hub import HfApi, RepoFile, errors, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()
    root, listing = source_dir(cfg), source_dir(cfg) / "files.json"
    with locked(root):
        try:
            if not listing.exists():
                api = HfApi()
                commit = api.dataset_info(dataset, revision=cfg.data.revision).sha
                tree = api.list_repo_tree(dataset, recursive=True, revision=commit, repo_type="dataset")
                files = {f.path: f.size for f in tree if isinstance(f, RepoFile) and f.path.endswith(".parquet")}
                if not files:
                    raise BadInput(f"data.source={cfg.data.source} at {commit} has no parquet files; name a dataset that has")
                write_json(listing, {"commit": commit, "files": files})
            known = json.loads(listing.read_text())
            commit, files = known["commit"], known["files"]
            missing = missing_files(cfg, files)
            need, free = sum(files[n] for n in missing), shutil.disk_usage(root).free
            say(f"{cfg.data.source} at {commit}: {len(chosen_files(cfg, files))} of {len(files)} files, "
                f"{len(missing)} to download, {need / 1e9:,.2f} GB, to {root / 'text'}")  # fmt: skip
            if need > free:
                raise BadInput(f"{root}: the download needs {need / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; "
                               "free space, lower data.shards or set data.dir")  # fmt: skip
            for left in root.glob("text/.cache/huggingface/download/**/*.incomplete"):
                left.unlink()  # of a download that was killed: the library starts such a file again

            def fetch(name: str) -> str:
                hf_hub_download(dataset, name, repo_type="dataset", revision=commit, local_dir=root / "text")
                return name

            progress = Progress("downloaded", len(missing))
            with ThreadPoolExecutor(DOWNLOADS) as pool, dropping_the_rest(pool):
                for done in as_completed([pool.submit(fetch, name) for name in missing]):
                    progress.add(MB=files[done.result()] / 1e6)
        except (errors.HTTPError, errors.HFValidationError, errors.XetDownloadError, OSError, RuntimeError) as error:
            raise BadInput(f"data.source={cfg.data.source}: {remedy(error, cfg)}") from None
    if wrong := missing_files(cfg, files):
        raise BadInput(f"{root / 'text' / wrong[0]} has not the {files[wrong[0]]} bytes of commit {commit}; remove it and run again")


def remedy(error: Exception, cfg) -> str:
    """What a user can do about an error of the hub."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {cfg.data.dir}; free some or set data.dir, then run the same command again"
    if isinstance(error, errors.GatedRepoError):
        return "access is restricted; accept its terms on its page and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no data.revision={cfg.data.revision}; give one of its branches, tags or commits, or null for main"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return f"a listed file is not there any more; remove {source_dir(cfg) / 'files.json'} and run the same command again"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)) or status == 404:
        return "no such dataset, or a private one; check the name, or set HF_TOKEN to a token that may read it"
    if status in (401, 403):
        return f"the hub answers {status}; set HF_TOKEN to a token that is valid and may read it"
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return (f"{constants.ENDPOINT} failed ({reason[0]}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then run the "
            "same command again: what is there stays")  # fmt: skip


@contextmanager
def dropping_the_rest(pool: ThreadPoolExecutor | ProcessPoolExecutor):
    """The first failure, or Ctrl-C at any moment, drops what has not begun and stops processes."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


class Bytes:
    """One token a byte; 0, which text does not contain, separates documents."""

    vocab, separator, digest = 256, 0, "bytes"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.replace("\0", "").encode(), np.uint8).astype(np.uint16) for t in texts]

    def decode(self, ids: list[int]) -> str:
        """Text without separators; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i != self.separator).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([0] + [1] * 255, np.int32)


class BPE:
    """Byte-level BPE of the `tokenizers` library, from a tokenizer.json."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise BadInput(f"data.tokenizer: {path} cannot be read as a tokenizer.json ({str(error).splitlines()[0]})")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # a document that spells <|bos|> does not end there
        ids = self._tokenizer.get_vocab()
        self.vocab, self.digest = max(ids.values()) + 1, file_digest(path)
        if self.vocab > MAX_VOCAB:
            raise BadInput(f"data.tokenizer: {path} has {self.vocab} tokens; at most {MAX_VOCAB} fit a uint16 shard")
        if not (names := [s for s in SEPARATORS if s in ids]):
            raise BadInput(f"data.tokenizer: {path} has none of {', '.join(SEPARATORS)} to separate documents; add one")
        self.separator = ids[names[0]]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, np.uint16) for e in encodings]

    def decode(self, ids: list[int]) -> str:
        """Text without separators and other special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """(vocab,) int32: length of each token's text; 0 for special tokens."""
        from tokenizers.pre_tokenizers import ByteLevel

        alphabet, sizes = set(ByteLevel.alphabet()), np.zeros(self.vocab, np.int32)  # one character a byte
        added = self._tokenizer.get_added_tokens_decoder()
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(token.encode())
            elif alphabet.issuperset(token):
                sizes[i] = len(token)
            else:
                raise BadInput(f"data.tokenizer: token {token!r} is not byte-level; only byte-level tokenizers are read")
        return sizes


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def tokenizer_path(cfg) -> Path | None:
    """The tokenizer's file, which for `bpe-N` may still have to be trained; None for `bytes`."""
    name = cfg.data.tokenizer
    if name == "bytes":
        return None
    if (size := re.fullmatch(r"bpe-(\d{1,5})", name)) and 300 <= int(size[1]) <= MAX_VOCAB:
        return corpus_dir(cfg) / f"{name}.json"
    if name.endswith(".json") and Path(name).is_file():
        return Path(name)
    raise BadInput(f"data.tokenizer={name!r} is neither `bytes` nor `bpe-N` with N from 300 to {MAX_VOCAB} nor the path of a "
                   "tokenizer.json")  # fmt: skip


def vocabulary(cfg) -> int:
    """The model's, or the tokenizer's, known from its file, or from its name as long as it is not made."""
    if cfg.model.vocab:
        return cfg.model.vocab
    path, named = tokenizer_path(cfg), re.fullmatch(r"bpe-(\d+)", cfg.data.tokenizer)
    return int(named[1]) if named and not path.exists() else open_tokenizer(path).vocab


def open_tokenizer(path: Path | None) -> Bytes | BPE:
    return Bytes() if path is None else BPE(path)


def make_tokenizer(cfg) -> Bytes | BPE:
    """The config's tokenizer; a `bpe-N` is trained if it is not there yet."""
    path = tokenizer_path(cfg)
    if path is not None and not path.exists():
        train_bpe(cfg, path)
    return open_tokenizer(path)


def train_bpe(cfg, path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size, start_s, chars = int(path.stem.removeprefix("bpe-")), time.monotonic(), 0

    def texts() -> Iterator[list[str]]:
        nonlocal chars
        for shard in text_shards(cfg):
            for first, batch in shard.documents() if shard.split != "val" else ():
                batch = [t for i, t in enumerate(batch, first) if split_of(shard, i) == "train"]
                for i, text in enumerate(batch):
                    batch[i] = text[: cfg.data.tokenizer_chars - chars]
                    chars += len(batch[i])
                yield batch
                if chars >= cfg.data.tokenizer_chars:
                    return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[SEPARATOR], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    if (reached := tokenizer.get_vocab_size()) < size:
        raise BadInput(f"data.tokenizer=bpe-{size}: {chars:,} characters of text give only {reached} tokens; ask for bpe-{reached} or "
                       "less, or give more text (data.source, data.tokenizer_chars)")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    tokenizer.save(str(tmp))
    tmp.rename(path)
    say(f"{path}: {size:,} tokens trained on {chars:,} characters in {time.monotonic() - start_s:,.1f} s")


# ---------------------------------------------------------------------------------------------------------------------
# Token shards


def split_of(shard: TextShard, document: int) -> str:
    return shard.split or ("val" if held_out(f"{shard.name}.parquet:{document}") else "train")


class Part:
    """A token shard being written: SPLIT_NAME.bin, under a temporary name until it is whole."""

    def __init__(self, path: Path):
        self.path, self.tmp = path, path.with_name(path.name + ".tmp")
        self.file, self.tokens, self.highest = open(self.tmp, "wb"), 0, 0
        self.blake3, self.sha256 = blake3(), hashlib.sha256()

    def write(self, tokens: np.ndarray) -> None:
        for take in (self.file.write, self.blake3.update, self.sha256.update):
            take(tokens.data.cast("B"))
        self.tokens, self.highest = self.tokens + len(tokens), max(self.highest, int(tokens.max()))

    def close(self) -> dict:
        self.file.close()
        self.tmp.rename(self.path)
        return {"file": self.path.name, "tokens": self.tokens, "highest": self.highest,
                "blake3": self.blake3.hexdigest(), "sha256": self.sha256.hexdigest()}  # fmt: skip


def facts_path(shard: TextShard, folder: Path) -> Path:
    return folder / f"{shard.split or 'both'}_{shard.name}.json"


def tokenize_shard(shard: TextShard, folder: Path, tokenizer: Bytes | BPE) -> dict:
    """Token shards of one text shard, each document after a separator; its facts are written last."""
    parts: dict[str, Part] = {}
    text_chars = 0
    for first, texts in shard.documents():
        text_chars += sum(map(len, texts))
        pieces: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        for i, tokens in enumerate(tokenizer.encode(texts), first):
            pieces[split_of(shard, i)] += [np.array([tokenizer.separator], np.uint16), tokens]
        for split, arrays in pieces.items():
            if arrays:
                if split not in parts:
                    parts[split] = Part(folder / f"{split}_{shard.name}.bin")
                parts[split].write(np.concatenate(arrays))
    facts = {"tokenizer": tokenizer.digest, "text_bytes": shard.path.stat().st_size, "text_chars": text_chars,
             "parts": [part.close() for part in parts.values()]}  # fmt: skip
    write_json(facts_path(shard, folder), facts)
    return facts


def begin_worker(path: Path | None) -> None:
    """A tokenizing process has one thread for its work, leaves Ctrl-C to its parent and dies with it."""
    import signal

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global worker_tokenizer
    worker_tokenizer = open_tokenizer(path)


def work(shard: TextShard, folder: Path) -> dict:
    return tokenize_shard(shard, folder, worker_tokenizer)


def facts_of(shard: TextShard, folder: Path, tokenizer: Bytes | BPE) -> dict | None:
    """What is recorded of a text shard that is tokenized, whole, with this tokenizer; else None."""
    path = facts_path(shard, folder)
    facts = json.loads(path.read_text()) if path.exists() else {}
    wanted = {"tokenizer": tokenizer.digest, "text_bytes": shard.path.stat().st_size}
    if facts.items() >= wanted.items() and all(is_whole(folder, part) for part in facts["parts"]):
        return facts
    return None


def is_whole(folder: Path, part: dict) -> bool:
    path = folder / part["file"]
    return path.is_file() and path.stat().st_size == 2 * part["tokens"]


def tokens_dir(cfg) -> Path:
    name = cfg.data.tokenizer
    if name.endswith(".json"):
        name = f"{Path(name).stem}-{hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()[:8]}"
    return corpus_dir(cfg) / f"tokens-{name}"


def tokenize(cfg, quietly: bool = False) -> None:
    """Token shards of all text shards and their meta.json; what is there and whole is not made again."""
    shards, tokenizer, folder = text_shards(cfg), make_tokenizer(cfg), tokens_dir(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    token_bytes = tokenizer.token_bytes().tolist()  # before hours of work: it refuses some tokenizers
    todo = [s for s in shards if facts_of(s, folder, tokenizer) is None]
    progress = Progress("tokenized", len(todo), quietly)
    text_bytes = sum(s.path.stat().st_size for s in todo)
    workers = min(len(todo), cfg.data.workers or min(os.cpu_count(), 1 + text_bytes // TEXT_BYTES_PER_WORKER))
    if workers <= 1:
        for shard in todo:
            report(progress, tokenize_shard(shard, folder, tokenizer))
    else:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads' locks
        with ProcessPoolExecutor(workers, spawn, begin_worker, (tokenizer_path(cfg),)) as pool, dropping_the_rest(pool):
            for done in as_completed([pool.submit(work, s, folder) for s in todo]):
                report(progress, done.result())
    parts = [part for s in shards for part in facts_of(s, folder, tokenizer)["parts"]]
    parts.sort(key=lambda part: part["file"])
    digest = hashlib.sha256(b"".join(bytes.fromhex(part.pop("sha256")) for part in parts)).hexdigest()[:16]
    write_json(folder / "meta.json", {
        "format": FORMAT, "source": cfg.data.source, "tokenizer": cfg.data.tokenizer, "tokenizer_digest": tokenizer.digest,
        "vocab": tokenizer.vocab, "token_bytes": token_bytes, "corpus_digest": digest, "shards": parts,
    })  # fmt: skip


def report(progress: Progress, facts: dict) -> None:
    progress.add(**{"tokens": sum(p["tokens"] for p in facts["parts"]), "M characters": facts["text_chars"] / 1e6})


def read_meta(folder: Path) -> dict | None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text()) if path.exists() else {}
    return meta if meta.get("format") == FORMAT else None


def prepare(cfg) -> Path:
    """Everything up to the token shards; returns their folder. Idempotent, safe to call from several processes."""
    with locked(corpus_dir(cfg)):
        if read_meta(tokens_dir(cfg)) is None:
            tokenize(cfg, quietly=True)
    return tokens_dir(cfg)


def verify(folder: Path, meta: dict) -> None:
    """Raises BadInput for a shard that is not as it was made, or holds ids beyond the vocabulary.

    A corpus below 2 GB is hashed every time (BLAKE3, on all cores); of a larger one only what verified.json, by size and
    time of change, does not know as good.
    """
    path, again = folder / "verified.json", "remove it and run data.py tokenize CONFIG"
    small = 2 * sum(s["tokens"] for s in meta["shards"]) < HASHED_AT_EVERY_START_BYTES
    known = json.loads(path.read_text()) if path.exists() and not small else {}
    before = dict(known)
    for shard in meta["shards"]:
        file, highest = folder / shard["file"], shard["highest"]
        if not is_whole(folder, shard):
            raise BadInput(f"token shard {file} is missing or not {2 * shard['tokens']} bytes long; {again}")
        stamp = [shard["blake3"], file.stat().st_size, file.stat().st_mtime_ns]
        if known.get(shard["file"]) != stamp:
            if blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest() != shard["blake3"]:
                raise BadInput(f"token shard {file} is damaged: its BLAKE3 is not the one in meta.json; {again}")
            highest, known[shard["file"]] = int(np.memmap(file, np.uint16, mode="r").max()), stamp
        if highest >= meta["vocab"]:
            raise BadInput(f"token shard {file} holds id {highest}, the vocabulary ends at {meta['vocab'] - 1}; {again}")
    if not small and known != before:
        write_json(path, known)


def split_rows(rows: int, n: int) -> list[tuple[int, int]]:
    """[first, stop) row ranges that cut `rows` into min(n, rows) parts, as even as possible."""
    n = min(n, rows)
    return [(rows * i // n, rows * (i + 1) // n) for i in range(n)]


class Corpus:
    """Memory-mapped token shards of a prepared source, and the batches in them."""

    def __init__(self, cfg):
        folder, path = prepare(cfg), tokenizer_path(cfg)
        meta = read_meta(folder)
        self.vocab, self.digest, self.tokenizer_digest = meta["vocab"], meta["corpus_digest"], meta["tokenizer_digest"]
        if path is not None and (not path.exists() or file_digest(path) != self.tokenizer_digest):
            raise BadInput(f"data.tokenizer: {path} is not the tokenizer, of digest {self.tokenizer_digest}, that {folder} was made "
                           "with; put that one back, or run data.py tokenize CONFIG")  # fmt: skip
        if cfg.model.vocab not in (None, self.vocab):
            raise BadInput(f"model.vocab={cfg.model.vocab} is not the {self.vocab} tokens of data.tokenizer={cfg.data.tokenizer}; "
                           f"set model.vocab={self.vocab} or null")  # fmt: skip
        with locked(folder):  # of several processes one hashes a large corpus
            verify(folder, meta)
        self.token_bytes = torch.tensor(meta["token_bytes"])
        self.seq_len = cfg.model.seq_len
        self.rows = cfg.data.tokens_per_step // self.seq_len
        self.seed = cfg.seed
        self._shards: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        for shard in meta["shards"]:
            mapped = np.memmap(folder / shard["file"], np.uint16, mode="r")
            self._shards[shard["file"].split("_")[0]].append(mapped.view(np.ndarray))  # whose slices are cheaper
        self._windows = {k: self._count_windows(v) for k, v in self._shards.items()}
        self._orders: dict[int, np.ndarray] = {}
        for split, windows in self._windows.items():
            if windows[-1] < 1:
                raise BadInput(f"{folder}: the {split} split has no window of model.seq_len={self.seq_len} tokens")
        if cfg.data.val_tokens > self.val_tokens:
            raise BadInput(f"data.val_tokens={cfg.data.val_tokens} exceeds the {self.val_tokens} held-out tokens of "
                           f"{cfg.data.source}; lower it")  # fmt: skip

    def _count_windows(self, shards: list[np.ndarray]) -> np.ndarray:
        """Cumulative number of windows up to each shard."""
        return np.cumsum([0] + [(len(s) - 1) // self.seq_len for s in shards])

    @property
    def val_tokens(self) -> int:
        return int(self._windows["val"][-1]) * self.seq_len

    @property
    def train_tokens(self) -> int:
        return int(self._windows["train"][-1]) * self.seq_len

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            words = np.frombuffer(bytes.fromhex(self.digest), np.uint32).tolist()
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch, *words]))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng.permutation(int(self._windows["train"][-1]))
        return self._orders[epoch]

    def batch(self, b: int, first_row: int = 0, num_rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [first_row, first_row + num_rows) of batch b: inputs and targets, each (rows, seq_len) int64."""
        num_rows = self.rows - first_row if num_rows is None else num_rows
        total, first = int(self._windows["train"][-1]), b * self.rows + first_row
        return self._pair("train", [int(self._order(i // total)[i % total]) for i in range(first, first + num_rows)])

    def validation(self, tokens: int, rows: int, rank: int = 0, ranks: int = 1):
        """(counts, (inputs, targets)): a rank's share of the batches of at most `rows` rows over the first `tokens` held-out tokens.
        Ranks get equally many; what would be one too many does not count."""
        count = max(1, min(tokens, self.val_tokens) // self.seq_len)
        batches = [range(i, min(i + rows, count)) for i in range(0, count, rows)]
        for i in range(rank, -(-len(batches) // ranks) * ranks, ranks):
            yield i < len(batches), self._pair("val", batches[min(i, len(batches) - 1)])

    def _pair(self, split: str, windows: list[int] | range) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of windows of a split; each window shares its last token with the next one."""
        before, both = self._windows[split], torch.empty(len(windows), self.seq_len + 1, dtype=torch.int64)
        shards = np.searchsorted(before, windows, side="right") - 1
        for row, window, shard in zip(both.numpy(), windows, shards):
            at = (window - before[shard]) * self.seq_len
            row[:] = self._shards[split][shard][at : at + self.seq_len + 1]
        return both[:, :-1], both[:, 1:]


class Feed:
    """This rank's rows of the batches of a round, on its device: while one is trained the next is read, and on a GPU waits in
    pinned memory."""

    def __init__(self, corpus: Corpus, rank: int, ranks: int, device: torch.device):
        self.corpus, self.rank, self.ranks, self.device = corpus, rank, ranks, device
        self.rows = corpus.rows // ranks
        self._reader, self._ahead = ThreadPoolExecutor(1, "feed"), (None, None)

    def take(self, batch: int, then: list[int], splits: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a batch, each (rows, seq_len) int64; `then`: the one likely to come next, if any.

        splits: inner steps that share the batch. Our part i, of `split_rows`, is our share of part i of the whole
        batch: a step sees the same rows however many ranks there are, if ranks x splits divide the rows."""
        here, ready = self._ahead
        pair = (ready if here == (batch, splits) else self._reader.submit(self._read, batch, splits)).result()
        self._ahead = (None, None)
        if then:
            self._ahead = (then[0], splits), self._reader.submit(self._read, then[0], splits)
        return tuple(t.to(self.device, non_blocking=True) for t in pair)

    def _read(self, batch: int, splits: int) -> tuple[torch.Tensor, ...]:
        parts = split_rows(self.rows, splits)
        ours = [(first * self.ranks + self.rank * (stop - first), stop - first) for first, stop in parts]
        pair = [torch.cat(both) for both in zip(*(self.corpus.batch(batch, first, rows) for first, rows in ours))]
        return tuple(t.contiguous().pin_memory() for t in pair) if self.device.type == "cuda" else tuple(pair)


def main(argv: list[str]) -> int:
    commands = ("prepare", "download", "tokenizer", "tokenize")
    if not argv or argv[0] not in commands:
        raise BadInput(f"say one of: {', '.join(commands)}, then CONFIG [key=value ...]")
    command, cfg = argv[0], config.load(argv[1:])
    try:
        if command == "download" or (command == "prepare" and hub_dataset(cfg)):
            download(cfg)
        if command == "tokenizer":
            with locked(corpus_dir(cfg)):
                tokenizer = make_tokenizer(cfg)
            print(f"{cfg.data.tokenizer}: {tokenizer.vocab} tokens, digest {tokenizer.digest}")
        if command in ("prepare", "tokenize"):
            with locked(corpus_dir(cfg)):
                tokenize(cfg)
            corpus = Corpus(cfg)
            say(f"{tokens_dir(cfg)}: {corpus.train_tokens:,} training and {corpus.val_tokens:,} validation tokens, "
                f"vocabulary {corpus.vocab}, corpus digest {corpus.digest}")  # fmt: skip
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BadInput(f"no space left in data.dir={cfg.data.dir}; free some, then run the same command again: what is done stays")
    return 0


if __name__ == "__main__":
    config.command(main)
