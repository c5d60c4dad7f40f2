"""What integration tests share."""

from tests.hub_double.fixture import hub

__all__ = ["hub"]
