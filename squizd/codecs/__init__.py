"""What stored bytes mean: the decode contract of the format, without MLX.

One module per codec, chosen by `Encoding.mode`. Knows nothing about files, nor about how values were chosen
(`squizd.quantizers`). Every codec computes in float32; a reader that needs `encoding.dtype` rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from squizd.codecs import affine, microscaling, raw
from squizd.codecs.bits import pack, unpack
from squizd.codecs.raw import to_float32
from squizd.container.layout import Array, Bytes, Encoding, Tensor
from squizd.errors import RequestError

__all__ = ["DECODERS", "decode", "pack", "to_float32", "unpack"]

Decoder = Callable[[Encoding, tuple[int, ...], Bytes, Bytes, Bytes], Array]

DECODERS: Final[dict[str, Decoder]] = {
    "raw": raw.decode,
    "affine": affine.decode,
    "mxfp4": microscaling.decode,
    "mxfp8": microscaling.decode,
    "nvfp4": microscaling.decode,
}


def decode(tensor: Tensor, record: Bytes) -> Array:
    """Decode one tensor of a record.

    Args:
        tensor: what it is, and where its parts lie in the record.
        record: the record's bytes, after the record codec (`squizd.container`).

    Returns:
        `tensor.shape`, float32; integers of a raw encoding stay what they are. May be a read-only view of
        `record`. Codes that stand for NaN, and overflow, come out as NaN and infinity: `squizd validate --deep`
        reports them.

    Raises:
        RequestError: the encoding is not in the registry, the parts' sizes do not follow from encoding and shape,
            or a part lies outside the record. A validated file gives no such tensor.
    """
    encoding, shape = tensor.encoding, tensor.shape
    if not encoding.is_registered() or not shape or min(shape) < 1:
        raise RequestError(f"{tensor.name}: cannot decode {encoding}, shape {shape}")
    sizes = (tensor.codes[1], tensor.scales[1], tensor.biases[1])
    if (encoding.group_size and shape[-1] % encoding.group_size) or sizes != encoding.part_sizes(shape):
        raise RequestError(f"{tensor.name}: parts of {sizes} bytes do not make {encoding}, shape {shape}")
    view = memoryview(record).cast("B")
    for name, offset, size in tensor.parts:
        if offset < 0 or offset + size > view.nbytes:
            raise RequestError(
                f"{tensor.name}: {name} take bytes {offset} to {offset + size} of a record of {view.nbytes}"
            )
    spans = (tensor.codes, tensor.scales, tensor.biases)
    codes, scales, biases = (view[offset : offset + size] for offset, size in spans)
    return DECODERS[encoding.mode](encoding, shape, codes, scales, biases)
