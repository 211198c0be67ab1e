"""A batch cut into pieces that several single-threaded calls share: how large they are.

Owns nothing but that number and its reason. Measured with the article's network on two cores (AVX-512, VNNI, 1 MiB of
L2 each), images/s of a batch of 256 by the size of the pieces:

    images in a piece             8        16        32        64       128
    OpenVINO int8, two streams    15,500   18,200    18,100    16,600   16,700
    onnxruntime float32, two      8,100*    9,000     9,000     –        8,600      (* 4 images)

The intermediates of 16 images fit into a core's caches, those of 128 don't; of 4, calling costs what that saves. It is
no more than that: when others used the machine, all sizes from 16 to 128 lay within 10 % and in no order.
"""

from __future__ import annotations

LARGEST = 16


def pieces(images: int, threads: int) -> list[slice]:
    """The slices of a batch, in order: at least one for each thread where there are as many images, none larger than
    `LARGEST`.
    """
    size = min(LARGEST, -(-images // threads))
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


def piece_slices(threads: int) -> str:
    """The slices of `x`, as an expression of Python."""
    size = f"min({LARGEST}, -(-len(x) // {threads}))"
    return f"[slice(n, min(n + {size}, len(x))) for n in range(0, len(x), {size})]"


def piece_lines(threads: int) -> list[str]:
    """Lines of Python that cut `x` so, into `pieces`."""
    return [f"pieces = [x[part] for part in {piece_slices(threads)}]"]
