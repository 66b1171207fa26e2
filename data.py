"""From text to batches: source -> parquet shards -> token shards -> batch b.

    python data.py prepare configs/demo.yaml      everything the config needs, once; done again only what is missing
    python data.py tokenizer configs/demo.yaml    only up to the tokenizer
    python data.py tokenize configs/demo.yaml     the same as prepare

Sources: `stdlib` is the text of the installed Python's own library (without site-packages and tests): real, always
there, nothing to download. Or a folder with .txt, .md, .py or .parquet files (column `text`). Parquet shards are laid
out as nanochat's are. Tokenizers: `bytes` (256 tokens, 0 separates documents) or `bpe-N`, a byte-level BPE of N tokens
trained on the source. One document in 20, chosen by hash, is held out for validation.

Batch b is the same at every site: a fixed function of b, the seed and the corpus digest. An epoch is a seeded
permutation of all windows of seq_len + 1 tokens; tokens that do not fill a last window are left out (less than one
window a split).
"""

import fcntl
import hashlib
import json
import platform
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import config
from config import BadInput

DOCS_PER_SHARD = 1000
HELD_OUT_ONE_IN = 20
SEPARATOR = "<|bos|>"
TEXT_SUFFIXES = (".txt", ".md", ".py")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "ensurepip"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def documents(source: str):
    """(name, text) of every document of a source, in a fixed order."""
    if source == "stdlib":
        root, files = Path(sysconfig.get_paths()["stdlib"]), stdlib_files()
    else:
        root = Path(source)
        if not root.is_dir():
            raise BadInput(f"data.source={source!r} is neither `stdlib` nor a folder; give a folder with "
                           f"{', '.join(TEXT_SUFFIXES)} or .parquet files")  # fmt: skip
        files = sorted(p for p in root.rglob("*") if p.suffix in (*TEXT_SUFFIXES, ".parquet"))
    for path in files:
        if path.suffix == ".parquet":
            try:
                texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
            except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError) as error:
                raise BadInput(f"{path} cannot be read as parquet with a column `text` ({str(error).splitlines()[0]})") from None
            for i, text in enumerate(texts):
                yield f"{path.relative_to(root)}:{i}", text
        else:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a handful of test-like files in other encodings
            if text.strip():
                yield str(path.relative_to(root)), text


def held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def corpus_dir(cfg) -> Path:
    """Where a source's shards live; the stdlib differs from Python to Python."""
    source = cfg.data.source
    label = f"stdlib-{platform.python_version()}" if source == "stdlib" else Path(source).name
    where = "" if source == "stdlib" else "-" + hashlib.sha256(str(Path(source).resolve()).encode()).hexdigest()[:8]
    return Path(cfg.data.dir) / (label + where)


@contextmanager
def locked(folder: Path):
    """One process prepares, the others wait and find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text_shards(cfg) -> Path:
    """The source as parquet shards (column `text`), train_*.parquet and val_*.parquet."""
    folder = corpus_dir(cfg) / "text"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name, text in documents(cfg.data.source):
        splits["val" if held_out(name) else "train"].append(text)
    if not all(splits.values()):
        counts = ", ".join(f"{k} {len(v)}" for k, v in splits.items())
        raise BadInput(f"data.source={cfg.data.source}: too few documents ({counts}); at least about 40 are needed")
    for split, texts in splits.items():
        for i in range(0, len(texts), DOCS_PER_SHARD):
            table = pa.table({"text": texts[i : i + DOCS_PER_SHARD]})
            pq.write_table(table, folder / f"{split}_{i // DOCS_PER_SHARD:05d}.parquet")
    (folder / "done").touch()
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


class Bytes:
    """One token a byte; 0, which text does not contain, separates documents."""

    vocab, separator, digest = 256, 0, "bytes"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.replace("\0", "").encode(), np.uint8).astype(np.uint16) for t in texts]

    def token_bytes(self) -> np.ndarray:
        return np.array([0] + [1] * 255, np.int32)


class BPE:
    """Byte-level BPE of the `tokenizers` library, kept as its own tokenizer.json."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self.vocab = self._tokenizer.get_vocab_size()
        self.separator = self._tokenizer.token_to_id(SEPARATOR)
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.uint16) for e in self._tokenizer.encode_batch(texts)]

    def token_bytes(self) -> np.ndarray:
        from tokenizers.pre_tokenizers import ByteLevel

        assert len(ByteLevel.alphabet()) == 256  # one character a byte, so a token's length is its bytes
        return np.array([0 if i == self.separator else len(self._tokenizer.id_to_token(i)) for i in range(self.vocab)], np.int32)


def bpe_size(name: str) -> int:
    try:
        size = int(name.removeprefix("bpe-"))
    except ValueError:
        size = 0
    if not name.startswith("bpe-") or not 300 <= size <= 65536:
        raise BadInput(f"data.tokenizer={name!r} is neither `bytes` nor `bpe-N` with N from 300 to 65536")
    return size


