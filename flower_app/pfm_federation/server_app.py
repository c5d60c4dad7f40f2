"""The ServerApp of the server's own pfm_llm."""

from pfm_llm.flower import server_app

app = server_app.app
