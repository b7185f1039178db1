"""The one tree of errors, divided by what the caller should do next.

    ArtifactStoreError
    ├── RejectedError            do not retry: the request itself is refused, and records nothing
    │   ├── InvalidRequestError        a field, id, path, cursor or position breaks a rule
    │   │   ├── InvalidPathError
    │   │   └── InvalidPositionError
    │   ├── UnauthenticatedError       the sender is unknown: get a token, or a new one
    │   ├── ForbiddenError             the sender lacks the right: ask an operator for it
    │   ├── UnknownRetentionClassError     also a ValueError
    │   ├── NotFoundError
    │   │   ├── PackageNotFoundError
    │   │   ├── FileNotFoundInRegistryError
    │   │   └── UploadNotFoundError
    │   ├── ConflictError
    │   │   ├── DuplicateRelativePathError
    │   │   ├── PathConflictError          a path would be both a file and a folder
    │   │   ├── IllegalPackageStateError
    │   │   │   ├── AnswerExpiredError     look in the log: an earlier attempt may be recorded, its answer is not kept
    │   │   │   └── PackageAbandonedError  the package stayed open for too long: create another one
    │   │   ├── SequenceBeyondLogError     the package has no event with the sequence that a read was to wait for
    │   │   ├── PackageQuarantinedError    the log contradicts the package's history: nothing is added to it
    │   │   └── UploadOffsetError          ask for the upload's offset, and continue from there
    │   ├── ContentMismatchError       the bytes are not what was declared
    │   ├── ChecksumMismatchError      a piece of an upload was damaged in transit: send the piece again
    │   ├── UnknownContentError        bytes that were only named are not stored here
    │   ├── InvalidArchiveError        an archive is malformed, or has an entry that no package can hold
    │   ├── CommandReusedError         a command id was reused with another request
    │   ├── TooLargeError              a limit is exceeded
    │   └── RangeNotSatisfiableError
    ├── PushBackError            retry later, after `retry_after` seconds: the system cannot take more now
    │   ├── LogLostError               the log lost acknowledged events: an operator has to decide
    │   └── UploadBusyError            another request adds to the upload
    ├── UnavailableError         retry, perhaps elsewhere: a part cannot be reached; the outcome may be unknown
    │   └── WaitTimeoutError           the view did not reach the sequence in time
    ├── CorruptError             stop: what was read breaks an invariant
    │   ├── BadRecordError             a record in the log is not an event; an operator has to confirm it
    │   ├── PackageParkedError         the view stopped following a package; an operator has to mend it
    │   └── LogIdentityError           a position, checkpoint or state belongs to another log
    └── ConfigurationError       mend the settings; the text says how

Each class has an HTTP status, a problem type (RFC 9457, the last part of a stable URN) and an exit code of the command
line; by default those of its base class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ArtifactStoreError(Exception):
    """Root of every error that this project raises on purpose.

    The text says what is wrong and, if possible, what mends it. It never contains a secret. `facts` are for programs:
    further members of the problem document, by their names in `documents.problem_details.Problem`.
    """

    status: ClassVar[int] = 500
    problem: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init_subclass__(
        cls, problem: str | None = None, status: int | None = None, exit_code: int | None = None
    ) -> None:
        """Arguments of the class statement; those that are not given are inherited."""
        super().__init_subclass__()
        if problem is not None:
            cls.problem = problem
        if status is not None:
            cls.status = status
        if exit_code is not None:
            cls.exit_code = exit_code

    def __init__(self, *args: object, facts: Mapping[str, str | int] | None = None) -> None:
        super().__init__(*args)
        self.facts: Mapping[str, str | int] = facts or {}

    @property
    def detail(self) -> str:
        """The text for people."""
        return str(self.args[0]) if self.args else self.__class__.__name__


class RejectedError(ArtifactStoreError, problem="rejected", status=422):
    """The request is refused for good, and records nothing."""


class InvalidRequestError(RejectedError, ValueError, problem="invalid-request", status=400):
    """A field, identifier, cursor or header breaks a rule that the text names."""


class InvalidPathError(InvalidRequestError, problem="invalid-path"):
    """A relative path breaks a rule that the text names."""


class InvalidPositionError(InvalidRequestError, problem="invalid-position"):
    """A log position cannot be read."""


class UnauthenticatedError(RejectedError, problem="unauthenticated", status=401):
    """The request carries no token, or one that is not accepted. The text never holds the token.

    `code` is the error code of RFC 6750 §3.1, None when there was no token at all.
    """

    def __init__(self, detail: str, code: str | None = None) -> None:
        super().__init__(detail)
        self.code = code

    @property
    def challenge(self) -> str:
        """The value of `WWW-Authenticate` (RFC 6750 §3)."""
        return bearer_challenge(self.code, self.detail)


class ForbiddenError(RejectedError, problem="forbidden", status=403):
    """The principal is known and lacks the right. The text names the right."""

    @property
    def challenge(self) -> str:
        """The value of `WWW-Authenticate` (RFC 6750 §3)."""
        return bearer_challenge("insufficient_scope", self.detail)


def bearer_challenge(code: str | None, detail: str) -> str:
    """A `Bearer` challenge. Without a `code` it says only that a token is needed (RFC 6750 §3.1)."""
    realm = 'Bearer realm="artifact-store"'
    if code is None:
        return realm
    plain = "".join(c if " " <= c <= "~" and c not in '"\\' else "'" for c in detail)
    return f'{realm}, error="{code}", error_description="{plain}"'


class UnknownRetentionClassError(RejectedError, ValueError, problem="unknown-retention-class"):
    """The retention class is not one of the seeded ones."""


class NotFoundError(RejectedError, problem="not-found", status=404):
    """The requested thing does not exist."""


class PackageNotFoundError(NotFoundError, problem="package-not-found"):
    """No such package."""


class FileNotFoundInRegistryError(NotFoundError, problem="file-not-found"):
    """No such file in the registry."""


class UploadNotFoundError(NotFoundError, problem="upload-not-found"):
    """No such upload: it never existed, has expired, was ended, or its bytes were refused."""


class ConflictError(RejectedError, problem="conflict", status=409):
    """The request does not fit the state of the package."""


class DuplicateRelativePathError(ConflictError, problem="duplicate-relative-path"):
    """The package already has a file with this relative path."""


class PathConflictError(ConflictError, problem="path-conflict"):
    """The file's path is a folder of another file of the package, or lies below another file."""


