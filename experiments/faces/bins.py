"""The test sets of insightface, `lfw.bin`, `cfp_fp.bin`, `agedb_30.bin`: pairs of images in a file.

Such a file is a pickle of (images, same): images[2 i] and images[2 i + 1] are image files, and
same[i] says whether they show one person. Unpickling runs any code that a file asks for. So this
module reads the opcodes alone, and refuses all but those of lists, tuples, bytes and Booleans.
"""

import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from experiments.faces.images import Faces
from experiments.faces.protocol import Pairs

FOLDS = 10


def read_bin(path: Path) -> tuple[Faces, Pairs]:
    """Reads the images and the pairs of a file; splits the pairs in order into ten folds.

    The images are called `lfw.bin/00000` and so on, as if all showed one person: the file names
    nobody.

    Raises:
      ValueError: the file holds anything but bytes and Booleans.
    """
    images, same = parsed(path)
    names = tuple(f"{path.name}/{number:05d}" for number in range(len(images)))

    def read(name: str) -> bytes:
        return images[int(name.rpartition("/")[2])]

    faces = Faces(path, names, np.zeros(len(names), np.int32), (path.name,), read)
    sizes = [len(fold) for fold in np.array_split(np.arange(len(same)), FOLDS)]
    first, second = np.array(names).reshape(-1, 2).T
    return faces, Pairs(first, second, np.array(same), np.repeat(np.arange(FOLDS), sizes))


def parsed(path: Path) -> tuple[list[bytes], list[bool]]:
    """Returns the file's two lists.

    Raises:
      ValueError: the file holds anything but bytes and Booleans.
    """
    expected = f"{path} must be a pickle of (images, same), as lfw.bin is"
    if path.exists() and not path.is_file():
        raise ValueError(f"{expected}; it is no regular file")
    try:
        value = _value(path.read_bytes())
    # Opcodes of a damaged file may pop an empty stack, or append to something that is not a list.
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{expected}: {error}") from error
    match value:
        case [[*images], [*same]] if (
            len(images) == 2 * len(same) > 0
            and all(type(image) is bytes for image in images)
            and all(type(one_person) is bool for one_person in same)
        ):
            return images, same
    raise ValueError(f"{expected}: two lists, of bytes and of half as many Booleans")


def _value(file: bytes) -> Any:
    """Reads the value of a pickle of lists, tuples, bytes and Booleans."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, place in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # bytes, as Python 2 wrote them
                stack.append(argument.encode("latin-1"))
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                marks.append(len(stack))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "TUPLE2":
                second = stack.pop()
                stack.append((stack.pop(), second))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case other:
                raise ValueError(f"it holds something else, {other} at byte {place}")
    return stack.pop()
