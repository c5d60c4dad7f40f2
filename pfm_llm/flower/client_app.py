"""The ClientApp: each call of `wire.MESSAGE_TYPES` is handed to the node's worker as bytes.

The process imports flwr, numpy and the client of the worker's socket. The owner of the node names
the socket: ``flower-supernode --node-config 'socket="/run/pfm-node/node.sock"'``.
"""

import functools
import logging

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from pfm_llm.base.errors import NodeError, NodeRefused
from pfm_llm.flower import wire
from pfm_llm.node.client import NodeClient
from pfm_llm.protocol.refusals import NodeRefusal

_log = logging.getLogger(__name__)

app = ClientApp()


def answer(call: str, message: Message, context: Context) -> Message:
    """Ask the worker. Flower sends the text of an exception to the server, so none gets out.

    Args:
        call: A key of `wire.MESSAGE_TYPES`.
        message: The request. The worker has as long as the message lives.
        context: Its ``node_config`` has the worker's ``socket``.
    """
    return Message(_answer(call, message, context), reply_to=message)


def _answer(call: str, message: Message, context: Context) -> RecordDict:
    try:
        header, body = wire.unpack(message.content)
        client = NodeClient(_socket_of(context), timeout=message.metadata.ttl)
        return wire.pack(*client.call(call, header, body))
    except NodeRefused as refused:
        _log.warning("%s: refused (%s): %s", call, refused.code, refused)
        return wire.pack_refusal(refused.code)
    except NodeError as error:
        _log.error("%s: %s", call, error)
        return wire.pack_no_worker()
    except Exception:
        _log.exception("%s failed", call)
        return wire.pack_refusal(NodeRefusal.FAILED)


def _socket_of(context: Context) -> str:
    socket = context.node_config.get("socket")
    if not isinstance(socket, str):
        raise NodeError(
            "this SuperNode knows no worker; start it with "
            "--node-config 'socket=\"/path/to/node.sock\"'"
        )
    return socket


def _register(call: str, message_type: str) -> None:
    category, _, action = message_type.partition(".")
    decorator = getattr(app, category)
    (decorator(action) if action else decorator())(functools.partial(answer, call))


for _call, _type in wire.MESSAGE_TYPES.items():
    _register(_call, _type)
