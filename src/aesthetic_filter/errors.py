"""Every error this package raises on purpose, and the exit code the command line gives it.

::

    AestheticFilterError                exit 1   something went wrong while running
    ├── ShardError                      exit 1   a shard is missing, cut short or unreadable
    │   └── CutShortError                        it ends too early; what came before was read
    ├── ImageError                      exit 1   an image cannot be decoded
    ├── DownloadError                   exit 1   the hub did not give the file
    ├── StageError                      exit 1   a stage of the user's own failed
    ├── ClusterError                    exit 1   the Ray cluster cannot be reached, or used
    ├── UsageError                      exit 2   the request cannot be carried out as it was made
    │   ├── SourceError                          nothing there, or not a format known here
    │   ├── OutputError                          the output folder is taken, locked or unwritable
    │   ├── SelectionError                       a rule or a condition that makes no sense
    │   ├── PipelineError                        stages that do not fit together
    │   ├── HeadError                            not a head, or one that does not fit
    │   │   └── ChecksumError                    the file is not the one that was published
    │   ├── WeightsError                         not the vision tower of CLIP ViT-L/14
    │   └── MissingExtraError                    an optional dependency is not installed
    └── WrongEmbeddingsError            exit 4   the input is not what the head was trained on
        ├── WidthError                           vectors of another width
        ├── ForeignEmbeddingsError               the right width, another encoder (or text)
        └── SpaceError                           embeddings stamped with another embedding space

Exit code 3 is no error: a run finished, but left broken shards behind (``--keep-going``).
Exit code 130 is an interrupted run (Ctrl-C).

A message says what was wrong, where, and what to do next, in one or two lines: the command line
prints it as it is, without a traceback.
"""

from __future__ import annotations


class AestheticFilterError(Exception):
    """The root: catch this to catch everything the package raises on purpose."""

    exit_code = 1


class ShardError(AestheticFilterError):
    """One shard of the source cannot be read (to its end).

    Attributes:
        shard: the shard's name within the source.
        reason: what is wrong with it, in one line.
    """

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"{shard}: {reason}")
        self.shard = shard
        self.reason = reason

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, str]]:
        return type(self), (self.shard, self.reason)


class CutShortError(ShardError):
    """A shard ends too early; the rows before that were read and are good."""


class ImageError(AestheticFilterError):
    """An image cannot be decoded; the message is the same for the same kind of fault."""


class DownloadError(AestheticFilterError):
    """A file could not be fetched from the hub and is not in its cache."""


class StageError(AestheticFilterError):
    """A stage of the user's own raised an exception, or lost rows or columns."""


class ClusterError(AestheticFilterError):
    """The Ray cluster cannot be reached, or its machines lack what the work needs."""


class UsageError(AestheticFilterError):
    """The request cannot be carried out as it was made."""

    exit_code = 2


class SourceError(UsageError):
    """The source does not exist, is empty, or is in no format known here."""


class OutputError(UsageError):
    """The output folder holds something else, is in use, or cannot be written."""


class SelectionError(UsageError):
    """A selection rule that makes no sense, or a malformed ``where`` condition."""


class PipelineError(UsageError):
    """Stages that do not fit together: one needs what none before it gives."""


class HeadError(UsageError):
    """A file that is not an aesthetic head, or one that cannot be used as asked."""


class ChecksumError(HeadError):
    """A file whose sha256 is not the one that was published for it."""


class WeightsError(UsageError):
    """A file that does not hold the vision tower of CLIP ViT-L/14, or holds it damaged."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed.

    Attributes:
        install: the exact command that installs it.
    """

    def __init__(self, need: str, extra: str) -> None:
        self.need = need
        self.extra = extra
        self.install = f'pip install "aesthetic-filter[{extra}]"'
        super().__init__(f"{need}; install it with:  {self.install}")

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.need, self.extra)


class WrongEmbeddingsError(AestheticFilterError):
    """The vectors are not what the head was trained on."""

    exit_code = 4


class WidthError(WrongEmbeddingsError):
    """The vectors have another width than the head's."""


class ForeignEmbeddingsError(WrongEmbeddingsError):
    """The vectors have the right width but come from another encoder, or from text."""


class SpaceError(WrongEmbeddingsError):
    """The embeddings carry the stamp of another embedding space than the head's."""
