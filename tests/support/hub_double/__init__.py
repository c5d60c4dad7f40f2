"""A double of the Hugging Face Hub that speaks its HTTP, for the real client to talk to.

`HubDouble` is the server. The fixture ``hub``, which every test below ``tests/integration`` has,
starts one and lets the client in this process talk to it; elsewhere, a ``conftest.py`` with
``from tests.support.hub_double.fixture import hub`` and ``__all__ = ["hub"]`` brings it.
"""

from tests.support.hub_double.server import OTHER_TOKEN, OWNER, READ_TOKEN, WRITE_TOKEN, HubDouble

__all__ = ["OTHER_TOKEN", "OWNER", "READ_TOKEN", "WRITE_TOKEN", "HubDouble"]
