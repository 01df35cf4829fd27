"""A stored prefix as a file: a header that says what it is, then the payload. Knows bytes, not folders.

Layout, little-endian: magic 8 bytes, format version u32, CRC-32 u32 (of all that follows), BLAKE2b-256 of the identity,
key 32 bytes, payload length u64, payload. Files are written by us for us in a folder of mode 0700, so the checksum is
there for torn writes and failing disks, not for forgers: CRC-32 reads 3 GB/s where BLAKE2b reads 0.8 GB/s.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

from ocserve.engine.tiers.host import Buffer, size_bytes

_MAGIC = b"ocsrvKV\0"
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_SUBJECT = struct.Struct("<32s32sQ")
HEADER_BYTES = _PREFIX.size + _SUBJECT.size


def identity_hash(identity: bytes) -> bytes:
    """32 bytes that stand for `identity` in headers and, in hexadecimal, as the name of a folder."""
    return hashlib.blake2b(identity, digest_size=32, person=b"ocserve tier 1").digest()


def header(identity: bytes, key: bytes, payload: Buffer) -> bytes:
    """The header for `payload` under `key`; `identity` is an `identity_hash`."""
    subject = _SUBJECT.pack(identity, key, size_bytes(payload))
    return _PREFIX.pack(_MAGIC, _VERSION, _checksum(subject, payload)) + subject


def payload_of(file: memoryview, identity: bytes, key: bytes) -> memoryview | None:
    """The payload of a whole `file`, not copied; None if it is damaged, of another version, or of anything else."""
    if file.nbytes < HEADER_BYTES:
        return None
    magic, version, checksum = _PREFIX.unpack_from(file)
    subject, payload = file[_PREFIX.size : HEADER_BYTES], file[HEADER_BYTES:]
    if (magic, version) != (_MAGIC, _VERSION) or subject != _SUBJECT.pack(identity, key, payload.nbytes):
        return None
    return payload if _checksum(subject, payload) == checksum else None


def _checksum(subject: bytes | memoryview, payload: Buffer) -> int:
    return zlib.crc32(payload, zlib.crc32(subject))