class IllegalPackageStateError(ConflictError, problem="illegal-package-state"):
    """The package is not in the state that the request needs."""


class AnswerExpiredError(IllegalPackageStateError, problem="answer-expired"):
    """The package's answers are no longer kept. Its events show whether an earlier attempt was recorded.

    `facts` names the package, when it was finalized (µs since 1970) and its manifest.
    """


class PackageAbandonedError(IllegalPackageStateError, problem="package-abandoned"):
    """The package was left open for so long after its last event that it takes no more commands.

    Repeats get no answer either: the package's events show whether a command was recorded. `facts` names the package.
    """


class SequenceBeyondLogError(ConflictError, problem="sequence-beyond-log"):
    """A read asked to wait for an event that the log does not hold. Waiting would not help."""


class PackageQuarantinedError(ConflictError, problem="package-quarantined"):
    """The log holds an event that contradicts the package's history. Nothing is added to it; publish another one."""


class UploadOffsetError(ConflictError, problem="upload-offset"):
    """The upload is at another offset than the request names."""


class ContentMismatchError(RejectedError, problem="content-mismatch"):
    """The bytes that arrived are not those that were declared."""


class ChecksumMismatchError(RejectedError, problem="checksum-mismatch", status=460):
    """The bytes of one request do not match its `Upload-Checksum`. The upload has not moved (tus 1.0, "Checksum")."""


class UnknownContentError(RejectedError, problem="unknown-content"):
    """Bytes named by their digest are not stored here, or not completely. Send them."""


class InvalidArchiveError(RejectedError, problem="invalid-archive"):
    """An archive is malformed or cut off, or has an entry that no package can hold; the text names it."""


class CommandReusedError(RejectedError, problem="command-reused"):
    """The command id (`Idempotency-Key`) was used before with another request."""


class TooLargeError(RejectedError, problem="too-large", status=413):
    """A documented limit is exceeded."""


class RangeNotSatisfiableError(RejectedError, problem="range-not-satisfiable", status=416):
    """No byte of the requested range exists (RFC 9110 §15.5.17). `size` is the length of the whole, in bytes."""

    def __init__(self, detail: str, size: int) -> None:
        super().__init__(detail)
        self.size = size


class PushBackError(ArtifactStoreError, problem="push-back", status=503):
    """The system cannot take more now. Retry after `retry_after` seconds; nothing was recorded."""

    def __init__(self, detail: str, retry_after: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class LogLostError(PushBackError, problem="log-lost"):
    """The package's partition has lost acknowledged events. Nothing is appended until an operator decides."""

    def __init__(self, detail: str, retry_after: float = 60.0) -> None:
        super().__init__(detail, retry_after)


class UploadBusyError(PushBackError, problem="upload-busy", status=423):
    """Another request is adding to this upload, or did so a moment ago."""


class UnavailableError(ArtifactStoreError, problem="unavailable", status=503):
    """A part cannot be reached. Retry with the same command id, perhaps elsewhere: the outcome may be unknown."""

    retry_after: float = 1.0


class WaitTimeoutError(UnavailableError, problem="wait-timeout", status=504):
    """The view did not reach the requested sequence in time."""


class CorruptError(ArtifactStoreError, problem="corrupt"):
    """What was read breaks an invariant. Stop: nothing is skipped, and nothing is reset automatically."""


class BadRecordError(CorruptError, problem="bad-record"):
    """A record in the log is not an event. The text has its position, its digest and the command that skips it."""


class PackageParkedError(CorruptError, problem="package-parked"):
    """The view stopped at an event of the package that it cannot read or apply. An operator has to mend it."""


class LogIdentityError(CorruptError, problem="foreign-log", status=400):
    """A position, checkpoint or state file belongs to another log than the one in use."""


class ConfigurationError(ArtifactStoreError, problem="configuration", exit_code=2):
    """The settings cannot work. The text says what mends them."""
