"""Ways to damage a safetensors file, each in place and at random."""

from __future__ import annotations

import json
import random


__all__ = [
    "DAMAGES",
    "append",
    "cut_off_the_end",
    "flip_a_bit",
    "forge_the_header",
    "forge_the_length_of_the_header",
    "overwrite_in_the_header",
    "remove_from_the_middle",
]


def flip_a_bit(data: bytearray, generator: random.Random) -> None:
    """Change one bit."""
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def overwrite_in_the_header(data: bytearray, generator: random.Random) -> None:
    """Change one byte of the header or of its length."""
    position = generator.randrange(8 + int.from_bytes(data[:8], "little"))
    data[position] = (data[position] + generator.randrange(1, 256)) % 256


def cut_off_the_end(data: bytearray, generator: random.Random) -> None:
    """Make the file shorter."""
    del data[generator.randrange(len(data)) :]


def append(data: bytearray, generator: random.Random) -> None:
    """Make the file longer."""
    data += bytes(generator.randrange(1, 100))


def remove_from_the_middle(data: bytearray, generator: random.Random) -> None:
    """Take out some bytes."""
    start = generator.randrange(len(data) - 64)
    del data[start : start + generator.randrange(1, 64)]


def forge_the_length_of_the_header(data: bytearray, generator: random.Random) -> None:
    """Say that the header is shorter or longer."""
    length = int.from_bytes(data[:8], "little")
    data[:8] = generator.choice([0, 1, length - 8, length + 8, 10**9, 2**63]).to_bytes(8, "little")


def forge_the_header(data: bytearray, generator: random.Random) -> None:
    """Write a header that is valid JSON and wrong."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = generator.choice([name for name in header if name != "__metadata__" and "norm" not in name])
    twins = [other for other in header if other != name and header[other].get("shape") == header[name]["shape"]]
    twins = [
        other for other in twins if header[other]["dtype"] == header[name]["dtype"] and not name.endswith(".shape")
    ]
    kind = generator.choice(["shape", "dtype", "offset", "rename", "size", "swap", "checksum"])
    if kind == "shape":
        header[name]["shape"] = [1, *header[name]["shape"]]
    elif kind == "dtype":
        header[name]["dtype"] = {"F32": "I32", "U8": "I8", "I64": "F64"}[header[name]["dtype"]]
    elif kind == "offset":
        header[name]["data_offsets"][1] += generator.choice([-4, 4, 10**12])
    elif kind == "rename":
        header[f"{name}x"] = header.pop(name)
    elif kind == "swap" and twins:
        other = generator.choice(twins)
        header[name], header[other] = header[other], header[name]
    elif kind == "size":
        header[name]["shape"] = [2**40, 2**40]
    else:
        del header["__metadata__"]
    text = json.dumps(header).encode()
    data[: 8 + length] = len(text).to_bytes(8, "little") + text


DAMAGES = [
    flip_a_bit,
    overwrite_in_the_header,
    cut_off_the_end,
    append,
    remove_from_the_middle,
    forge_the_length_of_the_header,
    forge_the_header,
]
