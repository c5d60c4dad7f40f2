"""What integration tests share."""

from tests.support.hub_double.fixture import hub

__all__ = ["hub"]