def make_tokenizer(cfg) -> "Bytes | BPE":
    name = cfg.data.tokenizer
    if name == "bytes":
        return Bytes()
    size, path = bpe_size(name), corpus_dir(cfg) / f"{name}.json"
    if not path.exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        text = write_text_shards(cfg)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[SEPARATOR], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
        shards = sorted(text.glob("train_*.parquet"))
        tokenizer.train_from_iterator((t for s in shards for t in pq.read_table(s)["text"].to_pylist()), trainer)
        tokenizer.save(str(path))
    return BPE(path)


# ---------------------------------------------------------------------------------------------------------------------
# Token shards


def prepare(cfg) -> Path:
    """Everything up to the token shards; returns their folder. Idempotent, safe to call from several processes."""
    corpus = corpus_dir(cfg)
    with locked(corpus):
        folder = corpus / f"tokens-{cfg.data.tokenizer}"
        if (folder / "meta.json").exists():
            return folder
        text, tokenizer = write_text_shards(cfg), make_tokenizer(cfg)
        folder.mkdir(exist_ok=True)
        shards, hashes = [], hashlib.sha256()
        for path in sorted(text.glob("*.parquet")):
            pieces = []
            for tokens in tokenizer.encode(pq.read_table(path)["text"].to_pylist()):
                pieces += [np.array([tokenizer.separator], np.uint16), tokens]
            flat = np.concatenate(pieces)
            out = folder / path.with_suffix(".bin").name
            flat.tofile(out)
            hashes.update(hashlib.sha256(flat.tobytes()).digest())
            shards.append({"file": out.name, "tokens": len(flat)})
        meta = {"source": cfg.data.source, "tokenizer": cfg.data.tokenizer, "tokenizer_digest": tokenizer.digest,
                "vocab": tokenizer.vocab, "token_bytes": tokenizer.token_bytes().tolist(),
                "corpus_digest": hashes.hexdigest()[:16], "shards": shards}  # fmt: skip
        tmp = folder / "meta.json.tmp"
        tmp.write_text(json.dumps(meta))
        tmp.rename(folder / "meta.json")
    return folder


def split_rows(rows: int, n: int) -> list[tuple[int, int]]:
    """[first, stop) row ranges that cut `rows` into min(n, rows) parts, as even as possible."""
    n = min(n, rows)
    return [(rows * i // n, rows * (i + 1) // n) for i in range(n)]


class Corpus:
    """Memory-mapped token shards of a prepared source, and the batches in them."""

    def __init__(self, cfg):
        folder = prepare(cfg)
        meta = json.loads((folder / "meta.json").read_text())
        self.vocab, self.digest, self.tokenizer_digest = meta["vocab"], meta["corpus_digest"], meta["tokenizer_digest"]
        self.token_bytes = torch.tensor(meta["token_bytes"])
        self.seq_len = cfg.model.seq_len
        self.rows = cfg.data.tokens_per_step // self.seq_len
        self.seed = cfg.seed
        self._shards: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        for shard in meta["shards"]:
            path = folder / shard["file"]
            if not path.exists() or path.stat().st_size != 2 * shard["tokens"]:
                raise BadInput(f"token shard {path} is missing or cut short ({2 * shard['tokens']} bytes expected); "
                               f"remove {folder} and run data.py prepare again")  # fmt: skip
            self._shards[shard["file"].split("_")[0]].append(np.memmap(path, np.uint16, mode="r"))
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

    def _window(self, split: str, index: int) -> np.ndarray:
        """(seq_len + 1,) tokens."""
        before = self._windows[split]
        shard = int(np.searchsorted(before, index, side="right")) - 1
        at = (index - int(before[shard])) * self.seq_len
        return self._shards[split][shard][at : at + self.seq_len + 1]

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
        total = int(self._windows["train"][-1])
        rows = []
        for i in range(b * self.rows + first_row, b * self.rows + first_row + num_rows):
            rows.append(self._window("train", int(self._order(i // total)[i % total])))
        return self._pair(rows)

    def validation(self, tokens: int, rows: int):
        """Batches of at most `rows` rows over the first `tokens` held-out tokens."""
        count = max(1, min(tokens, self.val_tokens) // self.seq_len)
        for i in range(0, count, rows):
            yield self._pair([self._window("val", j) for j in range(i, min(i + rows, count))])

    def _pair(self, rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.from_numpy(np.stack(rows).astype(np.int64))
        return both[:, :-1], both[:, 1:]


def main(argv: list[str]) -> int:
    commands = ("prepare", "tokenizer", "tokenize")
    if not argv or argv[0] not in commands:
        raise BadInput(f"say one of: {', '.join(commands)}, then CONFIG [key=value ...]")
    cfg = config.load(argv[1:])
    if argv[0] == "tokenizer":
        with locked(corpus_dir(cfg)):
            tokenizer = make_tokenizer(cfg)
        print(f"{cfg.data.tokenizer}: {tokenizer.vocab} tokens, digest {tokenizer.digest}")
        return 0
    corpus = Corpus(cfg)
    print(f"{corpus_dir(cfg)}: {corpus.train_tokens:,} training and {corpus.val_tokens:,} validation tokens, "
          f"vocabulary {corpus.vocab}, corpus digest {corpus.digest}", file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    config.command(main)
