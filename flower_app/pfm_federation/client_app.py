"""The ClientApp of the node's own pfm_llm."""

from pfm_llm.flower import client_app

app = client_app.app
