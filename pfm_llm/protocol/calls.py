"""The calls of a node: four, and five more that are the steps of a round under masks."""

from pfm_llm.protocol import mask_messages as masks
from pfm_llm.protocol import messages
from pfm_llm.protocol.messages import Message

CALLS: dict[str, tuple[type[Message], type[Message]]] = {
    "about": (messages.AboutRequest, messages.AboutReply),
    "train": (messages.TrainRequest, messages.TrainReply),
    "evaluate": (messages.EvaluateRequest, messages.EvaluateReply),
    "forget": (messages.ForgetRequest, messages.ForgetReply),
    "advertise": (masks.AdvertiseRequest, masks.AdvertiseReply),
    "share": (masks.ShareRequest, masks.ShareReply),
    "mask": (masks.MaskRequest, masks.MaskReply),
    "confirm": (masks.ConfirmRequest, masks.ConfirmReply),
    "reveal": (masks.RevealRequest, masks.RevealReply),
}
"""Name of a call to the types of its request and answer."""

OF_THE_OWNER = ("forget",)
"""Calls that only the node's owner may make; no engine passes them on."""
