"""The one tree of errors, cut by what the caller should do next.

    ArtifactStoreError
    ├── RejectedError            do not retry: the request itself is refused, and records nothing
    │   ├── InvalidRequestError        a field, id, path, cursor or position breaks a rule
    │   │   ├── InvalidPathError
    │   │   └── InvalidPositionError
    │   ├── UnauthenticatedError       nobody the gateway knows: get a token, or a new one
    │   ├── ForbiddenError             somebody without the right: ask an operator for it
    │   ├── UnknownRetentionClassError     also a ValueError
    │   ├── NotFoundError
    │   │   ├── PackageNotFoundError
    │   │   ├── FileNotFoundInRegistryError
    │   │   └── UploadNotFoundError
    │   ├── ConflictError
    │   │   ├── DuplicateRelativePathError
    │   │   ├── PathConflictError          a path would be both a file and a folder
    │   │   ├── IllegalPackageStateError
    │   │   │   ├── AnswerExpiredError     look in the log: an earlier try may be recorded, its answer is not kept
    │   │   │   └── PackageAbandonedError  the package stayed open for too long: create another one
    │   │   ├── SequenceBeyondLogError     the package has no event of the number that a read was to wait for
    │   │   ├── PackageQuarantinedError    the log contradicts the package's history: nothing is added to it
    │   │   └── UploadOffsetError          ask where the upload stands, and go on from there
    │   ├── ContentMismatchError       the bytes are not what was declared
    │   ├── ChecksumMismatchError      a piece of an upload was damaged on its way: send the piece again
    │   ├── UnknownContentError        bytes that were only named are not stored here
    │   ├── InvalidArchiveError        an archive is malformed, or holds what no package can
    │   ├── CommandReusedError         a command id came back with another request
    │   ├── TooLargeError              a limit is exceeded
    │   └── RangeNotSatisfiableError
    ├── PushBackError            retry later, after `retry_after` seconds: the system cannot take more now
    │   ├── LogLostError               the log lacks what it had acknowledged: an operator has to decide
    │   └── UploadBusyError            another request adds to the upload
    ├── UnavailableError         retry, perhaps elsewhere: a part cannot be reached; the outcome may be unknown
    │   └── WaitTimeoutError           the view did not reach what was waited for
    ├── CorruptError             stop: what was read breaks an invariant
    │   ├── BadRecordError             the log holds a record that is no event; an operator has to confirm it
    │   ├── PackageParkedError         the view stopped following a package; an operator has to mend it
    │   └── LogIdentityError           a position, checkpoint or state belongs to another log
    └── ConfigurationError       mend the settings; the text says how

Each class carries its HTTP status, its problem type (RFC 9457, the last part of a stable URN) and the exit code of the
command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class ArtifactStoreError(Exception):
    """Root of every error that this project raises on purpose.

    The text says what is wrong and what mends it, where something does. It never holds a secret. `facts` are for
    programs: further members of the problem document, by their names in `documents.problem_details.Problem`.
    """

    status: ClassVar[int] = 500
    problem: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, *args: object, facts: Mapping[str, str | int] | None = None) -> None:
        super().__init__(*args)
        self.facts: Mapping[str, str | int] = facts or {}

    @property
    def detail(self) -> str:
        """The text for people."""
        return str(self.args[0]) if self.args else self.__class__.__name__


class RejectedError(ArtifactStoreError):
    """The request is refused for good, and records nothing."""

    status = 422
    problem = "rejected"


class InvalidRequestError(RejectedError, ValueError):
    """A field, identifier, cursor or header breaks a rule that the text names."""

    status = 400
    problem = "invalid-request"


class InvalidPathError(InvalidRequestError):
    """A relative path breaks a rule that the text names."""

    problem = "invalid-path"


class InvalidPositionError(InvalidRequestError):
    """A log position cannot be read."""

    problem = "invalid-position"


class UnauthenticatedError(RejectedError):
    """The request carries no token, or one that is not accepted. The text never holds the token.

    `code` is the error code of RFC 6750 §3.1, None when there was no token at all.
    """

    status = 401
    problem = "unauthenticated"

    def __init__(self, detail: str, code: str | None = None) -> None:
        super().__init__(detail)
        self.code = code

    @property
    def challenge(self) -> str:
        """The value of `WWW-Authenticate` (RFC 6750 §3)."""
        return bearer_challenge(self.code, self.detail)


class ForbiddenError(RejectedError):
    """The principal is known and lacks the right. The text names the right."""

    status = 403
    problem = "forbidden"

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


class UnknownRetentionClassError(RejectedError, ValueError):
    """The retention class is not one of the seeded ones."""

    problem = "unknown-retention-class"


class NotFoundError(RejectedError):
    """What was asked for does not exist."""

    status = 404
    problem = "not-found"


class PackageNotFoundError(NotFoundError):
    """No such package."""

    problem = "package-not-found"


class FileNotFoundInRegistryError(NotFoundError):
    """No such file in the registry."""

    problem = "file-not-found"


class UploadNotFoundError(NotFoundError):
    """No such upload: it never existed, has expired, was ended, or its bytes were refused."""

    problem = "upload-not-found"


class ConflictError(RejectedError):
    """The request does not fit the state of the package."""

    status = 409
    problem = "conflict"


class DuplicateRelativePathError(ConflictError):
    """The package holds a file of this relative path already."""

    problem = "duplicate-relative-path"


class PathConflictError(ConflictError):
    """The file's path is a folder of another file of the package, or lies below another file."""

    problem = "path-conflict"


