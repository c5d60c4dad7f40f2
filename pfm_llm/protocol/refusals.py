"""Why a node refuses a call: the only words about it that leave the node.

This module imports nothing, since also a client of the socket without torch reads it.
"""

from enum import StrEnum


class NodeRefusal(StrEnum):
    """The codes. The text of an error may name users, files and titles; it stays in the node's log.

    A code says what the caller can do about it, and nothing about anybody's data.
    """

    MALFORMED = "malformed"
    """The request breaks its format; mend the caller."""
    VERSION = "version"
    """The caller speaks another version of the protocol; install the same pfm_llm."""
    UNKNOWN_CALL = "unknown_call"
    """There is no such call."""
    TOO_LARGE = "too_large"
    """The request or its answer exceeds the bound on sizes."""
    NOT_READY = "not_ready"
    """The node knows no federation yet, as after a restart; send it `about` with the settings."""
    NOT_ALLOWED = "not_allowed"
    """The node's owner does not allow what was asked; see its site.yaml."""
    AGREEMENT = "agreement"
    """The request belongs to another federation than the one that the node takes part in."""
    DATA = "data"
    """The node's data cannot be used with these settings; its log says why."""
    MODEL = "model"
    """The node cannot build the model of these settings; its log says why."""
    SLOTS = "slots"
    """A slot does not exist on this node."""
    ROUND = "round"
    """Another set of slots was asked in this round before."""
    TOO_FEW = "too_few"
    """A sum would be over fewer users than the owner's minimum."""
    NO_MASKS = "no_masks"
    """The node's owner has not set `masks`, or names fewer than two peers; see its site.yaml."""
    MASKS_REQUIRED = "masks_required"
    """The node's owner lets sums leave under masks alone; set federation.masks."""
    PEERS = "peers"
    """Keys of the round are not signed by a node that this one knows; see masks.peers there."""
    MASKS = "masks"
    """A step of a round under masks that comes out of order, or does not fit the others."""
    STORAGE = "storage"
    """The node cannot read or write its private files; its log says why."""
    FAILED = "failed"
    """Anything else; the node's log says what."""
