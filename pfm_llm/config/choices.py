"""The values of settings that offer a choice; an unknown name is an error."""

from enum import StrEnum


class Task(StrEnum):
    """The prediction task: the next item, or whether the user likes an item."""

    NEXT_ITEM = "next_item"
    LIKE = "like"


class Regime(StrEnum):
    """How local training and the server divide the work."""

    FEDSGD = "fedsgd"
    FEDAVG = "fedavg"


class SplitKind(StrEnum):
    """How held-out interactions are chosen."""

    LEAVE_LAST_OUT = "leave_last_out"
    LAST_FRACTION = "last_fraction"
    GLOBAL_TEMPORAL = "global_temporal"


class HeldOutSplit(StrEnum):
    """A part of the data that is evaluated and not trained on."""

    VALIDATION = "validation"
    TEST = "test"


class Repeats(StrEnum):
    """Whether repeated interactions of a user with an item are kept."""

    FIRST_ONLY = "first_only"
    ALLOW = "allow"


class ItemIds(StrEnum):
    """Where a learned embedding per item is used.

    With ``codes`` it is used as with ``both``, and is a sum of vectors that items share.
    """

    NONE = "none"
    OUTPUT = "output"
    BOTH = "both"
    CODES = "codes"


class Reading(StrEnum):
    """What the adapted layers read of a history; see `model.items.reader`."""

    TOKENS = "tokens"
    ITEMS = "items"


class Pooling(StrEnum):
    """How the states of a text's tokens become one vector, where the language model encodes it."""

    LAST = "last"
    MEAN = "mean"


class Ablation(StrEnum):
    """What a run does without, to measure what it is worth; see `model.ablation`."""

    NONE = "none"
    NO_PASS = "no_pass"
    ONE_ITEM = "one_item"
    NO_POSITIONS = "no_positions"
    SHUFFLED_TEXTS = "shuffled_texts"
    RANDOM_WEIGHTS = "random_weights"


class Schedule(StrEnum):
    """When the private adapter is trained relative to the shared one."""

    JOINT = "joint"
    ALTERNATE = "alternate"
    PRIVATE_AFTER = "private_after"


class Weighting(StrEnum):
    """How much each client's update counts."""

    UNIFORM = "uniform"
    NUM_EXAMPLES = "num_examples"


class Aggregation(StrEnum):
    """How the server combines the updates of a round; see `server.robust`."""

    MEAN = "mean"
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed_mean"
    FOOLSGOLD = "foolsgold"


class Participation(StrEnum):
    """Who takes part in a round under differential privacy; see `server.privacy`."""

    PASSES = "passes"
    POISSON = "poisson"


class ServerOptimizer(StrEnum):
    """How the server steps with the aggregated update; see `server.step`."""

    AVERAGE = "average"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"


class Transport(StrEnum):
    """The type of the numbers of a message, in both directions; see `protocol.transport`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class LearningRateSchedule(StrEnum):
    """How the server's learning rates change over the rounds."""

    CONSTANT = "constant"
    COSINE = "cosine"


class LocalOptimizer(StrEnum):
    """The optimizer of a client."""

    SGD = "sgd"
    ADAMW = "adamw"


class Dtype(StrEnum):
    """Compute dtype of the frozen backbone."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
