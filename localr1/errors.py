"""The one error tree. Every error that bad input can cause says three things: what was expected,
what was found, and what to do about it.

    LocalR1Error                 exit code 1
    ├── UsageError               exit code 2  an argument or option that cannot mean anything
    ├── NotFoundError            exit code 4  a model, file or revision that is not there
    │   └── AccessError                       there, but not for this user: gated, private
    ├── HubError                              the Hub sent what it must not
    │   └── UnreachableError                  no answer, or none of use: trying again may help
    ├── CheckpointError                       bytes of a checkpoint that cannot be trusted
    │   ├── FormatError                       malformed safetensors, GGUF or JSON
    │   ├── TruncatedError                    a file shorter than its own header says
    │   └── TensorError                       a tensor missing, duplicated or of the wrong shape
    ├── ConfigError                           config.json: a value that makes no model
    ├── UnsupportedError                      well formed, but not honoured: named, never ignored
    ├── TokenizerError
    ├── TemplateError
    ├── ContextError                          the conversation does not fit the context window
    ├── NumericsError                         NaN or Inf where a number must be
    ├── OutputError                           a result that could not be written; its name is free
    ├── MemoryLimitError         exit code 3  does not fit this machine
    └── KernelError                           the native module is missing or refused its arguments
        └── DeviceError                       a graphics card failed while it was used

`assert` is for our own mistakes only.
"""


class LocalR1Error(Exception):
    """Base of all errors shown to a user as one sentence.

    what: the subject and the failure, e.g. "model.safetensors: header is not valid JSON".
    expected, found: short phrases, quoted in the message when given.
    fix: what the user can do, a full sentence.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.expected = expected
        self.found = found
        self.fix = fix
        message = what
        if expected is not None and found is not None:
            message += f": expected {expected}, found {found}"
        elif expected is not None:
            message += f": expected {expected}"
        elif found is not None:
            message += f": found {found}"
        if fix is not None:
            message += ("" if message.endswith((".", "!", "?")) else ".") + f" {fix}"
        super().__init__(message)


class UsageError(LocalR1Error):
    exit_code = 2


class NotFoundError(LocalR1Error):
    exit_code = 4


class AccessError(NotFoundError):
    pass


class HubError(LocalR1Error):
    pass


class UnreachableError(HubError):
    pass


class CheckpointError(LocalR1Error):
    pass


class FormatError(CheckpointError):
    pass


class TruncatedError(CheckpointError):
    pass


class TensorError(CheckpointError):
    pass


class ConfigError(LocalR1Error):
    pass


class UnsupportedError(LocalR1Error):
    pass


class TokenizerError(LocalR1Error):
    pass


class TemplateError(LocalR1Error):
    pass


class ContextError(LocalR1Error):
    pass


class NumericsError(LocalR1Error):
    pass


class OutputError(LocalR1Error):
    pass


class MemoryLimitError(LocalR1Error):
    exit_code = 3


class KernelError(LocalR1Error):
    pass


class DeviceError(KernelError):
    pass
