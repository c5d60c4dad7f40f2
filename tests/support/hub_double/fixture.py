"""The fixture ``hub``: a double, and a client in this process that talks to it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.support.hub_double.server import HubDouble


def talk_to(hub: HubDouble, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, in this process and in those it starts, talk to the double.

    The client keeps at import what the environment said, so both are changed. Nobody is logged
    in. Retries come at once; `HubDouble.waits` has the seconds that the client
    and we meant to wait.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    from pfm_llm.publish.hub import calls

    for variable, text in hub.environ().items():
        patch.setenv(variable, text)
    values: dict[str, object] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_UPDATE_CHECK": True,
        "HF_HOME": str(hub.home),
        "HF_HUB_CACHE": str(hub.home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(hub.home / "hub"),
        "HF_ASSETS_CACHE": str(hub.home / "assets"),
        "HF_TOKEN_PATH": str(hub.home / "token"),
        "HF_STORED_TOKENS_PATH": str(hub.home / "stored_tokens"),
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
    # The functions of the module are methods of this object, which was made at import.
    patch.setattr(hf_api.api, "endpoint", hub.url)
    for module in (_http, file_download, calls):
        patch.setattr(module, "time", SimpleNamespace(sleep=hub.waits.append))


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    """A Hub that the client in this process talks to, and that must know all it is asked."""
    from huggingface_hub import close_session

    with HubDouble() as double:
        with pytest.MonkeyPatch.context() as patch:
            talk_to(double, patch)
            close_session()  # the client's connections, which know the proxies of before
            yield double
        close_session()
    assert double.unknown == [], "the double does not know these requests"
    assert double.errors == [], "the double has failed"
    assert double.faults_left() == [], "these faults were never met"
