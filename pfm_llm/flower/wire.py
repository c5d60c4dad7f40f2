"""A call to a node, and its answer, as records of Flower's messages.

They carry the bytes of `pfm_llm.protocol.messages` as they are: JSON in a ConfigRecord, safetensors
as the raw data of one Array. Flower cuts an Array into chunks, and sends equal ones once: the
shared state of a round goes to the SuperLink once, however many nodes there are. Nothing is
pickled, and this module imports neither torch nor transformers.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from pfm_llm.base.errors import NodeRefused
from pfm_llm.node.client import MAX_BODY
from pfm_llm.node.frames import MAX_HEADER
from pfm_llm.protocol.refusals import NodeRefusal

MESSAGE_TYPES = {
    "about": "query",
    "train": "train",
    "evaluate": "evaluate",
    "advertise": "query.advertise",
    "share": "query.share",
    "mask": "train.mask",
    "confirm": "query.confirm",
    "reveal": "query.reveal",
}
"""Call to Flower's type of message. The call ``forget`` is for the node's owner alone."""

_RECORD, _BODY = "pfm", "body"
_HEADER, _REFUSED, _NO_WORKER = "header", "refused", "no_worker"
_SERIALISED = "safetensors"


class NoWorker(Exception):
    """The answer of a node whose worker cannot be reached."""


def pack(header: bytes, body: bytes) -> RecordDict:
    """The records of a request, or of an answer to it.

    Args:
        header: JSON.
        body: Tensors as safetensors; empty: none.
    """
    found = RecordDict({_RECORD: ConfigRecord({_HEADER: header})})
    if body:
        array = Array(dtype="uint8", shape=(len(body),), stype=_SERIALISED, data=body)
        found[_BODY] = ArrayRecord({_BODY: array})
    return found


def pack_refusal(code: str) -> RecordDict:
    """The records of a refusal: its code, one of `NodeRefusal`, and no text."""
    return RecordDict({_RECORD: ConfigRecord({_REFUSED: str(code)})})


def pack_no_worker() -> RecordDict:
    """The records of an answer that says that the worker cannot be reached."""
    return RecordDict({_RECORD: ConfigRecord({_NO_WORKER: True})})


def unpack(content: RecordDict, max_body: int = MAX_BODY) -> tuple[bytes, bytes]:
    """Header and body of what arrived.

    Args:
        content: The records of a message.
        max_body: Bound on the body, in bytes.

    Raises:
        NodeRefused: It is a refusal; or it is no request and no answer, or is too large.
        NoWorker: The worker of the node cannot be reached.
    """
    record = content.config_records.get(_RECORD, ConfigRecord())
    if _REFUSED in record:
        raise NodeRefused(_code(record[_REFUSED]))
    if _NO_WORKER in record:
        raise NoWorker
    header, body = record.get(_HEADER), b""
    if _BODY in content.array_records:
        arrays = content.array_records[_BODY]
        if list(arrays) != [_BODY] or arrays[_BODY].stype != _SERIALISED:
            raise NodeRefused(NodeRefusal.MALFORMED, "a body that is not one array of safetensors")
        body = arrays[_BODY].data
    if not isinstance(header, bytes):
        raise NodeRefused(NodeRefusal.MALFORMED, "a message without a header")
    if len(header) > MAX_HEADER or len(body) > max_body:
        raise NodeRefused(
            NodeRefusal.TOO_LARGE, f"{len(header)} + {len(body)} bytes, at most {max_body}"
        )
    return header, body


def _code(value: object) -> str:
    """A code of the list; a newer node may have others."""
    return str(value) if value in list(NodeRefusal) else NodeRefusal.FAILED