class IllegalPackageStateError(ConflictError):
    """The package is not in the state that the request needs."""

    problem = "illegal-package-state"


class AnswerExpiredError(IllegalPackageStateError):
    """The package's answers are no longer kept. Its events show whether an earlier attempt was recorded.

    `facts` names the package, when it was finalized (µs since 1970) and its manifest.
    """

    problem = "answer-expired"


class PackageAbandonedError(IllegalPackageStateError):
    """The package was left open for so long after its last event that it takes no more commands.

    Repeats get no answer either: its events show whether a command was recorded. `facts` names the package.
    """

    problem = "package-abandoned"


class SequenceBeyondLogError(ConflictError):
    """A read asked to wait for an event that the log does not hold. Waiting would not help."""

    problem = "sequence-beyond-log"


class PackageQuarantinedError(ConflictError):
    """The log holds an event that contradicts the package's history. Nothing is added to it; publish another one."""

    problem = "package-quarantined"


class UploadOffsetError(ConflictError):
    """The upload stands at another offset than the request names."""

    problem = "upload-offset"


class ContentMismatchError(RejectedError):
    """The bytes that arrived are not those that were declared."""

    problem = "content-mismatch"


class ChecksumMismatchError(RejectedError):
    """The bytes of one request do not match its `Upload-Checksum`. The upload has not moved."""

    status = 460  # tus 1.0, "Checksum"
    problem = "checksum-mismatch"


class UnknownContentError(RejectedError):
    """Bytes named by their digest are not stored here, or not completely. Send them."""

    problem = "unknown-content"


class InvalidArchiveError(RejectedError):
    """An archive is malformed, cut off, or holds an entry that no package can; the text names it."""

    problem = "invalid-archive"


class CommandReusedError(RejectedError):
    """The command id (`Idempotency-Key`) was used before with another request."""

    problem = "command-reused"


class TooLargeError(RejectedError):
    """A documented limit is exceeded."""

    status = 413
    problem = "too-large"


class RangeNotSatisfiableError(RejectedError):
    """No byte of the requested range exists (RFC 9110 §15.5.17). `size` is the length of the whole, in bytes."""

    status = 416
    problem = "range-not-satisfiable"

    def __init__(self, detail: str, size: int) -> None:
        super().__init__(detail)
        self.size = size


class PushBackError(ArtifactStoreError):
    """The system cannot take more now. Retry after `retry_after` seconds; nothing was recorded."""

    status = 503
    problem = "push-back"

    def __init__(self, detail: str, retry_after: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class LogLostError(PushBackError):
    """The package's partition has lost acknowledged events. Nothing is appended until an operator decides."""

    problem = "log-lost"

    def __init__(self, detail: str, retry_after: float = 60.0) -> None:
        super().__init__(detail, retry_after)


class UploadBusyError(PushBackError):
    """Another request is adding to this upload, or did so a moment ago."""

    status = 423
    problem = "upload-busy"


class UnavailableError(ArtifactStoreError):
    """A part cannot be reached. Retry with the same command id, perhaps elsewhere: the outcome may be unknown."""

    status = 503
    problem = "unavailable"
    retry_after: float = 1.0


class WaitTimeoutError(UnavailableError):
    """The view did not reach the requested sequence in time."""

    status = 504
    problem = "wait-timeout"


class CorruptError(ArtifactStoreError):
    """What was read breaks an invariant. Stop: nothing is skipped, and nothing resets by itself."""

    problem = "corrupt"


class BadRecordError(CorruptError):
    """The log holds a record that is no event. The text names its place, its digest and the command that skips it."""

    problem = "bad-record"


class PackageParkedError(CorruptError):
    """The view stopped at an event of the package that it cannot read or apply. An operator has to mend it."""

    problem = "package-parked"


class LogIdentityError(CorruptError):
    """A position, checkpoint or state file belongs to another log than the one at hand."""

    status = 400
    problem = "foreign-log"


class ConfigurationError(ArtifactStoreError):
    """The settings cannot work. The text says what mends them."""

    problem = "configuration"
    exit_code = 2
