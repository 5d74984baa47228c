"""What `doctor` finds in a set of recordings: rates, lengths, what is silent or broken, and what transcripts hold."""

import io
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ssl_lab.cli.machine import Finding
from ssl_lab.data import tokenizer as tokenizers
from ssl_lab.data.audio_decode import decode_audio
from ssl_lab.data.decode import Unreadable
from ssl_lab.data.medium import AUDIO
from ssl_lab.data.pairs_table import PairTable, open_pairs
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.errors import UserError

_LOOKED_AT = 400  # clips of a split that are decoded, evenly spread
_READ = 4096  # rows whose transcripts are looked at together
_FRAME = 0.04  # seconds of a token of a Conformer
_RARE = 3  # a character in fewer transcripts than this is listed


@dataclass
class _Seen:
    """What was found in the clips of a split."""

    rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)


def sound(path: str, tokenizer: str | None = None) -> list[Finding]:
    """One line for each thing that is to be known of the recordings at `path`; see `Clips` for what that may be.

    Args:
        path: of the set.
        tokenizer: of the transcripts, or a run folder that holds one; None = only their characters are listed.

    Raises:
        UserError: there are no recordings, soundfile is not installed, or there is no such tokenizer.
    """
    known = None if tokenizer is None else tokenizers.load(tokenizer)
    found: list[Finding] = []
    for split in ("train", "test"):
        try:
            table = open_pairs(path, split, medium=AUDIO, optional=True)
        except UserError:
            if split == "train":
                raise
            continue
        found += _clips(f"{path}, {split}", table)
        found += _transcripts(f"{path}, {split}", table, known)
    return found


def _clips(name: str, table: PairTable) -> list[Finding]:
    step = max(1, -(-len(table) // _LOOKED_AT))
    rows, seen = list(range(0, len(table), step)), _Seen()
    for row in rows:
        _look(table, row, seen)
    of = f"{len(rows):,} of them looked at" if step > 1 else "all looked at"
    told = f"{len(table):,} clips, {len(table.classes)} classes, {of}"
    if not seen.seconds:
        return [Finding(name, told, f"{name}: not one clip can be read, such as {seen.broken[0]}: convert them")]
    lengths = sorted(seen.seconds)
    short = sum(x < 0.2 for x in lengths)
    spread = f"{lengths[0]:.2f} to {lengths[-1]:.2f} s, half of them below {lengths[len(lengths) // 2]:.2f} s"
    return [
        Finding(name, told),
        Finding("  rates", _counted(seen.rates, "Hz"), _mixed(name, seen.rates)),
        Finding("  channels", _counted(seen.channels, "in each")),
        Finding("  lengths", spread + (f"; {short} below 0.2 s, which silence follows" if short else "")),
        _listed("  unreadable", seen.broken, f"{name}: unreadable clips are replaced by others: mend or remove them"),
        _listed("  silent", seen.silent, f"{name}: clips without any sound teach silence: remove them if they are not"),
        _listed(
            "  too dense",
            seen.dense,
            f"{name}: transcripts with more letters than frames of {_FRAME * 1000:g} ms teach CTC nothing: mend them, "
            "or take data.tokenizer.kind=bpe",
        ),
    ]


def _look(table: PairTable, row: int, seen: _Seen) -> None:
    import soundfile

    (blob,), name = table.blobs([row]), table.name(row)
    try:
        with soundfile.SoundFile(io.BytesIO(blob)) as file:
            rate, channels = file.samplerate, file.channels
        clip = decode_audio(blob, rate)
    except Unreadable as reason:
        seen.broken.append(f"{name} ({reason})")
        return
    except Exception:  # the header is no better than what follows, whose reader knows the reason
        try:
            decode_audio(blob, 16000)
        except Unreadable as reason:
            seen.broken.append(f"{name} ({reason})")
        return
    seen.rates[rate] += 1
    seen.channels[channels] += 1
    seen.seconds.append(len(clip) / rate)
    if clip.min() == clip.max():
        seen.silent.append(name)
    text = next(iter(table.captions([row])[0]), "")
    needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))
    if needed > max(seen.seconds[-1], 0.2) / _FRAME:
        seen.dense.append(f"{name} ({len(text)} letters in {seen.seconds[-1]:.2f} s)")


def _transcripts(name: str, table: PairTable, known: Tokenizer | None) -> list[Finding]:
    if table.texts is None or not table.texts.column_names:
        return []
    characters: Counter[str] = Counter()
    empty, unknown = 0, list[str]()
    for start in range(0, len(table), _READ):
        for own in table.captions(range(start, min(start + _READ, len(table)))):
            text = own[0] if own else ""
            empty += not text.strip()
            characters.update(set(text))
            if known is not None and not _knows(known, text):
                unknown.append(repr(text[:60]))
    rare = sorted(x for x, count in characters.items() if count < _RARE)
    told = f"{len(characters)}: {''.join(sorted(characters))[:120]}"
    told += f"; in few transcripts: {' '.join(map(repr, rare[:10]))}" if rare else ""
    found = [Finding("  characters", told)]
    if empty:
        remedy = f"{name}: {empty:,} rows have no transcript and are left out where transcripts are learned"
        found.append(Finding("  without transcript", f"{empty:,}", remedy))
    if known is not None:
        remedy = (
            f"{name}: a transcript with a character that the tokenizer lacks ends a run before it begins: mend it, or "
            "train a tokenizer on these data"
        )
        found.append(_listed("  unknown to the tokenizer", unknown, remedy))
    return found


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    try:
        ids = tokenizer.encode(text)
    except UserError:
        return False
    return tokenizer.unk is None or tokenizer.unk not in ids


def _counted(counts: Counter[int], unit: str) -> str:
    return ", ".join(f"{value:,} {unit} ({count:,})" for value, count in counts.most_common(4))


def _mixed(name: str, rates: Counter[int]) -> str | None:
    low, high = min(rates), max(rates)
    if high <= 2 * low:
        return None
    return (
        f"{name}: rates from {low:,} to {high:,} Hz: all are resampled to data.sampling_rate, but the slow ones hold "
        "no high frequencies, which a model can tell; choose data.sampling_rate no higher than the lowest"
    )


def _listed(name: str, which: list[str], remedy: str) -> Finding:
    if not which:
        return Finding(name, "none")
    some = "; ".join(itertools.islice(_short(which), 3))
    return Finding(name, f"{len(which):,}: {some}{' ...' if len(which) > 3 else ''}", f"{remedy} ({len(which):,})")


def _short(which: list[str]) -> Iterator[str]:
    return (text if len(text) <= 90 else f"...{text[-87:]}" for text in which)
