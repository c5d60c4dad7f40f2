"""The same for a person's assistant: a server of the Model Context Protocol (MCP)."""

from typing import Annotated, Literal

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from pfm_llm import __version__
from pfm_llm.agent.agent import Suggestion
from pfm_llm.agent.reasons import Explanation
from pfm_llm.agent.web.desk import Desk, Item
from pfm_llm.base.errors import PfmError

_ABOUT = (
    "Recommendations for one person, from their own history, on their own machine. Say the reasons "
    "that explain gives, and no others. Call feedback only with what the person has said."
)
Count = Annotated[int, Field(ge=1, le=50)]
Said = Literal["like", "dislike", "seen", "less_like_this", "not_now"]


def make_mcp(desk: Desk) -> MCPServer:
    """The server of an agent, with the tools recommend, find, explain and feedback."""
    server: MCPServer = MCPServer(
        "pfm-agent", version=__version__, instructions=_ABOUT, log_level="WARNING"
    )
    tools = _Tools(desk)
    for tool in (tools.recommend, tools.find, tools.explain, tools.feedback):
        server.add_tool(tool)
    return server


class _Tools:
    """A tool for each method; its docstring is what an assistant reads of it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def recommend(self, k: Count = 10, where: dict[str, str] | None = None) -> list[Suggestion]:
        """The best items for this person that they do not know yet, the best first.

        ``where`` keeps items whose fields contain texts, such as {"genres": "comedy"}. ``own`` says
        how much the person's own part raises an item's log-probability.
        """
        try:
            return self._desk.agent.recommend(k, where)
        except PfmError as error:
            raise ToolError(str(error)) from error

    def find(self, title: str, k: Count = 5) -> list[Item]:
        """Items whose title is about this one; typos are forgiven. It gives the ids of items."""
        return self._desk.items.search(title, k)

    def explain(self, item_id: str) -> Explanation:
        """Why an item stands where it stands in this person's list. It may take some seconds."""
        try:
            return self._desk.agent.explain(item_id)
        except PfmError as error:
            raise ToolError(str(error)) from error

    def feedback(self, item_id: str, kind: Said) -> bool:
        """Keep what the person said of an item; false: they have paused, and nothing was kept."""
        try:
            return self._desk.agent.feedback(item_id, kind)
        except PfmError as error:
            raise ToolError(str(error)) from error
