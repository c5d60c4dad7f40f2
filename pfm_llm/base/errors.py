"""Every error that pfm_llm raises on purpose.

Each message names the thing and the remedy. Scripts print it without a traceback and exit
with ``exit_code``.
"""


class PfmError(Exception):
    """Base of all deliberate errors."""

    exit_code = 2


class ConfigError(PfmError):
    """A config key, value or combination that cannot run."""


class DataError(PfmError):
    """A data source, row or split that cannot be used."""


class AssetError(PfmError):
    """An embedded asset that cannot be fetched, verified or unpacked."""


class StorageError(PfmError):
    """A file that cannot be written or trusted."""


class DiskSpaceError(StorageError):
    """The disk is full; nothing half-written was left behind."""


class CorruptFileError(StorageError):
    """A file whose content does not match its checksum or format."""


class BusyError(PfmError):
    """Files that another process is working on, or a service that takes no more for the moment."""


class AccessError(PfmError):
    """A user whom a host does not know, or knows no more."""


class BackboneError(PfmError):
    """A language model that cannot serve as the backbone."""


class ContractError(PfmError):
    """A client update that breaks the update contract and is refused.

    Attributes:
        reason: The kind of fault in one word, for the public record of a round. It names no client.
    """

    def __init__(self, message: str, reason: str = "contract") -> None:
        super().__init__(message)
        self.reason = reason


class MaskError(PfmError):
    """A round under masks that cannot be trusted, or whose masks cannot be taken off."""


class TrainingError(PfmError):
    """Training that cannot go on, for example on a loss that is not finite."""


class CheckpointError(PfmError):
    """A run that cannot be resumed from its files."""


class ArtefactError(PfmError):
    """A folder that is not a shared adapter, or that does not fit the model or run that uses it."""


class PrivateLeakError(ArtefactError):
    """Something private was found in the files to be published; nothing was sent."""


class HubError(PfmError):
    """The Hub refused a request, or cannot be reached."""


class LaunchError(PfmError):
    """Processes that were started in a way that would silently mislead."""


class NodeRefused(PfmError):
    """A node that refuses a call.

    Attributes:
        code: One of `protocol.refusals.NodeRefusal`. It alone leaves the node; the message stays.
    """

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or f"the node refused the call: {code}")
        self.code = code


class NodeError(PfmError):
    """A node that cannot be reached, or that does not answer as a node does."""
