"""An archive is accepted whole, or refused with its entry named, also if it can be understood in two ways."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.archives.bundle import SmallFile
from artifact_store.archives.tar import (
    END,
    ArchiveLimits,
    EntryBegin,
    EntryPiece,
    TarReader,
    WholeEntry,
    entry_header,
    padding,
    tar_of_small,
)
from artifact_store.errors import ArtifactStoreError

LIMITS = ArchiveLimits(max_files=5, max_file_bytes=100_000, whole_bytes=1_000)


def read(data: bytes, step: int = 1 << 20, limits: ArchiveLimits = LIMITS) -> dict[str, bytes]:
    reader = TarReader(limits)
    found: dict[str, bytes] = {}
    name = ""
    for start in range(0, len(data), step):
        for item in reader.feed(data[start : start + step]):
            match item:
                case WholeEntry(path, content):
                    found[path] = content
                case EntryBegin(path, _):
                    name, found[path] = path, b""
                case EntryPiece(content):
                    found[name] += content
    reader.close()
    return found


def entry(name: str = "bad", data: bytes = b"abc", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    made.size = len(data)
    for field, value in fields.items():
        setattr(made, field, value)
    return made, data


def archive(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as writer:
        for made, data in entries:
            writer.addfile(made, io.BytesIO(data))
    return out.getvalue()


def raw(
    name: bytes = b"bad", kind: bytes = b"0", size: bytes = b"00000000003\0", body: bytes = b"abc", **more: bytes
) -> bytes:
    """An entry of which every field is the test's own, with a checksum that fits."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = more.get("magic", b"ustar\x0000")
    block[345 : 345 + len(more.get("prefix", b""))] = more.get("prefix", b"")
    block[148:156] = b" " * 8
    block[148:156] = more.get("checksum") or b"%06o\0 " % sum(block)
    return bytes(block) + body + bytes(-len(body) % 512)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    body = b"".join(records)
    return raw(b"pax", kind, b"%011o\0" % len(body), body)


def record(key: bytes, value: bytes) -> bytes:
    text = b" " + key + b"=" + value + b"\n"
    return b"%d" % (len(text) + len(str(len(text) + 2))) + text


GOOD = archive(entry("fine", b"first"))[:1024]  # header and body, without the end

LINK = tarfile.SYMTYPE
FOLDER = tarfile.DIRTYPE
GNU = tarfile.GNU_FORMAT

HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "a symbolic link": (
        archive(entry(type=LINK, linkname="/etc/passwd", data=b"")),
        "invalid-archive",
        "symbolic",
    ),
    "a hard link": (archive(entry(type=tarfile.LNKTYPE, linkname="fine", data=b"")), "invalid-archive", "hard link"),
    "a character device": (archive(entry(type=tarfile.CHRTYPE, data=b"")), "invalid-archive", "character"),
    "a block device": (archive(entry(type=tarfile.BLKTYPE, data=b"")), "invalid-archive", "block device"),
    "a pipe": (archive(entry(type=tarfile.FIFOTYPE, data=b"")), "invalid-archive", "pipe"),
    "an unknown kind": (raw(kind=b"Q") + END, "invalid-archive", "unknown kind"),
    "a sparse file of GNU": (raw(kind=b"S") + END, "invalid-archive", "sparse"),
    "a sparse file by pax": (pax(record(b"GNU.sparse.major", b"1")) + raw() + END, "invalid-archive", "sparse"),
    "another volume": (raw(kind=b"M") + END, "invalid-archive", "volume"),
    "an absolute path": (archive(entry("/etc/passwd")), "invalid-path", "'/etc/passwd'"),
    "a climbing path": (archive(entry("../up")), "invalid-path", "'../up'"),
    "a path that climbs within": (archive(entry("a/../../up")), "invalid-path", "'..'"),
    "a climbing folder": (archive(entry("../up", type=FOLDER, data=b"")), "invalid-path", "'../up/'"),
    "an empty segment": (archive(entry("a//b")), "invalid-path", "empty"),
    "no name": (raw(b"") + END, "invalid-path", "empty"),
    "a control character": (raw(b"a\nb") + END, "invalid-path", "control"),
    "a long name that climbs": (archive(entry("../" + "l" * 300)), "invalid-path", "entry 1"),
    "a GNU long name that climbs": (
        archive(entry("../" + "l" * 300), form=GNU),
        "invalid-path",
        "entry 1",
    ),
    "a name beyond all bounds": (archive(entry("n/" * 600 + "n")), "invalid-path", "1,024"),
    "a decomposed name": (archive(entry("e\u0301")), "invalid-path", "NFC"),
    "a name that is not UTF-8": (raw(b"caf\xe9") + END, "invalid-archive", "UTF-8"),
    "a pax name that is not UTF-8": (pax(record(b"path", b"caf\xe9")) + raw() + END, "invalid-archive", "UTF-8"),
    "names in another charset": (pax(record(b"hdrcharset", b"BINARY")) + raw() + END, "invalid-archive", "hdrcharset"),
    "a path twice": (archive(entry("same"), entry("same")), "duplicate-relative-path", "entry 2, 'same'"),
    "a path twice by ./": (archive(entry("same"), entry("./same")), "duplicate-relative-path", "entry 2"),
    "a pax size that is another": (
        pax(record(b"size", b"2")) + raw() + END,
        "invalid-archive",
        "3 bytes by its header",
    ),
    "a pax size beyond the header": (
        pax(record(b"size", b"512")) + raw() + END,
        "invalid-archive",
        "by its pax header",
    ),
    "a pax size that hides a header": (
        pax(record(b"size", b"1024")) + raw(size=b"00000000000\0", body=b"") + raw(b"hidden") + END,
        "invalid-archive",
        "by its pax header",
    ),
    "two pax sizes": (
        pax(record(b"size", b"3"), record(b"size", b"3")) + raw() + END,
        "invalid-archive",
        "two of them",
    ),
    "a pax size that is no number": (pax(record(b"size", b"-3")) + raw() + END, "invalid-archive", "no number"),
    "a global path": (pax(record(b"path", b"x"), kind=b"g") + raw() + END, "invalid-archive", "global"),
    "a global size": (pax(record(b"size", b"3"), kind=b"g") + raw() + END, "invalid-archive", "global"),
    "two names": (pax(record(b"path", b"x")) * 2 + raw() + END, "invalid-archive", "two long names"),
    "many extension headers": (pax(record(b"mtime", b"1")) * 3 + raw() + END, "invalid-archive", "more than two"),
    "many global headers": (pax(record(b"comment", b"x"), kind=b"g") * 99 + raw() + END, "invalid-archive", "global"),
    "an extension without an entry": (
        pax(record(b"path", b"x")) + END,
        "invalid-archive",
        "ends with an extension header",
    ),
    "a huge extension": (raw(b"pax", b"x", b"00077777777\0", b"") + END, "invalid-archive", "extension header of"),
    "a pax record that is cut": (pax(b"99 path=x\n") + raw() + END, "invalid-archive", "malformed"),
    "a pax record without a length": (pax(b"path=x\n") + raw() + END, "invalid-archive", "malformed"),
    "a negative size": (raw(size=b"\xff" * 12) + END, "invalid-archive", "no size"),
    "a size that is no number": (raw(size=b"0000000000x\0") + END, "invalid-archive", "no size"),
    "a declared bomb": (raw(size=b"\x80" + bytes(6) + b"\xff" * 5) + END, "too-large", "the limit is 100,000"),
    "a file too many": (archive(*(entry(f"f{n}") for n in range(6))), "too-large", "entry 6, 'f5'"),
    "folders without end": (
        archive(*(entry(f"d{n}", type=FOLDER, data=b"") for n in range(6))),
        "too-large",
        "folder too many",
    ),
    "a folder with bytes": (raw(b"folder/", b"5") + END, "invalid-archive", "is a folder"),
    "a wrong checksum": (raw(checksum=b"000000\0 ") + END, "invalid-archive", "checksum"),
    "no tar at all": (b"PK\x03\x04" + bytes(600), "invalid-archive", "not a tar archive"),
    "an unknown form": (raw(magic=b"custom!!") + END, "invalid-archive", "unknown format"),
    "no end": (GOOD, "invalid-archive", "cut off"),
    "half an end": (GOOD + bytes(512), "invalid-archive", "cut off"),
    "nothing": (b"", "invalid-archive", "cut off"),
    "cut in a header": (GOOD + GOOD[:300], "invalid-archive", "cut off"),
    "cut in a body": (archive(entry("large", b"x" * 5_000))[:2_000], "invalid-archive", "cut off"),
    "something behind the end": (GOOD + END + GOOD + END, "invalid-archive", "follow the archive's end"),
    "something behind half an end": (GOOD + bytes(512) + GOOD + END, "invalid-archive", "block of zeros"),
    "zeros for ever": (GOOD + END + bytes(2 << 20), "too-large", "zeros"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("step", [1 << 22, 700])
def test_a_hostile_archive_is_refused_by_name(case: str, step: int) -> None:
    data, problem, said = HOSTILE[case]
    with pytest.raises(ArtifactStoreError) as refused:
        read(data, step)
    assert (refused.value.problem, said in refused.value.detail) == (problem, True), refused.value.detail


HARMLESS: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "ustar": (archive(entry("a"), form=tarfile.USTAR_FORMAT), {"a": b"abc"}),
    "a prefix": (
        archive(entry("p" * 90 + "/" + "n" * 90), form=tarfile.USTAR_FORMAT),
        {"p" * 90 + "/" + "n" * 90: b"abc"},
    ),
    "a GNU long name": (archive(entry("l" * 300), form=GNU), {"l" * 300: b"abc"}),
    "a pax name": (archive(entry("ü" * 200)), {"ü" * 200: b"abc"}),
    "the seventh edition": (raw(b"a", b"\0", magic=bytes(8)) + END, {"a": b"abc"}),
    "a leading ./ and folders": (
        archive(entry("./", type=FOLDER, data=b""), entry("./d", type=FOLDER, data=b""), entry("./d/a")),
        {"d/a": b"abc"},
    ),
    "an old folder": (raw(b"d/", b"\0", b"00000000000\0", b"") + raw(b"d/a") + END, {"d/a": b"abc"}),
    "a comment of git": (pax(record(b"comment", b"c0ffee"), kind=b"g") + raw(b"a") + END, {"a": b"abc"}),
    "a pax size that is the header's": (pax(record(b"size", b"3")) + raw(b"a") + END, {"a": b"abc"}),
    "a binary size": (raw(b"a", size=b"\x80" + bytes(10) + b"\x03") + END, {"a": b"abc"}),
    "a larger file": (archive(entry("large", b"x" * 5_000), entry("a")), {"large": b"x" * 5_000, "a": b"abc"}),
    "an empty file": (archive(entry("empty", b"")), {"empty": b""}),
    "no file": (END, {}),
    "a whole record of zeros": (GOOD + bytes(20 * 512), {"fine": b"first"}),
}


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.parametrize("step", [1 << 22, 700])
def test_a_harmless_archive_is_read(case: str, step: int) -> None:
    data, files = HARMLESS[case]
    assert read(data, step) == files


def test_a_size_that_no_header_can_say_counts_by_pax() -> None:
    size = 9 << 30
    reader = TarReader(ArchiveLimits(5, 1 << 40, 1_000))
    assert reader.feed(entry_header("huge", size) + b"abc") == [EntryBegin("huge", size), EntryPiece(b"abc")]


names = st.lists(st.text("abcäß漢 .", min_size=1, max_size=60), min_size=1, max_size=6).map("/".join)
good_names = names.filter(lambda name: not {".", "..", ""} & set(name.split("/")))


@given(st.dictionaries(good_names, st.binary(max_size=3_000), max_size=5), st.integers(1, 5_000))
def test_what_is_written_is_read_by_us_and_by_others(files: dict[str, bytes], step: int) -> None:
    data = tar_of_small([SmallFile(name, "", content) for name, content in files.items()]) + END
    assert read(data, step) == files
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {m.name: file.read() for m in archive if (file := archive.extractfile(m)) is not None} == files


def test_padding_fills_whole_blocks() -> None:
    assert [len(padding(size)) for size in (0, 1, 511, 512, 513)] == [0, 511, 1, 0, 511]
